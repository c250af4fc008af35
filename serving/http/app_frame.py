"""What the HTTP apps of both tasks share: watching for a new bundle, /healthz, /metrics, errors of one line, bounds on bodies.

Every error is `{"error": one line}`: 4xx for what the client can mend, 503 with Retry-After for what passes by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware

from serving.errors import BundleError
from serving.http.access import Access
from serving.http.answers import Limits
from serving.http.api_schema import MediaTypeError, RequestError
from serving.http.gate import CONTENT_TYPE, LOG, HttpGate, ServingMetrics, error_body
from serving.http.live_bundle import LiveBundle
from serving.http.micro_batches import MicroBatches, Overloaded

# Smaller answers fit into one packet.
GZIP_FROM_BYTES = 1400


def lifespan_of(
    live: LiveBundle[Any], metrics: ServingMetrics, watch_s: float, *batches: MicroBatches
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """The lifespan of an app: it watches for a new bundle, and closes the batches at its end."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(watch(live, metrics, watch_s)) if watch_s else None
        yield
        if watching is not None:
            watching.cancel()
        for part in batches:
            part.close()

    return lifespan


async def result_of(batches: MicroBatches, job: Any, limits: Limits) -> Any:
    """What the run that takes the job has for it; raises it where it is an exception, and TimeoutError."""
    async with asyncio.timeout(limits.timeout_s):
        result = await batches.submit(job)
    if isinstance(result, Exception):
        raise result
    return result


async def answer(batches: MicroBatches, job: Any, limits: Limits) -> Response:
    """The JSON of the run that takes the job; errors as of `result_of`."""
    return Response(await result_of(batches, job, limits), media_type="application/json")


def add_common(app: FastAPI, metrics: ServingMetrics, routes: frozenset[str], limits: Limits, access: Access) -> None:
    """What every app has: /healthz, /metrics, errors of one line, gzip, rules of access, and bounds on bodies."""

    @app.get("/healthz", summary="Whether the process answers")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", summary="Figures in Prometheus's text format", response_class=Response)
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    add_errors(app)
    app.add_middleware(GZipMiddleware, minimum_size=GZIP_FROM_BYTES, compresslevel=1)
    # Added last, so it stands first.
    app.add_middleware(
        HttpGate,
        metrics=metrics,
        access=access,
        routes=routes,
        max_body_bytes=limits.max_body_bytes,
        timeout_s=limits.timeout_s,
    )


def add_errors(app: FastAPI) -> None:
    """Every error of ours as its status and one line."""

    def handler(kind: type[Exception], status: int, text: Any = str, headers: Any = None) -> None:
        async def handle(_: Request, error: Exception) -> Response:
            return Response(error_body(text(error)), status, headers, "application/json")

        app.add_exception_handler(kind, handle)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        text = {
            404: f"no route {request.url.path!r:.80}; see /docs",
            405: f"{request.method} is not taken here; see /docs",
        }
        message = text.get(error.status_code, str(error.detail))
        return Response(error_body(message), error.status_code, error.headers, "application/json")

    app.add_exception_handler(HTTPException, http_error)
    handler(RequestError, 400)
    handler(MediaTypeError, 415)
    handler(RequestValidationError, 400, lambda e: f"{e.errors()[0]['loc'][-1]}: {e.errors()[0]['msg']}")
    again = {"retry-after": "1"}
    handler(Overloaded, 503, headers=again)
    handler(TimeoutError, 503, lambda _: "no answer in time; ask for fewer users, or again later", headers=again)
    handler(BundleError, 503, headers=again)


async def watch(live: LiveBundle[Any], metrics: ServingMetrics, watch_s: float) -> None:
    """Look for a new bundle every `watch_s` seconds, for as long as the server runs; log and count what is found."""
    while True:
        await asyncio.sleep(watch_s)
        before, refused, n_failures = live.current.name, live.refused, live.n_failures
        try:
            loaded = await asyncio.to_thread(live.refresh)
        except Exception:  # Whatever it is, it must not end the watching.
            LOG.exception("looking for a new bundle failed")
            continue
        if loaded is not None:
            metrics.bundle.labels(before).set(0)
            metrics.bundle.labels(loaded.name).set(1)
            metrics.reloads.labels("loaded").inc()
            LOG.warning("bundle %s replaces %s", loaded.name, before)
        elif live.refused and (live.refused, live.n_failures) != (refused, n_failures):
            metrics.reloads.labels("failed" if live.n_failures else "refused").inc()
            LOG.warning("bundle %s stays: %s", before, live.refused)
