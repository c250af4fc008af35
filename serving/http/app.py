"""The HTTP app: recommendations and scores from a bundle, as JSON. FastAPI, without Ray.

    POST /v1/recommend   {"user_ids": [42, 43], "k": 20, "exclude": [[7], []]}
    GET  /v1/recommend   ?user_id=42&k=10: one user, all ids as text, with titles
    POST /v1/score       {"user_id": 42, "item_ids": [7, 8]}; both POST routes: "ids_as_text": true, ids of the answer as text
    GET  /               a page for people: a user's recommendations; /?user_id=42 is the page of one user
    GET  /v1/explain     where asked for: the buckets behind a user's recommendations; without user_id, of some user
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response

from serving.http.access import Access
from serving.http.answers import (
    DEFAULT_LIMITS,
    Limits,
    RecommendJob,
    ScoreJob,
    checked_ids,
    checked_k,
    id_from_text,
    recommend_job,
    run_jobs,
    score_job,
)
from serving.http.api_docs import HEADERS, docs_page
from serving.http.api_schema import (
    ERRORS,
    GET_ERRORS,
    RecommendRequest,
    RecommendResponse,
    RequestError,
    ScoreRequest,
    ScoreResponse,
    TextItems,
    parse,
)
from serving.http.app_frame import add_common, answer, lifespan_of, result_of
from serving.http.explain import Explainer, ExplainJob
from serving.http.gate import ServingMetrics
from serving.http.live_bundle import LiveBundle
from serving.http.micro_batches import MicroBatches
from serving.http.openapi import retrieval_openapi
from serving.retriever import Retriever

PAGE = Path(__file__).with_name("page.html")
ROUTES = frozenset(
    ("/", "/v1/recommend", "/v1/score", "/v1/explain", "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json")
)
# Explanations are for people; a long line of them is not.
MAX_WAITING_EXPLANATIONS = 16


@dataclass(frozen=True)
class RetrievalOptions:
    """What a retrieval server shows beside recommendations and scores."""

    explain: bool = False
    """Whether `/v1/explain` is there. It shows which ids share table rows, and known user ids."""
    titles: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Titles by raw item id, as text; for the page and GET /v1/recommend."""


