"""The search for a method's settings: trials drawn at random, each a whole training, compared by the validation score alone.

A trial is a run folder up to the stage `train`, ``OUT/trials/<hash of its settings>``; the test is never read. Ray Tune draws the
trials from the seed and runs as many at once as there are GPUs, or CPUs for. The same seed draws the same trials, so the same
command finds its finished ones in their folders and goes on, and one that asks for more trials adds to them. The first trial is
the method's own default.

No trial is stopped because another one is ahead (ASHA, medians). The learning rate falls to 0 over the epochs, and recall rises
most while it falls: half-way, a trial of a high rate looks bad that is best at the end, so a comparison in between would favour
low rates. A trial ends early by its own patience alone, as the training of `graphhash run` does, and the winner repeats there.

    OUT/best.toml     the settings of the best trial, whole: graphhash run --config OUT/best.toml --out DIR
    OUT/trials.csv    a line per trial, best first
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config.run_config import HOPS, RunConfig, parse_override
from pipeline.errors import ConfigError, TuneError
from pipeline.progress import silenced
from pipeline.runs.remote import run_folder
from pipeline.runs.run import is_done, run
from pipeline.runs.tasks import task_of
from pipeline.storage.atomic import write_text_atomic
from pipeline.storage.uris import localised
from pipeline.sweeps.compare import explain, share_out
from pipeline.tracking import tracker as tracking

_log = logging.getLogger(__name__)

# Sections whose settings a search may choose; the others say what is measured, and where.
SECTIONS = ("cluster", "map", "train")
NO_SETTINGS = ("train.seed", "train.eval_users", "map.seed", "cluster.threads", "cluster.shards", "cluster.levels")
# Around a default learning rate, in both directions.
LR_FACTOR = 4.0
DECAYS = {"retrieval": (1e-4, 0.2), "ctr": (0.1, 100.0)}


def score_key(base: RunConfig) -> str:
    """What trials are compared by: the score of the task on the validation rows, in the facts of a training."""
    return f"validation_{task_of(base).score}"


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included: whole ones, or by logarithm where both are above 0, else evenly."""

    low: float
    high: float
    whole: bool = False

    def domain(self) -> Any:
        """As Ray Tune has it."""
        from ray import tune

        if self.whole:
            return tune.randint(int(self.low), int(self.high) + 1)
        return tune.loguniform(self.low, self.high) if self.low > 0 else tune.uniform(self.low, self.high)


Space = dict[str, Range | tuple[Any, ...]]


def parse_space(text: str) -> tuple[str, Range | tuple[Any, ...]]:
    """`train.lr=0.01..0.1` -> ("train.lr", Range(0.01, 0.1)); `map.hops=1,2` -> ("map.hops", ("1", "2")).

    Raises:
        ConfigError: no such setting, one that a search must not choose, or values that it does not take.
    """
    key, separator, values = text.partition("=")
    key = key.strip()
    if not separator or not values.strip():
        raise ConfigError(
            f"{text!r} is no space; write section.key=a,b,c or section.key=low..high, such as train.lr=0.01..0.1"
        )
    ends = [part.strip() for part in values.split("..")]
    if len(ends) == 1:
        choices = tuple(parse_override(f"{key}={part}")[1] for part in values.split(","))
        _check_key(key)
        return key, choices
    if len(ends) != 2:
        raise ConfigError(f"{text!r} has more than two ends; write section.key=low..high")
    (_, low), (_, high) = (parse_override(f"{key}={end}") for end in ends)
    _check_key(key)
    if isinstance(low, bool) or not all(isinstance(end, (int, float)) for end in (low, high)):
        raise ConfigError(f"{key} is no number and has no range; write its values as {key}=a,b,c")
    if not low < high:
        raise ConfigError(f"{text!r} is empty: {low:g} is not below {high:g}")
    # A key of whole numbers has read both ends as such.
    return key, Range(low, high, whole=isinstance(low, int) and isinstance(high, int))


def default_space(base: RunConfig) -> Space:
    """What is searched unless told otherwise: learning rate, decay, and the hops of soft methods."""
    from pipeline.maps.methods import METHODS

    (name,) = base.run.methods
    method = METHODS[name]
    space: Space = {
        key: Range(value / LR_FACTOR, value * LR_FACTOR) if key == "train.lr" else Range(*DECAYS[base.run.task])
        for key, value in task_of(base).defaults(base, name).items()
    }
    if method.free_lookups:
        space["map.hops"] = ("auto", *HOPS)
    return space


