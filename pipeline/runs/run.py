"""The order of the stages: ingest -> cluster -> per method train -> evaluate -> export (first method) -> report.

    metrics = run(config, until="report").metrics

A stage's key follows from its settings and from the keys of the stages before it, so what has to be done is known
before anything is done: MLflow is asked early whether it is there, and Ray starts only for a stage that needs it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.run_config import RunConfig
from pipeline.errors import ConfigError
from pipeline.runs.folder import RunFolder, StageResult
from pipeline.runs.plan import STAGES, Step, check_methods, plan, steps_of
from pipeline.runs.remote import run_folder
from pipeline.runs.tasks import task_of
from pipeline.storage.atomic import write_json_atomic, write_text_atomic
from pipeline.storage.uris import localised
from pipeline.tracking import tracker as tracking

if TYPE_CHECKING:
    from pipeline.retrieval.train import FitJob
    from pipeline.training.checkpoints import CheckpointManager

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
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
    lenders: Iterable[Path] = (),
    fit_job: FitJob | None = None,
    resume: bool | None = None,
) -> Outcome:
    """Bring the run folder up to date, stage by stage, up to and including `until`.

    Args:
        config: `data.path` and `run.out` must be set.
        until: one of STAGES.
        store: where trainings are tracked; None: connected to when it is needed.
        lenders: other run folders, where the log may be ingested, or even clustered, in the same way already.
        fit_job: what trains (see `pipeline.retrieval.train.train_method`).
        resume: whether trainings go on from their checkpoints; None: from those that there are. True: a training that has to be done has
            one, or ConfigError is raised.

    Raises:
        DataError, ConfigError, RunFolderError, TrackingError: each with one line for the user.
    """
    assert until in STAGES, until
    out = Path(config.run.out)
    if until != "ingest":
        check_methods(config.run.methods, config.run.task)
    given, config = config, localised(config)
    steps = plan(config, until)
    with ExitStack() as stack:
        folder = stack.enter_context(run_folder(config))
        if config.run.remote is not None:
            # What was fetched may hold ids that an update has folded in.
            steps = plan(config, until)
        write_text_atomic(out / "config.toml", given.to_toml())
        for name in ("ingest", "cluster"):
            if (step := steps.get(name)) is not None:
                any(folder.borrow(lender, step.name, step.settings, step.inputs, name) for lender in lenders)
        tracked = [step for step in steps.values() if step.name not in ("ingest", "cluster")]
        nothing_new = all(_up_to_date(folder, step) for step in tracked)
        if not config.run.mlflow or (nothing_new and not tracking.has_left(out)):
            store = None
        elif store is None:
            try:
                store = tracking.connect(config.run.experiment, out)
            except tracking.TrackingError as error:
                if not nothing_new:
                    raise
                _log.warning("%s; what it should get is kept", error)
        ray = _RayOnDemand(stack, config.run.address, out)

        ingest = _ingest(folder, steps["ingest"], config, ray)
        if until == "ingest":
            return Outcome(ingest.result, {}, [])
        cluster = _cluster(folder, steps["cluster"], config, ray)
        if until == "cluster":
            return Outcome(ingest.result, cluster.result, [])
        metrics = []
        if resume is not None:
            _check_resume(folder, steps, config, resume)
        for method in config.run.methods:
            metrics.append(_method(folder, steps, config, method, ingest, cluster, store, ray, fit_job))
            if until != "train":
                write_json_atomic(out / "metrics.json", metrics)
        if until == "report":
            _report(folder, config, metrics, store)
        return Outcome(ingest.result, cluster.result, metrics)


def is_done(config: RunConfig, until: str) -> bool:
    """Whether :func:`run` with these arguments would find every stage up to date."""
    folder, config = RunFolder(config.run.out), localised(config)
    return all(_up_to_date(folder, step) for step in plan(config, until).values())


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


def _ingest(folder: RunFolder, step: Step, config: RunConfig, ray: _RayOnDemand) -> StageResult:
    def compute(out: Path) -> dict[str, Any]:
        if config.run.task == "retrieval":
            ray.start()
        return task_of(config).ingest(config, out)

    return folder.stage(step.name, step.settings, step.inputs, "ingest", compute)


def _cluster(folder: RunFolder, step: Step, config: RunConfig, ray: _RayOnDemand) -> StageResult:
    def compute(out: Path) -> dict[str, Any]:
        if config.cluster.shards > 0:
            ray.start()
        return task_of(config).cluster(config, folder.path / "ingest", out)

    return folder.stage(step.name, step.settings, step.inputs, "cluster", compute)


def _method(
    folder: RunFolder,
    steps: Mapping[str, Step],
    config: RunConfig,
    method: str,
    ingest: StageResult,
    cluster: StageResult,
    store: tracking.Store | None,
    ray: _RayOnDemand,
    fit_job: FitJob | None,
) -> dict[str, Any]:
    """Train, evaluate and, for the first method, export, inside one MLflow run. Returns the metrics object."""
    path = folder.path / "methods" / method
    train_step = steps[f"train {method}"]
    with _tracker(folder, steps, config, method, store) as tracker:

        def train(out: Path) -> dict[str, Any]:
            ray.start()
            states = _states(folder, method, train_step, mlflow_run_id=tracker.run_id)
            parts = folder.path / "ingest", folder.path / "cluster"
            result = task_of(config).train(config, method, *parts, out, tracker, fit_job, states)
            return {**result, "mlflow_run_id": tracker.run_id}

        trained = folder.stage(train_step.name, train_step.settings, train_step.inputs, f"methods/{method}", train)
        # What it was for is in the method's folder now.
        _states(folder, method, train_step).clear()
        seconds = {"ingest": ingest.seconds, "cluster": cluster.seconds, "train": trained.seconds}
        metrics = {"method": method, **trained.result}
        if (step := steps.get(f"evaluate {method}")) is not None:

            def evaluate() -> dict[str, Any]:
                if (config.train.workers or 1) > 1:
                    ray.start()
                return task_of(config).evaluate(config, method, folder.path / "ingest", path)

            evaluated = folder.value(step.name, step.settings, step.inputs, f"methods/{method}/metrics.json", evaluate)
            seconds["evaluate"] = evaluated.seconds
            metrics = {"method": method, **evaluated.result, "mlflow_run_id": trained.result["mlflow_run_id"]}
            if not evaluated.skipped:
                _log_test(tracker, ingest.result, evaluated.result)
        if (step := steps.get("export")) is not None and method == config.run.methods[0]:

            def export(out: Path) -> dict[str, Any]:
                return export_bundle(config, folder.path, path, out, metrics, train_step.key)

            exported = folder.stage(step.name, step.settings, step.inputs, "bundle", export)
            seconds["export"] = exported.seconds
            if not exported.skipped and tracker.run_id is not None:
                _log_bundle(tracker, folder)
    metrics["seconds"] = seconds
    return metrics


def _states(folder: RunFolder, method: str, train: Step, **facts: Any) -> CheckpointManager:
    """The checkpoints of a training that is not finished; they outlive the command."""
    from pipeline.training.checkpoints import CheckpointManager

    return CheckpointManager(folder.path / "checkpoints" / method, train.key, facts)


def _check_resume(folder: RunFolder, steps: Mapping[str, Step], config: RunConfig, resume: bool) -> None:
    """Without `resume`, forget the checkpoints; with it, make sure that there is one."""
    pending = [(m, step) for m in config.run.methods if not _up_to_date(folder, step := steps[f"train {m}"])]
    saved = {method: _states(folder, method, step) for method, step in pending}
    if not resume:
        for states in saved.values():
            states.clear()
    elif saved and not any(states.newest() for states in saved.values()):
        raise ConfigError(
            f"--resume: {folder.path}/checkpoints holds none of a training with these settings and data; give the settings that it was "
            "stopped with, or leave --resume out to start one"
        )


def export_bundle(
    config: RunConfig, run: Path, method_dir: Path, out: Path, metrics: dict[str, Any], train_key: str
) -> dict[str, Any]:
    """Write the bundle of a trained method, with the ids that updates have folded in since that training.

    Args:
        run: the run folder.  method_dir: the method's, in it.
        metrics: of the evaluation, with `method` and `mlflow_run_id`.

    Returns: the manifest.
    """
    if config.run.task == "ctr":
        from pipeline.ctr.export import data_facts, export_ctr_run

        return export_ctr_run(
            config, run, method_dir, out, metrics, _provenance(config, metrics, data_facts(run / "ingest"))
        )
    from graphhash.graph.vocabulary import Vocabulary
    from pipeline.retrieval.export import export_retrieval
    from pipeline.retrieval.folded_in import FoldedIn, folded_in_dir, folded_in_id
    from pipeline.retrieval.weights import load_method, with_more_ids

    ingested = json.loads((run / "ingest" / "ingest.json").read_text(encoding="utf-8"))
    provenance = _provenance(
        config,
        metrics,
        {key: ingested[key] for key in ("n_train", "n_validation", "n_test", "users_hash", "items_hash")},
    )
    model, *maps = load_method(method_dir, run / "ingest")
    vocabularies = [Vocabulary.load(run / "ingest" / f"{side}.parquet") for side in ("users", "items")]
    if folded_in_id(run, metrics["method"], train_key) is not None:
        folded_in = FoldedIn.load(folded_in_dir(run, metrics["method"]))
        model = with_more_ids(model, folded_in.maps, folded_in.item_bias, folded_in.user_rows)
        maps, vocabularies = folded_in.maps.values(), folded_in.vocabularies.values()
        # Metrics are of the training alone.
        provenance |= {"updates": list(folded_in.updates)} if folded_in.updates else {}
    return export_retrieval(
        model,
        *maps,
        *vocabularies,
        out,
        precision=metrics["precision"],
        runtime=config.export.runtime,
        external_data_mib=config.export.external_data_mib,
        metrics={key: value for key, value in metrics.items() if key not in ("method", "mlflow_run_id")},
        provenance=provenance,
    )


def _provenance(config: RunConfig, metrics: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """What a bundle's maker wants to find again; `data` are sizes and hashes of the log."""
    settings = config.flat()
    # Without `data` and `run`, which name places on the maker's machine.
    return {
        "method": metrics["method"],
        "mlflow_run_id": metrics["mlflow_run_id"],
        "settings": {key: settings[key] for key in settings if key.split(".")[0] in ("cluster", "map", "train")},
        "data": {**data, **{key: settings[f"data.{key}"] for key in ("split", "validation", "test", "seed")}},
    }


