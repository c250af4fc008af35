"""The HTTP app: recommendations and scores from a bundle, as JSON. FastAPI, without Ray.

    POST /v1/recommend   {"user_ids": [42, 43], "k": 20, "exclude": [[7], []]}
    POST /v1/score       {"user_id": 42, "item_ids": [7, 8]}
    GET  /               a page for people: a user's recommendations, buckets, and the items that share them
    GET  /v1/explain     what the page shows, all ids as text: ?user_id=42&k=10; without user_id, of some user
    GET  /healthz, /readyz, /metrics, /docs, /openapi.json

    app = create_app(LiveBundle("out/bundle"))
    uvicorn.run(app)

Every error is `{"error": one line}`: 4xx for what the client can mend, 503 with Retry-After for what passes by itself.
Answers name the bundle they are from. Requests that arrive while the model runs are answered by its next run, together.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from serving.bundle import BundleError
from serving.http.answers import Limits, RecommendJob, ScoreJob, checked_k, recommend_job, run_jobs, score_job
from serving.http.api_docs import docs_page
from serving.http.api_schema import (
    ERRORS,
    MediaTypeError,
    RecommendRequest,
    RecommendResponse,
    RequestError,
    ScoreRequest,
    ScoreResponse,
    parse,
)
from serving.http.buckets_shown import Explainer
from serving.http.gate import CONTENT_TYPE, LOG, HttpGate, ServingMetrics, error_body
from serving.http.live_bundle import LiveBundle, LiveScorer
from serving.http.micro_batches import MicroBatches, Overloaded

PAGE = Path(__file__).with_name("page.html")
ROUTES = frozenset(
    ("/", "/v1/recommend", "/v1/score", "/v1/explain", "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json")
)


def create_app(live: LiveBundle, limits: Limits = Limits(), *, watch_s: float = 2.0, n_workers: int = 1) -> FastAPI:
    """The app over a loaded bundle.

    Args:
        live: what to answer from.
        limits: of each request.
        watch_s: looks this often for a new bundle in the folder, while the app's lifespan lasts; 0: never.
        n_workers: runs of the model at a time.
    """
    metrics = ServingMetrics()
    explainer = Explainer()
    metrics.bundle.labels(live.current.name).set(1)

    def run(jobs: Sequence[RecommendJob | ScoreJob]) -> list[bytes | Exception]:
        return run_jobs(jobs, live.current, metrics)

    batches = MicroBatches(
        run,
        max_users=limits.max_users,
        max_cells=limits.max_cells,
        n_workers=n_workers,
        max_waiting=limits.max_waiting,
    )

    app = FastAPI(
        title="GraphHash",
        description="Recommendations and scores by raw ids.",
        docs_url=None,  # FastAPI's page loads its scripts from elsewhere.
        redoc_url=None,
        lifespan=lifespan_of(live, metrics, watch_s, batches),
    )

    @app.post(
        "/v1/recommend",
        summary="The best items of each user",
        responses={200: {"model": RecommendResponse}, **ERRORS},
        openapi_extra=body_schema(RecommendRequest),
    )
    async def recommend(request: Request) -> Response:
        """Items best first, ties by the bundle's rule. Users the model does not know get its fallback, `known` false."""
        body = parse(RecommendRequest, request, await request.body())
        return await answer(batches, recommend_job(body, live.current.retriever, limits), limits)

    @app.post(
        "/v1/score",
        summary="Scores of given items for one user",
        responses={200: {"model": ScoreResponse}, **ERRORS},
        openapi_extra=body_schema(ScoreRequest),
    )
    async def score(request: Request) -> Response:
        """One score per item, in the order asked for; items the model does not know are marked in `known_items`."""
        body = parse(ScoreRequest, request, await request.body())
        return await answer(batches, score_job(body, live.current.retriever, limits), limits)

    @app.get("/v1/explain", summary="A user's recommendations and buckets, ids as text", responses=ERRORS)
    async def explain(request: Request, user_id: str | None = None, k: int = 10) -> Response:
        """What the page at / shows. Without `user_id`, of a known user drawn at random."""
        if unknown := sorted(request.query_params.keys() - {"user_id", "k"}):
            raise RequestError(f"no parameter {unknown[0]!r:.60}; there are user_id and k")
        loaded = live.current
        k = checked_k(k, loaded.retriever, limits)
        async with asyncio.timeout(limits.timeout_s):
            result = await asyncio.to_thread(explainer.explain, loaded, user_id, k)
        return Response(json.dumps(result), media_type="application/json", headers={"cache-control": "no-store"})

    @app.get("/readyz", summary="Which bundle answers, and why not the newest")
    async def readyz() -> dict[str, Any]:
        retriever = live.current.retriever
        return {
            "status": "ready",
            "bundle": live.current.name,
            "provider": retriever.provider,
            "id_types": retriever.manifest["id_types"],
            "n_users": retriever.n_users,
            "n_items": retriever.n_items,
            "refused": live.refused,
        }

    page = PAGE.read_bytes()
    page_headers = {
        "content-security-policy": _policy(page),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=page_headers)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return Response(docs_page(app.openapi()), media_type="text/html; charset=utf-8")

    add_common(app, metrics, ROUTES, limits)
    return app


