"""Agreement of an exported graph in ONNX Runtime with the model that it was made from, on a sample of users."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from graphhash.graph.vocabulary import Vocabulary
from graphhash.models.mf import AllItemScores
from pipeline.export.publish import oov_id
from serving.errors import BundleError
from serving.retriever import Retriever

# Absolute, and relative to the largest score in size, beside the model with its tables rounded as they are stored.
TOLERANCE = 1e-5
_CHECK_K = 100
_CHECK_SCORES = 2**25


def check_agreement(
    retriever: Retriever,
    scores_of: AllItemScores,
    users: Vocabulary,
    items: Vocabulary,
    n_check: int,
    rng: np.random.Generator,
) -> None:
    """Raise BundleError unless ONNX Runtime and the model agree on scores and, ties within the tolerance aside, on items.

    Args:
        scores_of: of the model with its tables rounded as they are stored.
        n_check: users compared, an OOV one among them.
        rng: draws the users, and candidates for them.
    """
    sample = np.sort(rng.choice(len(users), min(n_check - 1, len(users)), replace=False))
    rows = np.concatenate([[len(users)], sample]).astype(np.int64)
    step = max(1, _CHECK_SCORES // len(items))
    for start in range(0, len(rows), step):
        chunk = rows[start : start + step]
        raw = [oov_id(users) if row == len(users) else users.take([row])[0] for row in chunk]
        with torch.no_grad():
            expected = scores_of(torch.from_numpy(chunk)).numpy()
        answers: list[tuple[list[Any], NDArray | None, int]] = [(raw, None, min(_CHECK_K, len(items)))]
        if start == 0:
            # Two users are asked for every item, so that each item's vector is read, and again without a
            # third of them.
            answers += [(raw[:2], exclude, len(items)) for exclude in (None, np.arange(0, len(items), 3))]
        for asked, exclude, k in answers:
            truth = expected[: len(asked)].copy()
            excluded = None
            if exclude is not None:
                truth[:, exclude] = -np.inf
                excluded = [items.take(exclude)] * len(asked)
            got = retriever.recommend(asked, k, excluded)
            if not np.array_equal(got.known, chunk[: len(asked)] < len(users)):
                raise BundleError(
                    "the exported graph does not tell known users from OOV ones; report this with the vocabulary"
                )
            for user, item_ids, scores, row in zip(asked, got.item_ids, got.scores, truth, strict=True):
                _compare_user(user, items.rows(item_ids), scores, row, k)
        if start == 0:
            _compare_candidates(retriever, raw, expected, items, rng)


def _compare_candidates(
    retriever: Retriever, users: list[Any], expected: NDArray, items: Vocabulary, rng: np.random.Generator
) -> None:
    """Raise BundleError unless candidates, an OOV one among them, score as in the catalogue."""
    rows = rng.integers(0, len(items), (len(users), min(_CHECK_K, len(items))))
    oov = np.full((len(users), 1), oov_id(items), np.int64 if items.kind == "int64" else object)
    got = retriever.score(users, np.concatenate([items.take(rows), oov], axis=1))
    wanted = np.take_along_axis(expected, rows, axis=1)
    worst = np.abs(got.scores[:, :-1] - wanted).max(initial=0)
    allowed = TOLERANCE * (1 + np.abs(expected).max(initial=0))
    if not worst <= allowed or not np.isfinite(got.scores).all():
        raise BundleError(
            f"scores of candidates and of the catalogue differ by {worst:.3g}, allowed are {allowed:.3g}; "
            "nothing was published, report this"
        )
    if not got.known_items[:, :-1].all() or got.known_items[:, -1].any():
        raise BundleError(
            "the exported graph does not tell known candidates from OOV ones; report this with the vocabulary"
        )


def _compare_user(user: Any, got: NDArray, scores: NDArray, expected: NDArray, k: int) -> None:
    """One user's answer: item rows and scores of ONNX Runtime against the model's scores of all items."""
    k = min(k, int((expected > -np.inf).sum()))
    if np.isnan(expected).any() or np.isposinf(expected).any():
        raise BundleError(
            f"user {user!r}: the trained model scores {expected[~np.isfinite(expected)][0]}; train it again"
        )
    best = -np.sort(np.partition(-expected, k - 1)[:k]) if k else expected[:0]
    allowed = TOLERANCE * (1 + np.abs(expected[np.isfinite(expected)]).max(initial=0))
    if len(got) != len(best) or len(np.unique(got)) != k:
        raise BundleError(
            f"user {user!r}: ONNX Runtime returns {len(np.unique(got))} items instead of {k}; "
            "nothing was published, report this"
        )
    worst = np.abs(scores - expected[got]).max(initial=0)
    if not worst <= allowed:
        raise BundleError(
            f"user {user!r}: scores of ONNX Runtime and the model differ by {worst:.3g}, allowed are "
            f"{allowed:.3g}; "
            "nothing was published, use precision='float32' or report this"
        )
    # Scores closer than the error of both may change places; equal scores may not.
    out_of_order = (scores[1:] == scores[:-1]) & (got[1:] < got[:-1])
    if (np.abs(expected[got] - best) > 2 * allowed).any() or out_of_order.any():
        raise BundleError(
            f"user {user!r}: ONNX Runtime and the model recommend different items; nothing was published, report this"
        )
