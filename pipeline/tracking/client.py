"""The MLflow client: timeouts, console output, errors of one line, and settings of the process that MLflow reads."""

from __future__ import annotations

import functools
import logging
import os
import sqlite3
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from urllib.parse import unquote, urlsplit

from pipeline.errors import TrackingError
from pipeline.storage.atomic import PARTIAL, write_bytes_atomic
from pipeline.storage.locks import file_lock
from pipeline.storage.reachable import unreachable_uri

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
            raise TrackingError(f"MLflow: {reason}; set MLFLOW_TRACKING_URI") from error

    return checked


def is_unreachable(error: BaseException | None) -> bool:
    """Whether the store could not be reached, or could not work: the same call may succeed later."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    if isinstance(error, MlflowException):
        return error_code(error) in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
    return isinstance(error, (RequestException, SQLAlchemyError, OSError)) and not isinstance(error, FileNotFoundError)


def error_code(error: BaseException | None) -> str:
    """MLflow's code of an error, such as "RESOURCE_DOES_NOT_EXIST"; empty for an error that is not MLflow's."""
    return str(getattr(error, "error_code", ""))


@functools.cache
def client_of(uri: str) -> MlflowClient:
    """The client of a store; the SQLite file is made where there is none."""
    with quiet(), no_stray_folders(uri):
        from mlflow import MlflowClient

        if uri.startswith(SQLITE) and not (file := sqlite_file(uri)).exists():
            # Where the file cannot be written, MLflow says so itself.
            with suppress(OSError):
                _make_sqlite_file(file)
        return MlflowClient(tracking_uri=uri)


def _make_sqlite_file(file: Path) -> None:
    """Make an empty store, all at once: MLflow takes some sixty migrations, after each of which SQLite waits for the disk.

    They take place in a temporary folder without that waiting, and the file gets its name when it is whole.

    Raises:
        OSError: it cannot be written.
    """
    from mlflow import MlflowClient
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def do_not_wait(connection: Any, _record: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            places = connection.execute("PRAGMA database_list").fetchall()
            if any(Path(place).parent == made.parent for *_, place in places):
                connection.execute("PRAGMA synchronous=OFF")

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder).resolve() / "mlflow.db"
        event.listen(Engine, "connect", do_not_wait)
        try:
            MlflowClient(tracking_uri=f"{SQLITE}{made}").search_experiments(max_results=1)
        finally:
            event.remove(Engine, "connect", do_not_wait)
        partial = file.with_name(f".{file.name}.{os.getpid()}{PARTIAL}")
        try:
            write_bytes_atomic(partial, made.read_bytes())
            # Unlike a rename, a link replaces no store that somebody else has made, and written to, meanwhile.
            os.link(partial, file)
        except FileExistsError:
            pass
        finally:
            partial.unlink(missing_ok=True)


def absolute_uri(uri: str) -> str:
    """The tracking URI with an absolute path: a relative SQLite path means another file in another working directory."""
    if uri.startswith(SQLITE) and not uri.startswith(SQLITE + "/"):
        path, mark, options = uri.removeprefix(SQLITE).partition("?")
        file = str(Path(path).resolve())
        # Behind a question mark there are options, and SQLAlchemy takes the path for quoted.
        return SQLITE + file.replace("%", "%25").replace("?", "%3F") + mark + options
    return uri


def sqlite_file(uri: str) -> Path:
    """The file of a SQLite store."""
    return Path(unquote(uri.removeprefix(SQLITE).partition("?")[0]))


@contextmanager
def no_stray_folders(uri: str) -> Iterator[None]:
    """Remove the empty folders that MLflow makes during the block: `mlruns`, and one of the quoted name of a SQLite store's folder."""
    with ExitStack() as stack:
        stack.enter_context(no_empty_folder(Path("mlruns")))
        quoted = Path(uri.removeprefix(SQLITE).partition("?")[0]).parent
        if uri.startswith(SQLITE) and quoted != sqlite_file(uri).parent:
            stack.enter_context(no_empty_folder(quoted))
        yield


def check_answers(uri: str) -> None:
    """Raise TrackingError where no server answers at a tracking URI: MLflow would ask for minutes before it says so."""
    reason = unreachable_uri(uri)
    if reason is not None:
        raise TrackingError(
            f"MLflow: the server at {_without_password(uri)} does not answer ({reason}); start it, or set MLFLOW_TRACKING_URI"
        )


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    return uri if "@" not in parts.netloc else uri.replace(parts.netloc, parts.netloc.rpartition("@")[2])


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
    """Make a store the process's default during the block: MLflow resolves `models:/` URIs there, whichever client is called."""
    import mlflow

    variable = os.environ.get("MLFLOW_TRACKING_URI")
    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        # Setting one sets the environment as well, and would outlast a later change there.
        mlflow.set_tracking_uri(None if before == variable else before)  # type: ignore[arg-type]  # None unsets it, says its docstring
        if variable is not None:
            os.environ["MLFLOW_TRACKING_URI"] = variable


@contextmanager
def no_empty_folder(folder: Path) -> Iterator[None]:
    """Remove `folder` if the block made it and left it empty, as MLflow's SQLite store does with its default place."""
    existed = folder.exists()
    try:
        yield
    finally:
        if not existed and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def short_timeouts() -> AbstractContextManager[None]:
    """Give up on an unreachable server in seconds, not in minutes: before a training begins, and while it waits."""
    return environment({"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(CONNECT_TIMEOUT_S)})


@contextmanager
def ignored_refusal() -> Iterator[None]:
    """Ignore an error that is not about reaching the store, as for a run that was deleted meanwhile."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, ValueError) as error:
        if is_unreachable(error):
            raise


@contextmanager
def one_at_a_time(uri: str) -> Iterator[None]:
    """Lock the folder of a SQLite store during the block: two processes that create its tables at once would both fail.

    A lock on the file itself would end the locks that SQLite holds on it.
    """
    folder = sqlite_file(uri).parent
    with ExitStack() as stack:
        if uri.startswith(SQLITE) and folder.is_dir():  # SQLite itself names a folder that is not there.
            # A file system without locks: the store still works for one process.
            with suppress(OSError):
                stack.enter_context(file_lock(folder, wait=True))
        yield
