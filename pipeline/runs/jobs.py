"""A command as a job of a Ray cluster: checked here, sent with the code, followed to its end.

    code = submit(["run", "--data", "s3://bucket/log.parquet", "--out", "s3://bucket/run"], address="http://head:8265")

The job's driver runs on the head, or wherever the resources that it asks for are; what it starts uses the cluster's Ray, and its
stages ask Ray for the CPUs and GPUs that they use. The driver reserves nothing by default: a reservation that nobody else could use
would keep the stages from the machine. Only memory, which it does use, is worth reserving.

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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import JobError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_log = logging.getLogger(__name__)

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
# Handed on from here to the job. Credentials are not among them: a job's environment can be read by everybody who sees the dashboard.
HANDED_ON = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "GRAPHHASH_WORK", "GRAPHHASH_DEBUG")
# Data and results of this machine, beside what .gitignore names, which Ray leaves out by itself.
EXCLUDED = ("/.git/", "/.venv/", "/tests/", "/mlruns/", "/mlartifacts/", "/mlflow.db*", "*.parquet", "*.npy", "*.npz")
# For a stopped job to mark its MLflow runs and to put away what it has; Ray's own three seconds are too short for that.
STOP_WAIT_S = 60
ASK_EVERY_S = 1.0
# A connection to the dashboard that breaks is made again this often before the job counts as lost from sight.
TRIES = 10


def environment_of_job(given: Mapping[str, str]) -> dict[str, str]:
    """The variables of the job: those of HANDED_ON that are set here, and `given` ones, which are stronger.

    A relative SQLite store is made absolute, as the job runs elsewhere; without any, it is the one that a command here would take.
    """
    from pipeline.tracking.client import absolute_uri
    from pipeline.tracking.tracker import DEFAULT_URI

    variables = {name: os.environ[name] for name in HANDED_ON if os.environ.get(name, "").strip()}
    variables |= given
    variables["MLFLOW_TRACKING_URI"] = absolute_uri(variables.get("MLFLOW_TRACKING_URI", DEFAULT_URI))
    return {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **variables}


def submit(
    command: Sequence[str],
    *,
    address: str | None = None,
    working_dir: Path | None = None,
    variables: Mapping[str, str] | None = None,
    driver: Mapping[str, float] | None = None,
    wait: bool = True,
    write: Callable[[str], Any] = lambda text: print(text, end="", flush=True),
) -> int:
    """Send a command to a cluster as a job, and follow it. Ctrl-C and SIGTERM stop the job.

    Args:
        command: words that were checked, without the program's name.
        address: of the cluster's dashboard; None: RAY_API_SERVER_ADDRESS, or the usual port of this machine.
        working_dir: what is sent; None: this checkout, or nothing where the package is installed, as it has to be there then.
        variables: of the job's environment.
        driver: ``num_cpus``, ``num_gpus``, ``memory`` (bytes) that the driver reserves; it then runs where these are.
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
    resources = {f"entrypoint_{key}": value for key, value in (driver or {}).items() if value}
    try:
        job = client.submit_job(
            entrypoint=shlex.join(["python", "-m", "pipeline", *command]), runtime_env=runtime_env, **resources
        )
    except (RuntimeError, OSError) as error:
        raise JobError(f"{address}: the job was refused: {_last_line(error)}") from error
    hint = "" if wait else f"; follow it with: ray job logs --address {address} --follow {job}"
    _log.info("job %s on %s%s", job, address, hint)
    if not wait:
        return 0
    with _stop_signals() as stopped:
        info = _follow(client, job, stopped, write)
    if stopped.is_set():
        _log.info("job %s: %s", job, info.status.value.lower())
        return 130
    if info.status.value == "SUCCEEDED":
        return 0
    code = info.driver_exit_code
    if code is None:
        raise JobError(f"job {job} {info.status.value.lower()} before its program ran: {_last_line(info.message)}")
    _log.warning("job %s failed with exit code %d; its reason is the last line above", job, code)
    return code if 0 < code < 256 else 1


def _follow(
    client: JobSubmissionClient,
    job: str,
    stopped: threading.Event,
    write: Callable[[str], Any],
) -> Any:
    """Write the job's output as it comes, and return what the cluster knows about the job at its end."""
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
                    f"job {job}: the cluster does not answer any more ({_last_line(error)}); the job may go on; look again with: ray job status {job}"
                ) from error
            time.sleep(n_failed * ASK_EVERY_S)
            continue
        if info.status.is_terminal():
            # The last lines are still on their way.
            tail.join(timeout=10)
            return info
        # Not when the job asks for attention but when the user does.
        stopped.wait(ASK_EVERY_S) if not asked_to_stop else time.sleep(ASK_EVERY_S)


def _tail(client: JobSubmissionClient, job: str, write: Callable[[str], Any]) -> None:
    """Write the log to its end; a connection that breaks goes on where it was, as each starts with the whole log."""
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
        # Whatever it is, the status of the job is asked for elsewhere and decides.
        with contextlib.suppress(Exception):
            asyncio.run(follow())
            return
        time.sleep(ASK_EVERY_S)


def _client(address: str) -> JobSubmissionClient:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise JobError(
            f"{address}: no Ray dashboard answers ({_last_line(error)}); give --ray-address http://HEAD:8265, and the cluster's token if it has one"
        ) from error


def _checkout() -> Path | None:
    """The folder that holds the packages, if it is a checkout and not where pip installs to."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "pyproject.toml").is_file() else None


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set while the block lasts; a second one goes through as always."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, _frame: Any) -> None:
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
