"""A training in Ray Train's workers, or in this process: checkpoints, resuming, Ctrl-C and SIGTERM, whatever is trained.

What is trained is a function ``task(job, device, how)`` that loads its data and calls ``pipeline.training.loop.fit(..., **how)``. One worker
has a GPU where the cluster has any, else a share of the CPUs. The first worker writes the states (``pipeline.training.checkpoints``), into the run
folder, which all of them read: Ray Train restarts workers when one is killed, and they go on from there, as does the same
command after it was stopped. A signal never reaches a worker; the driver leaves a file for it, which it looks for between two steps.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from graphhash.errors import DataError
from graphhash.nn.workers import Workers
from pipeline.distributed.session import cpus_of_machines
from pipeline.errors import ConfigError
from pipeline.storage.atomic import FULL_DISK, write_json_atomic, write_text_atomic
from pipeline.tracking.tracker import Tracker
from pipeline.training.loop import CONTINUE, SAVE, STOP

_log = logging.getLogger(__name__)

# The job, the device, and keyword arguments for `fit`, whose state it returns.
Task = Callable[[dict[str, Any], torch.device, dict[str, Any]], dict[str, Any]]
PROGRESS = "progress.json"
FAILURE = "failure.txt"
NOTES = "notes.txt"
# After a signal workers may be starting, or in the middle of a long step.
STOP_GRACE_S = 120.0


def run_on_ray(task: Task, job: dict[str, Any], tracker: Tracker) -> dict[str, Any]:
    """Train in Ray Train's workers and return the last state.

    Args:
        task: a module-level function.
        job: what it needs, small; of it this reads ``folder`` (to work in; shared by all machines), ``states`` (:class:`CheckpointManager`,
            there as well), ``workers`` (None: one per GPU, or one), ``checkpoint_seconds`` and ``max_failures`` (2).

    Raises:
        DataError: training failed; the message says why.
        ConfigError: the cluster has no place for so many workers.
        KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM, with a state written.
    """
    import ray
    from ray import train
    from ray.train.torch import TorchTrainer

    folder, states = Path(job["folder"]), job["states"]
    n_workers, resources = share_out_workers(
        job["workers"], int(ray.cluster_resources().get("GPU", 0)), cpus_of_machines()
    )
    for left in (states.stop_file, folder / FAILURE, folder / NOTES):
        left.unlink(missing_ok=True)
    start = states.newest(_log.warning)
    logged = [entry["epoch"] for entry in states.load(start)["history"]] if start else []
    if start:
        _log.info("going on from %s", states.folder / start)
    storage = folder / "ray"
    trainer = TorchTrainer(
        _worker,
        train_loop_config=job | {"task": task},
        scaling_config=train.ScalingConfig(
            num_workers=n_workers,
            use_gpu="GPU" in resources,
            resources_per_worker=None if "GPU" in resources else resources,
        ),
        run_config=train.RunConfig(
            name="fit",
            storage_path=str(storage),
            failure_config=train.FailureConfig(max_failures=job.get("max_failures", 2)),
            callbacks=[_tracking_callback(tracker, logged)] if tracker.run_id else [],
        ),
    )
    notes = _Followed(folder / NOTES)

    def stop() -> None:
        states.folder.mkdir(parents=True, exist_ok=True)
        states.stop_file.touch()
        _log.info("stopping as soon as a checkpoint is written; again to stop at once")

    error, number = _in_thread(trainer.fit, stop, notes)
    notes()
    failure = folder / FAILURE
    if number is None and failure.exists():
        raise DataError(failure.read_text())
    if number is None and isinstance(error, train.TrainingFailedError):
        raise DataError(_reason(error)) from error
    if error is not None and number is None:
        raise error
    if number is None and states.stop_file.exists():
        number = signal.SIGINT  # Somebody has put it there by hand.
    newest = states.newest(_log.warning)
    if number is not None:
        states.stop_file.unlink(missing_ok=True)
        if newest is not None:
            _log.info("stopped at %s; the same command goes on from there, or starts over with --no-resume", newest)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
    if newest is None:
        raise DataError(
            f"training ended without a checkpoint in {states.folder}; all machines have to share the run folder"
        )
    shutil.rmtree(storage, ignore_errors=True)
    return states.load(newest)


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
    job["states"].stop_file.unlink(missing_ok=True)
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


def fit_and_save(
    task: Task,
    job: dict[str, Any],
    device: torch.device,
    report: Callable[[dict[str, Any]], None],
    note: Callable[[str], None],
    *,
    report_again: bool = False,
) -> dict[str, Any]:
    """Train from the newest state on, and write states: at evaluations, every ``job["checkpoint_seconds"]``, and when told to stop.

    A state that cannot be written is said, and training goes on; the last one has to be.

    Args:
        report: told of every evaluation, by all workers.
        report_again: of the one before the newest state first, which the report of a killed worker may have missed.

    Raises:
        DataError: the last state could not be written, or as `fit`.
    """
    workers, states, folder = Workers.from_process_group(), job["states"], Path(job["folder"])
    first = workers.rank == 0
    start = workers.broadcast_object(states.newest(note) if first else None)
    state = states.load(start) if start else None
    if report_again and state is not None and state["history"]:
        report(state["history"][-1])
    seconds, saved_at, progress_at = job["checkpoint_seconds"], time.monotonic(), -math.inf
    failed: OSError | None = None

    def save(state: dict[str, Any]) -> None:
        nonlocal saved_at, failed
        saved_at = time.monotonic()
        if not first:
            return
        try:
            states.save(state)
            failed = None
        except OSError as error:
            failed = error
            kept = states.newest()
            note(f"no checkpoint in epoch {state['epoch']}: {error.strerror or error} in {states.folder}; "
                 f"{kept or 'none before it'} is kept, and training goes on")  # fmt: skip

    def on_evaluation(state: dict[str, Any]) -> None:
        save(state)
        report(state["history"][-1])

    def ask() -> int:
        if states.stop_file.exists():
            return STOP
        return SAVE if seconds and time.monotonic() - saved_at > seconds else CONTINUE

    def on_epoch(epoch: int, loss: float) -> None:
        nonlocal progress_at
        if first and time.monotonic() - progress_at > 0.5:
            progress_at = time.monotonic()
            try:
                write_json_atomic(folder / PROGRESS, {"epoch": epoch, "loss": loss})
            except OSError:
                pass  # For the progress bar alone.

    how = {"state": state, "workers": workers, "on_epoch": on_epoch, "on_evaluation": on_evaluation, "on_save": save, "ask": ask,
           "note": note if first else _quiet}  # fmt: skip
    state = task(job, device, how)
    if first and failed is not None:
        save(state)
    if failed is not None:
        reason = "the disk is full" if failed.errno in FULL_DISK else str(failed.strerror or failed)
        raise DataError(f"{states.folder}: {reason}, and the last checkpoint cannot be written; {states.newest() or 'none'} is kept. "
                        "Free some space and run the same command again")  # fmt: skip
    return state


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


def _in_thread(
    work: Callable[[], Any], stop: Callable[[], None], poll: Callable[[], None]
) -> tuple[BaseException | None, int | None]:
    """Do ``work``; on the first Ctrl-C or SIGTERM call ``stop`` and wait for it, on the second, or after STOP_GRACE_S, do not wait.

    In a thread of its own Ray Train leaves the signals to us; in the main thread it would abort its workers on Ctrl-C.

    Returns: what it raised, and the signal.
    """
    if threading.current_thread() is not threading.main_thread():
        try:
            work()
        except Exception as error:
            return error, None
        return None, None
    raised: list[BaseException] = []
    ended = threading.Event()
    received: list[tuple[int, float]] = []

    def body() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)
        finally:
            ended.set()

    def on_signal(number: int, frame: Any) -> None:
        received.append((number, time.monotonic()))

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    thread = threading.Thread(target=body, daemon=True)
    try:
        thread.start()
        told = False
        while not ended.wait(0.2):
            poll()
            if received and not told:
                told = True
                stop()
            if len(received) > 1 or (received and time.monotonic() - received[0][1] > STOP_GRACE_S):
                break
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return (raised[0] if raised else None), (received[0][0] if received else None)


class _Followed:
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


def progress_of(file: Path) -> dict[str, Any] | None:
    """Epoch and loss as the first worker has noted them last; None: it has not begun, or has just ended."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _quiet(_line: str) -> None:
    pass
