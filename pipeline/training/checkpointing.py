"""A training that writes checkpoints and resumes from the newest one, in any process: a Ray Train worker, a Ray task, or this one."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from graphhash.errors import DataError
from graphhash.nn.workers import Workers
from pipeline.storage.atomic import FULL_DISK, write_json_atomic
from pipeline.training.checkpoints import CheckpointManager
from pipeline.training.loop import CONTINUE, SAVE, STOP, Callbacks

_log = logging.getLogger(__name__)

# The job, the device, and keyword arguments for `fit`, whose state it returns.
Task = Callable[[dict[str, Any], torch.device, dict[str, Any]], dict[str, Any]]
# Epoch and loss, for the progress bar.
PROGRESS = "progress.json"
PROGRESS_EVERY_S = 0.5


def fit_and_save(
    task: Task,
    job: dict[str, Any],
    device: torch.device,
    report: Callable[[dict[str, Any]], None],
    warn: Callable[[str], None],
    *,
    report_again: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train from the newest checkpoint on, and save: at evaluations, every ``job["checkpoint_seconds"]``, and when told to stop.

    A checkpoint that cannot be written is warned of, and training goes on; the last one has to be written.

    Args:
        report: called by all workers with the history entry of every evaluation.
        warn: called by the first worker with a line.
        report_again: report the evaluation before the newest checkpoint first, which the report of a killed worker may have missed.
        stopped: polled by the first worker; True: save and return. A file of the checkpoints' folder says the same (``stop_file``).

    Raises:
        DataError: the last checkpoint could not be written, or as `fit`.
    """
    workers, checkpoints = Workers.from_process_group(), job["checkpoints"]
    is_first = workers.rank == 0
    newest = workers.broadcast_object(checkpoints.newest(warn) if is_first else None)
    state = checkpoints.load(newest) if newest else None
    if newest and is_first:
        _log.info("going on from %s", checkpoints.folder / newest)
    if report_again and state is not None and state["history"]:
        report(state["history"][-1])
    saver = _Saver(checkpoints, Path(job["folder"]), job["checkpoint_seconds"], is_first, report, warn, stopped)
    last = task(job, device, {"state": state, "workers": workers, "callbacks": saver.callbacks()})
    saver.finish(last)
    return last


def progress_of(file: Path) -> dict[str, Any] | None:
    """Epoch and loss as the first worker wrote them last; None: it has not begun, or has just ended."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


class _Saver:
    """The callbacks of a training that saves. Only the first worker writes."""

    def __init__(
        self,
        checkpoints: CheckpointManager,
        folder: Path,
        every_s: float,
        is_first: bool,
        report: Callable[[dict[str, Any]], None],
        warn: Callable[[str], None],
        stopped: Callable[[], bool],
    ) -> None:
        self._stopped = stopped
        self._checkpoints, self._folder, self._every_s, self._is_first = checkpoints, folder, every_s, is_first
        self._report, self._warn = report, warn
        self._saved_at, self._progress_at = time.monotonic(), -math.inf
        self._error: OSError | None = None

    def callbacks(self) -> Callbacks:
        return Callbacks(
            on_epoch=self._on_epoch,
            on_evaluation=self._on_evaluation,
            on_save=self._save,
            poll=self._poll,
            warn=self._warn if self._is_first else lambda line: None,
        )

    def finish(self, state: dict[str, Any]) -> None:
        """Write the last state where that failed.

        Raises:
            DataError: it fails again.
        """
        if self._error is None:
            return
        self._save(state)
        if (error := self._error) is not None:
            reason = "the disk is full" if error.errno in FULL_DISK else str(error.strerror or error)
            raise DataError(
                f"{self._checkpoints.folder}: {reason}, and the last checkpoint cannot be written; "
                f"{self._checkpoints.newest() or 'none'} is kept. Free some space and run the same command again"
            )

    def _save(self, state: dict[str, Any]) -> None:
        self._saved_at = time.monotonic()
        if not self._is_first:
            return
        try:
            self._checkpoints.save(state)
            self._error = None
        except OSError as error:
            self._error = error
            kept = self._checkpoints.newest() or "none before it"
            self._warn(
                f"no checkpoint in epoch {state['epoch']}: {error.strerror or error} in {self._checkpoints.folder}; "
                f"{kept} is kept, and training goes on"
            )

    def _on_evaluation(self, state: dict[str, Any]) -> None:
        self._save(state)
        self._report(state["history"][-1])

    def _poll(self) -> int:
        if self._stopped() or self._checkpoints.stop_file.exists():
            return STOP
        return SAVE if self._every_s and time.monotonic() - self._saved_at > self._every_s else CONTINUE

    def _on_epoch(self, epoch: int, loss: float) -> None:
        if not self._is_first or time.monotonic() - self._progress_at <= PROGRESS_EVERY_S:
            return
        self._progress_at = time.monotonic()
        with contextlib.suppress(OSError):  # For the progress bar alone.
            write_json_atomic(self._folder / PROGRESS, {"epoch": epoch, "loss": loss}, durable=False)
