"""Ray for the length of a `with` block, and tasks in bounded number, in order; without Ray they run in this process.

`ray_session()` starts a Ray of its own for this process, in a private folder, and takes everything away at
the end, also after Ctrl-C or SIGTERM: it neither joins nor stops any other Ray of the machine, and writes
nothing into the home folder. `ray_session("auto")` or a host attaches to a running cluster and only
disconnects at the end.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphhash.errors import ArgumentError
from pipeline.errors import RunFolderError

if TYPE_CHECKING:
    from tqdm import tqdm

# Ray reads its token once per process, so each later session of this process has to use the same one.
_TOKEN = secrets.token_hex(32)


@contextmanager
def ray_session(address: str | None = None, *, num_cpus: int | None = None, **init: Any) -> Iterator[None]:
    """Ray is initialised inside the block.

    A Ray that this process has initialised before is used as it is and left running.

    Args:
        address: None starts a private local Ray, but in a job of a cluster, which is then the one that is used; "auto",
            "host:port" or "ray://..." attaches to a running one.
        num_cpus: CPUs of a private local Ray; None means all.
        init: further arguments of `ray.init`.

    Raises ConnectionError when nothing answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if address is None and num_cpus is None and on_cluster(None):
        address = "auto"  # `ray job submit` has set RAY_ADDRESS as well.
    if ray.is_initialized():
        yield
    elif address is None:
        with _private_ray(num_cpus, init):
            yield
    else:
        if num_cpus is not None:
            raise ArgumentError(f"num_cpus={num_cpus} sizes a private Ray; leave it out with address={address!r}")
        _check_answers(address)
        options = {"logging_level": logging.ERROR, "log_to_driver": False} | init
        try:
            ray.init(address=address, **options)
            with _sigterm_as_exit():
                yield
        finally:
            ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise ConnectionError unless a Ray answers at an address; Ray itself would wait for one without an end."""
    from pipeline.storage.reachable import why_unreachable

    target = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address
    if target == "auto":
        return  # Ray looks for one on this machine, and says at once if there is none.
    host, _, port = target.removeprefix("ray://").partition("?")[0].rpartition(":")
    if "://" in host or not host or not port.isdecimal():
        return  # Ray knows more forms, and refuses others at once.
    reason = why_unreachable(host.strip("[]"), int(port), protocol="grpc")
    if reason is not None:
        raise ConnectionError(
            f"--address {address}: no Ray answers ({reason}); check host and port (ray start --head prints them, usually port 6379, or "
            "10001 with ray://), or leave it out for a local Ray"
        )


def on_cluster(address: str | None) -> bool:
    """Whether work goes to a running Ray: at an address, or in a job of a cluster."""
    return address is not None or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def is_running() -> bool:
    """Whether Ray is initialised in this process."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def put(value: Any) -> Any:
    """A reference to a large argument of :func:`run_tasks`, which is sent once to every machine; the value itself without Ray."""
    if not is_running():
        return value
    import ray

    return ray.put(value)


