"""Balanced co-clustering with a second row per user, after BACO (Jiang, Yang and Wu, SIGIR 2026, arXiv
2604.18351).

Label propagation of one level: every user and item begins alone, and in a few sequential passes each moves to
the neighbours' community of largest gain ``w(v, c) - resolution * a_v * (volume of the other side in c)``,
with volume ``k_u / sqrt(m)`` for a user of degree k_u and ``d_i / sqrt(n_items)`` for an item of degree d_i,
m the total weight. The passes stop in the middle as soon as few enough rows are left. Every user then reads
two rows, that of its community and that of the next best one, and its vector is their mean.

Written from the method's description alone, not from its code, and with decisions of our own where that
leaves room:

- Nodes take turns in row order, users before items. Ties go to the lowest label.
- The product of the two volumes is ``k_u d_i / sqrt(m n_items)``, so the gain is Barber's at resolution
  ``resolution * sqrt(m / n_items)``: the labels report that resolution, and their modularity at it.
- The resolution defaults to 5: with 1 passes reach 11,500 rows on Gowalla as well, with largest buckets 2.5
  times as large, and from 20 on they end above it.
- Where passes end with too many rows, the smallest buckets are merged (``graphhash.clustering.row_budget``).

The second row of a user is chosen in ``graphhash.maps.balanced_maps``.
"""

from __future__ import annotations

import math
import time

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graphhash.clustering.labels import Labels
from graphhash.clustering.row_budget import cap_sizes, fit_rows, modularity_of, share_rows
from graphhash.errors import ArgumentError
from graphhash.graph import _kernels, _refine_kernels
from graphhash.graph.local import LocalGraph, exact_weights

RESOLUTION = 5.0
MAX_PASSES = 10


def balanced_labels(
    biadjacency: csr_array,
    *,
    rows: int | tuple[int, int],
    resolution: float = RESOLUTION,
    max_size: int | None = None,
) -> Labels:
    """Communities by balanced label propagation, with exactly so many rows.

    Args:
        biadjacency: interactions, shape (n_users, n_items), weights above 0.
        rows: of users and items together, or (rows of users, rows of items).
        resolution: of the gain above.
        max_size: most users, and most items, of a community.

    Returns: labels whose ``resolution`` is the equal one of Barber's modularity and whose ``history`` is empty.

    Raises:
        ArgumentError: no edges, a weight that is not above 0, a resolution that is not above 0, or rows out of range.
    """
    if not (math.isfinite(resolution) and resolution > 0):
        raise ArgumentError(f"resolution must be finite and above 0, got {resolution}")
    n_users, n_items = biadjacency.shape
    total_rows = rows if isinstance(rows, int) else sum(rows)
    if not 2 <= total_rows <= n_users + n_items:
        raise ArgumentError(f"rows must be from 2 to the {n_users + n_items} ids, got {rows}")
    graph = LocalGraph(biadjacency)
    started = time.perf_counter()
    users, items = _propagate(graph, biadjacency, resolution, total_rows)
    barber = resolution * math.sqrt(graph.total_weight / n_items)
    propagated = time.perf_counter()
    labels = Labels(users, items, barber, modularity_of(graph, users, items, barber))
    if max_size is not None:
        labels = cap_sizes(graph, labels, max_size)
    user_rows, item_rows = share_rows(labels, rows) if isinstance(rows, int) else rows
    labels = fit_rows(graph, labels, user_rows=user_rows, item_rows=item_rows, max_size=max_size)
    labels.seconds.update(passes=propagated - started, fit_rows=time.perf_counter() - propagated)
    return labels


def _propagate(
    graph: LocalGraph, biadjacency: csr_array, resolution: float, least_rows: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """User and item labels after the passes, numbered 0.. in order of first appearance."""
    n_users, n_items = biadjacency.shape
    n_nodes = n_users + n_items
    transposed = biadjacency.T.tocsr()
    indptr = np.concatenate(
        [biadjacency.indptr.astype(np.int64), biadjacency.nnz + transposed.indptr[1:].astype(np.int64)]
    )
    indices = np.concatenate([biadjacency.indices.astype(np.int64) + n_users, transposed.indices.astype(np.int64)])
    weights = np.concatenate([exact_weights(side.data, graph.total_weight) for side in (biadjacency, transposed)])
    volumes = np.concatenate(_volumes(graph))
    labels = np.arange(n_nodes, dtype=np.int32)
    other = np.repeat(np.array([1, 0], np.int8), [n_users, n_items])
    totals, counts = np.zeros((2, n_nodes)), np.zeros((2, n_nodes), np.int64)
    totals[1 - other, labels], counts[1 - other, labels] = volumes, 1
    n_rows, turns = n_nodes, np.arange(n_nodes)
    for _ in range(MAX_PASSES):
        n_moves, n_rows = _refine_kernels.propagate(
            turns,
            indptr,
            indices,
            weights,
            labels,
            volumes,
            totals,
            other,
            counts,
            resolution,
            n_rows,
            least_rows,
        )
        if n_moves == 0 or n_rows <= least_rows:
            break
    users, items = labels[:n_users].copy(), labels[n_users:].copy()
    _kernels.compact_labels(users, items, n_nodes)
    return users, items


def _volumes(graph: LocalGraph) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return graph.user_degrees / math.sqrt(graph.total_weight), graph.item_degrees / math.sqrt(graph.n_items)
