"""The MLflow store of a command: where runs go, and what an earlier command left undelivered.

The store is `MLFLOW_TRACKING_URI`, or `mlflow.db` (SQLite) in the current folder.

    store = connect("graphhash", Path("out"))          # early: fails here when the server is away

A store that goes away later stops nothing: what it should have got is kept in the run folder (`pipeline.tracking.outbox`) and delivered
when it answers again, at the latest by the next command in that folder. A run whose process was killed outright is marked so then.
"""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.errors import TrackingError
from pipeline.tracking.client import (
    SQLITE,
    absolute_uri,
    check_answers,
    client_of,
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
from pipeline.tracking.outbox import FOLDER, Outbox
from pipeline.tracking.tracker import Tracker, note, now_ms

DEFAULT_URI = "sqlite:///mlflow.db"


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
            "or an absolute path"
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
                note(f"{n_sent} of {n_kept} entries that were kept for MLflow are delivered{refused}")
            killed = tuple(outbox.open_runs())
            for run_id in killed:
                with ignored_refusal():
                    send(uri, outbox, outbox.real_id(run_id), "status", {"status": "KILLED", "end_time": now_ms()})
                outbox.ended(run_id)
            store = replace(store, killed=killed)
    return replace(store, outbox=outbox)


def has_undelivered(folder: Path) -> bool:
    """Whether an earlier command in a run folder has left something for :func:`connect` to deliver or to end."""
    return bool(outbox_of(folder, absolute_uri(os.environ.get("MLFLOW_TRACKING_URI", "").strip() or DEFAULT_URI)))


def outbox_of(folder: Path, uri: str) -> Outbox:
    """What a run folder keeps for a store. Each store has its own, as another one would refuse it."""
    # A URI may hold a password, and none of its characters have to suit a file's name.
    return Outbox(Path(folder).absolute() / FOLDER / hashlib.sha256(uri.encode()).hexdigest()[:12])


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
            f"MLflow: experiment {experiment!r} was deleted in {uri}; restore it, or name another experiment"
        )
    return Store(uri, found.experiment_id)
