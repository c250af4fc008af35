"""Bucket maps of balanced communities, after BACO (Jiang, Yang and Wu, SIGIR 2026, arXiv 2604.18351): the mean of two rows
per user.

The communities come from ``graphhash.clustering.balanced``. The next best community of a user is one of its neighbours' that holds
users. A user without one reads a single row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graphhash.clustering.labels import Labels
from graphhash.errors import ArgumentError
from graphhash.graph import _refine_kernels
from graphhash.graph.bipartite import balanced_chunks
from graphhash.graph.local import LocalGraph, exact_weights
from graphhash.maps.bucket_map import BucketMap
from graphhash.maps.community_maps import graph_maps


def balanced_maps(biadjacency: csr_array, labels: Labels) -> tuple[BucketMap, BucketMap]:
    """Maps of balanced labels: the mean of two rows per user, and one row per item.

    Args:
        biadjacency: the interactions that were clustered, shape (n_users, n_items).
        labels: of :func:`balanced_labels`; any other communities do as well.

    Returns: user map of two indices per id, the second of weight 0 for a user without a second community; item map of one index per id.

    Raises:
        ArgumentError: shapes of graph and labels differ.
    """
    if biadjacency.shape != (len(labels.users), len(labels.items)):
        raise ArgumentError(
            f"biadjacency is {biadjacency.shape[0]} x {biadjacency.shape[1]}, labels hold "
            f"{len(labels.users)} users and {len(labels.items)} items"
        )
    own, items = graph_maps(labels)
    second = _second_communities(biadjacency, labels)
    # A label's bucket is its rank among the labels that hold users, as in `graph_maps`.
    bucket = np.searchsorted(np.unique(labels.users), second)
    rows = np.repeat(own.rows, 2, axis=1)
    rows[:-1, 1] = np.where(second >= 0, bucket, rows[:-1, 0])
    codebook = np.array([[0.5, 0.5], [1, 0]], np.float32)
    codes = np.append(second < 0, True).astype(np.uint8)
    users = BucketMap(rows, own.n_buckets, "baco", codebook=codebook, codes=codes)
    return users, BucketMap(items.rows, items.n_buckets, "baco")


def _second_communities(biadjacency: csr_array, labels: Labels) -> NDArray[np.int32]:
    """Every user's best community but its own, at the labels' resolution; -1 where there is none."""
    graph = LocalGraph(biadjacency)
    n_labels = int(max(labels.users.max(), labels.items.max())) + 1
    second = np.empty(len(labels.users), np.int32)
    indptr = biadjacency.indptr.astype(np.int64)
    holds = np.bincount(labels.users, minlength=n_labels) > 0
    totals = np.bincount(labels.items, graph.item_degrees, n_labels)
    _refine_kernels.next_best(
        indptr, biadjacency.indices, exact_weights(biadjacency.data, graph.total_weight), labels.users, labels.items,
        graph.user_degrees, totals, holds, labels.resolution / graph.total_weight, balanced_chunks(indptr, 32), second,
    )  # fmt: skip
    return second
