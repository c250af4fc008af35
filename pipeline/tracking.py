"""MLflow: one run per training, written through `MlflowClient` alone.

The only module that imports MLflow. The fluent interface (`mlflow.log_metric` and the like) keeps a current run
per process and starts runs by itself, which in Ray's processes leaves stray ones; here every call names its run.
A `Tracker` holds two texts, so it can be sent to another process and log from there.

    store = connect("graphhash")                       # early: fails here when the server is away
    with training_run(store, "soft", {"train.dim": 64}) as tracker:
        tracker.log_metrics({"recall@20": 0.12}, step=10)

The store is `MLFLOW_TRACKING_URI`, or `mlflow.db` (SQLite) in the current folder. When `MLFLOW_RUN_ID` is set, as
`mlflow run` does, that run is adopted: by the training itself, or as the parent of several. A command of many
trainings opens a run of its own for them, the parent of all:

    with parent_run(store, "compare", params) as (tracker, nested):
        with training_run(nested, "soft", {...}) as child: ...
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient

DEFAULT_URI = "sqlite:///mlflow.db"
SQLITE = "sqlite:///"
# MLflow's own limits on one log_batch call, and on the length of a value.
MAX_METRICS, MAX_PARAMS, MAX_TAGS = 1000, 100, 100
MAX_PARAM_LENGTH, MAX_TAG_LENGTH = 6000, 5000
CONNECT_TIMEOUT_S = 10

P = ParamSpec("P")
T = TypeVar("T")


class TrackingError(RuntimeError):
    """The MLflow store cannot be reached, or refused what it was given."""


@dataclass(frozen=True)
class Store:
    """Where runs go: a tracking URI that is valid from any working directory, and an experiment."""

    uri: str
    experiment_id: str
    adopted_run_id: str | None = None
    """The run that the caller opened (MLFLOW_RUN_ID), if any."""
    parent_run_id: str | None = None
    """The run that all others are nested under, if any; none adopts the caller's run then."""


def _one_line_errors(function: Callable[P, T]) -> Callable[P, T]:
    """Turn MLflow's and the database's errors into a `TrackingError` of one line."""

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        with _quiet():
            from mlflow.exceptions import MlflowException
            from requests import RequestException
            from sqlalchemy.exc import SQLAlchemyError
        try:
            return function(*args, **kwargs)
        except (MlflowException, SQLAlchemyError, RequestException, OSError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if "Max retries exceeded" in reason:
                reason = f"the server at {os.environ.get('MLFLOW_TRACKING_URI')} does not answer"
            reason = reason.split(". ")[0][:300]
            raise TrackingError(
                f"MLflow: {reason}; set MLFLOW_TRACKING_URI, or go without: --no-mlflow"
            ) from error

    return checked


@_one_line_errors
def connect(experiment: str) -> Store:
    """Open the store, making the SQLite file and the experiment where they are missing.

    Raises:
        TrackingError: the server does not answer, the file cannot be written, or the experiment was deleted.
    """
    uri = _absolute(os.environ.get("MLFLOW_TRACKING_URI", "").strip() or DEFAULT_URI)
    # The patience that suits a long training (minutes of retries) is not wanted before it has begun.
    patience = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(CONNECT_TIMEOUT_S)}
    with _quiet(), _environment(patience), _no_empty_folder(Path("mlruns")):
        client = _client(uri)
        adopted = os.environ.get("MLFLOW_RUN_ID", "").strip() or None
        if adopted is not None:
            return Store(uri, client.get_run(adopted).info.experiment_id, adopted)
        found = client.get_experiment_by_name(experiment)
        if found is not None and found.lifecycle_stage == "deleted":
            raise TrackingError(
                f"MLflow: experiment {experiment!r} was deleted in {uri}; restore it, or name another: "
                "run.experiment=NAME"
            )
        if found is not None:
            return Store(uri, found.experiment_id)
        # Beside the SQLite file: MLflow's default is the working directory of whoever comes first.
        location = None
        if uri.startswith(SQLITE):
            location = (Path(uri.removeprefix(SQLITE)).parent / "mlartifacts").as_uri()
        return Store(uri, client.create_experiment(experiment, artifact_location=location))


