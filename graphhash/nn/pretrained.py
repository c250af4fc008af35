"""Tables of bucket embeddings from trained vectors of all ids."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.linalg import lsqr

from graphhash.maps.bucket_map import BucketMap

# Of the iterative solver, relative.
_TOLERANCE = 1e-10


def fitted_table(
    bucket_map: BucketMap, vectors: NDArray[np.float64], *, skipped: int | None = None
) -> NDArray[np.float64]:
    """The table whose reads through the map are nearest to given vectors: ``min_T sum_id |map[id] @ T - vectors[id]|^2``.

    Rows that no id reads are zero, OOV rows among them.

    Args:
        vectors: of all ids, shape (n_ids, dim).
        skipped: an id that does not count, because it reads nothing.

    Returns: shape (n_buckets, dim).
    """
    n_ids, indices_per_id = bucket_map.n_ids, bucket_map.indices_per_id
    weights = bucket_map.weights[:-1].astype(np.float64)
    if skipped is not None:
        weights[skipped] = 0
    ids = np.repeat(np.arange(n_ids), indices_per_id)
    rows = bucket_map.rows[:-1].reshape(-1)
    reads = csr_array((weights.reshape(-1), (ids, rows)), shape=(n_ids, bucket_map.n_buckets))
    if indices_per_id == 1:
        # Every row on its own: the mean of its ids' vectors, weighted by the squares of their weights.
        squares = np.asarray((reads**2).sum(0)).reshape(-1, 1)
        return np.divide(
            reads.T @ vectors, squares, out=np.zeros((bucket_map.n_buckets, vectors.shape[1])), where=squares > 0
        )
    solved = [lsqr(reads, column, atol=_TOLERANCE, btol=_TOLERANCE)[0] for column in vectors.T]
    return np.stack(solved, axis=1)
