"""What `/v1/explain` answers: a user's recommendations, with the table rows behind them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from serving.errors import BundleError
from serving.http.buckets_shown import BucketsShown
from serving.manifest import MANIFEST
from serving.retriever import Retriever


@dataclass(frozen=True)
class ExplainJob:
    """A checked request; `user_id` is of the model's type, None draws a known one."""

    user_id: int | str | None
    k: int

    n_users = 1
    width = 1


class Explainer:
    """Explains answers of the bundle in use. Its maps are read, and indexed, when they are first asked for."""

    def __init__(self) -> None:
        self._of: tuple[str, BucketsShown] | None = None
        self._rng = np.random.default_rng()

    def run(self, jobs: Sequence[ExplainJob], retriever: Retriever) -> list[dict[str, Any] | Exception]:
        """An answer per job, as `serving.http.micro_batches` takes it."""
        answers: list[dict[str, Any] | Exception] = []
        for job in jobs:
            try:
                answers.append(self.explain(retriever, job))
            except BundleError as error:
                answers.append(error)
        return answers

    def explain(self, retriever: Retriever, job: ExplainJob) -> dict[str, Any]:
        """JSON-able, ids as text.

        Raises:
            BundleError: the bundle's files are being replaced.
        """
        if self._of is None or self._of[0] != retriever.name:
            self._of = None  # Never two at a time in memory.
            self._of = (retriever.name, _shown(retriever))
        shown = self._of[1]
        user_id = shown.random_user(self._rng) if job.user_id is None else job.user_id
        answer = retriever.recommend([user_id], job.k)
        buckets = shown.of_user(user_id)
        mine = {entry["bucket"] for entry in buckets} if shown.shared else set()
        items = []
        for item_id, score in zip(answer.item_ids[0].tolist(), answer.scores[0].tolist(), strict=True):
            described = [
                {
                    "bucket": bucket,
                    "weight": weight,
                    "with_user": bucket in mine,
                    # Where tables are shared, the user's buckets say how many items read them.
                    "n_items": None if shown.shared else len(shown.readers("item", bucket)),
                }
                for bucket, weight in shown.of_item(item_id).items()
            ]
            items.append({"item_id": str(item_id), "score": score, "buckets": described})
        return {
            "bundle": retriever.name,
            "user_id": str(user_id),
            "known": bool(answer.known[0]),
            "shared_table": shown.shared,
            "buckets": [{**entry, "items": list(map(str, entry["items"]))} for entry in buckets],
            "items": items,
        }


def _shown(retriever: Retriever) -> BucketsShown:
    """The maps of the loaded bundle: the folder may hold a newer one by now."""
    path, manifest = retriever.path, retriever.manifest
    try:
        shown = BucketsShown(path)
        # After the file is read: bundles are only ever replaced by newer ones.
        same = json.loads((path / MANIFEST).read_bytes())["manifest_sha256"] == manifest["manifest_sha256"]
    except (ValueError, OSError, KeyError) as error:
        raise BundleError(f"the bundle's maps cannot be read now ({error}); try again") from error
    if not same:
        raise BundleError("the bundle is being replaced; try again")
    return shown