@dataclass(frozen=True)
class Tracker:
    """One MLflow run, or, without a run id, nothing: every call is then a no-op."""

    uri: str = ""
    run_id: str | None = None

    @_one_line_errors
    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters by dotted key. A value logged before cannot change."""
        from mlflow.entities import Param

        entries = [Param(_name(key), str(value)[:MAX_PARAM_LENGTH]) for key, value in params.items()]
        for start in range(0, len(entries) if self.run_id else 0, MAX_PARAMS):
            self._log_batch(params=entries[start : start + MAX_PARAMS])

    @_one_line_errors
    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Log numbers at one step (an epoch). Entries that are no numbers are left out."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        entries = [
            Metric(_name(key), float(value), now_ms, step)
            for key, value in metrics.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        ]
        for start in range(0, len(entries) if self.run_id else 0, MAX_METRICS):
            self._log_batch(metrics=entries[start : start + MAX_METRICS])

    @_one_line_errors
    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags, such as the hashes of the bucket maps."""
        from mlflow.entities import RunTag

        entries = [RunTag(_name(key), str(value)[:MAX_TAG_LENGTH]) for key, value in tags.items()]
        for start in range(0, len(entries) if self.run_id else 0, MAX_TAGS):
            self._log_batch(tags=entries[start : start + MAX_TAGS])

    @_one_line_errors
    def rename(self, name: str) -> None:
        """Give the run another name."""
        if self.run_id is not None:
            with _quiet():
                _client(self.uri).update_run(self.run_id, name=name)

    @_one_line_errors
    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a file, or all of a folder, below `folder` of the run's artifacts."""
        if self.run_id is None:
            return
        with _quiet():
            log = _client(self.uri).log_artifacts if path.is_dir() else _client(self.uri).log_artifact
            log(self.run_id, str(path), folder)

    @_one_line_errors
    def log_onnx_model(
        self, model_path: Path, example: Mapping[str, np.ndarray], outputs: Sequence[str]
    ) -> str | None:
        """Log an ONNX file as an MLflow model of the onnx flavour, and return its URI.

        Args:
            model_path: `model.onnx`, with its data file beside it if it has one.
            example: one array per input that the logged model is to take; the graph's other inputs keep their defaults,
                because a signature of MLflow's has no optional tensors. The signature is read from the graph.
            outputs: those that the logged model is to give.
        """
        if self.run_id is None:
            return None
        with _quiet(), _no_empty_folder(Path("mlruns")):
            import mlflow
            import onnx
            from mlflow.models import Model

            from pipeline.onnx_parts import keep_part

            model = onnx.load(model_path)
            keep_part(model.graph, tuple(example), outputs)
            client = _client(self.uri)
            run = client.get_run(self.run_id)
            # Without this MLflow files the model under the process's current experiment, whatever the run's is.
            logged = client.create_logged_model(
                run.info.experiment_id, name="model", source_run_id=self.run_id, params=run.data.params
            )
            # The store of a model is taken from the process's setting, which is put back.
            before = mlflow.get_tracking_uri()
            mlflow.set_tracking_uri(self.uri)
            try:
                info = Model.log(
                    None,
                    mlflow.onnx,
                    model_id=logged.model_id,
                    run_id=self.run_id,
                    onnx_model=model,
                    signature=_signature(model),
                    input_example=dict(example),
                    pip_requirements=_requirements(),
                    # MLflow's default asks for CUDA first and warns at length wherever there is none.
                    onnx_execution_providers=["CPUExecutionProvider"],
                )
            finally:
                mlflow.set_tracking_uri(before)
            return info.model_uri

    def _log_batch(self, **entries: Any) -> None:
        with _quiet():
            _client(self.uri).log_batch(self.run_id, **entries)

    @_one_line_errors
    def _end(self, status: str) -> None:
        if self.run_id is not None:
            with _quiet():
                _client(self.uri).set_terminated(self.run_id, status)


@contextmanager
def training_run(
    store: Store | None,
    name: str,
    params: Mapping[str, Any],
    *,
    alone: bool = True,
    run_id: str | None = None,
) -> Iterator[Tracker]:
    """Open a run for one training and end it with the truth: FINISHED, FAILED, or KILLED when it was interrupted.

    Args:
        store: None tracks nothing.
        name: name of the run, the method.
        params: logged at once.
        alone: whether this is the command's only training, which then takes over the adopted run, if there is one.
        run_id: an earlier run to go on with, parameters and all; a new one is opened if the store has it no more.
    """
    if store is None:
        yield Tracker()
        return
    tracker = _reopen(store, run_id) if run_id else None
    try:
        if tracker is None:
            tracker = _open(store, name, alone=alone)
            tracker.log_params(params)
        yield tracker
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        if tracker is None:
            raise
        try:
            tracker._end(status)
        except TrackingError as second:
            # The first error is the one to report; this one only explains a run that stays open.
            error.add_note(f"the MLflow run {tracker.run_id} could not be marked {status}: {second}")
        raise
    tracker._end("FINISHED")