def check_shared(folder: Path) -> None:
    """Check that all machines of the running Ray see a folder of this one.

    Raises:
        RunFolderError: one does not. With one machine there is nothing to check.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / f".seen-{secrets.token_hex(8)}"
    marker.touch()
    sees = ray.remote(num_cpus=0, max_retries=2)(_sees)
    try:
        refs = [
            (
                node,
                sees.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                    str(marker)
                ),
            )
            for node in nodes
        ]
        # A machine that leaves in the meantime has nothing to say.
        blind = [node["NodeManagerHostname"] for node, ref in refs if _answer(ref) is False]
    finally:
        marker.unlink(missing_ok=True)
    if blind:
        raise RunFolderError(
            f"{folder}: not seen on {', '.join(sorted(set(blind))[:8])}, of {len(nodes)} machines; work in a folder on storage that all of "
            "them share (--out, or --work where --out is a URI)"
        )


def _sees(path: str) -> bool:
    """What a Ray task does. Network storage may show a new file late."""
    for _ in range(20):
        if os.path.exists(path):
            return True
        time.sleep(0.25)
    return False


def _answer(ref: Any) -> bool | None:
    import ray

    try:
        return ray.get(ref, timeout=60)
    except (ray.exceptions.RayError, TimeoutError):
        return None


def cpus_of_machines() -> list[int]:
    """CPUs of every machine of the running Ray."""
    import ray

    return [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]


def run_tasks(
    function: Callable[..., Any],
    arguments: Sequence[tuple],
    *,
    label: str,
    n_in_flight: int | None = None,
    threads: int = 1,
) -> list[Any]:
    """`[function(*a) for a in arguments]`, results in the order of `arguments`: each call is a Ray task of one CPU where Ray is
    running, and happens in this process where it is not.

    Args:
        function: a plain module-level function.
        arguments: one tuple per task, small (paths and numbers), or refs of what was put once.
        label: words for the progress bar, which goes to stderr and only to a terminal.
        n_in_flight: tasks submitted at once; None means the CPUs of the cluster plus one, so that none waits.
        threads: calls at once in this process.

    Raises the exception of the earliest failing call in the order of `arguments`, as the task raised it, so
    that the same input gives the same error whichever task was quicker.
    """
    from tqdm import tqdm

    with tqdm(total=len(arguments), desc=label, file=sys.stderr, disable=None, leave=False) as bar:
        if is_running():
            return _run_on_ray(function, arguments, n_in_flight, bar)
        with _mapped(function, arguments, threads) as found:
            done = []
            for result in found:
                done.append(result)
                bar.update()
            return done


def _run_on_ray(
    function: Callable[..., Any], arguments: Sequence[tuple], n_in_flight: int | None, bar: tqdm
) -> list[Any]:
    """:func:`run_tasks` where Ray is running."""
    import ray

    remote = ray.remote(num_cpus=1, max_retries=2)(function)
    limit = n_in_flight or max(2, int(ray.cluster_resources().get("CPU", 1)) + 1)
    results: list[Any] = [None] * len(arguments)
    failed: tuple[int, Exception] | None = None
    running: dict[Any, int] = {}
    submitted = 0
    try:
        while running or (submitted < len(arguments) and failed is None):
            while submitted < len(arguments) and len(running) < limit and failed is None:
                running[remote.remote(*arguments[submitted])] = submitted
                submitted += 1
            done, _ = ray.wait(list(running), num_returns=1)
            for ref in done:
                index = running.pop(ref)
                try:
                    results[index] = ray.get(ref)
                except ray.exceptions.RayTaskError as error:
                    if failed is None or index < failed[0]:
                        failed = (index, error.cause if isinstance(error.cause, Exception) else error)
                bar.update()
    finally:
        for ref in running:
            ray.cancel(ref, force=True)
    if failed is not None:
        raise failed[1] from None
    return results


@contextmanager
def _mapped(function: Callable[..., Any], arguments: Sequence[tuple], threads: int) -> Iterator[Iterator[Any]]:
    """The results of the calls in their order, by threads where there are several; after an error none is begun."""
    if min(threads, len(arguments)) < 2:
        yield (function(*each) for each in arguments)
        return
    with ThreadPoolExecutor(min(threads, len(arguments))) as pool:
        futures = [pool.submit(function, *each) for each in arguments]
        try:
            yield (future.result() for future in futures)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _private_ray(num_cpus: int | None, init: dict[str, Any]) -> Iterator[None]:
    import ray

    # Unix socket paths end at about 100 characters and Ray adds 60 of its own, so the folder stays near the
    # root.
    root = "/tmp" if os.access("/tmp", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="gh", dir=root))
    code = str(Path(__file__).resolve().parents[2])
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH")]))}
    if "RAY_AUTH_MODE" not in os.environ:
        # A local Ray turns token authentication on by itself. Without a token file of ours it would write one
        # into the home folder, which then locks `ray job submit` out of other clusters. The mode is left to
        # Ray, which has read it once at import and refreshes it only where it sets the mode itself.
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(_TOKEN)
        variables["RAY_AUTH_TOKEN_PATH"] = str(token)
    options: dict[str, Any] = {
        "include_dashboard": False,
        "logging_level": logging.ERROR,
        "log_to_driver": False,
        "configure_logging": True,
        "_temp_dir": str(folder),
    } | init
    # RAY_ADDRESS would turn the private Ray into an attached one in libraries that call ray.init()
    # themselves.
    with _environment(variables, without=("RAY_ADDRESS",)):
        try:
            ray.init(address="local", num_cpus=num_cpus, **options)
            # After init, because Ray installs a handler of its own that prints a native stack trace.
            with _sigterm_as_exit():
                yield
        finally:
            ray.shutdown()
            _remove(folder)


@contextmanager
def _environment(variables: dict[str, str], without: tuple[str, ...]) -> Iterator[None]:
    # Ray itself sets RAY_AUTH_MODE; left behind, it would ask the next session for a token file that is gone.
    before = {name: os.environ.get(name) for name in (*variables, *without, "RAY_AUTH_MODE")}
    for name in without:
        os.environ.pop(name, None)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """SIGTERM unwinds the stack like Ctrl-C does, so that the private folder goes; main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, frame: Any) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _remove(folder: Path) -> None:
    """Delete the session's files; its last processes may still write a log line while they end."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)
