"""Ranking a catalogue for users, and the metrics of the ranking: recall, NDCG, hit rate and reciprocal rank at k, and coverage.

Ties are broken by one rule everywhere: the higher score first, equal scores by the lower item row (items are in ascending raw-id
order; it is also the rule of ONNX's TopK).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graphhash.errors import ArgumentError


def top_k(scores: NDArray[np.float32], k: int, seen: csr_array | None = None) -> NDArray[np.int32]:
    """Best k items of every row, best first.

    Args:
        scores: shape (n, n_items). Not changed. -inf marks an item that must not be recommended.
        k: slots per row.
        seen: items to leave out, shape (n, n_items), nonzero = left out.

    Returns: item rows, shape (n, k); -1 marks an empty slot (fewer than k items are left).

    Raises:
        ArgumentError: k below 1, shapes differ, or a score is NaN.
    """
    if k < 1:
        raise ArgumentError(f"k must be at least 1, got {k}")
    if seen is not None and seen.shape != scores.shape:
        raise ArgumentError(f"seen is {seen.shape}, scores are {scores.shape}")
    if np.isnan(scores).any():
        raise ArgumentError("scores hold NaN: the model diverged; train with a smaller learning rate")
    if seen is None:
        indptr, indices = np.zeros(len(scores) + 1, np.int64), np.empty(0, np.int32)
    else:
        indptr, indices = seen.indptr.astype(np.int64), seen.indices
    items = np.empty((len(scores), k), np.int32)
    _top_k(scores, indptr, indices, items)
    return items


@dataclass(frozen=True, eq=False)
class Hits:
    """Which recommended items are relevant: every measure of a ranking follows from it. Methods return values of shape (n_users,), NaN for
    a user with nothing relevant, for the first ``k`` slots.

    Attributes:
        is_hit: bool, shape (n_users, n_slots), best slot first.
        n_relevant: relevant items of every user, int64, shape (n_users,).
    """

    is_hit: NDArray[np.bool_]
    n_relevant: NDArray[np.int64]

    @classmethod
    def of(cls, topk: NDArray[np.int32], relevant: csr_array) -> Hits:
        """Look the recommended items up.

        Args:
            topk: item rows, best first, shape (n_users, n_slots); -1 marks an empty slot.
            relevant: held-out interactions, shape (n_users, n_items), nonzero = relevant.

        Raises:
            ArgumentError: they differ in users.
        """
        if len(topk) != relevant.shape[0]:
            raise ArgumentError(f"topk holds {len(topk)} users, relevant {relevant.shape[0]}")
        n_relevant = np.diff(relevant.indptr).astype(np.int64)
        users = np.repeat(np.arange(len(topk)), n_relevant)
        # One number per pair, so that membership is one sorted search.
        pairs = np.sort(users * np.int64(relevant.shape[1]) + relevant.indices)
        slots = np.arange(len(topk), dtype=np.int64)[:, None] * relevant.shape[1] + topk
        place = np.minimum(np.searchsorted(pairs, slots), max(len(pairs) - 1, 0))
        hits = (pairs[place] == slots) & (topk >= 0) if len(pairs) else np.zeros(topk.shape, np.bool_)
        return cls(hits, n_relevant)

    def among(self, is_member: NDArray[np.bool_], topk: NDArray[np.int32], relevant: csr_array) -> Hits:
        """The hits where only some items are relevant; the recommended items are the same.

        Args:
            is_member: of every item, shape (n_items,).
            topk, relevant: those that the hits were made of.
        """
        users = np.repeat(np.arange(len(topk)), self.n_relevant)[is_member[relevant.indices]]
        return Hits(self.is_hit & is_member[topk], np.bincount(users, minlength=len(topk)).astype(np.int64))

    def recall(self, k: int) -> NDArray[np.float64]:
        """As :func:`recall_at_k`."""
        return _share(self.is_hit[:, :k].sum(1), self.n_relevant)

    def capped_recall(self, k: int) -> NDArray[np.float64]:
        """As :func:`capped_recall_at_k`."""
        return _share(self.is_hit[:, :k].sum(1), np.minimum(k, self.n_relevant))

    def ndcg(self, k: int) -> NDArray[np.float64]:
        """As :func:`ndcg_at_k`."""
        discounts = 1 / np.log2(np.arange(2, k + 2))
        best = np.concatenate([[np.nan], np.cumsum(discounts)])[np.minimum(k, self.n_relevant)]
        return (self.is_hit[:, :k] * discounts).sum(1) / best

    def hit_rate(self, k: int) -> NDArray[np.float64]:
        """As :func:`hit_rate_at_k`."""
        return np.where(self.n_relevant > 0, self.is_hit[:, :k].any(1).astype(np.float64), np.nan)

    def mrr(self, k: int) -> NDArray[np.float64]:
        """As :func:`mrr_at_k`."""
        first = self.is_hit[:, :k]
        reciprocal = np.where(first.any(1), 1 / (first.argmax(1) + 1), 0.0)
        return np.where(self.n_relevant > 0, reciprocal, np.nan)


def recall_at_k(topk: NDArray[np.int32], relevant: csr_array) -> NDArray[np.float64]:
    """Share of each user's relevant items that were recommended, over the number of relevant items.

    It stays below 1 for a user with more than k of them. LightGCN and BARS report this one; :func:`capped_recall_at_k` is the other.

    Args:
        topk: item rows, best first, shape (n_users, k); -1 marks an empty slot.
        relevant: held-out interactions, shape (n_users, n_items), nonzero = relevant.

    Returns: values in [0, 1], shape (n_users,); NaN for a user with nothing held out.
    """
    return Hits.of(topk, relevant).recall(topk.shape[1])


def capped_recall_at_k(topk: NDArray[np.int32], relevant: csr_array) -> NDArray[np.float64]:
    """Share of each user's relevant items that were recommended, over min(k, number relevant): a perfect ranking has 1.

    GraphHash and BACO report this one. Arguments and return as in :func:`recall_at_k`.
    """
    return Hits.of(topk, relevant).capped_recall(topk.shape[1])


def ndcg_at_k(topk: NDArray[np.int32], relevant: csr_array) -> NDArray[np.float64]:
    """Normalised discounted cumulative gain with binary relevance: hits weigh ``1 / log2(rank + 1)``, ranks from 1, over the
    best that min(k, number relevant) hits could reach (Jarvelin and Kekalainen, TOIS 2002).

    Arguments and return as in :func:`recall_at_k`.
    """
    return Hits.of(topk, relevant).ndcg(topk.shape[1])


def hit_rate_at_k(topk: NDArray[np.int32], relevant: csr_array) -> NDArray[np.float64]:
    """1 for a user with a relevant item among those recommended, else 0.

    Arguments and return as in :func:`recall_at_k`.
    """
    return Hits.of(topk, relevant).hit_rate(topk.shape[1])


def mrr_at_k(topk: NDArray[np.int32], relevant: csr_array) -> NDArray[np.float64]:
    """Reciprocal rank of the first relevant item, ranks from 1; 0 where none is among those recommended (Voorhees, TREC-8).

    Its mean over users is the mean reciprocal rank. Arguments and return as in :func:`recall_at_k`.
    """
    return Hits.of(topk, relevant).mrr(topk.shape[1])


def coverage(topk: NDArray[np.int32], n_items: int) -> float:
    """Share of the catalogue that is recommended to at least one user.

    Args:
        topk: item rows, shape (n_users, k); -1 marks an empty slot.
        n_items: of the catalogue.
    """
    shown = np.zeros(n_items, np.bool_)
    shown[topk[topk >= 0]] = True
    return float(shown.mean())


def thirds_of_interactions(degrees: NDArray) -> NDArray[np.int8]:
    """Split ids by the number of their interactions, so that each part holds a third of all interactions.

    Ids are ordered by falling degree, equal ones by their row. An id belongs to the third in which the middle of its interactions lies.

    Args:
        degrees: interactions of every id, shape (n_ids,).

    Returns: int8, shape (n_ids,): 0 the head, of the fewest ids; 1 the middle; 2 the tail. Ids without interactions are in the tail.
    """
    degrees = np.asarray(degrees, np.float64)
    order = np.argsort(-degrees, kind="stable")
    ends = np.cumsum(degrees[order])
    total = ends[-1] if len(ends) else 0.0
    thirds = np.full(len(degrees), 2, np.int8)
    if total > 0:
        middles = (ends - degrees[order] / 2) / total
        thirds[order] = np.minimum(np.floor(3 * middles), 2).astype(np.int8)
        thirds[degrees == 0] = 2
    return thirds


def _share(part: NDArray, whole: NDArray) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


# The work of a row is a function of its own: array expressions inside a parallel loop become parallel loops themselves, which take
# three times as long to compile.
@njit(cache=True, parallel=True)
def _top_k(scores, indptr, indices, items):
    for row in prange(len(scores)):
        _best_of_row(scores[row], indices[indptr[row] : indptr[row + 1]], items[row])


@njit(cache=True)
def _best_of_row(scores, seen, items):
    k = len(items)
    left_out = np.zeros(len(scores), np.bool_)
    for item in seen:
        left_out[item] = True
    best_scores = np.full(k, -np.inf, scores.dtype)
    items[:] = -1
    for item in range(len(scores)):
        score = scores[item]
        # Strictly larger only: of equal scores the earlier, lower item stays ahead.
        if score > best_scores[k - 1] and not left_out[item]:
            place = k - 1
            while place > 0 and score > best_scores[place - 1]:
                best_scores[place] = best_scores[place - 1]
                items[place] = items[place - 1]
                place -= 1
            best_scores[place] = score
            items[place] = item
