"""The search for a method's settings: trials chosen by Optuna, each a whole training, compared by the validation score alone.

A trial is a run up to the stage `train` in the folder ``OUT/trials/<hash of its settings>`` (`pipeline.sweeps.scheduler`); the test is
never read. The first trial has the method's defaults. Trials that finished are kept, so the same command goes on where it was
stopped, and one that asks for more trials adds to them.

No trial is stopped because another one is ahead (ASHA, medians). The learning rate falls to 0 over the epochs, and recall rises most
while it falls: half-way, a trial of a high rate looks bad that is best at the end. A trial ends early by its own patience alone, as the
training of `graphhash run` does, and the winner repeats there.

    OUT/best.toml     all settings of the best trial: graphhash run --config OUT/best.toml --out DIR
    OUT/trials.csv    a line per trial, best first
    OUT/tune.json     the settings of all trials chosen so far, sampler, seed and space, and the id of the MLflow run
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config.run_config import RunConfig
from pipeline.errors import ConfigError, TuneError
from pipeline.runs.remote import run_folder
from pipeline.runs.run import run
from pipeline.runs.tasks import task_of
from pipeline.runs.tracked import log_dataset, run_name
from pipeline.storage.atomic import write_text_atomic
from pipeline.storage.uris import localised
from pipeline.sweeps.scheduler import (
    LocalPool,
    Pool,
    RayPool,
    Result,
    RunSpec,
    finished,
    one_line,
    schedule,
    sweep_session,
)
from pipeline.sweeps.space import Space, default_point, in_words
from pipeline.sweeps.study import SearchRecord, Study
from pipeline.sweeps.trials import Trial, best_first, to_csv
from pipeline.tracking.mlflow_runs import parent_run
from pipeline.tracking.store import connect

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchSettings:
    """Space, sampler and size of a search.

    Args:
        space: settings to choose, by dotted key.
        n_trials: number of trials, those of earlier commands included.
        seed: of the draws.
        sampler: one of `pipeline.sweeps.study.SAMPLERS`.
    """

    space: Space
    n_trials: int
    seed: int
    sampler: str = "random"

    def chosen_by(self, base: RunConfig) -> dict[str, Any]:
        """Everything that determines the settings of the trials, scores aside."""
        space = {key: str(values) for key, values in self.space.items()}
        return {
            "space": space,
            "seed": self.seed,
            "sampler": self.sampler,
            "first": default_point(base, self.space),
        }


def score_key(base: RunConfig) -> str:
    """The key of the validation score in the facts of a training, by which trials are compared."""
    return f"validation_{task_of(base).validation_metric}"


def tune(base: RunConfig, search: SearchSettings, *, jobs: int | None = None) -> dict[str, Any]:
    """Run the trials that are not finished, and write `best.toml` and `trials.csv`.

    Args:
        base: the settings that all trials share, of one method; `run.out` is the folder of the search.
        jobs: trials at once; None: as many as the CPUs and GPUs allow.

    Returns: ``trials``, best first, as `Trial.facts` has them; ``best`` (the path of its settings) and ``mlflow_run_id``.

    Raises:
        DataError, ConfigError, RunFolderError, TrackingError: what concerns all trials, each with one line for the user.
        TuneError: every trial failed.
    """
    out, score = Path(base.run.out), score_key(base)
    if not base.data.has_validation:
        raise ConfigError("data.validation=0.0 leaves nothing to compare trials by; give a share above 0")
    requested, base = base, RunConfig.from_flat(localised(base).flat() | {"run.remote": None})
    with ExitStack() as stack:
        folder = stack.enter_context(run_folder(requested))
        on_ray = stack.enter_context(sweep_session(base, search.n_trials, jobs))
        # The log is split once. Each trial clusters: a budget in bytes gives rows by the size of the bucket maps.
        read = run(RunConfig.from_flat(base.flat() | {"run.out": str(out / "log")}), until="ingest")
        record = SearchRecord.read(out / "tune.json", search.chosen_by(base))
        store = connect(base.run.experiment, out) if base.run.mlflow else None
        params = requested.flat() | {f"space.{key}": in_words(values) for key, values in search.space.items()}
        name = f"tune {run_name(base, base.run.methods[0])}"
        tracker, nested = stack.enter_context(parent_run(store, name, params, run_id=record.mlflow_run_id))
        log_dataset(tracker, base, read.ingest)
        record.mlflow_run_id = tracker.run_id or record.mlflow_run_id
        record.write()

        def on_trial(trial: Trial) -> None:
            metrics = trial.result.metrics
            if nested is not None and metrics is not None and not trial.result.finished_before:
                tracker.of(metrics["mlflow_run_id"]).rename(trial.run)
            folder.on_stage()

        pool = RayPool(search.n_trials, jobs, nested) if on_ray else LocalPool(nested)
        trials = best_first(run_trials(base, search, record, pool, on_trial))
        write_text_atomic(out / "trials.csv", to_csv(trials, search.space, score))
        best = trials[0]
        if best.score is None:
            raise TuneError(f"none of {len(trials)} trials came to an end, the first because: {best.result.reason}")
        write_text_atomic(out / "best.toml", best_config(requested, best).to_toml())
        n_failed = sum(trial.score is None for trial in trials)
        tracker.log_metrics({score: best.score, "n_trials": len(trials), "n_failed": n_failed})
        for name in ("best.toml", "trials.csv"):
            tracker.log_artifact(out / name)
    return {
        "trials": [trial.facts() for trial in trials],
        "best": str(out / "best.toml"),
        "mlflow_run_id": record.mlflow_run_id,
    }


def run_trials(
    base: RunConfig, search: SearchSettings, record: SearchRecord, pool: Pool, on_trial: Callable[[Trial], None]
) -> list[Trial]:
    """Run all trials of a search that are not finished.

    Args:
        record: settings chosen by an earlier command; those chosen here are added.
        on_trial: told of each as it ends.

    Returns: the trials, in the order in which they were chosen.
    """
    study = Study(
        search.space,
        sampler=search.sampler,
        seed=search.seed,
        first=default_point(base, search.space),
        recorded=record.trials,
    )
    ended: dict[int, Trial] = {}
    # Numbers of the trials that wait for a run. Settings that are chosen twice are trained once.
    waiting: dict[str, list[int]] = {}

    def end(number: int, result: Result) -> None:
        settings = study.settings[number]
        trial = Trial(settings, trial_name(settings), result, score_key(base))
        study.tell(number, trial.score)
        ended[number] = trial
        _log.info("[%d/%d] %s", len(ended), search.n_trials, _in_words(trial))
        on_trial(trial)

    def specs() -> Iterator[RunSpec]:
        for _ in range(search.n_trials):
            number = study.ask()
            record.add(number, study.settings[number])
            try:
                spec = trial_spec(base, study.settings[number])
            except ConfigError as error:
                # Settings that contradict each other are a bad trial and no failure of the search.
                end(number, Result(reason=one_line(error)))
                continue
            if spec.name in waiting:
                waiting[spec.name].append(number)
            elif (result := finished(spec)) is not None:
                end(number, result)
            else:
                waiting[spec.name] = [number]
                yield spec

    for spec, result in schedule(specs(), pool):
        first, *others = waiting.pop(spec.name)
        end(first, result)
        for number in others:
            end(number, replace(result, finished_before=result.reason is None))
    return [ended[number] for number in range(search.n_trials)]


def trial_name(chosen: Mapping[str, Any]) -> str:
    """The folder of a trial, relative to that of the search: a hash of the settings that were chosen."""
    return f"trials/{hashlib.sha256(json.dumps(dict(chosen), sort_keys=True).encode()).hexdigest()[:12]}"


def trial_spec(base: RunConfig, chosen: Mapping[str, Any]) -> RunSpec:
    """The run of a trial.

    Raises:
        ConfigError: the settings contradict each other.
    """
    name, out = trial_name(chosen), Path(base.run.out)
    # A trial is compared by its validation score, which a refit has none of.
    own = {"run.out": str(out / name), "cluster.shards": 0, "train.refit": bool(base.train.refit)}
    # The task of a trial holds its CPUs, so it cannot wait for further tasks that need some.
    config = RunConfig.from_flat(base.flat() | dict(chosen) | own)
    return RunSpec(name, name, config, until="train", reuse_from=(out / "log",))


def best_config(base: RunConfig, trial: Trial) -> RunConfig:
    """All settings of a trial, for any folder."""
    return RunConfig.from_flat(base.flat() | {"run.remote": None} | dict(trial.settings))


def _in_words(trial: Trial) -> str:
    chosen = " ".join(f"{key}={in_words((value,))}" for key, value in trial.settings.items())
    if trial.score is None:
        return f"{chosen}: failed: {trial.result.reason}"
    before = ", as before" if trial.result.finished_before else ""
    return f"{chosen}: {trial.score_key.replace('_', ' ', 1)} {trial.score:.4f}{before}"
