"""What stands before the HTTP app: who may ask, bounds on bodies, figures for Prometheus, and no traceback for anybody.

HEAD is answered as GET without the body. A body is read here, up to the limit, and refused from its first byte past it or from its stated
length; the app behind gets it whole. Every request that comes by is counted with its route and status.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from serving.http.access import Access

LOG = logging.getLogger("graphhash.serve")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# prometheus_client keeps the figures in this folder instead of in memory, for several processes together.
SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class ServingMetrics:
    """The figures of one app. With `SHARED_FOLDER` set they are of all processes that share the folder."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def make(kind: Any, name: str, text: str, labels: tuple[str, ...] = (), **options: Any) -> Any:
            return kind(f"graphhash_{name}", text, labels, registry=self._registry, **options)

        self.requests = make(Counter, "requests", "Requests by route and status.", ("route", "status"))
        self.seconds = make(
            Histogram, "request_seconds", "From the first byte to the answer.", ("route",), buckets=_SECONDS
        )
        self.run_users = make(Histogram, "run_users", "Users in one run of the model.", buckets=_SIZES)
        self.users = make(Counter, "users", "User ids asked for.")
        self.oov_users = make(Counter, "oov_users", "Out-of-vocabulary user ids.")
        self.oov_items = make(Counter, "oov_items", "Out-of-vocabulary candidate items.")
        self.run_rows = make(Histogram, "run_rows", "Rows in one run of the model.", buckets=_SIZES)
        self.rows = make(Counter, "rows", "Rows that were predicted.")
        # A counter of each: a histogram would observe every row by itself.
        self.predictions = make(
            Counter, "predictions", "Click probabilities that were predicted, by bundle.", ("bundle",)
        )
        self.prediction_sum = make(
            Counter,
            "prediction_sum",
            "Sum of the predicted click probabilities, by bundle; over graphhash_predictions it is the mean prediction.",
            ("bundle",),
        )
        self.oov_values = make(Counter, "oov_values", "Out-of-vocabulary values, by column.", ("column",))
        self.reloads = make(
            Counter,
            "reloads",
            "New bundles that were loaded or refused, and failed attempts to load one, which are repeated.",
            ("result",),
        )
        self.bundle = make(
            Gauge,
            "bundle",
            "Processes that answer from this bundle (first digits of its manifest's hash).",
            ("bundle",),
            multiprocess_mode="livesum",
        )

    def text(self) -> bytes:
        """Everything in Prometheus's text format."""
        folder = os.environ.get(SHARED_FOLDER)
        if folder is None:
            return generate_latest(self._registry)
        for file in Path(folder).glob("gauge_live*_*.db"):
            pid = file.stem.rpartition("_")[2]
            if not Path(f"/proc/{pid}").exists():
                mark_process_dead(int(pid), folder)
        registry = CollectorRegistry()
        MultiProcessCollector(registry, folder)
        return generate_latest(registry)


class HttpGate:
    """An ASGI app around another one.

    Args:
        app: gets requests with a body of at most `max_body_bytes`, in one piece.
        access: which requests are refused before their body is read.
        routes: paths that have figures of their own; all others are "other".
        timeout_s: for the body to arrive.
    """

    def __init__(
        self,
        app: Any,
        *,
        metrics: ServingMetrics,
        access: Access,
        routes: frozenset[str],
        max_body_bytes: int,
        timeout_s: float,
    ) -> None:
        self._app, self._metrics, self._access, self._routes = app, metrics, access, routes
        self._max_body_bytes, self._timeout_s = max_body_bytes, timeout_s

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 499  # 499: the client was gone before an answer.
        is_head = scope["method"] == "HEAD"

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif is_head:
                message = message | {"body": b""}
            await send(message)

        try:
            if refusal := self._access.refusal(scope):
                await send_error(counted, refusal.status, refusal.message, refusal.headers, close=True)
                return
            if is_head:
                scope = scope | {"method": "GET"}
            body = await self._body(scope, receive, counted)
            if body is not None:
                await self._app(scope, _replay(body, receive), counted)
        except Exception:
            LOG.exception("%s %r failed", scope["method"], scope["path"])
            if status == 499:
                await send_error(counted, 500, "the server failed; its log says why")
        finally:
            route = scope["path"] if scope["path"] in self._routes else "other"
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - start)

    async def _body(self, scope: Any, receive: Any, send: Any) -> bytes | None:
        """The whole body, or None when it was refused or the client has gone."""
        stated = dict(scope["headers"]).get(b"content-length", b"")
        if stated.isdigit() and (len(stated) > 18 or int(stated) > self._max_body_bytes):
            await self._refuse(send)
            return None
        parts: list[bytes] = []
        n_bytes = 0
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    n_bytes += len(part)
                    if n_bytes > self._max_body_bytes:
                        break
                    parts.append(part)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            await send_error(send, 408, f"the body did not arrive within {self._timeout_s:g} s", close=True)
            return None
        await self._refuse(send)
        return None

    async def _refuse(self, send: Any) -> None:
        await send_error(
            send, 413, f"the body is larger than {self._max_body_bytes} bytes; send several requests", close=True
        )


def one_line(message: str) -> str:
    """A message as one line that can be sent: lone surrogates, which no encoding takes, are spelled out."""
    return " ".join(message.encode("utf-8", "backslashreplace").decode("utf-8").split())[:500]


def error_body(message: str) -> bytes:
    return json.dumps({"error": one_line(message)}).encode()


async def send_error(
    send: Any, status: int, message: str, extra: Iterable[tuple[bytes, bytes]] = (), *, close: bool = False
) -> None:
    body = error_body(message)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *extra]
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _replay(body: bytes, receive: Any) -> Any:
    given = False

    async def again() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
