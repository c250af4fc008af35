"""A training by one worker in this process: that of the command, or that of a Ray task.

It writes the same checkpoints as Ray Train's first worker, resumes from them, and gives the same weights, bit for bit: only the ten
seconds and more until Ray Train's workers are up are gone.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from graphhash.errors import DataError, GraphHashError
from pipeline.tracking.tracker import Tracker
from pipeline.training.checkpointing import fit_and_save
from pipeline.training.checkpoints import CheckpointManager
from pipeline.training.interrupts import end, noted_signals
from pipeline.training.machine import n_threads, threads

_log = logging.getLogger(__name__)


def fit_here(job: dict[str, Any], tracker: Tracker) -> dict[str, Any]:
    """Train in the process of the command, on the GPU if there is one, else on all CPUs, and return the last state.

    Args:
        job: as in ``pipeline.training.workers.run_on_ray``.

    Raises:
        DataError: training failed; the message says why.
        KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM, with a checkpoint written.
    """
    checkpoints: CheckpointManager = job["checkpoints"]
    checkpoints.stop_file.unlink(missing_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with noted_signals() as signalled, threads(n_threads()):
        try:
            state = fit_and_save(job["task"], job, device, reporter(tracker), _log.warning, stopped=signalled)
        except (GraphHashError, OSError):
            raise
        except Exception as error:
            raise DataError(reason(error)) from error
    if signalled.number is not None or state["stopped"]:
        stopped(checkpoints, signalled.number)
    return state


def fit_in_task(job: dict[str, Any], tracker: Tracker) -> dict[str, Any]:
    """Train in this Ray task, on its GPU if it has one, else on its CPUs, and return the last state. Signals are left to Ray."""
    import ray

    resources = ray.get_runtime_context().get_assigned_resources()
    job["checkpoints"].stop_file.unlink(missing_ok=True)
    device = torch.device("cuda" if resources.get("GPU", 0) > 0 else "cpu")
    with threads(max(1, int(resources.get("CPU", 1)))):
        return fit_and_save(job["task"], job, device, reporter(tracker), _log.warning)


def reporter(tracker: Tracker) -> Callable[[dict[str, Any]], None]:
    """A function that sends an entry of the history to MLflow."""

    def report(entry: dict[str, Any]) -> None:
        tracker.log_metrics({key: value for key, value in entry.items() if key != "epoch"}, step=entry["epoch"])

    return report


def stopped(checkpoints: CheckpointManager, number: int | None) -> NoReturn:
    """Say from where a stopped training goes on, and end the command.

    Args:
        number: of the signal; None: somebody has put the stop file there by hand, which counts as Ctrl-C.
    """
    checkpoints.stop_file.unlink(missing_ok=True)
    if (newest := checkpoints.newest(_log.warning)) is not None:
        _log.info("stopped at %s; the same command goes on from there", newest)
    end(signal.SIGINT if number is None else number)


def reason(error: BaseException) -> str:
    """One line of why a training failed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"training failed: {lines[-1] if lines else type(error).__name__}"
