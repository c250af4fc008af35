"""How MLflow is told one thing: the client, its patience and its noise, its errors in one line.

`pipeline.tracking.tracker` says what there is to tell. This module and `pipeline.tracking.registry` are the only ones that import MLflow.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from pipeline.errors import TrackingError
from pipeline.storage.locks import file_lock
from pipeline.tracking.outbox import PROVISIONAL, Outbox

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"
CONNECT_TIMEOUT_S = 10

P = ParamSpec("P")
T = TypeVar("T")


def one_line_errors(function: Callable[P, T]) -> Callable[P, T]:
    """Turn MLflow's and the database's errors into a `TrackingError` of one line."""

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        with quiet():
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
            raise TrackingError(f"MLflow: {reason}; set MLFLOW_TRACKING_URI, or go without: --no-mlflow") from error

    return checked


def send(uri: str, outbox: Outbox | None, run_id: str, kind: str, content: Mapping[str, Any]) -> str | None:
    """Tell the store one thing about a run. Returns the id of a run that this opened."""
    from mlflow.entities import Metric, Param, RunStatus, RunTag

    client = client_of(uri)
    if run_id.startswith(PROVISIONAL) and kind != "create":
        raise ValueError(f"the run {run_id} was never opened")
    match kind:
        case "create":
            tags = dict(content["tags"])
            if outbox is not None and "mlflow.parentRunId" in tags:
                tags["mlflow.parentRunId"] = outbox.real_id(tags["mlflow.parentRunId"])
            run = client.create_run(content["experiment_id"], content["start_time"], tags, run_name=content["name"])
            return run.info.run_id
        case "params":
            client.log_batch(run_id, params=[Param(*entry) for entry in content["entries"]])
        case "metrics":
            client.log_batch(run_id, metrics=[Metric(*entry) for entry in content["entries"]])
        case "tags":
            client.log_batch(run_id, tags=[RunTag(*entry) for entry in content["entries"]])
        case "rename":
            client.update_run(run_id, name=content["name"])
        case "status" if RunStatus.is_terminated(RunStatus.from_string(content["status"])):
            client.set_terminated(run_id, content["status"], content["end_time"])
        case "status":
            client.update_run(run_id, status=content["status"])
        case "artifact":
            path = Path(content["path"])
            if not path.exists():
                raise FileNotFoundError(f"{path} is no longer there")
            (client.log_artifacts if path.is_dir() else client.log_artifact)(run_id, str(path), content["folder"])
        case "model":
            from pipeline.tracking.registry import log_onnx_model

            log_onnx_model(uri, run_id, Path(content["path"]), content["example"], content["tags"], content["outputs"])
        case _:
            raise ValueError(f"{kind!r} is nothing that a store can be told")
    return None


def is_away(error: BaseException | None) -> bool:
    """Whether the store could not be reached, or could not work: the same call may succeed later."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    if isinstance(error, MlflowException):
        return error_code(error) in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
    return isinstance(error, (RequestException, SQLAlchemyError, OSError)) and not isinstance(error, FileNotFoundError)


def error_code(error: BaseException | None) -> str:
    return str(getattr(error, "error_code", ""))


@functools.cache
def client_of(uri: str) -> MlflowClient:
    with quiet():
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=uri)


def absolute_uri(uri: str) -> str:
    """A relative SQLite path means another file in a process with another working directory."""
    if uri.startswith(SQLITE) and not uri.startswith(SQLITE + "/"):
        return SQLITE + str(Path(uri.removeprefix(SQLITE)).resolve())
    return uri


@contextmanager
def quiet() -> Iterator[None]:
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
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables that the user has not set, for the length of the block."""
    fresh = {key: value for key, value in variables.items() if key not in os.environ}
    os.environ.update(fresh)
    try:
        yield
    finally:
        for key in fresh:
            os.environ.pop(key, None)


@contextmanager
def current_store(uri: str) -> Iterator[None]:
    """Make a store the process's, by whose setting MLflow finds `models:/` URIs whatever client is asked; then put back what was set."""
    import mlflow

    named = os.environ.get("MLFLOW_TRACKING_URI")
    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        # Setting one sets the environment as well, and would outlast a later change there.
        mlflow.set_tracking_uri(None if before == named else before)
        if named is not None:
            os.environ["MLFLOW_TRACKING_URI"] = named


@contextmanager
def no_empty_folder(folder: Path) -> Iterator[None]:
    """Remove `folder` if the block made it and left it empty, as MLflow's SQLite store does with its default place."""
    existed = folder.exists()
    try:
        yield
    finally:
        if not existed and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def impatient() -> Any:
    """MLflow's patience of minutes is wanted neither before a training has begun nor while it waits."""
    return environment({"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(CONNECT_TIMEOUT_S)})


@contextmanager
def ignored_refusal() -> Iterator[None]:
    """A run that was deleted meanwhile has nothing to be marked."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, ValueError) as error:
        if is_away(error):
            raise


@contextmanager
def one_at_a_time(uri: str) -> Iterator[None]:
    """Two processes that make the tables of one SQLite file at once fail, so they take turns, by a lock on its folder.

    A lock on the file itself would end the locks that SQLite holds on it.
    """
    folder = Path(uri.removeprefix(SQLITE).partition("?")[0]).parent
    with ExitStack() as stack:
        if uri.startswith(SQLITE) and folder.is_dir():  # SQLite itself names a folder that is not there.
            # A file system without locks: the store still works for one process.
            with suppress(OSError):
                stack.enter_context(file_lock(folder, wait=True))
        yield
