"""The HTTP app of a CTR model: click probabilities, as JSON. FastAPI, without Ray.

    POST /v1/predict     {"rows": [{"user_id": 42, "item_id": "a", "price": null}]}, or {"columns": {"user_id": [42], ...}}
    GET  /healthz, /readyz, /metrics, /docs (and /), /openapi.json

    app = create_ctr_app(LiveBundle(Scorer, "out/bundle"))

Errors, limits, micro-batches and the replacement of the bundle are in `serving.http.app_frame`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Request, Response
from numpy.typing import NDArray
from pydantic import Field

from serving.errors import BundleError, InputError
from serving.http.access import Access
from serving.http.answers import DEFAULT_LIMITS, Limits
from serving.http.api_docs import HEADERS, docs_page
from serving.http.api_schema import ERRORS, ApiRequest, PredictResponse, RequestError, parse
from serving.http.app_frame import add_common, answer, lifespan_of
from serving.http.gate import ServingMetrics
from serving.http.live_bundle import LiveBundle
from serving.http.micro_batches import MicroBatches
from serving.http.openapi import ctr_openapi
from serving.scorer import Scorer

ROUTES = frozenset(("/", "/v1/predict", "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"))


class PredictRequest(ApiRequest):
    """Rows to predict, as objects or as columns; null is a missing value. Columns that the model does not read are ignored."""

    rows: Annotated[list[dict[str, Any]] | None, Field(description="One object per row: column name -> raw value.")] = (
        None
    )
    columns: Annotated[
        dict[str, list[Any]] | None, Field(description="Column name -> raw values of all rows; instead of rows.")
    ] = None


@dataclass(frozen=True, eq=False)
class PredictJob:
    """Checked rows, as the graph takes them."""

    feed: dict[str, NDArray]
    n_users: int
    """Rows; micro-batches count them."""
    width = 1


def predict_job(body: PredictRequest, scorer: Scorer, limits: Limits) -> PredictJob:
    """A checked request. Raises RequestError with the reason."""
    if (body.rows is None) == (body.columns is None):
        raise RequestError("give either rows or columns")
    columns = _by_column(body.rows, scorer) if body.rows is not None else body.columns or {}
    n_rows = len(body.rows) if body.rows is not None else max(map(len, columns.values()), default=0)
    if n_rows > limits.max_users:
        raise RequestError(f"{n_rows} rows; at most {limits.max_users} a request")
    if body.rows == []:
        columns = {name: [] for name in scorer.columns}
    try:
        feed = scorer.tensors(columns)
    except InputError as error:
        raise RequestError(str(error)) from None
    return PredictJob(feed, len(next(iter(feed.values()))))


def _by_column(rows: list[dict[str, Any]], scorer: Scorer) -> dict[str, list[Any]]:
    columns = {}
    for name in dict.fromkeys([*scorer.columns, *(column["name"] for column in scorer.manifest["columns"])]):
        there = [name in row for row in rows]
        if all(there):
            columns[name] = [row[name] for row in rows]
        elif any(there):
            raise RequestError(f"rows[{there.index(False)}] has no {name!r}; give null for a missing value")
    return columns


def run_jobs(jobs: Sequence[PredictJob], scorer: Scorer, metrics: ServingMetrics) -> list[bytes | Exception]:
    """One run of the model for all rows that are asked for together; of each request alone, where one of them has no answer."""
    try:
        return _run_together(jobs, scorer, metrics)
    except BundleError as error:
        return [error] * len(jobs)
    except InputError as error:
        if len(jobs) == 1:
            return [RequestError(str(error))]
        return [answer for job in jobs for answer in run_jobs([job], scorer, metrics)]


def _run_together(jobs: Sequence[PredictJob], scorer: Scorer, metrics: ServingMetrics) -> list[bytes | Exception]:
    feed = {
        column["input"]: _joined([job.feed[column["input"]] for job in jobs], column.get("missing"))
        for column in scorer.manifest["columns"]
    }
    answer = scorer.answer(feed)
    metrics.run_rows.observe(len(answer.probabilities))
    metrics.rows.inc(len(answer.probabilities))
    metrics.predictions.labels(scorer.name).inc(len(answer.probabilities))
    metrics.prediction_sum.labels(scorer.name).inc(float(answer.probabilities.sum(dtype=np.float64)))
    for name, known in answer.known.items():
        if n_oov := int((~known).sum()):
            metrics.oov_values.labels(name).inc(n_oov)
    names = list(answer.known)
    oov = ~np.column_stack(list(answer.known.values())) if names else np.zeros((len(answer.probabilities), 0), np.bool_)
    bodies: list[bytes | Exception] = []
    start = 0
    for job in jobs:
        rows = slice(start, start + job.n_users)
        start += job.n_users
        value = {
            "bundle": scorer.name,
            "probabilities": answer.probabilities[rows].tolist(),
            "oov": [[names[i] for i in np.flatnonzero(flags)] for flags in oov[rows]],
        }
        bodies.append(json.dumps(value, separators=(",", ":")).encode())
    return bodies


def _joined(parts: Sequence[NDArray], missing: Any) -> NDArray:
    """The rows of all parts; those of multi-valued columns filled up to one width."""
    width = max((part.shape[1] for part in parts if part.ndim == 2), default=None)
    if width is None:
        return np.concatenate(parts)
    return np.concatenate(
        [np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=missing) for part in parts]
    )


def create_ctr_app(
    live: LiveBundle[Scorer],
    limits: Limits = DEFAULT_LIMITS,
    *,
    access: Access | None = None,
    watch_s: float = 2.0,
    n_workers: int = 1,
) -> FastAPI:
    """The app over a loaded bundle; arguments as for `serving.http.app.create_app`, ``limits.max_users`` are rows."""
    metrics, access = ServingMetrics(), access or Access()
    metrics.bundle.labels(live.current.name).set(1)

    def run(jobs: Sequence[PredictJob]) -> list[bytes | Exception]:
        return run_jobs(jobs, live.current, metrics)

    batches = MicroBatches(
        run, max_users=limits.max_users, max_cells=limits.max_cells, n_workers=n_workers, max_waiting=limits.max_waiting
    )

    app = FastAPI(title="GraphHash", description="Click probabilities by raw values.", docs_url=None, redoc_url=None,
                  lifespan=lifespan_of(live, metrics, watch_s, batches))  # fmt: skip

    @app.post(
        "/v1/predict",
        summary="The click probability of each row",
        responses={200: {"model": PredictResponse}, **ERRORS},
    )
    async def predict(request: Request) -> Response:
        """In the order of the rows. Columns with an out-of-vocabulary value are named in `oov`, and read the OOV row."""
        body = parse(PredictRequest, request, await request.body())
        job = predict_job(body, live.current, limits)
        return await answer(batches, job, limits)

    @app.get("/readyz", summary="Which bundle answers, and why not the newest")
    async def readyz() -> dict[str, Any]:
        scorer = live.current
        return {
            "status": "ready",
            "bundle": live.current.name,
            "provider": scorer.provider,
            "task": "ctr",
            "columns": {column["name"]: column["dtype"] for column in scorer.manifest["columns"]},
            "refused": live.refused,
        }

    @app.get("/", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        examples = {("post", "/v1/predict"): {"rows": [example_row(live.current)]}}
        page = docs_page(app.openapi(), examples, str(request.base_url).rstrip("/"), token=bool(access.tokens))
        return Response(page, media_type="text/html; charset=utf-8", headers=HEADERS)

    app.openapi = lambda: ctr_openapi(app, live.current, limits, access)  # type: ignore[method-assign]
    add_common(app, metrics, ROUTES, limits, access)
    return app


def example_row(scorer: Scorer) -> dict[str, Any]:
    """A row of every column's type."""
    row: dict[str, Any] = {}
    for column in scorer.manifest["columns"]:
        value: Any = {"int64": 1, "string": "a", "float64": column.get("mean")}[column["dtype"]]
        row[column["name"]] = [value] if column["role"] == "multi_valued" else value
    return row
