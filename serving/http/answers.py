"""From a request to what the model is asked, and from the model's answer to JSON.

Requests are checked one by one before they are put together for a run of the model, so that one client's mistake is
told to that client.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.errors import BundleError, InputError
from serving.http.api_schema import RecommendRequest, RequestError, ScoreRequest
from serving.http.gate import ServingMetrics
from serving.raw_ids import RawIds, as_id_array
from serving.retriever import Retriever


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how long it may take."""

    max_body_bytes: int = 4 * 2**20
    max_users: int = 1000
    """User ids of a request, and of one run of the model."""
    max_k: int = 1000
    max_items: int = 10_000
    """Ids in one list of excluded items, or candidates of one user."""
    max_cells: int = 500_000
    """Users times (items for each + longest list of excluded ones): what a request makes in memory and on the wire."""
    max_waiting: int = 1024
    """Requests that wait for the model; the next is told to come again."""
    timeout_s: float = 10.0


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, eq=False)
class RecommendJob:
    user_ids: NDArray
    k: int
    exclude: list[NDArray] | None
    width: int
    ids_as_text: bool = False

    @property
    def n_users(self) -> int:
        return len(self.user_ids)


@dataclass(frozen=True, eq=False)
class ScoreJob:
    user_id: NDArray
    item_ids: NDArray
    ids_as_text: bool = False

    n_users = 1

    @property
    def width(self) -> int:
        return len(self.item_ids)


def recommend_job(body: RecommendRequest, retriever: Retriever, limits: Limits) -> RecommendJob:
    """A checked request. Raises RequestError with the reason."""
    types = retriever.manifest["id_types"]
    user_ids = checked_ids(body.user_ids, types["user_id"], "user_ids", limits.max_users)
    k = checked_k(body.k, retriever, limits)
    exclude = None
    if body.exclude is not None:
        if len(body.exclude) != len(user_ids):
            raise RequestError(
                f"exclude has {len(body.exclude)} lists for {len(user_ids)} users; give one list per user"
            )
        exclude = [
            checked_ids(ids, types["item_id"], f"exclude[{i}]", limits.max_items) for i, ids in enumerate(body.exclude)
        ]
    width = k + max(map(len, exclude or ()), default=0)
    if len(user_ids) * width > limits.max_cells:
        raise RequestError(
            f"{len(user_ids)} users times {width} items each (k and the longest list of excluded ones) is over "
            f"{limits.max_cells}; ask for fewer users at a time"
        )
    return RecommendJob(user_ids, k, exclude, width, body.ids_as_text)


def score_job(body: ScoreRequest, retriever: Retriever, limits: Limits) -> ScoreJob:
    """As `recommend_job`."""
    types = retriever.manifest["id_types"]
    user = checked_ids([body.user_id], types["user_id"], "user_id")
    item_ids = checked_ids(body.item_ids, types["item_id"], "item_ids", limits.max_items)
    return ScoreJob(user, item_ids, body.ids_as_text)


def checked_k(k: int, retriever: Retriever, limits: Limits) -> int:
    """k within the catalogue: asking for more gives all of it, as far as the limit allows."""
    if k < 1:
        raise RequestError(f"k is {k!r:.60}; give a whole number from 1")
    if min(k, retriever.n_items) > limits.max_k:
        raise RequestError(f"k is {k!r:.60}; at most {limits.max_k} items a user")
    return min(k, retriever.n_items)


def checked_ids(ids: Any, kind: str, name: str, limit: int | None = None) -> NDArray:
    """Checked raw ids, as `Retriever` takes them."""
    if not isinstance(ids, list):
        raise RequestError(f"{name} is {ids!r:.60}; give a list of {kind} ids")
    if limit is not None and len(ids) > limit:
        raise RequestError(f"{name} has {len(ids)} ids; at most {limit} a request")
    try:
        return as_id_array(ids, kind, name)
    except InputError as error:
        raise RequestError(str(error)) from None


def run_jobs(
    jobs: Sequence[RecommendJob | ScoreJob], retriever: Retriever, metrics: ServingMetrics
) -> list[bytes | Exception]:
    """One run of the model for all users that are asked for together, and one for each list of candidates."""
    results: dict[int, bytes | Exception] = {}
    asked = [(i, job) for i, job in enumerate(jobs) if isinstance(job, RecommendJob)]
    if asked:
        for (i, _), result in zip(asked, _recommend_all([job for _, job in asked], retriever, metrics), strict=True):
            results[i] = result
    for i, job in enumerate(jobs):
        if isinstance(job, ScoreJob):
            try:
                results[i] = _score(job, retriever, metrics)
            except BundleError as error:
                results[i] = error
    return [results[i] for i in range(len(jobs))]


def _recommend_all(
    jobs: Sequence[RecommendJob], retriever: Retriever, metrics: ServingMetrics
) -> Sequence[bytes | Exception]:
    users = np.concatenate([job.user_ids for job in jobs])
    exclude: list[RawIds] | None = None
    if any(job.exclude is not None for job in jobs):
        exclude = []
        for job in jobs:
            exclude += [[]] * job.n_users if job.exclude is None else job.exclude
    metrics.run_users.observe(len(users))
    try:
        # The k best are the first k of more: ties have one order.
        answer = retriever.recommend(users, max(job.k for job in jobs), exclude)
    except BundleError as error:
        return [error] * len(jobs)
    metrics.users.inc(len(users))
    metrics.oov_users.inc(int((~answer.known).sum()))
    bodies, start = [], 0
    for job in jobs:
        results = [
            {
                "user_id": user_id,
                "known": known,
                "items": [
                    {"item_id": item_id, "score": score}
                    for item_id, score in zip(_shown(item_ids[: job.k], job), scores[: job.k].tolist(), strict=True)
                ],
            }
            for user_id, known, item_ids, scores in zip(
                _shown(job.user_ids, job),
                answer.known[start : start + job.n_users].tolist(),
                answer.item_ids[start : start + job.n_users],
                answer.scores[start : start + job.n_users],
                strict=True,
            )
        ]
        start += job.n_users
        bodies.append(json.dumps({"bundle": retriever.name, "results": results}, separators=(",", ":")).encode())
    return bodies


def _score(job: ScoreJob, retriever: Retriever, metrics: ServingMetrics) -> bytes:
    answer = retriever.score(job.user_id, job.item_ids[None, :])
    known, known_items = bool(answer.known[0]), answer.known_items[0].tolist()
    metrics.users.inc()
    metrics.oov_users.inc(not known)
    metrics.oov_items.inc(known_items.count(False))
    return json.dumps(
        {
            "bundle": retriever.name,
            "user_id": _shown(job.user_id, job)[0],
            "known": known,
            "item_ids": _shown(job.item_ids, job),
            "scores": answer.scores[0].tolist(),
            "known_items": known_items,
        },
        separators=(",", ":"),
    ).encode()


def _shown(ids: NDArray, job: RecommendJob | ScoreJob) -> list[int | str]:
    """Ids of an answer, for JSON."""
    values = ids.tolist()
    return [str(value) for value in values] if job.ids_as_text else values


def id_from_text(text: str, kind: str) -> int | str:
    """A raw id of a type from text, as an address or a person gives it. Raises RequestError."""
    if kind == "string":
        return text
    if re.fullmatch(r"[+-]?[0-9]{1,19}", text.strip()) and -(2**63) <= int(text) < 2**63:
        return int(text)
    raise RequestError(f"user_id is {text!r:.60}; this model takes whole numbers of 64 bits")