@contextmanager
def _tracker(
    folder: RunFolder, steps: Mapping[str, Step], config: RunConfig, method: str, store: tracking.Store | None
) -> Iterator[tracking.Tracker]:
    """The MLflow run of a training that is about to happen, or that later stages add to; else one that logs nothing."""
    train = steps[f"train {method}"]
    run_id = None
    if _up_to_date(folder, train):
        recorded = folder.current(train.name)
        run_id = recorded.result.get("mlflow_run_id") if recorded else None
        store = store if run_id else None  # Trained without MLflow: there is nothing to add to.
    elif (begun := _states(folder, method, train).manifest()) is not None:
        run_id = begun.get("mlflow_run_id")
    if all(_up_to_date(folder, step) for step in steps_of(steps, config, method)):
        # A command that was killed after its last stage has left the run open, and it did finish.
        if store is None or run_id not in store.killed:
            yield tracking.Tracker()
            return
    params = {key: value for key, value in config.flat().items() if key != "run.methods"} | {"method": method}
    alone = len(config.run.methods) == 1
    with tracking.training_run(store, method, params, alone=alone, run_id=run_id) as tracker:
        yield tracker


def _log_test(tracker: tracking.Tracker, ingest: Mapping[str, Any], evaluated: Mapping[str, Any]) -> None:
    """The test metrics, and every hash that says what the numbers belong to."""
    tracker.log_metrics({f"test.{key}": value for key, value in _flatten(evaluated).items()})
    known = _flatten({"ingest": ingest}) | _flatten(evaluated)
    tracker.set_tags({f"graphhash.{key}": value for key, value in known.items() if "hash" in key})


def _log_bundle(tracker: tracking.Tracker, folder: RunFolder) -> None:
    """The bundle as it is, and its graph as a model of MLflow's onnx flavour with a call that works as example."""
    from pipeline.tracking.registry import BUNDLE_TAG, known_example
    from serving.bundle import MODEL, check_bundle
    from serving.session import only_errors

    only_errors()  # MLflow opens a session to try the example.
    bundle = folder.path / "bundle"
    manifest = check_bundle(bundle)
    example, outputs = known_example(manifest, folder.path / "ingest")
    tracker.log_artifact(bundle, "bundle")
    tracker.log_onnx_model(bundle / MODEL, example, {BUNDLE_TAG: manifest["manifest_sha256"]}, outputs)


def _report(folder: RunFolder, config: RunConfig, metrics: list[dict[str, Any]], store: tracking.Store | None) -> None:
    _log.info("report ...")
    files = task_of(config).report(folder.path)
    if store is None:
        return
    for entry in metrics:
        tracker = store.tracker(entry.get("mlflow_run_id"))
        for file in files:
            tracker.log_artifact(file, "report")


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        flat |= _flatten(entry, f"{prefix}{key}.") if isinstance(entry, Mapping) else {f"{prefix}{key}": entry}
    return flat