@contextmanager
def parent_run(
    store: Store | None, name: str, params: Mapping[str, Any], *, run_id: str | None = None
) -> Iterator[tuple[Tracker, Store | None]]:
    """Open a run for a command of many trainings, and end it as :func:`training_run` does.

    Args:
        store, params: as there.
        name: name of the run, the command.
        run_id: the run of an earlier call of the command to go on with, parameters and all; an adopted run is preferred.

    Yields its tracker, and the store to give to the trainings, which nests their runs under this one.
    """
    if store is None:
        yield Tracker(), None
        return
    with training_run(store, name, params, run_id=None if store.adopted_run_id else run_id) as tracker:
        yield tracker, replace(store, adopted_run_id=None, parent_run_id=tracker.run_id)


@_one_line_errors
def _open(store: Store, name: str, *, alone: bool) -> Tracker:
    with _quiet():
        client = _client(store.uri)
        if store.adopted_run_id is not None and alone:
            client.update_run(store.adopted_run_id, status="RUNNING")
            client.set_tag(store.adopted_run_id, "graphhash.method", name)
            return Tracker(store.uri, store.adopted_run_id)
        tags = {"graphhash.method": name}
        parent = store.parent_run_id or store.adopted_run_id
        if parent is not None:
            tags["mlflow.parentRunId"] = parent
        run = client.create_run(store.experiment_id, run_name=name, tags=tags)
        return Tracker(store.uri, run.info.run_id)


@_one_line_errors
def _reopen(store: Store, run_id: str) -> Tracker | None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

    with _quiet():
        try:
            _client(store.uri).update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                raise
            return None
    return Tracker(store.uri, run_id)


@functools.cache
def _client(uri: str) -> MlflowClient:
    with _quiet():
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=uri)


def _absolute(uri: str) -> str:
    """A relative SQLite path means another file in a process with another working directory."""
    if uri.startswith(SQLITE) and not uri.startswith(SQLITE + "/"):
        return SQLITE + str(Path(uri.removeprefix(SQLITE)).resolve())
    return uri


def _name(key: str) -> str:
    return key.replace("@", "_at_")  # MLflow's names have no @.


def _signature(model: Any) -> Any:
    """The graph's inputs and outputs as an MLflow signature; a named axis counts as -1."""
    import numpy as np
    import onnx
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    def schema(values: Any) -> Schema:
        specs = []
        for value in values:
            kind = value.type.tensor_type
            dtype = (
                np.dtype(str)
                if kind.elem_type == onnx.TensorProto.STRING
                else np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
            )
            shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
            specs.append(TensorSpec(dtype, shape, value.name))
        return Schema(specs)

    stored = {tensor.name for tensor in model.graph.initializer}
    return ModelSignature(
        schema(v for v in model.graph.input if v.name not in stored), schema(model.graph.output)
    )


def _requirements() -> list[str]:
    """What the logged model needs, with only that one of the two onnxruntime packages that is installed here.

    MLflow's own inference lists both, and installing both breaks the GPU one.
    """
    installed = {d.metadata["Name"].lower() for d in importlib.metadata.distributions() if d.metadata["Name"]}
    runtime = "onnxruntime-gpu" if "onnxruntime-gpu" in installed else "onnxruntime"
    names = ["mlflow", "numpy", "onnx", runtime]
    return [f"{name}=={importlib.metadata.version(name)}" for name in names]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep MLflow's and its database's progress notes off the console; errors come as exceptions."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables that the user has not set, for the length of the block."""
    fresh = {key: value for key, value in variables.items() if key not in os.environ}
    os.environ.update(fresh)
    try:
        yield
    finally:
        for key in fresh:
            os.environ.pop(key, None)


@contextmanager
def _no_empty_folder(folder: Path) -> Iterator[None]:
    """Remove `folder` if the block made it and left it empty, as MLflow's SQLite store does with its default place."""
    existed = folder.exists()
    try:
        yield
    finally:
        if not existed and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
