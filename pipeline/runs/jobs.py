"""A command as a job of a Ray cluster: sent with the code, and followed to its end.

    code = submit(["run", "--data", "s3://bucket/log.parquet", "--out", "s3://bucket/run"], address="http://head:8265")

The job's driver runs on the head, or where the resources that it reserves are. What it starts uses the cluster's Ray, and its stages ask
Ray for the CPUs and GPUs that they use. The driver reserves nothing by default: a reservation would keep the stages from the machine.
Only memory, which the driver does use, is worth reserving.

When MLFLOW_RUN_ID is set, as `mlflow run` does, the job goes on with that run, in the same store: MLflow has one run from end to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from pipeline.errors import JobError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

_log = logging.getLogger(__name__)

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
# Variables that a job inherits. Credentials are not among them: everybody who sees the dashboard can read a job's environment.
INHERITED = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "GRAPHHASH_WORK", "GRAPHHASH_DEBUG")
# Data and results of this machine, beside what .gitignore names, which Ray leaves out by itself.
EXCLUDED = ("/.git/", "/.venv/", "/tests/", "/mlruns/", "/mlartifacts/", "/mlflow.db*", "*.parquet", "*.npy", "*.npz")
# The interpreter that Ray runs in. A job's shell is started by a worker, and workers by the raylet, whose command line has it. Where there
# is no /proc, and where the raylet has another command line, it is `python`.
HEAD_PYTHON = (
    "raylet=$(sed -n 's/^PPid:[[:space:]]*//p' /proc/$PPID/status 2>/dev/null); "
    "python=$(tr '\\0' '\\n' 2>/dev/null < /proc/$raylet/cmdline | sed -n 's/^--python_worker_command=\\([^ ]*\\) .*/\\1/p'); "
    "python=${python:-python}"
)
NOT_INSTALLED = (
    '{ echo "graphhash: error: $python on $(hostname), a machine of the cluster, has no GraphHash; install graphhash[all] on the '
    "cluster's machines, send a checkout with --working-dir DIR, or name another interpreter with --python PATH\"; exit 1; }"
)
# Time of a stopped job to end its MLflow runs and to save its results; Ray's own three seconds are too short for that.
STOP_WAIT_S = 60
POLL_INTERVAL_S = 1.0
# Attempts to reach the dashboard in a row before the job counts as out of reach.
TRIES = 10


@dataclass(frozen=True)
class Driver:
    """Resources that a job's driver reserves, which runs where these are, and its interpreter.

    Args:
        python: a path on that machine, or a command there; None: the interpreter that the machine's Ray runs in.
    """

    num_cpus: float = 0.0
    num_gpus: float = 0.0
    memory_bytes: int = 0
    python: str | None = None


def environment_of_job(requested: Mapping[str, str]) -> dict[str, str]:
    """The variables of the job: those of INHERITED that are set here, and the requested ones, which are stronger.

    A relative SQLite store is made absolute, as the job runs elsewhere; without any, it is the one that a command here would take.
    """
    from pipeline.tracking.client import absolute_uri
    from pipeline.tracking.store import DEFAULT_URI

    variables = {name: os.environ[name] for name in INHERITED if os.environ.get(name, "").strip()}
    variables |= requested
    variables["MLFLOW_TRACKING_URI"] = absolute_uri(variables.get("MLFLOW_TRACKING_URI", DEFAULT_URI))
    return {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **variables}


def entrypoint(command: Sequence[str], python: str | None = None) -> str:
    """The shell command of a job: GraphHash in the interpreter ``python``, or a line that says that it is not installed there.

    Args:
        command: as for :func:`submit`.
        python: as in :class:`Driver`.
    """
    words = shlex.join(["-m", "pipeline", *command])
    chosen = HEAD_PYTHON if python is None else f"python={shlex.quote(python)}"
    return f'{chosen}; "$python" -c "import pipeline" 2>/dev/null || {NOT_INSTALLED}; exec "$python" {words}'


def submit(
    command: Sequence[str],
    *,
    address: str | None = None,
    working_dir: Path | None = None,
    variables: Mapping[str, str] | None = None,
    driver: Driver = Driver(),
    wait: bool = True,
    write: Callable[[str], Any] = lambda text: print(text, end="", flush=True),
) -> int:
    """Send a command to a cluster as a job, and follow it. Ctrl-C and SIGTERM stop the job.

    Args:
        command: words that were checked, without the program's name.
        address: of the cluster's dashboard; None: RAY_API_SERVER_ADDRESS, or the usual port of this machine.
        working_dir: what is sent; None: this checkout, or nothing where the package is installed, as it has to be there then.
        variables: of the job's environment.
        driver: resources that the driver reserves, and its interpreter.
        wait: follow the job to its end.
        write: takes the job's output as it comes.

    Returns: the exit code of the job's program, 0 when it is not waited for, and 130 when it was stopped.

    Raises:
        JobError: the cluster does not answer, or the job never ran.
    """
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS", "").strip() or DEFAULT_ADDRESS
    runtime_env: dict[str, Any] = {"env_vars": environment_of_job(variables or {})}
    if (working_dir := working_dir or _checkout()) is not None:
        runtime_env |= {"working_dir": str(working_dir), "excludes": list(EXCLUDED)}
    client = _client(address)
    try:
        job = client.submit_job(
            entrypoint=entrypoint(command, driver.python),
            runtime_env=runtime_env,
            entrypoint_num_cpus=driver.num_cpus or None,
            entrypoint_num_gpus=driver.num_gpus or None,
            entrypoint_memory=driver.memory_bytes or None,
        )
    except (RuntimeError, OSError) as error:
        raise JobError(f"{address}: the job was refused: {_last_line(error)}") from error
    hint = "" if wait else f"; follow it with: ray job logs --address {address} --follow {job}"
    _log.info("job %s on %s%s", job, address, hint)
    if not wait:
        return 0
    with _stop_signals() as stopped:
        info = _follow(client, job, stopped, write)
    return _exit_code(job, info, was_stopped=stopped.is_set())


def _exit_code(job: str, info: JobDetails, *, was_stopped: bool) -> int:
    """The exit code of a job that has ended.

    Raises:
        JobError: its program never ran.
    """
    if was_stopped:
        _log.info("job %s: %s", job, info.status.value.lower())
        return 130
    if info.status.value == "SUCCEEDED":
        return 0
    code = info.driver_exit_code
    if code is None:
        raise JobError(f"job {job} {info.status.value.lower()} before its program ran: {_last_line(info.message)}")
    _log.warning("job %s failed with exit code %d; its reason is the last line above", job, code)
    return code if 0 < code < 256 else 1


def _follow(client: JobSubmissionClient, job: str, stopped: threading.Event, write: Callable[[str], Any]) -> JobDetails:
    """Write the job's output as it comes, and return the job's details at its end. The event asks for the job to be stopped."""
    tail = threading.Thread(target=_tail, args=(client, job, write), daemon=True)
    tail.start()
    n_failed, asked_to_stop = 0, False
    while True:
        try:
            if stopped.is_set() and not asked_to_stop:
                _log.info("stopping job %s ...", job)
                client.stop_job(job)
                asked_to_stop = True
            info = client.get_job_info(job)
            n_failed = 0
        except (RuntimeError, OSError) as error:
            n_failed += 1
            if n_failed == TRIES:
                raise JobError(
                    f"job {job}: the cluster no longer answers ({_last_line(error)}); the job may be running still; check it with: "
                    f"ray job status {job}"
                ) from error
            time.sleep(n_failed * POLL_INTERVAL_S)
            continue
        if info.status.is_terminal():
            # The last lines are still on their way.
            tail.join(timeout=10)
            return info
        # Ctrl-C ends the wait.
        stopped.wait(POLL_INTERVAL_S) if not asked_to_stop else time.sleep(POLL_INTERVAL_S)


def _tail(client: JobSubmissionClient, job: str, write: Callable[[str], Any]) -> None:
    """Write the job's log to its end. A new connection sends the whole log again, of which only the rest is written."""
    n_written = 0

    async def follow() -> None:
        nonlocal n_written
        n_seen = 0
        async for text in client.tail_job_logs(job):
            fresh = text[max(0, n_written - n_seen) :]
            n_seen += len(text)
            if fresh:
                write(fresh)
                n_written += len(fresh)

    for _ in range(TRIES):
        # The status of the job decides, which `_follow` polls; a lost log ends nothing.
        with contextlib.suppress(Exception):
            asyncio.run(follow())
            return
        time.sleep(POLL_INTERVAL_S)


def _client(address: str) -> JobSubmissionClient:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise JobError(
            f"{address}: no Ray dashboard answers ({_last_line(error)}); give --ray-address http://HEAD:8265, and the cluster's token if "
            "it has one"
        ) from error


def _checkout() -> Path | None:
    """The checkout that holds the packages; None where they are installed."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "pyproject.toml").is_file() else None


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set during the block; a second signal acts as before."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {int(number): signal.getsignal(number) for number in numbers}

    def stop(number: int, _frame: FrameType | None) -> None:
        stopped.set()
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, stop)
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _last_line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no reason given"