def lifespan_of(live: LiveBundle | LiveScorer, metrics: ServingMetrics, watch_s: float, batches: MicroBatches) -> Any:
    """While an app runs: looking for a new bundle; at its end the batches are closed."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(watch(live, metrics, watch_s)) if watch_s else None
        yield
        if watching is not None:
            watching.cancel()
        batches.close()

    return lifespan


async def answer(batches: MicroBatches, job: Any, limits: Limits) -> Response:
    """The answer of the run that takes the job; raises what the run has for it instead, or TimeoutError."""
    async with asyncio.timeout(limits.timeout_s):
        result = await batches.submit(job)
    if isinstance(result, Exception):
        raise result
    return Response(result, media_type="application/json")


def add_common(app: FastAPI, metrics: ServingMetrics, routes: frozenset[str], limits: Limits) -> None:
    """What every app has: /healthz, /metrics, errors of one line, and bounds on bodies."""

    @app.get("/healthz", summary="Whether the process answers")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", summary="Figures in Prometheus's text format", response_class=Response)
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    add_errors(app)
    app.add_middleware(
        HttpGate, metrics=metrics, routes=routes, max_body_bytes=limits.max_body_bytes, timeout_s=limits.timeout_s
    )


def add_errors(app: FastAPI) -> None:
    """Every error of ours as its status and one line."""

    def handler(kind: type[Exception], status: int, text: Any = str, headers: Any = None) -> None:
        async def handle(_: Request, error: Exception) -> Response:
            return Response(error_body(text(error)), status, headers, "application/json")

        app.add_exception_handler(kind, handle)

    async def http_error(request: Request, error: HTTPException) -> Response:
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


async def watch(live: LiveBundle | LiveScorer, metrics: ServingMetrics, watch_s: float) -> None:
    """Look for a new bundle for as long as the server runs."""
    while True:
        await asyncio.sleep(watch_s)
        before, refused = live.current.name, live.refused
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
        elif live.refused and live.refused != refused:
            metrics.reloads.labels("refused").inc()
            LOG.warning("bundle %s stays: %s", before, live.refused)


def body_schema(model: Any) -> dict[str, Any]:
    """A request's model for the OpenAPI description."""
    schema = model.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _policy(page: bytes) -> str:
    """Nothing but the page's own script and style may run, and it may talk to this server only."""

    def sources(tag: str) -> str:
        bodies = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(body).digest()).decode()}'" for body in bodies)

    return (
        f"default-src 'none'; script-src {sources('script')}; style-src {sources('style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
