"""A training in Ray Train's workers: checkpoints, resuming, Ctrl-C and SIGTERM, whatever is trained.

What is trained is a function ``task(job, device, options)`` that loads its data and calls ``pipeline.training.loop.fit(..., **options)``.
One worker has a GPU where the cluster has any, else a share of the CPUs. The first worker writes the checkpoints into the run folder, which
all workers read: Ray Train restarts workers when one is killed, and they resume from there, as does the same command after it was stopped.
A signal never reaches a worker; the driver leaves a file for it, which it looks for between two steps. The first worker adds the figures
of every evaluation to a file, from which the driver sends them to MLflow: Ray Train's own reports hold a worker up for two seconds, until
its controller looks again.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graphhash.errors import DataError
from pipeline.distributed.session import cpus_of_machines
from pipeline.errors import ConfigError
from pipeline.storage.atomic import write_text_atomic
from pipeline.tracking.tracker import Tracker
from pipeline.training.checkpointing import fit_and_save
from pipeline.training.checkpoints import CheckpointManager
from pipeline.training.here import reason, reporter, stopped
from pipeline.training.interrupts import announce_stop, run_interruptibly
from pipeline.training.machine import threads

_log = logging.getLogger(__name__)

# Files in the job's folder: why training failed, and lines from the first worker for the driver: to log, and for MLflow.
FAILURE = "failure.txt"
NOTES = "notes.txt"
ENTRIES = "entries.jsonl"
# Between two looks of Ray Train's controller at its workers; by default 2, by which a training's end would be late.
CONTROLLER_POLL_S = "0.5"


def run_on_ray(job: dict[str, Any], tracker: Tracker) -> dict[str, Any]:
    """Train in Ray Train's workers and return the last state.

    Args:
        job: ``task`` (a function of a module) and what it needs, small; of it this reads ``folder`` (to work in; shared by all
            machines), ``checkpoints`` (:class:`CheckpointManager`, there as well), ``workers`` (None: one per GPU, or one),
            ``checkpoint_seconds`` and ``max_failures`` (2).

    Raises:
        DataError: training failed; the message says why.
        ConfigError: the cluster has no place for so many workers.
        KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM, with a checkpoint written.
    """
    folder, checkpoints = Path(job["folder"]), job["checkpoints"]
    for left in (checkpoints.stop_file, folder / FAILURE, folder / NOTES, folder / ENTRIES):
        left.unlink(missing_ok=True)
    trainer, entries = _trainer(job), _EntriesSender(folder / ENTRIES, tracker, _epochs_before(checkpoints))
    notes = _NewLines(folder / NOTES)

    def stop() -> None:
        checkpoints.folder.mkdir(parents=True, exist_ok=True)
        checkpoints.stop_file.touch()
        announce_stop()

    def poll() -> None:
        for line in notes():
            _log.warning("%s", line)
        entries.send()

    error, number = run_interruptibly(trainer.fit, stop, poll)
    poll()
    if number is None:
        _raise_failure(folder / FAILURE, error)
    if number is not None or checkpoints.stop_file.exists():
        stopped(checkpoints, number)
    newest = checkpoints.newest(_log.warning)
    if newest is None:
        raise DataError(
            f"training ended without a checkpoint in {checkpoints.folder}; all machines have to share the run folder"
        )
    shutil.rmtree(_storage(folder), ignore_errors=True)
    for file in (NOTES, ENTRIES):
        (folder / file).unlink(missing_ok=True)
    return checkpoints.load(newest)


def _trainer(job: dict[str, Any]) -> Any:
    """Ray Train's trainer of a job."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", CONTROLLER_POLL_S)
    import ray
    from ray import train
    from ray.train.torch import TorchTrainer

    n_workers, resources = share_out_workers(
        job["workers"], int(ray.cluster_resources().get("GPU", 0)), cpus_of_machines()
    )
    return TorchTrainer(
        _worker,
        train_loop_config=job,
        scaling_config=train.ScalingConfig(
            num_workers=n_workers,
            use_gpu="GPU" in resources,
            resources_per_worker=None if "GPU" in resources else resources,
        ),
        run_config=train.RunConfig(
            name="fit",
            storage_path=str(_storage(Path(job["folder"]))),
            failure_config=train.FailureConfig(max_failures=job.get("max_failures", 2)),
        ),
    )


