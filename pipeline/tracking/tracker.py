"""MLflow: one run per training, written through `MlflowClient` alone.

MLflow itself is behind `pipeline.tracking.client`. The fluent interface (`mlflow.log_metric` and the like) keeps a current
run per process and starts runs by itself, which in Ray's processes leaves stray ones; here every call names its run.
A `Tracker` holds texts and paths, so it can be sent to another process and log from there.

    store = connect("graphhash", Path("out"))          # early: fails here when the server is away
    with training_run(store, "soft", {"train.dim": 64}) as tracker:
        tracker.log_metrics({"recall@20": 0.12}, step=10)

The store is `MLFLOW_TRACKING_URI`, or `mlflow.db` (SQLite) in the current folder. When `MLFLOW_RUN_ID` is set, as
`mlflow run` does, that run is adopted: by the training itself, or as the parent of several. A command of many
trainings opens a run of its own for them, the parent of all:

    with parent_run(store, "compare", params) as (tracker, nested):
        with training_run(nested, "soft", {...}) as child: ...

A store that goes away later stops nothing: what it should have got is kept in the run folder (`pipeline.tracking.outbox`) and delivered
when it answers again, at the latest by the next command in that folder. A run whose process was killed outright is marked so then.
"""

from __future__ import annotations

import functools
import getpass
import hashlib
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import TrackingError
from pipeline.tracking.client import (
    SQLITE,
    absolute_uri,
    check_answers,
    client_of,
    error_code,
    ignored_refusal,
    is_unreachable,
    no_stray_folders,
    one_at_a_time,
    one_line_errors,
    quiet,
    short_timeouts,
    sqlite_file,
)
from pipeline.tracking.delivery import send
from pipeline.tracking.onnx_model import MAX_METRICS, ModelCall
from pipeline.tracking.outbox import FOLDER, Outbox, provisional_id

if TYPE_CHECKING:
    pass

DEFAULT_URI = "sqlite:///mlflow.db"
# MLflow's own limits on one log_batch call, and on the length of a value.
MAX_PARAMS, MAX_TAGS = 100, 100
MAX_PARAM_LENGTH, MAX_TAG_LENGTH = 6000, 5000
# A store that is away is asked again no sooner, so that a training is not held up at every epoch.
RETRY_AFTER_S = 30.0
_retry_at: dict[str, float] = {}
_noted: set[str] = set()


@dataclass(frozen=True)
class Store:
    """Where runs go: a tracking URI that is valid from any working directory, and an experiment."""

    uri: str
    experiment_id: str
    adopted_run_id: str | None = None
    """The run that the caller opened (MLFLOW_RUN_ID), if any."""
    parent_run_id: str | None = None
    """The run that all others are nested under, if any; none adopts the caller's run then."""
    outbox: Outbox | None = None
    """Keeps what the store cannot take while it is away; None: an error is raised then."""
    killed: tuple[str, ...] = ()
    """Runs that an earlier command in the same folder left open, because it was killed."""

    def tracker(self, run_id: str | None) -> Tracker:
        """To add to a run of this store; without an id, to nothing."""
        return Tracker(self.uri, run_id, self.outbox)


@one_line_errors
def connect(experiment: str, folder: Path | None = None) -> Store:
    """Open the store, making the SQLite file and the experiment where they are missing.

    Args:
        folder: the run folder, which must be locked by the caller. What an earlier command left undelivered there is delivered, and
            the runs that it left open are marked KILLED.

    Raises:
        TrackingError: the server does not answer, the file cannot be written, or the experiment was deleted; or there is no store
            named in a Ray job, whose current folder is a copy that goes away with it.
    """
    named = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    uri = absolute_uri(named or DEFAULT_URI)
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and uri != named and uri.startswith(SQLITE):
        raise TrackingError(
            f"MLflow: in a Ray job {named or DEFAULT_URI} would lie in the job's temporary folder; set MLFLOW_TRACKING_URI to a server "
            "or an absolute path, or go without: --no-mlflow"
        )
    check_answers(uri)
    outbox = None if folder is None else outbox_of(folder, uri)
    with quiet(), short_timeouts(), no_stray_folders(uri), one_at_a_time(uri):
        store = _find_experiment(uri, experiment)
        if outbox:
            n_kept = len(outbox)
            n_sent = outbox.deliver(functools.partial(send, uri, outbox), is_unreachable)
            if n_kept:
                refused = (
                    f"; the others are in {outbox.folder}/refused, each with the reason" if n_sent < n_kept else ""
                )
                _note(f"{n_sent} of {n_kept} entries that were kept for MLflow are delivered{refused}")
            killed = tuple(outbox.open_runs())
            for run_id in killed:
                with ignored_refusal():
                    send(uri, outbox, outbox.real_id(run_id), "status", {"status": "KILLED", "end_time": _now_ms()})
                outbox.ended(run_id)
            store = replace(store, killed=killed)
    return replace(store, outbox=outbox)


