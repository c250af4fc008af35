"""MLflow runs: one per training, ended with the truth, and a parent of those of a command with many.

    with training_run(store, "soft", {"train.dim": 64}) as tracker:
        tracker.log_metrics({"recall@20": 0.12}, step=10)

When `MLFLOW_RUN_ID` is set, as `mlflow run` does, that run is adopted: by the training itself, or as the parent of several. A command of
many trainings opens a run of its own for them, the parent of all:

    with parent_run(store, "compare", params) as (tracker, nested):
        with training_run(nested, "soft", {...}) as child: ...
"""

from __future__ import annotations

import getpass
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.errors import TrackingError
from pipeline.tracking.client import (
    error_code,
    is_unreachable,
    one_line_errors,
    quiet,
    short_timeouts,
)
from pipeline.tracking.delivery import send
from pipeline.tracking.outbox import provisional_id
from pipeline.tracking.store import Store
from pipeline.tracking.tracker import MAX_TAG_LENGTH, Tracker, now_ms


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
        tracker.reopen()
        tracker.set_tags(tags)
        return tracker
    parent = store.parent_run_id or store.adopted_run_id
    nested = {} if parent is None else {"mlflow.parentRunId": parent}
    content = {
        "experiment_id": store.experiment_id,
        "name": name,
        "tags": {**_source(), **nested, **tags},
        "start_time": now_ms(),
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
        tracker.reopen()
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
