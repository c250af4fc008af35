"""The user-item graph: building a biadjacency matrix from columns, and cutting its rows into pieces of equal work."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array

from graphhash.errors import DataError


def biadjacency(
    users: NDArray[np.integer],
    items: NDArray[np.integer],
    weights: NDArray[np.floating] | None = None,
    *,
    n_users: int | None = None,
    n_items: int | None = None,
) -> csr_array:
    """CSR matrix users x items; duplicate pairs are merged and their weights add.

    Args:
        users, items: row numbers, shape (n_interactions,).
        weights: greater than 0, same shape; all ones when None.
        n_users, n_items: shape of the matrix; the largest row number plus one when None.

    Returns: float32 weights, indices ascending in each row.

    Raises:
        DataError: columns of different length, empty, or with a negative row number or a weight that is not above 0.
    """
    users, items = np.asarray(users), np.asarray(items)
    weights = np.ones(len(users), np.float32) if weights is None else np.asarray(weights)
    if not len(users) == len(items) == len(weights):
        raise DataError(f"columns differ in length: {len(users)} users, {len(items)} items, {len(weights)} weights")
    if len(users) == 0:
        raise DataError("no interactions: the graph would be empty")
    if users.min() < 0 or items.min() < 0:
        raise DataError(f"row numbers must not be negative, got user {users.min()} and item {items.min()}")
    if not (weights > 0).all() or not np.isfinite(weights).all():
        raise DataError("weights must be finite and above 0; drop the others first")
    shape = (
        int(users.max()) + 1 if n_users is None else n_users,
        int(items.max()) + 1 if n_items is None else n_items,
    )
    if users.max() >= shape[0] or items.max() >= shape[1]:
        raise DataError(f"row numbers reach user {users.max()} and item {items.max()}, the graph is {shape[0]} x {shape[1]}")
    matrix = csr_array(coo_array((weights.astype(np.float64), (users, items)), shape=shape))
    matrix.sum_duplicates()
    return matrix.astype(np.float32)


def balanced_chunks(indptr: NDArray[np.integer], n_chunks: int) -> NDArray[np.int64]:
    """Row boundaries, shape (at most n_chunks + 1,), that give every chunk about the same number of edges and rows together."""
    work = np.asarray(indptr, np.int64) + np.arange(len(indptr))
    cuts = np.searchsorted(work, np.linspace(0, work[-1], n_chunks + 1))
    return np.unique(np.clip(cuts, 0, len(indptr) - 1)).astype(np.int64)
