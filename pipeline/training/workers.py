"""A training in Ray Train's workers, or in this process: checkpoints, resuming, Ctrl-C and SIGTERM, whatever is trained.

What is trained is a function ``task(job, device, options)`` that loads its data and calls ``pipeline.training.loop.fit(..., **options)``.
One worker has a GPU where the cluster has any, else a share of the CPUs. The first worker writes the checkpoints into the run folder, which
all workers read: Ray Train restarts workers when one is killed, and they resume from there, as does the same command after it was stopped.
A signal never reaches a worker; the driver leaves a file for it, which it looks for between two steps.
"""

from __future__ import annotations

import logging
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from graphhash.errors import DataError
from pipeline.distributed.session import cpus_of_machines
from pipeline.errors import ConfigError
from pipeline.storage.atomic import write_text_atomic
from pipeline.tracking.tracker import Tracker
from pipeline.training.checkpointing import Task, fit_and_save
from pipeline.training.checkpoints import CheckpointManager
from pipeline.training.interrupts import run_interruptibly

_log = logging.getLogger(__name__)

# Files in the job's folder: why training failed, and lines from the first worker for the driver to log.
FAILURE = "failure.txt"
NOTES = "notes.txt"


def run_on_ray(task: Task, job: dict[str, Any], tracker: Tracker) -> dict[str, Any]:
    """Train in Ray Train's workers and return the last state.

    Args:
        task: a module-level function.
        job: what it needs, small; of it this reads ``folder`` (to work in; shared by all machines), ``checkpoints``
            (:class:`CheckpointManager`, there as well), ``workers`` (None: one per GPU, or one), ``checkpoint_seconds`` and
            ``max_failures`` (2).

    Raises:
        DataError: training failed; the message says why.
        ConfigError: the cluster has no place for so many workers.
        KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM, with a checkpoint written.
    """
    folder, checkpoints = Path(job["folder"]), job["checkpoints"]
    for left in (checkpoints.stop_file, folder / FAILURE, folder / NOTES):
        left.unlink(missing_ok=True)
    trainer = _trainer(task, job, tracker)
    notes = _NotesLogger(folder / NOTES)

    def stop() -> None:
        checkpoints.folder.mkdir(parents=True, exist_ok=True)
        checkpoints.stop_file.touch()
        _log.info("stopping as soon as a checkpoint is written; again to stop at once")

    error, number = run_interruptibly(trainer.fit, stop, notes)
    notes()
    if number is None:
        _raise_failure(folder / FAILURE, error)
        if checkpoints.stop_file.exists():
            number = signal.SIGINT  # Somebody has put it there by hand.
    newest = checkpoints.newest(_log.warning)
    if number is not None:
        checkpoints.stop_file.unlink(missing_ok=True)
        if newest is not None:
            _log.info("stopped at %s; the same command goes on from there, or starts over with --no-resume", newest)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
    if newest is None:
        raise DataError(
            f"training ended without a checkpoint in {checkpoints.folder}; all machines have to share the run folder"
        )
    shutil.rmtree(_storage(folder), ignore_errors=True)
    return checkpoints.load(newest)


def _trainer(task: Task, job: dict[str, Any], tracker: Tracker) -> Any:
    """Ray Train's trainer of a job, from the newest checkpoint on."""
    import ray
    from ray import train
    from ray.train.torch import TorchTrainer

    checkpoints: CheckpointManager = job["checkpoints"]
    n_workers, resources = share_out_workers(
        job["workers"], int(ray.cluster_resources().get("GPU", 0)), cpus_of_machines()
    )
    logged: list[int] = []
    if (start := checkpoints.newest(_log.warning)) is not None:
        logged = [entry["epoch"] for entry in checkpoints.load(start)["history"]]
        _log.info("going on from %s", checkpoints.folder / start)
    return TorchTrainer(
        _worker,
        train_loop_config=job | {"task": task},
        scaling_config=train.ScalingConfig(
            num_workers=n_workers,
            use_gpu="GPU" in resources,
            resources_per_worker=None if "GPU" in resources else resources,
        ),
        run_config=train.RunConfig(
            name="fit",
            storage_path=str(_storage(Path(job["folder"]))),
            failure_config=train.FailureConfig(max_failures=job.get("max_failures", 2)),
            callbacks=[_tracking_callback(tracker, logged)] if tracker.run_id else [],
        ),
    )


def _storage(folder: Path) -> Path:
    """Where Ray Train keeps its own records while the training lasts."""
    return folder / "ray"


def _raise_failure(failure: Path, error: BaseException | None) -> None:
    """Raise what ended a training, if anything did."""
    from ray import train

    if failure.exists():
        raise DataError(failure.read_text())
    if isinstance(error, train.TrainingFailedError):
        raise DataError(_reason(error)) from error
    if error is not None:
        raise error