@dataclass(frozen=True, eq=False)
class _Served:
    """What the routes of an app share."""

    live: LiveBundle[Retriever]
    batches: MicroBatches[Any]
    limits: Limits
    access: Access
    options: RetrievalOptions

    def titled(self, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Items with their ids as text, and titles."""
        return [
            {**item, "item_id": str(item["item_id"]), "title": self.options.titles.get(str(item["item_id"]))}
            for item in items
        ]


def create_app(
    live: LiveBundle[Retriever],
    limits: Limits = DEFAULT_LIMITS,
    *,
    access: Access | None = None,
    options: RetrievalOptions | None = None,
    watch_s: float = 2.0,
    n_workers: int = 1,
) -> FastAPI:
    """The app over a loaded bundle.

    Args:
        live: what to answer from.
        limits: of each request.
        access: who may ask; None: everybody.
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
    explainer = Explainer()
    explanations = MicroBatches[ExplainJob](
        lambda jobs: explainer.run(jobs, live.current), max_users=1, max_cells=1, max_waiting=MAX_WAITING_EXPLANATIONS
    )
    app = FastAPI(
        title="GraphHash",
        description="Recommendations and scores by raw ids.",
        docs_url=None,  # FastAPI's page loads its scripts from elsewhere.
        redoc_url=None,
        lifespan=lifespan_of(live, metrics, watch_s, batches, explanations),
    )
    served = _Served(live, batches, limits, access or Access(), options or RetrievalOptions())
    _add_answers(app, served)
    _add_text_answer(app, served)
    if served.options.explain:
        _add_explanations(app, served, explanations)
    _add_pages(app, served)
    app.openapi = lambda: retrieval_openapi(app, live.current, limits, served.access)  # type: ignore[method-assign]  # FastAPI documents it.
    add_common(app, metrics, ROUTES, limits, served.access)
    return app


def _add_answers(app: FastAPI, served: _Served) -> None:
    """The routes for programs."""

    @app.post(
        "/v1/recommend", summary="The best items of each user", responses={200: {"model": RecommendResponse}, **ERRORS}
    )
    async def recommend(request: Request) -> Response:
        """Items best first, ties by the bundle's rule. Out-of-vocabulary users are answered from the OOV row, `known` false."""
        body = parse(RecommendRequest, request, await request.body())
        return await answer(served.batches, recommend_job(body, served.live.current, served.limits), served.limits)

    @app.post(
        "/v1/score", summary="Scores of given items for one user", responses={200: {"model": ScoreResponse}, **ERRORS}
    )
    async def score(request: Request) -> Response:
        """One score per item, in the order of the request; out-of-vocabulary items are marked in `known_items`."""
        body = parse(ScoreRequest, request, await request.body())
        return await answer(served.batches, score_job(body, served.live.current, served.limits), served.limits)


def _add_text_answer(app: FastAPI, served: _Served) -> None:
    """The route for browsers."""

    @app.get(
        "/v1/recommend",
        summary="The best items of one user, all ids as text",
        responses={200: {"model": TextItems}, **GET_ERRORS},
    )
    async def recommend_text(request: Request, user_id: str, k: int = 10) -> Response:
        """For browsers, which round whole numbers beyond 2^53. Items have titles where the server was given them."""
        _check_parameters(request)
        retriever = served.live.current
        kind = retriever.manifest["id_types"]["user_id"]
        user = checked_ids([id_from_text(user_id, kind)], kind, "user_id")
        k = checked_k(k, retriever, served.limits)
        found = json.loads(await result_of(served.batches, RecommendJob(user, k, None, k), served.limits))
        (result,) = found["results"]
        return _json(
            {
                "bundle": found["bundle"],
                "user_id": str(result["user_id"]),
                "known": result["known"],
                "items": served.titled(result["items"]),
            }
        )


def _add_explanations(app: FastAPI, served: _Served, explanations: MicroBatches[ExplainJob]) -> None:
    @app.get("/v1/explain", summary="The buckets behind a user's recommendations, ids as text", responses=GET_ERRORS)
    async def explain(request: Request, user_id: str | None = None, k: int = 10) -> Response:
        """What the page at / shows. Without `user_id`, of a known user drawn at random."""
        _check_parameters(request)
        retriever = served.live.current
        kind = retriever.manifest["id_types"]["user_id"]
        user = None if user_id is None else checked_ids([id_from_text(user_id, kind)], kind, "user_id").tolist()[0]
        job = ExplainJob(user, checked_k(k, retriever, served.limits))
        result = await result_of(explanations, job, served.limits)
        return _json({**result, "items": served.titled(result["items"])})


def _add_pages(app: FastAPI, served: _Served) -> None:
    """The routes for people, and what the page asks first."""
    page = PAGE.read_bytes()
    page_headers = HEADERS | {"content-security-policy": _policy(page)}

    @app.get("/readyz", summary="Which bundle answers, and why not the newest")
    async def readyz() -> dict[str, Any]:
        retriever = served.live.current
        return {
            "status": "ready",
            "bundle": retriever.name,
            "provider": retriever.provider,
            "id_types": retriever.manifest["id_types"],
            "n_users": retriever.n_users,
            "n_items": retriever.n_items,
            "refused": served.live.refused,
            "explain": served.options.explain,
        }

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=page_headers)

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        async with asyncio.timeout(served.limits.timeout_s):
            examples = await asyncio.to_thread(_examples, served.live.current, served.options)
        text = docs_page(app.openapi(), examples, str(request.base_url).rstrip("/"), token=bool(served.access.tokens))
        return Response(text, media_type="text/html; charset=utf-8", headers=HEADERS)


def _examples(retriever: Retriever, options: RetrievalOptions) -> dict[tuple[str, str], Any]:
    """Requests that this bundle takes, with items that it has. Known users are shown by /v1/explain alone."""
    user: int | str = 42 if retriever.manifest["id_types"]["user_id"] == "int64" else "anna"
    items = retriever.recommend([user], 2).item_ids[0].tolist()
    examples: dict[tuple[str, str], Any] = {
        ("post", "/v1/recommend"): {"user_ids": [user], "k": 5, "exclude": [items[:1]]},
        ("get", "/v1/recommend"): {"user_id": user, "k": 5},
        ("post", "/v1/score"): {"user_id": user, "item_ids": items},
    }
    if options.explain:
        examples["get", "/v1/explain"] = {"user_id": user, "k": 5}
    return examples


def _check_parameters(request: Request) -> None:
    if others := sorted(request.query_params.keys() - {"user_id", "k"}):
        raise RequestError(f"no parameter {others[0]!r:.60}; there are user_id and k")


def _json(value: dict[str, Any]) -> Response:
    return Response(json.dumps(value), media_type="application/json", headers={"cache-control": "no-store"})


def _policy(page: bytes) -> str:
    """Nothing but the page's own script and style may run, and it may talk to this server only."""

    def sources(tag: str) -> str:
        bodies = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(body).digest()).decode()}'" for body in bodies)

    return (
        f"default-src 'none'; script-src {sources('script')}; style-src {sources('style')}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
