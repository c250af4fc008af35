"""The order of the stages: ingest -> cluster -> per method train -> refit -> evaluate -> export (first method) -> report.

    metrics = run(config, until="report").metrics

A stage's key follows from its settings and from the keys of the stages before it, so what has to be done is known
before anything is done: MLflow is asked early whether it is there, and Ray starts only for a stage that needs it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pipeline.config.run_config import RunConfig
from pipeline.errors import ConfigError
from pipeline.runs.fingerprints import FileHashes
from pipeline.runs.folder import RunFolder, StageResult
from pipeline.runs.plan import LOG, STAGES, Step, check_methods, plan, root_reasons, steps_of
from pipeline.runs.remote import run_folder
from pipeline.runs.tasks import task_of
from pipeline.storage.atomic import write_json_atomic, write_text_atomic
from pipeline.storage.uris import localised
from pipeline.task import StageContext, Task, budget_of, model_parts, model_stage
from pipeline.tracking import tracker as tracking

if TYPE_CHECKING:
    from pipeline.training.checkpoints import CheckpointManager
    from pipeline.training.job import FitJob, TrainingSession

CONFIG_FILE = "config.toml"

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
    store: tracking.Store | None = None,
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
    if until != "ingest":
        check_methods(config.run.methods, config.run.task)
    if STAGES.index(until) >= STAGES.index("train"):
        task_of(config).check_trainable(config)
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
        write_text_atomic(out / CONFIG_FILE, given.to_toml())
        _reuse(folder, steps, reuse_from)
        store = _open_store(folder, steps, config, store)
        stages = _Stages(
            folder, steps, config, task_of(config), store, _RayOnDemand(stack, config.run.address, out), fit_job
        )
        ingest = stages.ingest()
        if until == "ingest":
            return RunResult(ingest.result, {}, [])
        cluster = stages.cluster()
        if until == "cluster":
            return RunResult(ingest.result, cluster.result, [])
        if resume is not None:
            _check_resume(folder, steps, config, resume)
        metrics = stages.methods(ingest, cluster, write=until != "train")
        if until == "report":
            stages.report(metrics)
        return RunResult(ingest.result, cluster.result, metrics)


def is_done(config: RunConfig, until: str) -> bool:
    """Whether :func:`run` with these arguments would find every stage up to date."""
    folder, config = RunFolder(config.run.out), localised(config)
    return all(_up_to_date(folder, step) for step in plan(config, until).values())


def with_recorded_budget(config: RunConfig) -> RunConfig:
    """The configuration with the rows of a byte budget planned as the finished run folder planned them.

    They depend on the precision of the tables and on the methods that share them. So the run's own precision is kept as
    `cluster.budget_precision`, and its other trained methods follow the ones that are evaluated or exported.
    """
    file = Path(config.run.out) / CONFIG_FILE
    if not file.is_file():
        return config
    recorded, changes = RunConfig.load(file), dict[str, Any]()
    precision = recorded.cluster.budget_precision or recorded.export.precision
    if config.cluster.budget_precision is None and precision != config.export.precision:
        changes["cluster.budget_precision"] = precision
    methods, folder = config.run.methods, RunFolder(config.run.out)
    if set(methods) < set(recorded.run.methods) and all(folder.current(f"train {m}") for m in recorded.run.methods):
        changes["run.methods"] = (*methods, *(m for m in recorded.run.methods if m not in methods))
    return RunConfig.from_flat(config.flat() | changes) if changes else config


def check_keeps_trained(folder: RunFolder, steps: Mapping[str, Step], config: RunConfig, until: str) -> None:
    """Raise ConfigError if a trained model would be replaced by a command that is there for a later stage."""
    for method, name in ((m, f"{stage} {m}") for m in config.run.methods for stage in ("train", "refit")):
        if name not in steps or folder.current(name) is None or _up_to_date(folder, steps[name]):
            continue
        why = root_reasons(folder, steps, name)
        remedy = "run" if why == [f"{LOG} changed"] else "leave it out, or run"
        raise ConfigError(
            f"`graphhash {until}` would train {method} again: {'; '.join(why)}; {remedy} `graphhash train` first"
        )


def _reuse(folder: RunFolder, steps: Mapping[str, Step], sources: Sequence[Path]) -> None:
    """Take the ingested log, the clustering and trainings over from other run folders that have them."""
    trained = [name for name in steps if name.startswith(("train ", "refit "))]
    for name in ("ingest", "cluster", *trained):
        if (step := steps.get(name)) is not None:
            place = name.replace("train ", "methods/").replace("refit ", "refit/")
            any(folder.reuse(source, step.name, step.settings, step.inputs, place) for source in sources)


def _open_store(
    folder: RunFolder, steps: Mapping[str, Step], config: RunConfig, store: tracking.Store | None
) -> tracking.Store | None:
    """The MLflow store, connected to where something new is to be tracked, or something is left from an earlier command."""
    tracked = [step for step in steps.values() if step.name not in ("ingest", "cluster")]
    nothing_new = all(_up_to_date(folder, step) for step in tracked)
    if not config.run.mlflow or (nothing_new and not tracking.has_undelivered(folder.path)):
        return None
    if store is not None:
        return store
    try:
        return tracking.connect(config.run.experiment, folder.path)
    except tracking.TrackingError as error:
        if not nothing_new:
            raise
        _log.warning("%s; what it should get is kept", error)
        return None


class _RayOnDemand:
    """Ray for the rest of the command, started by the first stage that computes something on it."""

    def __init__(self, stack: ExitStack, address: str | None, out: Path) -> None:
        self._stack, self._address, self._out, self._started = stack, address, out, False

    def start(self) -> None:
        if not self._started:
            from pipeline.distributed.session import check_shared, ray_session

            self._stack.enter_context(ray_session(self._address))
            check_shared(self._out)
            self._started = True


def _up_to_date(folder: RunFolder, step: Step) -> bool:
    return folder.would_skip(step.name, step.settings, step.inputs)


@dataclass(frozen=True)
class _Stages:
    """The stages of one run, each computed unless it is up to date."""

    folder: RunFolder
    steps: Mapping[str, Step]
    config: RunConfig
    task: Task
    store: tracking.Store | None
    ray: _RayOnDemand
    fit_job: FitJob | None

    @property
    def context(self) -> StageContext:
        return StageContext(self.config, self.folder.path)

    def ingest(self) -> StageResult:
        def compute(out: Path) -> dict[str, Any]:
            self._start_ray("ingest")
            return self.task.ingest(self.context, out)

        step = self.steps["ingest"]
        return self.folder.stage(step.name, step.settings, step.inputs, "ingest", compute)

    def cluster(self) -> StageResult:
        def compute(out: Path) -> dict[str, Any]:
            self._start_ray("cluster")
            return self.task.cluster(self.context, out)

        step = self.steps["cluster"]
        return self.folder.stage(step.name, step.settings, step.inputs, "cluster", compute)

    def methods(self, ingest: StageResult, cluster: StageResult, *, write: bool) -> list[dict[str, Any]]:
        """The metrics objects of all methods; `write`: also into `RUN/metrics.json`, anew after each method."""
        done: dict[str, dict[str, Any]] = {}
        metrics: list[dict[str, Any]] = []
        # What others store otherwise is trained first, so that it is tracked under its own name.
        for method in sorted(self.config.run.methods, key=lambda name: self.task.trained_as(name) is not None):
            done[method] = self.method(method, ingest, cluster)
            metrics = [done[name] for name in self.config.run.methods if name in done]
            if write:
                write_json_atomic(self.folder.path / "metrics.json", metrics)
        return metrics

    def method(self, method: str, ingest: StageResult, cluster: StageResult) -> dict[str, Any]:
        """Train, evaluate and, for the first method, export, inside one MLflow run. Returns the metrics object."""
        with self._tracker(method) as tracker:
            _log_dataset(tracker, self.config, ingest.result)
            trained = self._train(method, tracker)
            seconds = {"ingest": ingest.seconds, "cluster": cluster.seconds, "train": trained.seconds}
            if f"refit {method}" in self.steps:
                seconds["refit"] = self._refit(method, tracker).seconds
            metrics = {"method": method, **trained.result}
            if f"evaluate {method}" in self.steps:
                evaluated = self._evaluate(method)
                seconds["evaluate"] = evaluated.seconds
                metrics = {"method": method, **evaluated.result, "mlflow_run_id": trained.result["mlflow_run_id"]}
                if not evaluated.skipped:
                    _log_test(tracker, ingest.result, evaluated.result)
            if "export" in self.steps and method == self.config.run.methods[0]:
                exported = self._export(method, metrics)
                seconds["export"] = exported.seconds
                if not exported.skipped and tracker.run_id is not None:
                    _log_bundle(tracker, self.folder, self.task)
        metrics["seconds"] = seconds
        return metrics

    def report(self, metrics: list[dict[str, Any]]) -> None:
        _log.info("report ...")
        files = self.task.report(self.folder.path)
        if self.store is None:
            return
        for entry in metrics:
            tracker = self.store.tracker(entry.get("mlflow_run_id"))
            for file in files:
                tracker.log_artifact(file, "report")

    def _start_ray(self, stage: str) -> None:
        if self.task.needs_ray(stage, self.config):
            self.ray.start()

    def _train(self, method: str, tracker: tracking.Tracker) -> StageResult:
        step = self.steps[f"train {method}"]
        if (trained_as := self.task.trained_as(method)) is not None and not _up_to_date(self.folder, step):
            self._train(trained_as, tracker)
        return self._fit(step, f"methods/{method}", tracker, partial(self.task.train, self.context, method))

    def _refit(self, method: str, tracker: tracking.Tracker) -> StageResult:
        step = self.steps[f"refit {method}"]
        if (trained_as := self.task.trained_as(method)) is not None and not _up_to_date(self.folder, step):
            self._train(trained_as, tracker)
            self._refit(trained_as, tracker)
        refit = partial(self.task.refit, self.context, method)
        return self._fit(step, f"refit/{method}", tracker.named("refit"), refit)

    def _fit(
        self, step: Step, place: str, tracker: tracking.Tracker, fit: Callable[[Path, TrainingSession], dict[str, Any]]
    ) -> StageResult:
        """A stage that trains: its checkpoints outlive the command, and are removed when its folder is there."""

        def compute(out: Path) -> dict[str, Any]:
            from pipeline.training.job import TrainingSession, fit_job_of

            self._start_ray("train")
            checkpoints = _checkpoints(self.folder, step, mlflow_run_id=tracker.run_id)
            session = TrainingSession(tracker, self.fit_job or fit_job_of(self.config), checkpoints)
            return {**fit(out, session), "mlflow_run_id": tracker.run_id}

        trained = self.folder.stage(step.name, step.settings, step.inputs, place, compute)
        # What they were for is in the stage's folder now.
        _checkpoints(self.folder, step).clear()
        return trained

    def _evaluate(self, method: str) -> StageResult:
        step = self.steps[f"evaluate {method}"]

        def compute() -> dict[str, Any]:
            self._start_ray("evaluate")
            return self.task.evaluate(self.context, method) | {"trained_on": list(model_parts(self.config))}

        evaluated = self.folder.value(step.name, step.settings, step.inputs, f"methods/{method}/metrics.json", compute)
        if warning := over_budget(self.config, self.task, method, evaluated.result):
            _log.warning(warning)
        return evaluated

    def _export(self, method: str, metrics: dict[str, Any]) -> StageResult:
        step, model_key = self.steps["export"], self.steps[model_stage(self.config, method)].key

        def compute(out: Path) -> dict[str, Any]:
            return self.task.export(self.context, method, out, metrics, model_key)

        return self.folder.stage(step.name, step.settings, step.inputs, "bundle", compute)

    @contextmanager
    def _tracker(self, method: str) -> Iterator[tracking.Tracker]:
        """The MLflow run of a training that is about to happen, or that later stages add to; else one that logs nothing."""
        train, store, run_id = self.steps[f"train {method}"], self.store, None
        if _up_to_date(self.folder, train):
            recorded = self.folder.current(train.name)
            run_id = recorded.result.get("mlflow_run_id") if recorded else None
            store = store if run_id else None  # Trained without MLflow: there is nothing to add to.
        elif (begun := _checkpoints(self.folder, train).manifest()) is not None:
            run_id = begun.get("mlflow_run_id")
        nothing_new = all(_up_to_date(self.folder, step) for step in steps_of(self.steps, self.config, method))
        # A command that was killed after its last stage has left the run open, and it did finish.
        if nothing_new and (store is None or run_id not in store.killed):
            yield tracking.Tracker()
            return
        params = {key: value for key, value in self.config.flat().items() if key != "run.methods"}
        params |= {"method": method}
        alone, tags = len(self.config.run.methods) == 1, {"graphhash.method": method}
        name = _mlflow_name(self.config, method)
        with tracking.training_run(store, name, params, tags=tags, alone=alone, run_id=run_id) as tracker:
            yield tracker


def over_budget(config: RunConfig, task: Task, method: str, metrics: Mapping[str, Any]) -> str | None:
    """A line where a method takes more bytes than its budget because it is stored in another precision than was planned."""
    kind, ratio = budget_of(config, task.default_budget)
    planned, stored = task.planned_precision_of(config, method), task.precision_of(config, method)
    if kind != "ratio" or method == "full" or planned == stored or metrics["bytes_ratio"] <= ratio:
        return None
    return (
        f"{method}: {metrics['bytes_ratio']:.1%} of the full tables' bytes in {stored}, above the budget of {ratio:.1%}: "
        f"rows were planned for {planned}; `graphhash run` with --data and --precision {stored} plans them anew"
    )


def _checkpoints(folder: RunFolder, step: Step, **facts: Any) -> CheckpointManager:
    """The checkpoints of a training, or of a refit, that is not finished; they outlive the command."""
    from pipeline.training.checkpoints import CheckpointManager

    place = step.name.removeprefix("train ").replace("refit ", "refit-")
    return CheckpointManager(folder.path / "checkpoints" / place, step.key, facts)


def _check_resume(folder: RunFolder, steps: Mapping[str, Step], config: RunConfig, resume: bool) -> None:
    """Without `resume`, forget the checkpoints; with it, make sure that there is one."""
    trainings = [steps[name] for m in config.run.methods for name in (f"train {m}", f"refit {m}") if name in steps]
    saved = [_checkpoints(folder, step) for step in trainings if not _up_to_date(folder, step)]
    if not resume:
        for checkpoints in saved:
            checkpoints.clear()
    elif saved and not any(checkpoints.newest() for checkpoints in saved):
        raise ConfigError(
            f"--resume: {folder.path}/checkpoints holds none of a training with these settings and data; give the settings that it was "
            "stopped with, or leave --resume out to start one"
        )


def _mlflow_name(config: RunConfig, method: str) -> str:
    """Method, model, loss and log, such as "soft mf bpr log.parquet"."""
    loss = [config.train.loss] if config.run.task == "retrieval" else []
    return " ".join([method, config.train.model, *loss, _log_name(config)])


def _log_name(config: RunConfig) -> str:
    """The last part of the log's path or URI, without a query."""
    return PurePosixPath(config.data.path.partition("?")[0]).name or "log"


