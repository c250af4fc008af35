"""The training of one model as a job: what it reports to, where it resumes from, and the progress bar that follows it."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.config.run_config import RunConfig, TrainConfig
from pipeline.tracking.tracker import Tracker
from pipeline.training.checkpointing import PROGRESS, progress_of
from pipeline.training.checkpoints import CheckpointManager
from pipeline.training.here import fit_here
from pipeline.training.machine import trains_on_ray

FitJob = Callable[[dict[str, Any], Tracker], dict[str, Any]]


@dataclass(frozen=True)
class TrainingSession:
    """What a training reports to, what executes it, and where it resumes from.

    Args:
        tracker: the MLflow run.
        fit_job: executes the job: ``fit_here`` or ``fit_in_task`` of ``pipeline.training.here``, or
            ``pipeline.training.workers.run_on_ray`` (see :func:`fit_job_of`).
        checkpoints: None: kept in the output folder while the training lasts.
    """

    tracker: Tracker = dataclasses.field(default_factory=Tracker)
    fit_job: FitJob = fit_here
    checkpoints: CheckpointManager | None = None


def fit_job_of(config: RunConfig) -> FitJob:
    """What executes a training of the command: Ray Train's workers where they are wanted (``trains_on_ray``), else this process."""
    if not trains_on_ray(config):
        return fit_here
    from pipeline.training.workers import run_on_ray

    return run_on_ray


def run_job(job: dict[str, Any], train: TrainConfig, method: str, session: TrainingSession) -> dict[str, Any]:
    """Train, with a progress bar, and return the last state of ``pipeline.training.loop``.

    Args:
        job: ``task``, a function of a module, which loads and fits (see ``pipeline.training.workers``); ``folder``, absolute, to work in;
            ``settings``; and what else ``task`` wants.

    Raises:
        DataError: training failed; the message says why.
    """
    folder = Path(job["folder"])
    saved = CheckpointManager(folder / "checkpoints") if session.checkpoints is None else session.checkpoints
    job |= {
        "checkpoints": dataclasses.replace(saved, folder=saved.folder.absolute()),
        "workers": train.workers,
        "checkpoint_seconds": train.checkpoint_seconds,
    }
    with _progress_bar(method, job["settings"].n_epochs, folder / PROGRESS):
        state = session.fit_job(job, session.tracker)
    (folder / PROGRESS).unlink(missing_ok=True)
    if session.checkpoints is None:
        saved.clear()
    return state


@contextmanager
def _progress_bar(method: str, epochs: int, file: Path) -> Iterator[None]:
    """A bar over the epochs that the worker notes in ``file``; only on a terminal."""
    with tqdm(total=epochs, desc=f"train {method}", unit=" epochs", disable=None, leave=False) as bar:
        if bar.disable:
            yield
            return
        ended = threading.Event()

        def follow() -> None:
            while not ended.wait(0.5):
                if (seen := progress_of(file)) is None:
                    continue
                bar.update(seen["epoch"] - bar.n)
                bar.set_postfix_str(f"loss {seen['loss']:.4f}")

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
