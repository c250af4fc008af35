"""Affinities: how much of what an id's neighbours pass on falls on each bucket, as sparse rows of which the largest entries are kept.

They are computed row by row, so ranges of rows can be made apart, and nothing of the size n_ids x n_buckets is ever held.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graphhash.graph.bipartite import balanced_chunks
from graphhash.maps import _kernels

# Exponent of affinities before they are scaled: 1 gives the first indices nearly all the weight. With 16 indices, validation recall is
# .1723 for 1, .1742 for 0.7, .1731 for 0.5.
POWER = 0.7

# indptr, indices, data
CsrArrays = tuple[NDArray[np.integer], NDArray[np.integer], NDArray[np.floating]]


def affinity_rows(
    graph: csr_array, sources: csr_array, indices_per_id: int, *, split: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Largest entries of each row of ``graph @ sources``, in descending order, raised to POWER and scaled to unit length.

    The entries of buckets below ``split`` and those of the others are scaled to unit length first, so that neither group outweighs the
    other.

    Args:
        graph: some rows of the graph or of its transpose, shape (n_rows, n_neighbours).
        sources: what each neighbour passes on to each bucket, float64 above 0, shape (n_neighbours, n_buckets).
        indices_per_id: entries to keep.
        split: first bucket of the second group; n_buckets or more makes one group.

    Returns: buckets, int32, and weights, float32, both of shape (n_rows, indices_per_id). Entries of weight 0 repeat the row's first
        bucket; a row without neighbours has bucket ``n_buckets``, which stands for the OOV row, at weight 1.
    """
    edges, entries = ((matrix.indptr, matrix.indices, matrix.data) for matrix in (graph, sources))
    return csr_affinity_rows(edges, entries, sources.shape[1], indices_per_id, split=split)


def csr_affinity_rows(
    graph: CsrArrays, sources: CsrArrays, n_buckets: int, indices_per_id: int, *, split: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """:func:`affinity_rows` of plain ``(indptr, indices, data)``.

    Memory maps are read in place; a csr_array would copy their indices wherever indptr is of another type.
    """
    indptr, *edges = graph
    indptr, n_rows = indptr.astype(np.int64, copy=False), len(indptr) - 1
    rows = np.full((n_rows, indices_per_id), n_buckets, np.int32)
    weights = np.zeros((n_rows, indices_per_id), np.float32)
    entries = sources[0].astype(np.int64, copy=False), sources[1], sources[2].astype(np.float64, copy=False)
    _kernels.top_affinities(
        *map(_read_only, (indptr, *edges, *entries)),
        n_buckets, split, POWER, balanced_chunks(indptr, 32), rows, weights,
    )  # fmt: skip
    rows = np.where(weights > 0, rows, rows[:, :1])
    weights[weights[:, 0] == 0, 0] = 1
    return rows, weights


def one_hot(buckets: NDArray[np.int32], n_buckets: int, values: NDArray[np.float64]) -> csr_array:
    """One entry per row: ``values[i]`` at ``buckets[i]``, shape (n_ids, n_buckets)."""
    return csr_array((values, buckets, np.arange(len(buckets) + 1)), shape=(len(buckets), n_buckets))


def row_degrees(graph: csr_array) -> NDArray[np.float64]:
    """Total weight of every row, shape (n_rows,): the same bits whichever other rows ``graph`` holds."""
    return np.asarray(graph.sum(axis=1), np.float64).ravel()


def _read_only(array: NDArray) -> NDArray:
    """A view as read-only as a memory map, so that the kernel is compiled once for both."""
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view
