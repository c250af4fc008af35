"""The comparison: the runs of a grid of methods, models, seeds and budgets, and the table of their figures.

Each is trained and tested in a run folder of its own, ``OUT/runs/<name>`` (`pipeline.sweeps.scheduler`). The files of the table
(`pipeline.sweeps.table`) are written anew after every run.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.run_config import RunConfig
from pipeline.progress import prefixed
from pipeline.runs.remote import run_folder
from pipeline.runs.run import run
from pipeline.runs.tasks import task_of
from pipeline.runs.tracked import log_dataset, log_name
from pipeline.storage.uris import localised
from pipeline.sweeps.grid import GridPoint, MethodOverride, grid_specs, in_waves
from pipeline.sweeps.scheduler import LocalPool, RayPool, Result, RunSpec, finished, schedule, sweep_session
from pipeline.sweeps.table import PointLabels, write_comparison
from pipeline.task import Measure, Task
from pipeline.tracking.mlflow_runs import parent_run
from pipeline.tracking.store import connect, has_undelivered
from pipeline.tracking.tracker import Tracker

_log = logging.getLogger(__name__)


def compare(
    base: RunConfig,
    points: Sequence[GridPoint],
    *,
    overrides: Sequence[MethodOverride] = (),
    jobs: int | None = None,
) -> dict[str, Any]:
    """Bring the run of every point up to date and write the comparison.

    Args:
        base: the settings that all runs share; `run.out` is the folder of the comparison.
        overrides: settings of single methods.
        jobs: runs at once; None: as many as the CPUs and GPUs allow.

    Returns: what `OUT/compare.json` holds (see `pipeline.sweeps.table`).

    Raises:
        DataError, ConfigError, RunFolderError, TrackingError: what concerns all runs, each with one line for the user.
    """
    requested, base = base, localised(base)
    out = Path(base.run.out)
    specs = grid_specs(base, points, overrides)
    for spec in specs.values():
        task_of(base).check_trainable(spec.config)
    with ExitStack() as stack:
        folder = stack.enter_context(run_folder(base))
        results = {point: result for point, spec in specs.items() if (result := finished(spec)) is not None}
        pending = {point: spec for point, spec in specs.items() if point not in results}
        _log.info("compare: %d runs, %d of them finished before", len(specs), len(results))
        # An earlier command that was killed may have left its MLflow run open, with every run of the grid finished.
        wanted = base.run.mlflow and (pending or has_undelivered(out))
        store = connect(base.run.experiment, out) if wanted else None
        earlier = _earlier_mlflow_run(out)
        tracker, nested = stack.enter_context(
            parent_run(store, f"compare {log_name(base)}", requested.flat(), run_id=earlier)
        )
        table = _Table(out, specs, results, tracker.run_id or earlier, task_of(base), base.evaluate.cutoffs)
        written = table.write()
        if pending:
            on_ray = stack.enter_context(sweep_session(base, len(pending), jobs))
            _ingest(pending, tracker)
            pool = RayPool(len(pending), jobs, nested) if on_ray else LocalPool(nested)
            points_of = {spec.name: point for point, spec in pending.items()}
            ended = (schedule(_announced(wave), pool) for wave in in_waves(pending) if wave)
            for spec, result in itertools.chain.from_iterable(ended):
                results[points_of[spec.name]] = result
                _log.info("[%d/%d] %s: %s", len(results), len(specs), spec.title, _in_words(result, table.main))
                if nested is not None and result.metrics is not None:
                    tracker.of(result.metrics["mlflow_run_id"]).rename(spec.title)
                written = table.write()
                folder.on_stage()
        _log_figures(tracker, written, table.main, out)
    return written


@dataclass
class _Table:
    """The files of the comparison, from the results so far."""

    out: Path
    specs: Mapping[GridPoint, RunSpec]
    results: Mapping[GridPoint, Result]
    mlflow_run_id: str | None
    task: Task
    cutoffs: tuple[int, ...]

    @property
    def main(self) -> Measure:
        return self.task.measures_of(self.cutoffs)[0]

    def write(self) -> dict[str, Any]:
        entries = [
            (_labels(point, spec), self.results[point]) for point, spec in self.specs.items() if point in self.results
        ]
        return write_comparison(
            self.out,
            entries,
            n_runs=len(self.specs),
            mlflow_run_id=self.mlflow_run_id,
            task=self.task,
            cutoffs=self.cutoffs,
        )


def _labels(point: GridPoint, spec: RunSpec) -> PointLabels:
    return {
        "method": point.method,
        "model": point.model,
        "seed": point.seed,
        "budget": str(point.budget or ""),
        "run": spec.name,
    }


def _ingest(pending: Mapping[GridPoint, RunSpec], tracker: Tracker) -> None:
    """Read the log once per seed; the split is a dataset in MLflow. An error is the log's or Ray's, not a run's, and ends the command."""
    first_of_seed = {point.seed: spec for point, spec in reversed(list(pending.items()))}
    for seed, spec in first_of_seed.items():
        with prefixed(f"seed {seed}"):
            read = run(spec.config, until="ingest", reuse_from=spec.reuse_from)
            log_dataset(tracker, spec.config, read.ingest)


def _announced(pending: Sequence[RunSpec]) -> Iterator[RunSpec]:
    for spec in pending:
        _log.info("%s ...", spec.title)
        yield spec


def _log_figures(tracker: Tracker, written: Mapping[str, Any], main: Measure, out: Path) -> None:
    """The figures of the whole comparison, with the main measure of every line by a name that MLflow takes."""
    figures = {"n_runs": written["n_runs"], "n_failed": len(written["failed"])}
    for line in written["summary"]:
        if (value := line[main.key]) is not None:
            name = (line["model"], line["method"], line["budget"].replace("+", "-"), main.key)
            figures["/".join(filter(None, name))] = value
    tracker.log_metrics(figures)
    for file in sorted(out.glob("compare.*")):
        tracker.log_artifact(file)


def _earlier_mlflow_run(out: Path) -> str | None:
    try:
        return json.loads((out / "compare.json").read_text(encoding="utf-8"))["mlflow_run_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _in_words(result: Result, main: Measure) -> str:
    if result.metrics is None:
        return f"failed: {result.reason}"
    value = result.metrics[main.key]
    score = "nothing to test with" if value is None else f"{main.title} {value:.4f}"
    share, seconds = 100 * result.metrics["bytes_ratio"], result.metrics["seconds"]["train"]
    return f"{score} with {share:.1f} % of the bytes, {seconds:.0f} s"