def _log_dataset(tracker: tracking.Tracker, config: RunConfig, ingest: Mapping[str, Any]) -> None:
    """The log with its numbers; the digest is that of its vocabularies, its numbers and its split."""
    known = _flatten(ingest)
    numbers = {
        key: value for key, value in known.items() if isinstance(value, (int, float)) and not key.startswith("seconds")
    }
    hashes = {key: value for key, value in known.items() if "hash" in key}
    split = {
        key: value for key, value in config.flat().items() if key in ("data.split", "data.validation", "data.test")
    }
    text = json.dumps(hashes | numbers | split, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    tracker.log_dataset(_log_name(config), digest, config.data.path, numbers)


def _log_test(tracker: tracking.Tracker, ingest: Mapping[str, Any], evaluated: Mapping[str, Any]) -> None:
    """The test metrics, the parts of the log that were trained on, and every hash that says what the numbers belong to."""
    figures = {key: value for key, value in evaluated.items() if key != "trained_on"}
    tracker.log_metrics({f"test.{key}": value for key, value in _flatten(figures).items()})
    known = _flatten({"ingest": ingest}) | _flatten(evaluated)
    tags = {f"graphhash.{key}": value for key, value in known.items() if "hash" in key}
    tracker.set_tags({"graphhash.trained_on": ",".join(evaluated["trained_on"])} | tags)


def _log_bundle(tracker: tracking.Tracker, folder: RunFolder, task: Task) -> None:
    """The bundle as it is, and its graph as a model of MLflow's onnx flavour with a call that works as example."""
    from pipeline.tracking.onnx_model import BUNDLE_TAG
    from serving.bundle import check_bundle
    from serving.manifest import MODEL

    bundle = folder.path / "bundle"
    manifest = check_bundle(bundle)
    call = task.example_call(manifest, folder.path / "ingest")
    tracker.log_artifact(bundle, "bundle")
    tracker.log_onnx_model(bundle / MODEL, call, {BUNDLE_TAG: manifest["manifest_sha256"]})


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        flat |= _flatten(entry, f"{prefix}{key}.") if isinstance(entry, Mapping) else {f"{prefix}{key}": entry}
    return flat
