"""Numba kernels of what happens inside communities: edges kept inside, connected pieces, sequential label propagation.

As in ``graphhash._kernels``: flat arrays in, flat arrays out; an empty weight array means all ones; ties go to the lowest label.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange


@njit(cache=True, parallel=True)
def keep_inside(indptr, indices, weights, labels, other_labels, chunks):
    """The edges whose two ends share a label that is not negative.

    Args:
        indptr: int64, shape (n_rows + 1,).  indices: columns, shape (n_edges,).  weights: float32 (n_edges,) or (0,).
        labels, other_labels: int32, shapes (n_rows,) and (n_columns,).
        chunks: int64 row boundaries, shape (n_chunks + 1,), one unit of parallel work each.

    Returns: indptr, indices and weights of the edges kept, in the same types and order.
    """
    n_rows = len(indptr) - 1
    kept = np.zeros(n_rows + 1, np.int64)
    for chunk in prange(len(chunks) - 1):
        for row in range(chunks[chunk], chunks[chunk + 1]):
            if labels[row] < 0:
                continue
            for edge in range(indptr[row], indptr[row + 1]):
                if other_labels[indices[edge]] == labels[row]:
                    kept[row + 1] += 1
    for row in range(n_rows):
        kept[row + 1] += kept[row]
    unit = len(weights) == 0
    columns = np.empty(kept[n_rows], indices.dtype)
    values = np.empty(0 if unit else kept[n_rows], weights.dtype)
    for chunk in prange(len(chunks) - 1):
        for row in range(chunks[chunk], chunks[chunk + 1]):
            end = kept[row]
            if end == kept[row + 1]:
                continue
            for edge in range(indptr[row], indptr[row + 1]):
                if other_labels[indices[edge]] == labels[row]:
                    columns[end] = indices[edge]
                    if not unit:
                        values[end] = weights[edge]
                    end += 1
    return kept, columns, values


@njit(cache=True, parallel=True)
def lowest_roots(indptr, indices, roots, other_roots, chunks, lowered):
    """``lowered[row]`` = the lowest of the row's own root and its neighbours' roots; int64, shape (n_rows,), written."""
    for chunk in prange(len(chunks) - 1):
        for row in range(chunks[chunk], chunks[chunk + 1]):
            lowest = roots[row]
            for edge in range(indptr[row], indptr[row + 1]):
                lowest = min(lowest, other_roots[indices[edge]])
            lowered[row] = lowest
