"""The order of the stages: ingest -> cluster -> per method train -> refit -> evaluate -> export (first method) -> report.

    metrics = run(config, until="report").metrics

A stage's key follows from its settings and from the keys of the stages before it, so what has to be done is known
before anything is done: MLflow is asked early whether it is there, and Ray starts only for a stage that needs it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.choices import AUTO_LOSS, AUTO_METHODS
from pipeline.config.run_config import RunConfig
from pipeline.config.toml_file import CONFIG_FILE
from pipeline.runs.fingerprints import FileHashes
from pipeline.runs.folder import RunFolder
from pipeline.runs.plan import STAGES, Step, check_methods, is_up_to_date, plan
from pipeline.runs.remote import run_folder
from pipeline.runs.stages import RayOnDemand, Stages
from pipeline.runs.tasks import task_of
from pipeline.runs.tracked import open_store
from pipeline.runs.trained import (
    check_keeps_trained,
    check_resume,
    has_defaults_of_log,
    with_defaults_of_ingested,
    with_recorded_budget,
)
from pipeline.storage.atomic import write_text_atomic
from pipeline.storage.uris import localised, with_uris
from pipeline.tracking.store import Store
from pipeline.training.machine import n_cpus

if TYPE_CHECKING:
    from pipeline.training.job import FitJob

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What a run knows at its end; parts that were not reached are empty."""

    ingest: dict[str, Any]
    cluster: dict[str, Any]
    metrics: list[dict[str, Any]]
    """One object per method, as in `RUN/metrics.json`."""


def run(
    config: RunConfig,
    *,
    until: str = "report",
    store: Store | None = None,
    reuse_from: Sequence[Path] = (),
    fit_job: FitJob | None = None,
    resume: bool | None = None,
    keep_trained: bool = False,
) -> RunResult:
    """Bring the run folder up to date, stage by stage, up to and including `until`.

    Args:
        config: `data.path` and `run.out` must be set.
        until: one of STAGES.
        store: where trainings are tracked; None: connected to when it is needed.
        reuse_from: other run folders, where the log may be ingested, or even clustered, in the same way already.
        fit_job: executes a training (see `pipeline.training.job.TrainingSession`); None: as the configuration says.
        resume: whether trainings resume from their checkpoints; None: from those that there are. True: a training that has to be done has
            one, or ConfigError is raised.
        keep_trained: ConfigError where a trained model would be replaced, and rows stay as the run's own precision planned them.

    Raises:
        DataError, ConfigError, RunFolderError, TrackingError: each with one line for the user.
    """
    assert until in STAGES, until
    out = Path(config.run.out)
    if until != "ingest" and config.run.methods != AUTO_METHODS:
        check_methods(config.run.methods, config.run.task)
    if STAGES.index(until) >= STAGES.index("train"):
        task_of(config).check_trainable(config)
    if until != "ingest" and config.run.task == "retrieval" and not (out / "cluster").exists():
        _compile_beside()
    if has_defaults_of_log(config) and until != "ingest":
        facts, given = run(config, until="ingest", reuse_from=reuse_from).ingest, config
        config = task_of(config).with_log_defaults(config, facts)
        if given.train.loss == AUTO_LOSS:
            _log.info("loss: %s, by the log (train.loss)", config.train.loss)
        if given.run.methods == AUTO_METHODS:
            _log.info("method: %s, by budget, model and loss (run.methods)", ",".join(config.run.methods))
    if keep_trained:
        config = with_recorded_budget(config)
    given, config = config, localised(config)
    hashes = FileHashes(out)
    steps = plan(config, until, hashes=hashes)
    with ExitStack() as stack:
        folder = stack.enter_context(run_folder(config))
        hashes.save()
        if config.run.remote is not None:
            # What was fetched may hold ids that an update has folded in, and the precision that rows were planned for.
            if keep_trained:
                given, config = with_recorded_budget(given), with_recorded_budget(config)
            steps = plan(config, until, hashes=hashes)
        if keep_trained:
            check_keeps_trained(folder, steps, config, until)
        # The runs of a sweep read its copy of a log at a URI; whoever goes on from their settings has the URI alone.
        write_text_atomic(out / CONFIG_FILE, with_uris(given).to_toml())
        _reuse(folder, steps, reuse_from)
        store = open_store(folder, steps, config, store)
        ray = RayOnDemand(stack, config.run.address, out)
        stages = Stages(folder, steps, config, task_of(config), store, ray, fit_job)
        return _compute(stages, until, resume)


def _compile_beside() -> None:
    """On a new machine, compile in a second process what a clustering and a training need, while this one reads the log."""
    from graphhash.precompile import compile_beside

    if n_cpus() > 1:
        compile_beside()


def is_done(config: RunConfig, until: str) -> bool:
    """Whether :func:`run` with these arguments would find every stage up to date."""
    folder, config = RunFolder(config.run.out), localised(with_defaults_of_ingested(config))
    return all(is_up_to_date(folder, step) for step in plan(config, until).values())


def _compute(stages: Stages, until: str, resume: bool | None) -> RunResult:
    """The stages in their order, up to and including `until`."""
    ingest = stages.ingest()
    if until == "ingest":
        return RunResult(ingest.result, {}, [])
    stages.task.check_sizes(stages.context)
    cluster = stages.cluster()
    if until == "cluster":
        return RunResult(ingest.result, cluster.result, [])
    if resume is not None:
        check_resume(stages.folder, stages.steps, stages.config, resume)
    metrics = stages.methods(ingest, cluster, write=until != "train")
    if until == "report":
        stages.report(metrics)
    return RunResult(ingest.result, cluster.result, metrics)


def _reuse(folder: RunFolder, steps: Mapping[str, Step], sources: Sequence[Path]) -> None:
    """Take the ingested log, the clustering and trainings over from other run folders that have them."""
    trained = [name for name in steps if name.startswith(("train ", "refit "))]
    for name in ("ingest", "cluster", *trained):
        if (step := steps.get(name)) is not None:
            place = name.replace("train ", "methods/").replace("refit ", "refit/")
            any(folder.reuse(source, step.name, step.settings, step.inputs, place) for source in sources)