def tune(
    base: RunConfig,
    space: Space,
    n_trials: int,
    *,
    seed: int,
    jobs: int | None = None,
) -> dict[str, Any]:
    """Run the trials that are not finished, and write `best.toml` and `trials.csv`.

    Args:
        base: the settings that all trials share, of one method; `run.out` is the folder of the search.
        space: settings to choose, by dotted key.
        seed: of the draws.
        jobs: trials at once; None: as many as the CPUs and GPUs allow.

    Returns: ``trials``, best first (settings, the task's validation score, or None with a ``reason``), ``best`` (its path) and
        ``mlflow_run_id``.

    Raises:
        DataError, ConfigError, RunFolderError, TrackingError: what concerns all trials, each with one line for the user.
        TuneError: every trial failed.
    """
    out, score = Path(base.run.out), score_key(base)
    if not base.data.validation:
        raise ConfigError("data.validation=0.0 leaves nothing to compare trials by; give a share above 0")
    given, base = base, RunConfig.from_flat(localised(base).flat() | {"run.remote": None})
    with ExitStack() as stack:
        stack.enter_context(run_folder(given))
        from pipeline.distributed.session import check_shared, ray_session

        stack.enter_context(ray_session(base.run.address))
        check_shared(out)
        # The log is split once. Clusters are a trial's own affair: a budget in bytes gives rows by what its maps take.
        log = RunConfig.from_flat(base.flat() | {"run.out": str(out / "log")})
        run(log, until="ingest")
        store = tracking.connect(base.run.experiment, out) if base.run.mlflow else None
        earlier = _read_state(out)
        params = base.flat() | {f"space.{key}": _in_words(values) for key, values in space.items()}
        tracker, nested = stack.enter_context(tracking.parent_run(store, "tune", params, run_id=earlier))
        run_id = tracker.run_id or earlier
        write_text_atomic(out / "tune.json", json.dumps({"mlflow_run_id": run_id}) + "\n")
        trials = _search(base, space, n_trials, seed, jobs, nested)
        trials.sort(key=lambda trial: -math.inf if trial[score] is None else trial[score], reverse=True)
        write_text_atomic(out / "trials.csv", _csv(trials, space, score))
        best = trials[0]
        if best[score] is None:
            raise TuneError(f"none of {len(trials)} trials came to an end, the first because: {best['reason']}")
        write_text_atomic(out / "best.toml", best_config(given, best, space).to_toml())
        n_failed = sum(trial[score] is None for trial in trials)
        tracker.log_metrics({score: best[score], "n_trials": len(trials), "n_failed": n_failed})
        for name in ("best.toml", "trials.csv"):
            tracker.log_artifact(out / name)
    return {"trials": trials, "best": str(out / "best.toml"), "mlflow_run_id": run_id}


def best_config(base: RunConfig, trial: Mapping[str, Any], space: Space) -> RunConfig:
    """All settings of a trial, for any folder."""
    return RunConfig.from_flat(base.flat() | {"run.remote": None} | {key: trial[key] for key in space})


def trial_config(base: RunConfig, chosen: Mapping[str, Any]) -> RunConfig:
    """The configuration of a trial's run folder, which is named after the settings that were chosen."""
    digest = hashlib.sha256(json.dumps(dict(chosen), sort_keys=True).encode()).hexdigest()[:12]
    settings = base.flat() | dict(chosen) | {"run.out": str(Path(base.run.out) / "trials" / digest)}
    # A trial has CPUs of its own, and nothing to wait for in tasks that want more.
    return RunConfig.from_flat(settings | {"cluster.shards": 0})


def run_trial(
    chosen: Mapping[str, Any],
    base: RunConfig,
    store: tracking.Store | None,
    on_entry: Callable[[dict[str, Any]], None] = lambda entry: None,
) -> dict[str, Any]:
    """Train with the settings chosen, in this process, or take the result from an earlier command.

    Returns: the task's validation score (None if training failed, with its ``reason``), ``best_epoch``, ``epochs``, ``seconds``,
        ``run`` (the folder) and ``finished_before``.
    """
    from graphhash.errors import DataError
    from pipeline.training.workers import fit_here

    trial, score = trial_config(base, chosen), score_key(base)
    facts: dict[str, Any] = {"run": f"trials/{Path(trial.run.out).name}", "finished_before": is_done(trial, "train")}
    lenders = [Path(base.run.out) / "log"]
    try:
        fit_job = partial(fit_here, on_entry=on_entry)
        with silenced():
            (metrics,) = run(trial, until="train", store=store, lenders=lenders, fit_job=fit_job).metrics
    except (DataError, ConfigError) as error:
        # Settings that do not train, or do not go together, are a bad trial and no failure of the search.
        return facts | {score: None, "reason": explain(error)}
    if store is not None and not facts["finished_before"]:
        store.tracker(metrics["mlflow_run_id"]).rename(facts["run"])
    kept = {key: metrics[key] for key in (score, "best_epoch", "epochs")}
    return facts | kept | {"seconds": metrics["seconds"]["train"], "mlflow_run_id": metrics.get("mlflow_run_id")}


