"""The comparison: every method with every model, seed and budget, each a run folder of its own, finished ones kept.

A cell is one training with its test. It lives in ``OUT/runs/<name>`` as `graphhash evaluate` leaves it there, so the stage
records say what is finished, and the same command goes on where it was killed. Cells of one seed read the same ingested log, and
those of one seed and size the same clusters: the first makes them, the others take them over.

A budget in bytes is every method's own: a method whose maps are smaller gets more rows. `full` depends on no budget and is
trained once per model and seed.

A cell is trained and tested by a Ray task, as many at once as there are GPUs, or CPUs for. One that fails is set down with its
reason, and the others go on.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.run_config import BUDGET_KEYS, RunConfig, parse_override
from pipeline.errors import ConfigError
from pipeline.progress import prefixed, silenced
from pipeline.runs.plan import check_methods
from pipeline.runs.remote import run_folder
from pipeline.runs.run import is_done, run
from pipeline.runs.tasks import TASKS, Task, task_of
from pipeline.storage.atomic import write_text_atomic
from pipeline.storage.uris import localised
from pipeline.sweeps.table import Outcome, write_comparison
from pipeline.tracking import tracker as tracking

_log = logging.getLogger(__name__)

# What a comparison calls a model -> the model and its loss.
MODELS = TASKS["retrieval"].models
FULL = "full"
# `full` reads no communities, so the stage before it is kept short.
ANY_CLUSTERS = {"cluster.resolution": 1.0, "cluster.method": "louvain", "cluster.max_size": None, "cluster.levels": ()}
# More of them hardly make one training faster.
CPUS_OF_A_TRAINING = 4


@dataclass(frozen=True)
class Budget:
    """How far to compress: a kind of `ClusterConfig.budget`, with its value."""

    kind: str
    value: Any

    @property
    def settings(self) -> dict[str, Any]:
        if self.kind == "side_rows":
            return dict(zip(("cluster.user_rows", "cluster.item_rows"), self.value, strict=True))
        return {f"cluster.{self.kind}": self.value}

    def __str__(self) -> str:
        values = self.value if isinstance(self.value, tuple) else (self.value,)
        return f"{self.kind} " + "+".join(f"{value:.10g}" for value in values)


@dataclass(frozen=True)
class Cell:
    """One training of the comparison; the budget is None for `full`."""

    method: str
    model: str
    seed: int
    budget: Budget | None

    @property
    def name(self) -> str:
        """Of its run folder."""
        parts = [
            self.method,
            self.model,
            f"seed{self.seed}",
            *([str(self.budget).replace(" ", "")] if self.budget else []),
        ]
        return "-".join(parts)

    def __str__(self) -> str:
        return " ".join([self.method, self.model, f"seed {self.seed}", *([str(self.budget)] if self.budget else [])])


def make_cells(
    methods: Sequence[str],
    models: Sequence[str],
    seeds: Sequence[int],
    budgets: Sequence[Budget],
    task: str = "retrieval",
) -> list[Cell]:
    """Every cell once, seed by seed, so that a whole table of one seed is there first.

    Raises:
        ConfigError: nothing to compare, or an unknown name.
    """
    for name, values in (("methods", methods), ("models", models), ("seeds", seeds), ("budgets", budgets)):
        if not values:
            raise ConfigError(f"the comparison has no {name}; name one or more, separated by commas")
    check_methods(methods, task)
    for model in models:
        model_settings(model, task)
    cells = [
        Cell(method, model, seed, None if method == FULL else budget)
        for seed in seeds
        for model in models
        for budget in budgets
        for method in methods
    ]
    return list(dict.fromkeys(cells))


def model_settings(name: str, task: str = "retrieval") -> Mapping[str, str]:
    """The settings that make the model of this name.

    Raises:
        ConfigError: there is none.
    """
    models = TASKS[task].models
    if name not in models:
        close = difflib.get_close_matches(name, models, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"unknown model {name!r}; {hint}models are {', '.join(models)}")
    return models[name]


def budgets_of(base: RunConfig, **given: Sequence[float]) -> list[Budget]:
    """The budgets that were given, all of one kind; else the one of the configuration; else the task's.

    Raises:
        ConfigError: budgets of several kinds.
    """
    kinds = [kind for kind, values in given.items() if values]
    if len(kinds) > 1:
        raise ConfigError(f"budgets in {' and in '.join(kinds)} contradict each other; give them in one kind")
    if kinds:
        return [Budget(kinds[0], value) for value in given[kinds[0]]]
    if any(getattr(base.cluster, key) is not None for key in BUDGET_KEYS):
        return [Budget(*base.cluster.budget)]
    return [Budget(kind, value) for kind, value in task_of(base).budgets]


def parse_method_setting(text: str) -> tuple[str, str, Any]:
    """`full:train.lr=0.04` -> ("full", "train.lr", 0.04).

    Raises:
        ConfigError: no method before a colon, or no setting of a map or a training after it.
    """
    method, separator, setting = text.partition(":")
    if not separator or "=" in method:
        raise ConfigError(f"{text!r} names no method; write METHOD:section.key=value, such as full:train.lr=0.04")
    check_methods([method])
    key, value = parse_override(setting)
    if key.split(".")[0] not in ("map", "train") or key in ("train.seed", "map.seed", "train.model", "train.loss"):
        raise ConfigError(f"{key} cannot differ between methods; give settings of map and train")
    return method, key, value


def cell_config(base: RunConfig, cell: Cell, own: Sequence[tuple[str, str, Any]] = ()) -> RunConfig:
    """The configuration of a cell's run folder, which lies below that of the comparison.

    Args:
        own: settings of single methods, as :func:`parse_method_setting` returns them.
    """
    settings = base.flat() | {key: value for method, key, value in own if method == cell.method}
    settings |= dict.fromkeys((f"cluster.{key}" for key in BUDGET_KEYS), None)
    settings |= ANY_CLUSTERS if cell.budget is None else cell.budget.settings
    settings |= dict.fromkeys(("data.seed", "map.seed", "train.seed"), cell.seed) | model_settings(
        cell.model, base.run.task
    )
    settings |= {"run.methods": (cell.method,), "run.remote": None}
    settings |= {"run.out": str(Path(base.run.out) / "runs" / cell.name)}
    return RunConfig.from_flat(settings)


def compare(
    base: RunConfig,
    cells: Sequence[Cell],
    *,
    own: Sequence[tuple[str, str, Any]] = (),
    jobs: int | None = None,
) -> dict[str, Any]:
    """Bring every cell up to date and write the comparison, anew after every cell.

    Args:
        base: the settings that all cells share; `run.out` is the folder of the comparison.
        own: settings of single methods, as :func:`parse_method_setting` returns them.
        jobs: cells at once; None: as many as the CPUs and GPUs allow.

    Returns: what `OUT/compare.json` holds (see `pipeline.sweeps.table`).

    Raises:
        DataError, ConfigError, RunFolderError, TrackingError: what concerns all cells, each with one line for the user.
    """
    out, task, base = Path(base.run.out), task_of(base), localised(base)
    configs = {cell: cell_config(base, cell, own) for cell in cells}
    outcomes: dict[Cell, Outcome] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(run_folder(base))
        pending = []
        for cell, config in configs.items():
            if is_done(config, "evaluate"):
                outcomes[cell] = _attempt(config, "evaluate")
            else:
                pending.append(cell)
        _log.info("compare: %d cells, %d of them finished before", len(cells), len(outcomes))
        # An earlier call that was killed may have left its run open, with every cell finished.
        wanted = base.run.mlflow and (pending or tracking.has_left(out))
        store = tracking.connect(base.run.experiment, out) if wanted else None
        run_id = _earlier_run(out)
        tracker, nested = stack.enter_context(tracking.parent_run(store, "compare", base.flat(), run_id=run_id))
        result = _write(out, cells, outcomes, tracker.run_id or run_id, task)
        if pending:
            from pipeline.distributed.session import check_shared, ray_session

            stack.enter_context(ray_session(base.run.address))
            check_shared(out)
            for cell in {cell.seed: cell for cell in reversed(pending)}.values():
                # The log is at fault, or Ray: that is no cell's failure, and ends the command.
                with prefixed(f"seed {cell.seed}"):
                    run(configs[cell], until="ingest", lenders=_lenders(configs, cell))
            for cell, outcome in _outcomes(configs, pending, jobs, nested):
                outcomes[cell] = outcome
                _log.info("[%d/%d] %s: %s", len(outcomes), len(cells), cell, _in_words(outcome, task))
                if outcome.metrics is not None:
                    tracker.of(outcome.metrics["mlflow_run_id"]).rename(str(cell))
                result = _write(out, cells, outcomes, tracker.run_id or run_id, task)
                folder.on_stage()
        tracker.log_metrics({"n_cells": len(cells), "n_failed": len(result["failed"])} | _parent_metrics(result, task))
        for file in sorted(out.glob("compare.*")):
            tracker.log_artifact(file)
    return result


def share_out(n_trainings: int, jobs: int | None) -> tuple[int, dict[str, int]]:
    """How many trainings to run at once on the running Ray, and what `ray.remote` is to give each.

    A GPU each where there are any; else at least CPUS_OF_A_TRAINING, or all of the widest machine if it has fewer.
    """
    import ray

    from pipeline.distributed.session import cpus_of_machines

    n_gpus = int(ray.cluster_resources().get("GPU", 0))
    if n_gpus:
        return min(n_trainings, jobs or n_gpus, n_gpus), {"num_cpus": 1, "num_gpus": 1}
    machines = cpus_of_machines()
    if jobs is None:
        n_each = max(1, min(max(machines) // CPUS_OF_A_TRAINING, math.ceil(n_trainings / len(machines))))
        cpus = max(1, max(machines) // n_each)
        return max(1, min(n_trainings, sum(n // cpus for n in machines))), {"num_cpus": cpus}
    return jobs, {"num_cpus": max(1, min(max(machines), sum(machines) // jobs))}


def _outcomes(
    configs: Mapping[Cell, RunConfig],
    pending: Sequence[Cell],
    jobs: int | None,
    store: tracking.Store | None,
) -> Iterator[tuple[Cell, Outcome]]:
    """The outcome of every pending cell, as they come. Each is clustered here, and trained and tested in a Ray task."""
    import ray

    n_jobs, resources = share_out(len(pending), jobs)
    remote = ray.remote(max_retries=1, **resources)(_train_cell)
    queue, running = list(reversed(pending)), {}
    try:
        while queue or running:
            while queue and len(running) < n_jobs:
                cell = queue.pop()
                _log.info("%s ...", cell)
                failed = _attempt(configs[cell], "cluster", lenders=_lenders(configs, cell))
                if failed.reason is not None:
                    yield cell, failed
                else:
                    running[remote.remote(configs[cell], store)] = cell
            if running:
                (done, *_), _ = ray.wait(list(running), num_returns=1)
                cell = running.pop(done)
                try:
                    yield cell, ray.get(done)
                except ray.exceptions.RayError as error:
                    yield cell, Outcome(reason=f"its process ended: {explain(error)}")
    finally:
        for ref in running:
            ray.cancel(ref, force=True)


def _train_cell(config: RunConfig, store: tracking.Store | None) -> Outcome:
    """What a Ray task does."""
    from pipeline.training.workers import fit_here

    return _attempt(config, "evaluate", store=store, fit_job=fit_here)


def _attempt(config: RunConfig, until: str, **how: Any) -> Outcome:
    """Run a cell. An error becomes its outcome, and `error.txt` in its folder keeps the traceback."""
    trace = Path(config.run.out) / "error.txt"
    try:
        with silenced():
            metrics = run(config, until=until, **how).metrics
    except Exception as error:
        write_text_atomic(trace, traceback.format_exc())
        # Ray hands on a task's error as a subclass whose text is the remote traceback; `cause` is the error itself.
        cause = error.cause if isinstance(getattr(error, "cause", None), Exception) else error
        return Outcome(reason=explain(cause))
    trace.unlink(missing_ok=True)
    return Outcome(metrics=metrics[0] if metrics else None)


def _lenders(configs: Mapping[Cell, RunConfig], cell: Cell) -> list[Path]:
    """Run folders whose log is split in the same way."""
    return [Path(config.run.out) for other, config in configs.items() if other.seed == cell.seed and other != cell]


def _write(
    out: Path, cells: Sequence[Cell], outcomes: Mapping[Cell, Outcome], run_id: str | None, task: Task
) -> dict[str, Any]:
    entries = [
        (
            {
                "method": c.method,
                "model": c.model,
                "seed": c.seed,
                "budget": str(c.budget or ""),
                "run": f"runs/{c.name}",
            },
            o,
        )
        for c in cells
        if (o := outcomes.get(c)) is not None
    ]
    return write_comparison(out, entries, n_cells=len(cells), run_id=run_id, task=task)


def _earlier_run(out: Path) -> str | None:
    try:
        return json.loads((out / "compare.json").read_text(encoding="utf-8"))["mlflow_run_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _parent_metrics(result: Mapping[str, Any], task: Task) -> dict[str, float]:
    """The main measure of every line of the table, by a name that MLflow takes."""
    return {
        "/".join(filter(None, [line["model"], line["method"], line["budget"].replace("+", "-"), task.main.key])): value
        for line in result["summary"]
        if (value := line[task.main.key]) is not None
    }


def _in_words(outcome: Outcome, task: Task) -> str:
    if outcome.metrics is None:
        return f"failed: {outcome.reason}"
    value = outcome.metrics[task.main.key]
    value = "nothing to test with" if value is None else f"{task.main.title} {value:.4f}"
    share, seconds = 100 * outcome.metrics["bytes_ratio"], outcome.metrics["seconds"]["train"]
    return f"{value} with {share:.1f} % of the bytes, {seconds:.0f} s"


def explain(error: BaseException) -> str:
    """An error in one line, with its class where it speaks to a programmer and not to the user."""
    from graphhash.errors import DataError
    from pipeline.errors import RunFolderError

    text = " ".join(str(error).split()) or "no reason given"
    expected = isinstance(error, (DataError, ConfigError, RunFolderError, tracking.TrackingError, OSError))
    return (text if expected else f"{type(error).__name__}: {text}")[:500]