def _find_experiment(uri: str, experiment: str) -> Store:
    client = client_of(uri)
    adopted = os.environ.get("MLFLOW_RUN_ID", "").strip() or None
    if adopted is not None:
        return Store(uri, client.get_run(adopted).info.experiment_id, adopted)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        # Beside the SQLite file: MLflow's default is the working directory of whoever comes first.
        location = None
        if uri.startswith(SQLITE):
            location = (sqlite_file(uri).parent / "mlartifacts").as_uri()
        try:
            return Store(uri, client.create_experiment(experiment, artifact_location=location))
        except Exception:
            # Another command may have been quicker.
            if (found := client.get_experiment_by_name(experiment)) is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"MLflow: experiment {experiment!r} was deleted in {uri}; restore it, or name another: run.experiment=NAME"
        )
    return Store(uri, found.experiment_id)


def has_undelivered(folder: Path) -> bool:
    """Whether an earlier command in a run folder has left something for :func:`connect` to deliver or to end."""
    return bool(outbox_of(folder, absolute_uri(os.environ.get("MLFLOW_TRACKING_URI", "").strip() or DEFAULT_URI)))


def outbox_of(folder: Path, uri: str) -> Outbox:
    """What a run folder keeps for a store. Each store has its own, as another one would refuse it."""
    # A URI may hold a password, and none of its characters have to suit a file's name.
    return Outbox(Path(folder).absolute() / FOLDER / hashlib.sha256(uri.encode()).hexdigest()[:12])


