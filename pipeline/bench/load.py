"""Load on a running server: how many requests it answers, how fast, and whether it drops one when its bundle is replaced.

Clients ask one after another, each as soon as it has its answer, so together they find the most that the server can do
with that many. They run in this process and share the machine with the server.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphhash.errors import DataError

_log = logging.getLogger(__name__)

# Known users that requests are drawn from.
N_USERS = 32
START_TIMEOUT_S = 180
ANSWER_TIMEOUT_S = 60


@dataclass
class _Record:
    """What the clients saw: latencies in seconds, answers by bundle, failures by reason."""

    seconds: list[float] = field(default_factory=list)
    bundles: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    first_of: dict[str, float] = field(default_factory=dict)


def bench_load(
    url: str,
    *,
    seconds: float,
    clients: int,
    users: int = 1,
    k: int = 20,
    at_half: Callable[[], None] | None = None,
    pid: int | None = None,
) -> dict[str, Any]:
    """Load the server at `url` with recommendations, and say what came back.

    Args:
        seconds: how long.
        clients: requests at a time.
        users, k: of each request.
        at_half: called once, after half of the time, as to replace the bundle.
        pid: the server's process; its resident memory, children too, is then measured.

    Returns: `requests`, `failed`, `failures` {reason: count}, `requests_per_s`, `p50_ms`, `p95_ms`, `p99_ms`, `max_ms`,
        `bundles` {name: answers}; with `at_half`: `reload_s`, from the call to the first answer of another bundle
        (None if there was none); with `pid`: `resident_mib` at the start, half and end.

    Raises:
        DataError: nothing answers at `url`, or what answers is no server of ours.
    """
    return asyncio.run(_load(url.rstrip("/"), seconds, clients, users, k, at_half, pid))


@contextmanager
def served(bundle: Path, options: list[str]) -> Iterator[tuple[str, int, Callable[[Path], None]]]:
    """`graphhash serve` on a link to `bundle`, in a process of its own: its address, its number, and `replace(bundle)`.

    Raises DataError when it does not start, with its last line.
    """
    with tempfile.TemporaryDirectory(prefix="graphhash-load-") as folder:
        link = Path(folder) / "bundle"

        def replace(target: Path) -> None:
            new = link.with_name("next")
            new.symlink_to(target.resolve())
            new.replace(link)

        replace(bundle)
        code = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "pipeline", "serve", str(link), "--port", "0", *options]
        process = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            yield _address(process), process.pid, replace
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _address(process: subprocess.Popen) -> str:
    """Where the server says it answers; its later lines are handed on."""
    timer = threading.Timer(START_TIMEOUT_S, process.kill)
    timer.start()
    line = ""
    try:
        for line in process.stderr:
            if "://" in line and " at " in line:
                threading.Thread(
                    target=lambda: [sys.stderr.write(rest) for rest in process.stderr], daemon=True
                ).start()
                return line.partition(" at ")[2].split()[0]
    finally:
        timer.cancel()
    raise DataError(f"graphhash serve did not start: {line.strip() or 'it said nothing'}")


async def _load(
    url: str,
    seconds: float,
    clients: int,
    users: int,
    k: int,
    at_half: Callable[[], None] | None,
    pid: int | None,
) -> dict[str, Any]:
    import aiohttp

    record = _Record()
    timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=clients + 1)) as session:
        ready, known = await _known_users(session, url)
        n_items = min(k, ready["n_items"])
        _log.info(
            "%s: %d clients, %d users a request, %d items each, for %g s ...", url, clients, users, n_items, seconds
        )
        memory = [_resident_mib(pid)]
        start = time.perf_counter()
        stop = start + seconds
        tasks = [
            asyncio.create_task(_client(session, url, known, users, k, n_items, stop, record, random.Random(i)))
            for i in range(clients)
        ]
        await asyncio.sleep(seconds / 2)
        replaced = time.perf_counter()
        memory.append(_resident_mib(pid))
        if at_half is not None:
            await asyncio.to_thread(at_half)
        await asyncio.gather(*tasks)
        took = time.perf_counter() - start
        memory.append(_resident_mib(pid))
    result = _summary(record, took)
    if at_half is not None:
        later = [at for name, at in record.first_of.items() if name != ready["bundle"]]
        result["reload_s"] = round(min(later) - replaced, 2) if later else None
    if pid is not None:
        result["resident_mib"] = memory
    return result


async def _client(
    session: Any,
    url: str,
    known: list[Any],
    users: int,
    k: int,
    n_items: int,
    stop: float,
    record: _Record,
    rng: random.Random,
) -> None:
    while (start := time.perf_counter()) < stop:
        asked = [rng.choice(known) for _ in range(users)]
        try:
            async with session.post(f"{url}/v1/recommend", json={"user_ids": asked, "k": k}) as response:
                body = await response.json()
                reason = None if response.status == 200 else f"{response.status} {body.get('error', '')}"
        except Exception as error:  # Whatever kept the answer from the client is a failed request.
            body, reason = {}, f"{type(error).__name__}: {error}"
        now = time.perf_counter()
        if reason is None and [len(r["items"]) if r["known"] else -1 for r in body["results"]] != [n_items] * users:
            reason = "an answer without the items asked for"
        if reason is not None:
            record.failures[reason[:200]] += 1
            continue
        record.seconds.append(now - start)
        record.bundles[body["bundle"]] += 1
        record.first_of.setdefault(body["bundle"], now)


async def _known_users(session: Any, url: str) -> tuple[dict[str, Any], list[Any]]:
    """The server's description, and some known raw user ids."""
    try:
        async with session.get(f"{url}/readyz") as response:
            ready = await response.json()
        if "id_types" not in ready:
            raise DataError(f"{url} predicts clicks; load is measured with recommendations")
        kind = ready["id_types"]["user_id"]
        known = []
        for _ in range(N_USERS):
            async with session.get(f"{url}/v1/explain?k=1") as response:
                known.append((await response.json())["user_id"])
    except DataError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{url}: no graphhash server answers there ({reason}); start one with 'graphhash serve'"
        ) from error
    return ready, [int(user) for user in known] if kind == "int64" else known


def _resident_mib(pid: int | None) -> float | None:
    """Resident memory of a process and its children."""
    import psutil

    if pid is None:
        return None
    total = 0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return round(total / 2**20, 1)


def _summary(record: _Record, took: float) -> dict[str, Any]:
    import numpy as np

    ms = 1000 * np.array(record.seconds) if record.seconds else np.full(1, np.nan)
    p50, p95, p99 = np.percentile(ms, (50, 95, 99)).round(2).tolist()
    return {
        "requests": len(record.seconds) + record.failures.total(),
        "failed": record.failures.total(),
        "failures": dict(record.failures),
        "seconds": round(took, 1),
        "requests_per_s": round(len(record.seconds) / took, 1),
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "max_ms": round(float(ms.max()), 2),
        "bundles": dict(record.bundles),
    }