def fit_here(
    job: dict[str, Any], tracker: Tracker, on_entry: Callable[[dict[str, Any]], None] = lambda entry: None
) -> dict[str, Any]:
    """Fit in this process, a Ray task or actor that was given what one training needs, and return the last state.

    A Ray Train worker takes ten seconds and more to come up, which counts when there are many trainings. This one goes on from its
    last checkpoint as well, and is one worker whatever ``job["workers"]`` says.

    Args:
        job: as in :func:`run_on_ray`, with the ``task``.
        on_entry: told epoch, loss and metrics of every evaluation.
    """
    import ray

    has_gpu = ray.get_runtime_context().get_assigned_resources().get("GPU", 0) > 0

    def report(entry: dict[str, Any]) -> None:
        tracker.log_metrics({key: value for key, value in entry.items() if key != "epoch"}, step=entry["epoch"])
        on_entry(entry)

    _use_assigned_cpus()
    job["checkpoints"].stop_file.unlink(missing_ok=True)
    return fit_and_save(job["task"], job, torch.device("cuda" if has_gpu else "cpu"), report, _log.warning)


def _worker(job: dict[str, Any]) -> None:
    """What one Ray Train worker does."""
    from ray import train
    from ray.train.torch import get_device

    folder = Path(job["folder"])
    if (folder / FAILURE).exists():
        return  # Told already, by a worker whose end ended the others.
    _use_assigned_cpus()
    notes = folder / NOTES

    def note(line: str) -> None:
        try:
            with open(notes, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError:
            _log.warning(line)  # A full disk, of which the line may speak; then it is in Ray's log.

    try:
        fit_and_save(job["task"], job, get_device(), train.report, note, report_again=True)
    except DataError as error:
        # Another try would end the same way, so it is told to the driver and not to Ray Train, unless others wait for this worker.
        try:
            write_text_atomic(folder / FAILURE, str(error))
        except OSError:
            raise error from None
        if train.get_context().get_world_size() > 1:
            raise


def _use_assigned_cpus() -> None:
    """As many threads as Ray has given CPUs to this process."""
    import numba
    import ray

    n_cpus = max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))
    torch.set_num_threads(n_cpus)
    numba.set_num_threads(min(n_cpus, numba.config.NUMBA_NUM_THREADS))


def share_out_workers(asked: int | None, n_gpus: int, cpus: Sequence[int]) -> tuple[int, dict[str, float]]:
    """How many workers to start, and what each needs of the cluster.

    Args:
        asked: ``train.workers``; None: one per GPU, or one.
        cpus: of every machine.

    Raises:
        ConfigError: there are fewer GPUs, or CPUs, than workers.
    """
    n = asked or n_gpus or 1
    if n_gpus:
        if n > n_gpus:
            raise ConfigError(
                f"train.workers={n} is more than the {n_gpus} GPUs of the cluster; leave it out for one worker per GPU"
            )
        return n, {"GPU": 1}
    # Each on one machine, with as many CPUs as all of them can have alike.
    for each in range(max([1, *cpus]), 0, -1):
        if sum(machine // each for machine in cpus) >= n:
            return n, {"CPU": each}
    if n == 1:
        return 1, {"CPU": 1}
    raise ConfigError(
        f"train.workers={n} is more than the {sum(cpus)} CPUs of the cluster; give at most {max(1, sum(cpus))}"
    )


class _NotesLogger:
    """Logs the lines that were added to a file since the last call."""

    def __init__(self, file: Path) -> None:
        self._file, self._n = file, 0

    def __call__(self) -> None:
        try:
            lines = self._file.read_text(encoding="utf-8").splitlines()
        except OSError:
            return
        for line in lines[self._n :]:
            _log.warning("%s", line)
        self._n = len(lines)


def _tracking_callback(tracker: Tracker, logged: Sequence[int]) -> Any:
    """Sends the metrics to MLflow from Ray Train's controller process, so that workers need no tracking, each epoch's once.

    Args:
        logged: epochs that an earlier command has sent.
    """
    from ray.train import UserCallback

    class TrackingCallback(UserCallback):
        def __init__(self) -> None:
            self.logged = set(logged)

        def after_report(self, run_context, metrics, checkpoint):
            # Every worker reports the same metrics, and those that were restarted may report an epoch again.
            entry = metrics[0]
            if entry["epoch"] not in self.logged:
                self.logged.add(entry["epoch"])
                tracker.log_metrics({key: value for key, value in entry.items() if key != "epoch"}, step=entry["epoch"])

    return TrackingCallback()


def _reason(error: Exception) -> str:
    """One line of why a worker failed, from Ray Train's collection of tracebacks."""
    causes = list(getattr(error, "worker_failures", {}).values()) or [error]
    cause = getattr(causes[0], "cause", None) or causes[0]
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"training failed: {lines[-1] if lines else type(cause).__name__}"
