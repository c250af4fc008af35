"""The figures of a test: accuracy at every cut-off, for whom it holds, and how much of the catalogue is recommended.

Keys are a measure, a cut-off and, for a part of the items or users, its name: ``recall@20``, ``ndcg@20_tail_items``. Parts are thirds
of the training interactions: items by popularity, users by activity (``graphhash.metrics.ranking.thirds_of_interactions``). For a part
of the items, the ranking is that of the whole catalogue, and only test items of the part are relevant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graphhash.metrics.ranking import Hits, coverage, thirds_of_interactions
from pipeline.retrieval.defaults import ITEM_PARTS, USER_PARTS, metric_keys

PER_USER: dict[str, Callable[[Hits, int], NDArray[np.float64]]] = {
    "recall": Hits.recall,
    "capped_recall": Hits.capped_recall,
    "ndcg": Hits.ndcg,
    "hit_rate": Hits.hit_rate,
    "mrr": Hits.mrr,
}
# Of the measures above, those that are also given for parts of the items and users.
PER_PART = ("recall", "ndcg")
# Users whose hits are looked up at once.
BLOCK_USERS = 2**17


@dataclass(frozen=True)
class Parts:
    """The third of the training interactions that every item and every user belongs to: 0, 1 or 2, int8, shape (n_ids,)."""

    items: NDArray[np.int8]
    users: NDArray[np.int8]

    @classmethod
    def of(cls, train: csr_array) -> Parts:
        """The thirds of a training graph, users x items; an interaction counts once, whatever its weight."""
        return cls(
            thirds_of_interactions(np.bincount(train.indices, minlength=train.shape[1])),
            thirds_of_interactions(np.diff(train.indptr)),
        )


def figures(
    topk: NDArray[np.int32], users: NDArray[np.integer], relevant: csr_array, parts: Parts, cutoffs: Sequence[int]
) -> dict[str, Any]:
    """The figures of a ranking, means over its users.

    Args:
        topk: item rows, best first, shape (n, max(cutoffs)); -1 marks an empty slot.
        users: their rows, shape (n,), each with something relevant.
        relevant: held-out interactions, shape (n_users, n_items).
        cutoffs: the parts have figures at the first of them.

    Returns: the keys of :func:`pipeline.retrieval.defaults.metric_keys`, None where there is nothing to measure, and ``parts``: for every
        part the number of its ids, and of the test users that its figures are means over.
    """
    per_user = _per_user(topk, users, relevant, parts, cutoffs)
    means = {key: _mean(values) for key, values in per_user.items()}
    covered = {f"coverage@{k}": coverage(topk[:, :k], relevant.shape[1]) if len(users) else None for k in cutoffs}
    of_parts = {
        part: {
            "n_ids": int(np.count_nonzero(thirds == number)),
            "n_test_users": int(np.count_nonzero(~np.isnan(per_user[f"recall@{cutoffs[0]}_{part}"]))),
        }
        for names, thirds in ((ITEM_PARTS, parts.items), (USER_PARTS, parts.users))
        for number, part in enumerate(names)
    }
    found = means | covered
    return {key: found[key] for key in metric_keys(cutoffs)} | {"parts": of_parts}


def _per_user(
    topk: NDArray[np.int32], users: NDArray[np.integer], relevant: csr_array, parts: Parts, cutoffs: Sequence[int]
) -> Mapping[str, NDArray[np.float64]]:
    """Figures of every user by key, NaN where the user has none, shape (n,) each."""
    blocks: dict[str, list[NDArray[np.float64]]] = {}
    for start in range(0, max(len(users), 1), BLOCK_USERS):
        block = slice(start, start + BLOCK_USERS)
        for key, values in _block(topk[block], users[block], relevant[users[block]], parts, cutoffs):
            blocks.setdefault(key, []).append(values)
    return {key: np.concatenate(values) for key, values in blocks.items()}


def _block(
    topk: NDArray[np.int32], users: NDArray[np.integer], relevant: csr_array, parts: Parts, cutoffs: Sequence[int]
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    hits = Hits.of(topk, relevant)
    for k in cutoffs:
        for name, measure in PER_USER.items():
            yield f"{name}@{k}", measure(hits, k)
    main = cutoffs[0]
    for number, part in enumerate(ITEM_PARTS):
        among = hits.among(parts.items == number, topk, relevant)
        for name in PER_PART:
            yield f"{name}@{main}_{part}", PER_USER[name](among, main)
    for name in PER_PART:
        values = PER_USER[name](hits, main)
        for number, part in enumerate(USER_PARTS):
            yield f"{name}@{main}_{part}", np.where(parts.users[users] == number, values, np.nan)


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None