@dataclass(frozen=True)
class Tracker:
    """One MLflow run, or, without a run id, nothing: every call is then a no-op.

    With an outbox no call fails because the store is away; a refusal is a TrackingError in any case.
    """

    uri: str = ""
    run_id: str | None = None
    outbox: Outbox | None = None
    prefix: str = ""
    """Of the names of metrics."""

    def named(self, prefix: str) -> Tracker:
        """The same run, and metrics by the names ``<prefix>.<name>``."""
        return replace(self, prefix=f"{prefix}.")

    def of(self, run_id: str | None) -> Tracker:
        """The same store, and another run."""
        return replace(self, run_id=run_id)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters by dotted key, but for those that are None. A value logged before cannot change."""
        entries = [[_name(key), str(value)[:MAX_PARAM_LENGTH]] for key, value in params.items() if value is not None]
        for start in range(0, len(entries), MAX_PARAMS):
            self._send("params", {"entries": entries[start : start + MAX_PARAMS]})

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Log numbers at one step (an epoch). Entries that are no numbers are left out."""
        now_ms = _now_ms()
        entries = [
            [_name(self.prefix + key), float(value), now_ms, step]
            for key, value in metrics.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        ]
        for start in range(0, len(entries), MAX_METRICS):
            self._send("metrics", {"entries": entries[start : start + MAX_METRICS]})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags, such as the hashes of the bucket maps."""
        entries = [[_name(key), str(value)[:MAX_TAG_LENGTH]] for key, value in tags.items()]
        for start in range(0, len(entries), MAX_TAGS):
            self._send("tags", {"entries": entries[start : start + MAX_TAGS]})

    def log_dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        """Log the data that a run was trained on.

        Args:
            digest: equal for equal data, at most 36 characters.
            source: path or URI.
            profile: numbers of the data, such as users and interactions.
        """
        self._send("dataset", {"name": name, "digest": digest, "source": source, "profile": dict(profile)})

    def rename(self, name: str) -> None:
        """Give the run another name."""
        self._send("rename", {"name": name})

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a file, or all of a folder, below `folder` of the run's artifacts. Delivered later, it is what lies there then."""
        self._send("artifact", {"path": str(Path(path).absolute()), "folder": folder})

    def log_onnx_model(self, model_path: Path, call: ModelCall, tags: Mapping[str, str] | None = None) -> None:
        """Log an ONNX file as an MLflow model of the onnx flavour.

        Args:
            model_path: `model.onnx`, with its data file beside it if it has one.
            call: an example, stored with the model. The signature is read from the graph.
            tags: of the model, to find it by.
        """
        content = {
            "path": str(Path(model_path).absolute()),
            "example": {name: [array.dtype.str, array.tolist()] for name, array in call.inputs.items()},
            "tags": dict(tags or {}),
            "outputs": list(call.outputs),
        }
        self._send("model", content)

    def end(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        # The last chance of this command to deliver what was kept.
        _retry_at.pop(self.uri, None)
        self._send("status", {"status": status, "end_time": _now_ms()})
        if self.run_id is not None and self.outbox is not None:
            self.outbox.ended(self.run_id)

    def _send(self, kind: str, content: dict[str, Any]) -> None:
        if self.run_id is not None and content.get("entries") != []:
            self._send_to(self.run_id, kind, content)  # Imports MLflow.

    @one_line_errors
    def _send_to(self, run_id: str, kind: str, content: dict[str, Any]) -> None:
        if self.outbox is None:
            with quiet():
                send(self.uri, None, run_id, kind, content)
            return
        if time.monotonic() >= _retry_at.get(self.uri, 0.0):
            try:
                with quiet(), short_timeouts():
                    n = len(self.outbox)
                    if n and (n := self.outbox.deliver(functools.partial(send, self.uri, self.outbox), is_unreachable)):
                        _noted.discard(self.uri)
                        _note(f"MLflow answers again; {n} entries delivered")
                    # While another process delivers, older entries of this run may still lie there.
                    if not len(self.outbox):
                        send(self.uri, self.outbox, self.outbox.real_id(run_id), kind, content)
                        return
            except Exception as error:
                if not is_unreachable(error):
                    raise
                if self.uri not in _noted:
                    _noted.add(self.uri)
                    _note(
                        f"MLflow does not answer; what it should get is kept in {self.outbox.folder} and delivered later"
                    )
                _retry_at[self.uri] = time.monotonic() + RETRY_AFTER_S
        self.outbox.put(run_id, kind, content)


@contextmanager
def training_run(
    store: Store | None,
    name: str,
    params: Mapping[str, Any],
    *,
    tags: Mapping[str, str] | None = None,
    alone: bool = True,
    run_id: str | None = None,
) -> Iterator[Tracker]:
    """Open a run for one training and end it with the truth: FINISHED, FAILED, or KILLED when it was interrupted.

    Args:
        store: None tracks nothing.
        name: name of the run; an adopted run keeps its own.
        params: logged at once.
        tags: set at once.
        alone: whether this is the command's only training, which then takes over the adopted run, if there is one.
        run_id: an earlier run to go on with, parameters and all; a new one is opened if the store has it no more.
    """
    if store is None:
        yield Tracker()
        return
    tracker = _reopen(store, run_id) if run_id else None
    try:
        if tracker is None:
            tracker = _open(store, name, tags or {}, alone=alone)
            tracker.log_params(params)
        yield tracker
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        if tracker is None:
            raise
        try:
            tracker.end(status)
        except TrackingError as second:
            # The first error is the one to report; this one only explains a run that stays open.
            error.add_note(f"the MLflow run {tracker.run_id} could not be marked {status}: {second}")
        raise
    tracker.end("FINISHED")


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
        try:
            yield tracker, replace(store, adopted_run_id=None, parent_run_id=tracker.run_id)
        except BaseException:
            # Trainings in processes of their own, which end with the command, had no time to say so.
            for run_id in store.outbox.open_runs() if store.outbox is not None else ():
                if run_id != tracker.run_id:
                    with suppress(TrackingError):
                        tracker.of(run_id).end("KILLED")
            raise


@one_line_errors
def _open(store: Store, name: str, tags: Mapping[str, str], *, alone: bool) -> Tracker:
    if store.adopted_run_id is not None and alone:
        tracker = store.tracker(store.adopted_run_id)
        # Whoever opened this run ends it, if we cannot: it is not noted as open.
        tracker._send("status", {"status": "RUNNING", "end_time": None})
        tracker.set_tags(tags)
        return tracker
    parent = store.parent_run_id or store.adopted_run_id
    nested = {} if parent is None else {"mlflow.parentRunId": parent}
    content = {
        "experiment_id": store.experiment_id,
        "name": name,
        "tags": {**_source(), **nested, **tags},
        "start_time": _now_ms(),
    }
    try:
        with quiet(), short_timeouts():
            run_id = send(store.uri, store.outbox, "", "create", content)
            assert run_id is not None
    except Exception as error:
        if store.outbox is None or not is_unreachable(error):
            raise
        run_id = provisional_id()
        store.outbox.put(run_id, "create", content)
    if store.outbox is not None:
        store.outbox.opened(run_id)
    return store.tracker(run_id)


@one_line_errors
def _reopen(store: Store, run_id: str) -> Tracker | None:
    tracker = store.tracker(run_id)
    try:
        tracker._send("status", {"status": "RUNNING", "end_time": None})
    except TrackingError as error:
        if error_code(error.__cause__) != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    if store.outbox is not None:
        store.outbox.opened(run_id)
    return tracker


def _source() -> dict[str, str]:
    """MLflow's tags for what started a run, and who: the command line, or "graphhash" in another program and in Ray's workers."""
    program, *words = sys.argv or [""]
    is_command = Path(program).name == "graphhash" or Path(program).parts[-2:] == ("pipeline", "__main__.py")
    command = shlex.join(["graphhash", *words]) if is_command else "graphhash"
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    tags = {"mlflow.source.name": command[:MAX_TAG_LENGTH], "mlflow.source.type": "JOB" if in_job else "LOCAL"}
    # A container's user may have no name.
    with suppress(OSError, KeyError):
        tags["mlflow.user"] = getpass.getuser()
    return tags


def _note(line: str) -> None:
    print(f"graphhash: {line}", file=sys.stderr, flush=True)


def _now_ms() -> int:
    return int(time.time() * 1000)


def _name(key: str) -> str:
    return key.replace("@", "_at_")  # MLflow's names have no @.
