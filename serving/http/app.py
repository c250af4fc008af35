"""The HTTP app: recommendations and scores from a bundle, as JSON. FastAPI, without Ray.

    POST /v1/recommend   {"user_ids": [42, 43], "k": 20, "exclude": [[7], []]}
    POST /v1/score       {"user_id": 42, "item_ids": [7, 8]}
    GET  /               a page for people: a user's recommendations, buckets, and the items that share them
    GET  /v1/explain     what the page shows, all ids as text: ?user_id=42&k=10; without user_id, of some user
    GET  /healthz, /readyz, /metrics, /docs, /openapi.json

    app = create_app(LiveBundle(Retriever, "out/bundle"))
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response

from serving.http.answers import (
    DEFAULT_LIMITS,
    Limits,
    RecommendJob,
    ScoreJob,
    checked_k,
    recommend_job,
    run_jobs,
    score_job,
)
from serving.http.api_docs import docs_page
from serving.http.api_schema import (
    ERRORS,
    RecommendRequest,
    RecommendResponse,
    RequestError,
    ScoreRequest,
    ScoreResponse,
    parse,
)
from serving.http.app_frame import add_common, answer, body_schema, lifespan_of
from serving.http.buckets_shown import Explainer
from serving.http.gate import ServingMetrics
from serving.http.live_bundle import LiveBundle
from serving.http.micro_batches import MicroBatches
from serving.retriever import Retriever

PAGE = Path(__file__).with_name("page.html")
ROUTES = frozenset(
    ("/", "/v1/recommend", "/v1/score", "/v1/explain", "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json")
)


def create_app(
    live: LiveBundle[Retriever], limits: Limits = DEFAULT_LIMITS, *, watch_s: float = 2.0, n_workers: int = 1
) -> FastAPI:
    """The app over a loaded bundle.

    Args:
        live: what to answer from.
        limits: of each request.
        watch_s: looks this often for a new bundle in the folder, while the app's lifespan lasts; 0: never.
        n_workers: runs of the model at a time.
    """
    metrics = ServingMetrics()
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

    _add_answers(app, live, batches, limits)
    _add_explanations(app, live, limits)
    _add_pages(app)
    add_common(app, metrics, ROUTES, limits)
    return app


def _add_answers(app: FastAPI, live: LiveBundle[Retriever], batches: MicroBatches[Any], limits: Limits) -> None:
    """The routes that run the model."""

    @app.post(
        "/v1/recommend",
        summary="The best items of each user",
        responses={200: {"model": RecommendResponse}, **ERRORS},
        openapi_extra=body_schema(RecommendRequest),
    )
    async def recommend(request: Request) -> Response:
        """Items best first, ties by the bundle's rule. Out-of-vocabulary users are answered from the OOV row, `known` false."""
        body = parse(RecommendRequest, request, await request.body())
        return await answer(batches, recommend_job(body, live.current, limits), limits)

    @app.post(
        "/v1/score",
        summary="Scores of given items for one user",
        responses={200: {"model": ScoreResponse}, **ERRORS},
        openapi_extra=body_schema(ScoreRequest),
    )
    async def score(request: Request) -> Response:
        """One score per item, in the order of the request; out-of-vocabulary items are marked in `known_items`."""
        body = parse(ScoreRequest, request, await request.body())
        return await answer(batches, score_job(body, live.current, limits), limits)


def _add_explanations(app: FastAPI, live: LiveBundle[Retriever], limits: Limits) -> None:
    """The routes that describe the bundle and its answers."""
    explainer = Explainer()

    @app.get("/v1/explain", summary="A user's recommendations and buckets, ids as text", responses=ERRORS)
    async def explain(request: Request, user_id: str | None = None, k: int = 10) -> Response:
        """What the page at / shows. Without `user_id`, of a known user drawn at random."""
        if others := sorted(request.query_params.keys() - {"user_id", "k"}):
            raise RequestError(f"no parameter {others[0]!r:.60}; there are user_id and k")
        retriever = live.current
        k = checked_k(k, retriever, limits)
        async with asyncio.timeout(limits.timeout_s):
            result = await asyncio.to_thread(explainer.explain, retriever, user_id, k)
        return Response(json.dumps(result), media_type="application/json", headers={"cache-control": "no-store"})

    @app.get("/readyz", summary="Which bundle answers, and why not the newest")
    async def readyz() -> dict[str, Any]:
        retriever = live.current
        return {
            "status": "ready",
            "bundle": live.current.name,
            "provider": retriever.provider,
            "id_types": retriever.manifest["id_types"],
            "n_users": retriever.n_users,
            "n_items": retriever.n_items,
            "refused": live.refused,
        }


def _add_pages(app: FastAPI) -> None:
    """The routes for people."""
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


def _policy(page: bytes) -> str:
    """Nothing but the page's own script and style may run, and it may talk to this server only."""

    def sources(tag: str) -> str:
        bodies = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(body).digest()).decode()}'" for body in bodies)

    return (
        f"default-src 'none'; script-src {sources('script')}; style-src {sources('style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
