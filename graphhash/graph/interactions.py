"""Interactions as columns of row numbers: merging duplicates, and the seeded split.

The split draws one 64-bit number per (user, item) pair from the seed and the two rows. It therefore depends
on the seed
and on the data alone, and never on the order of the log, on files, shards or tasks: whoever holds an edge
knows its part.

Every user and every item keeps its edge with the lowest number in train, so that no id is left without
training data. Of the other edges, a share `test` goes to test and a share `validation` to validation.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from graphhash.errors import ArgumentError

TRAIN, VALIDATION, TEST = 0, 1, 2


def merge_duplicates(
    users: NDArray[np.integer], items: NDArray[np.integer], weights: NDArray[np.float64]
) -> tuple[NDArray[np.integer], NDArray[np.integer], NDArray[np.float64]]:
    """Edges in ascending (user, item) order, each pair once; weights of equal pairs add up in float64, in log
    order.

    Args:
        users, items, weights: shape (n,); ids or rows, 0 <= items.

    Returns: users, items, weights, shape (n_distinct,).
    """
    # lexsort is stable, so equal pairs stay in log order, and bincount adds in that order.
    order = np.lexsort((items, users))
    users, items = users[order], items[order]
    first = np.ones(len(users), bool)
    first[1:] = (users[1:] != users[:-1]) | (items[1:] != items[:-1])
    if first.all():
        return users, items, weights[order].astype(np.float64)
    total = np.bincount(np.cumsum(first) - 1, weights=weights[order], minlength=int(first.sum()))
    return users[first], items[first], total.astype(np.float64, copy=False)


def edge_hash(users: NDArray[np.integer], items: NDArray[np.integer], *, seed: int) -> NDArray[np.uint64]:
    """One uniform uint64 per edge from (seed, user row, item row), shape (n,).

    The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), applied after each of the three numbers
    is added.
    """
    return _mix(_mix(seed_state(seed) + users.astype(np.uint64)) + items.astype(np.uint64))


def seed_state(seed: int) -> NDArray[np.uint64]:
    """The state of `edge_hash` after the seed, shape (1,)."""
    # Two words of the seed, so that seeds which differ above 2^64 differ here too.
    low, high = np.uint64(seed % 2**64), np.uint64(seed // 2**64 % 2**64)
    return _mix(_mix(np.array([low])) + high)


def lowest_hash(rows: NDArray[np.integer], hashes: NDArray[np.uint64], n_rows: int) -> NDArray[np.uint64]:
    """The lowest hash of each row's edges, shape (n_rows,); 2^64 - 1 for a row without edges."""
    lowest = np.full(n_rows, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(lowest, rows, hashes)
    return lowest


def split_parts(
    hashes: NDArray[np.uint64],
    user_lowest: NDArray[np.uint64],
    item_lowest: NDArray[np.uint64],
    *,
    validation: float,
    test: float,
) -> NDArray[np.uint8]:
    """TRAIN, VALIDATION or TEST of each edge, shape (n,).

    Args:
        hashes: `edge_hash` of each edge.
        user_lowest, item_lowest: the lowest hash of the edge's user and of its item, over all edges, shape
            (n,).
        validation, test: shares in [0, 1), together below 1.
    """
    if not (0 <= validation < 1 and 0 <= test < 1 and validation + test < 1):
        raise ArgumentError(f"validation={validation} and test={test} must be in [0, 1) and together below 1")
    # The lowest hash of a row is low, so the protected edges would thin out the low end: the parts are cut
    # from a second mix of the number, which is independent of its size.
    share = _mix(hashes ^ np.uint64(0x5851F42D4C957F2D)).astype(np.float64) / 2.0**64
    parts = np.where(share < test, TEST, np.where(share < test + validation, VALIDATION, TRAIN)).astype(np.uint8)
    parts[(hashes == user_lowest) | (hashes == item_lowest)] = TRAIN
    return parts


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
