"""The stages of a run: each is computed unless it is up to date, and its figures are logged to the MLflow run of its method."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.run_config import RunConfig
from pipeline.runs.folder import RunFolder, StageResult
from pipeline.runs.plan import Step, is_up_to_date, steps_of
from pipeline.runs.tracked import log_bundle, log_dataset, log_test, run_name
from pipeline.runs.trained import checkpoints_of, warnings_of_bytes
from pipeline.storage.atomic import write_json_atomic
from pipeline.storage.uris import with_uris
from pipeline.task import StageContext, Task, model_parts, model_stage
from pipeline.tracking.mlflow_runs import training_run
from pipeline.tracking.store import Store
from pipeline.tracking.tracker import Tracker

if TYPE_CHECKING:
    from pipeline.training.job import FitJob, TrainingSession

_log = logging.getLogger(__name__)


class RayOnDemand:
    """Ray for the rest of the command, started by the first stage that computes something on it."""

    def __init__(self, stack: ExitStack, address: str | None, out: Path) -> None:
        self._stack, self._address, self._out, self._started = stack, address, out, False

    def start(self) -> None:
        """Start it, or connect to it, unless that was done before."""
        if not self._started:
            from pipeline.distributed.session import check_shared, ray_session

            self._stack.enter_context(ray_session(self._address))
            check_shared(self._out)
            self._started = True


@dataclass(frozen=True)
class Stages:
    """The stages of one run, each computed unless it is up to date.

    Args:
        steps: the stages that are planned, by name.
        store: where trainings are tracked; None: nowhere.
        fit_job: executes a training; None: as the configuration says.
    """

    folder: RunFolder
    steps: Mapping[str, Step]
    config: RunConfig
    task: Task
    store: Store | None
    ray: RayOnDemand
    fit_job: FitJob | None

    @property
    def context(self) -> StageContext:
        return StageContext(self.config, self.folder.path)

    def ingest(self) -> StageResult:
        """The ingested log."""

        def compute(out: Path) -> dict[str, Any]:
            self._start_ray("ingest")
            return self.task.ingest(self.context, out)

        step = self.steps["ingest"]
        return self.folder.stage(step.name, step.settings, step.inputs, "ingest", compute)

    def cluster(self) -> StageResult:
        """The communities."""

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
            log_dataset(tracker, self.config, ingest.result)
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
                    log_test(tracker, ingest.result, evaluated.result)
            if "export" in self.steps and method == self.config.run.methods[0]:
                exported = self._export(method, metrics)
                seconds["export"] = exported.seconds
                if not exported.skipped and tracker.run_id is not None:
                    log_bundle(tracker, self.folder, self.task)
        metrics["seconds"] = seconds
        return metrics

    def report(self, metrics: list[dict[str, Any]]) -> None:
        """Write the report, and log it to the MLflow run of every method."""
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

    def _train(self, method: str, tracker: Tracker) -> StageResult:
        step = self.steps[f"train {method}"]
        if (trained_as := self.task.trained_as(method)) is not None and not is_up_to_date(self.folder, step):
            self._train(trained_as, tracker)
        return self._fit(step, f"methods/{method}", tracker, partial(self.task.train, self.context, method))

    def _refit(self, method: str, tracker: Tracker) -> StageResult:
        step = self.steps[f"refit {method}"]
        if (trained_as := self.task.trained_as(method)) is not None and not is_up_to_date(self.folder, step):
            self._train(trained_as, tracker)
            self._refit(trained_as, tracker)
        refit = partial(self.task.refit, self.context, method)
        return self._fit(step, f"refit/{method}", tracker.named("refit"), refit)

    def _fit(
        self, step: Step, place: str, tracker: Tracker, fit: Callable[[Path, TrainingSession], dict[str, Any]]
    ) -> StageResult:
        """A stage that trains: its checkpoints outlive the command, and are removed when its folder is there."""

        def compute(out: Path) -> dict[str, Any]:
            from pipeline.training.job import TrainingSession, fit_job_of

            self._start_ray("train")
            checkpoints = checkpoints_of(self.folder, step, mlflow_run_id=tracker.run_id)
            session = TrainingSession(tracker, self.fit_job or fit_job_of(self.config), checkpoints)
            return {**fit(out, session), "mlflow_run_id": tracker.run_id}

        trained = self.folder.stage(step.name, step.settings, step.inputs, place, compute)
        # What they were for is in the stage's folder now.
        checkpoints_of(self.folder, step).clear()
        return trained

    def _evaluate(self, method: str) -> StageResult:
        step = self.steps[f"evaluate {method}"]

        def compute() -> dict[str, Any]:
            self._start_ray("evaluate")
            return self.task.evaluate(self.context, method) | {"trained_on": list(model_parts(self.config))}

        evaluated = self.folder.value(step.name, step.settings, step.inputs, f"methods/{method}/metrics.json", compute)
        for warning in warnings_of_bytes(self.config, self.task, method, evaluated.result):
            _log.warning(warning)
        return evaluated

    def _export(self, method: str, metrics: dict[str, Any]) -> StageResult:
        step, model_key = self.steps["export"], self.steps[model_stage(self.config, method)].key

        def compute(out: Path) -> dict[str, Any]:
            return self.task.export(self.context, method, out, metrics, model_key)

        return self.folder.stage(step.name, step.settings, step.inputs, "bundle", compute)

    @contextmanager
    def _tracker(self, method: str) -> Iterator[Tracker]:
        """The MLflow run of a training that is about to happen, or that later stages add to; else one that logs nothing."""
        train, store, run_id = self.steps[f"train {method}"], self.store, None
        if is_up_to_date(self.folder, train):
            recorded = self.folder.current(train.name)
            run_id = recorded.result.get("mlflow_run_id") if recorded else None
            store = store if run_id else None  # Trained without MLflow: there is nothing to add to.
        elif (begun := checkpoints_of(self.folder, train).manifest()) is not None:
            run_id = begun.get("mlflow_run_id")
        nothing_new = all(is_up_to_date(self.folder, step) for step in steps_of(self.steps, self.config, method))
        # A command that was killed after its last stage has left the run open, and it did finish.
        if nothing_new and (store is None or run_id not in store.killed):
            yield Tracker()
            return
        params = with_uris(self.config).flat() | {"method": method}
        del params["run.methods"]
        alone, tags = len(self.config.run.methods) == 1, {"graphhash.method": method}
        name = run_name(self.config, method)
        with training_run(store, name, params, tags=tags, alone=alone, run_id=run_id) as tracker:
            yield tracker