def _search(
    base: RunConfig,
    space: Space,
    n_trials: int,
    seed: int,
    jobs: int | None,
    store: tracking.Store | None,
) -> list[dict[str, Any]]:
    """All trials, in the order in which they were drawn."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    from ray import tune as ray_tune
    from ray.tune.search.basic_variant import BasicVariantGenerator

    n_jobs, resources = share_out(n_trials, jobs)
    names = {"num_cpus": "cpu", "num_gpus": "gpu"}
    trainable = ray_tune.with_resources(
        ray_tune.with_parameters(_trainable, base=base, store=store), {names[key]: n for key, n in resources.items()}
    )
    storage = Path(base.run.out).absolute() / "ray"
    tuner = ray_tune.Tuner(
        trainable,
        param_space={key: v.domain() if isinstance(v, Range) else ray_tune.choice(v) for key, v in space.items()},
        tune_config=ray_tune.TuneConfig(
            num_samples=n_trials,
            # To start a process for every trial takes longer than a short training.
            reuse_actors=True,
            search_alg=BasicVariantGenerator(
                points_to_evaluate=[default_point(base, space)], max_concurrent=n_jobs, random_state=seed
            ),
        ),
        run_config=ray_tune.RunConfig(
            name="tune", storage_path=str(storage), verbose=0, callbacks=[_progress(n_trials, score_key(base))]
        ),
    )
    try:
        # Tune prints what it is about to do, however quiet it is asked to be.
        with redirect_stdout(io.StringIO()):
            results = tuner.fit()
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    trials = []
    for result in results:
        # A trial that ended with an error of another kind than run_trial expects has reported no outcome.
        outcome = (result.metrics or {}).get("outcome") or {score_key(base): None, "reason": _reason(result.error)}
        trials.append({**{key: result.config[key] for key in space}, **outcome} if result.config else outcome)
    return trials


def default_point(base: RunConfig, space: Space) -> dict[str, Any]:
    """The method's own defaults, as far as the space has them; what it has not is left to chance."""
    from pipeline.maps.methods import METHODS

    (name,) = base.run.methods
    given = {key: value for key, value in base.flat().items() if value is not None}
    known = base.flat() | task_of(base).defaults(base, name) | given
    if base.cluster.budget[0] != "ratio":
        # Under a budget of bytes it depends on the graph.
        known["map.indices_per_id"] = METHODS[name].lookups(base.map.indices_per_id)
    inside = {}
    for key, values in space.items():
        value = known[key]
        held = (
            value is not None and values.low <= value <= values.high if isinstance(values, Range) else value in values
        )
        if held:
            inside[key] = value
    return inside


def _trainable(chosen: dict[str, Any], base: RunConfig, store: tracking.Store | None) -> None:
    """What a trial of Ray Tune does in its process."""
    from ray import tune as ray_tune

    score = task_of(base).score

    def on_entry(entry: dict[str, Any]) -> None:
        ray_tune.report({"epoch": entry["epoch"], score: entry.get(score)})

    ray_tune.report({"outcome": run_trial(chosen, base, store, on_entry)})


def _progress(n_trials: int, key: str) -> Any:
    """Logs the result of every trial."""
    from ray.tune import Callback

    class Progress(Callback):
        n_ended = 0

        def on_trial_complete(self, iteration, trials, trial, **info):
            self._report(trial, (trial.last_result or {}).get("outcome") or {})

        def on_trial_error(self, iteration, trials, trial, **info):
            self._report(trial, {"reason": "its process ended with an error"})

        def _report(self, trial, outcome):
            self.n_ended += 1
            chosen = " ".join(f"{key}={_in_words((value,))}" for key, value in trial.config.items())
            score = outcome.get(key)
            words = f"failed: {outcome.get('reason')}" if score is None else f"{key.replace('_', ' ', 1)} {score:.4f}"
            before = ", as before" if outcome.get("finished_before") else ""
            _log.info("[%d/%d] %s: %s%s", self.n_ended, n_trials, chosen, words, before)

    return Progress()


def _reason(error: BaseException | None) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no outcome"


def _check_key(key: str) -> None:
    if key.split(".")[0] not in SECTIONS or key in NO_SETTINGS:
        raise ConfigError(
            f"{key} cannot be searched: it changes what is measured, or nothing; sections are {', '.join(SECTIONS)}"
        )


def _in_words(values: Range | Sequence[Any]) -> str:
    if isinstance(values, Range):
        return f"{values.low:.4g}..{values.high:.4g}"
    return ",".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values)


def _read_state(out: Path) -> str | None:
    try:
        return json.loads((out / "tune.json").read_text(encoding="utf-8"))["mlflow_run_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _csv(trials: Sequence[Mapping[str, Any]], space: Space, score: str) -> str:
    text = io.StringIO()
    columns = [score, *space, "best_epoch", "epochs", "seconds", "run", "reason"]
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(trials)
    return text.getvalue()


def table(
    trials: Sequence[Mapping[str, Any]], space: Space, score: str
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and lines to print, in the order of the trials; `score` is what :func:`score_key` says."""

    def text(value: Any, spec: str) -> str:
        return "-" if value is None else format(value, spec)

    header = ("trial", *(key.split(".")[1] for key in space), score.partition("_")[2], "best epoch", "train s", "")
    return header, [
        (
            Path(trial.get("run", "-")).name,
            *(_in_words((trial.get(key),)) for key in space),
            text(trial[score], ".4f"),
            text(trial.get("best_epoch"), "d"),
            text(trial.get("seconds"), ".0f"),
            trial.get("reason") or "",
        )
        for trial in trials
    ]