def _epochs_before(checkpoints: CheckpointManager) -> list[int]:
    """Epochs whose figures an earlier command has sent."""
    if (start := checkpoints.newest(_log.warning)) is None:
        return []
    _log.info("going on from %s", checkpoints.folder / start)
    return [entry["epoch"] for entry in checkpoints.load(start)["history"]]


def _storage(folder: Path) -> Path:
    """Where Ray Train keeps its own records while the training lasts."""
    return folder / "ray"


def _raise_failure(failure: Path, error: BaseException | None) -> None:
    """Raise what ended a training, if anything did."""
    from ray import train

    if failure.exists():
        raise DataError(failure.read_text())
    if isinstance(error, train.TrainingFailedError):
        raise DataError(_reason_of_workers(error)) from error
    if error is not None:
        raise error


def _worker(job: dict[str, Any]) -> None:
    """What one Ray Train worker does."""
    from ray import train
    from ray.train.torch import get_device

    folder = Path(job["folder"])
    if (folder / FAILURE).exists():
        return  # Told already, by a worker whose end ended the others.
    is_first = train.get_context().get_world_rank() == 0

    def note(line: str) -> None:
        if not _append(folder / NOTES, line):
            _log.warning(line)  # A full disk, of which the line may speak; then it is in Ray's log.

    def report(entry: dict[str, Any]) -> None:
        if is_first:
            _append(folder / ENTRIES, json.dumps(entry))

    try:
        with threads(_assigned_cpus()):
            fit_and_save(job["task"], job, get_device(), report, note, report_again=True)
    except DataError as error:
        # Another try would end the same way, so it is told to the driver and not to Ray Train, unless others wait for this worker.
        try:
            write_text_atomic(folder / FAILURE, str(error))
        except OSError:
            raise error from None
        if train.get_context().get_world_size() > 1:
            raise


def _append(file: Path, line: str) -> bool:
    """Add a line to a file; False where it cannot be written."""
    try:
        with open(file, "a", encoding="utf-8") as stream:
            stream.write(line + "\n")
    except OSError:
        return False
    return True


def _assigned_cpus() -> int:
    """The CPUs that Ray has given to this process."""
    import ray

    return max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))


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


class _NewLines:
    """The whole lines that were added to a file since the last call."""

    def __init__(self, file: Path) -> None:
        self._file, self._n = file, 0

    def __call__(self) -> list[str]:
        try:
            lines = self._file.read_text(encoding="utf-8").split("\n")[:-1]
        except OSError:
            return []
        new, self._n = lines[self._n :], len(lines)
        return new


class _EntriesSender:
    """Sends the figures that the first worker adds to a file to MLflow, each epoch's once: a restarted worker reports one again.

    Args:
        sent: epochs that an earlier command has sent.
    """

    def __init__(self, file: Path, tracker: Tracker, sent: Sequence[int]) -> None:
        self._lines, self._report, self._sent = _NewLines(file), reporter(tracker), set(sent)

    def send(self) -> None:
        for line in self._lines():
            entry = json.loads(line)
            if entry["epoch"] not in self._sent:
                self._sent.add(entry["epoch"])
                self._report(entry)


def _reason_of_workers(error: Exception) -> str:
    """One line of why a worker failed, from Ray Train's collection of tracebacks."""
    causes = list(getattr(error, "worker_failures", {}).values()) or [error]
    return reason(getattr(causes[0], "cause", None) or causes[0])
