"""Bucket maps that follow from communities: hard, doubled, of several resolutions, and soft.

A soft map lets every id read a mixture of buckets, its affinities: one or two steps of graph convolution, taken once, at the size
of the table. They are computed row by row, so ranges of rows can be made apart (:func:`affinity_rows`), and nothing of the size
users x buckets is ever held.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, diags_array

from graphhash import _map_kernels
from graphhash.buckets import BucketMap, plain_map
from graphhash.clustering import Labels
from graphhash.graph import balanced_chunks
from graphhash.hashes import universal_hash

WEIGHT_SCALE = 1 / 255


def graph_maps(labels: Labels) -> tuple[BucketMap, BucketMap]:
    """GraphHash: ids of one community share a row (Wu et al., WWW 2025, eq. 6).

    Returns:
        User map and item map; each table has a row per community that holds ids of that side, and the unknown ids' row.
    """
    sides = []
    for side in (labels.users, labels.items):
        buckets, n_buckets = compact_side(side)
        sides.append(plain_map(buckets[:, None], n_buckets + 1, "graph"))
    return sides[0], sides[1]


def double_graph_maps(labels: Labels, *, seed: int) -> tuple[BucketMap, BucketMap]:
    """The community's row plus a row hashed from the id, of the same table (Wu et al., WWW 2025, section 4).

    Args:
        seed: draws the hash functions.
    """
    sides = []
    for number, side in enumerate((labels.users, labels.items)):
        buckets, n_buckets = compact_side(side)
        hashed = universal_hash(np.arange(len(side)), n_buckets, np.random.default_rng([seed, number]))
        sides.append(plain_map(np.stack([buckets, hashed], axis=1), n_buckets + 1, "double_graph"))
    return sides[0], sides[1]


def multilevel_maps(levels: list[Labels]) -> tuple[BucketMap, BucketMap]:
    """The sum of one row per level, each with rows of its own in the table.

    Args:
        levels: communities of the same users and items, coarse to fine.
    """
    sides = []
    for side in ("users", "items"):
        rows, n_buckets = [], 0
        for labels in levels:
            buckets, n_level = compact_side(getattr(labels, side))
            rows.append(n_buckets + buckets)
            n_buckets += n_level
        sides.append(plain_map(np.stack(rows, axis=1), n_buckets + 1, "multilevel"))
    return sides[0], sides[1]


def soft_maps(
    biadjacency: csr_array, labels: Labels, *, n_lookups: int = 12, hops: int = 1
) -> tuple[BucketMap, BucketMap]:
    """Every id reads the buckets around it.

    With ``A_n = K^-1/2 A D^-1/2`` the normalised biadjacency and C the one-hot community assignment, one hop is
    ``S_user = A_n C_item`` and ``S_item = A_n^T C_user``: how much of an id's normalised interactions falls on each community of the
    other side, so the user table has a row per *item* community and the reverse. Two hops are ``S_user = A_n (A_n^T C_user)`` and
    ``S_item = A_n^T (A_n C_item)``. The largest ``n_lookups`` entries are kept (ties to the lowest bucket), scaled to unit length and
    rounded to 8 bits. Both tables together have as many rows as ``graph_maps`` gives them.

    Args:
        biadjacency: training interactions, shape (n_users, n_items), weights > 0.
        labels: one community per user and item.
        n_lookups: rows read per id.
        hops: 1 or 2.

    Raises:
        ValueError: shapes of graph and labels differ, n_lookups is below 1, or hops is neither 1 nor 2.
    """
    if n_lookups < 1:
        raise ValueError(f"n_lookups must be at least 1, got {n_lookups}")
    if hops not in (1, 2):
        raise ValueError(f"hops must be 1 or 2, got {hops}")
    if biadjacency.shape != (len(labels.users), len(labels.items)):
        raise ValueError(
            f"biadjacency is {biadjacency.shape[0]} x {biadjacency.shape[1]}, labels hold "
            f"{len(labels.users)} users and {len(labels.items)} items"
        )
    transposed = biadjacency.T.tocsr()
    sides = (biadjacency, labels.users), (transposed, labels.items)
    degrees = [np.asarray(graph.sum(axis=1), np.float64).ravel() for graph, _ in sides]
    maps = []
    for own, other in ((0, 1), (1, 0)):
        graph, own_labels = sides[own]
        # The row's own degree is a common factor of its affinities: unit length removes it.
        step = 1.0 / np.sqrt(np.maximum(degrees[other], 1e-300))
        if hops == 1:
            buckets, n_buckets = compact_side(sides[other][1])
            sources = one_hot(buckets, n_buckets, step)
        else:
            buckets, n_buckets = compact_side(own_labels)
            back = one_hot(buckets, n_buckets, 1.0 / np.sqrt(np.maximum(degrees[own], 1e-300)))
            sources = csr_array(diags_array(step**2) @ (sides[other][0].astype(np.float64) @ back))
        rows, codes = affinity_rows(graph, sources, n_lookups)
        maps.append(soft_map(rows, codes, n_buckets, "soft"))
    return maps[0], maps[1]


def double_soft_maps(
    biadjacency: csr_array, labels: Labels, *, n_lookups: int = 12, hops: int = 1, seed: int
) -> tuple[BucketMap, BucketMap]:
    """:func:`soft_maps` with one more lookup of weight 1, hashed from the id into the same table, so that ids stay distinguishable.

    Args:
        n_lookups: rows read per id, the hashed one among them; at least 2.
        seed: draws the hash functions.  biadjacency, labels, hops: as in :func:`soft_maps`.
    """
    if n_lookups < 2:
        raise ValueError(f"n_lookups must be at least 2, one of them hashed, got {n_lookups}")
    maps = []
    for number, soft in enumerate(soft_maps(biadjacency, labels, n_lookups=n_lookups - 1, hops=hops)):
        rng = np.random.default_rng([seed, number])
        hashed = universal_hash(np.arange(soft.n_ids), soft.n_buckets - 1, rng).astype(np.int32)
        rows = np.column_stack([soft.rows[:-1], hashed])
        codes = np.column_stack([soft.weight_codes[:-1], np.full(soft.n_ids, 255, np.uint8)])
        maps.append(soft_map(rows, codes, soft.n_buckets - 1, "double_soft"))
    return maps[0], maps[1]


def affinity_rows(
    graph: csr_array, sources: csr_array, n_lookups: int
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Largest entries of each row of ``graph @ sources``, by falling size, scaled to unit length.

    Args:
        graph: some rows of the graph or of its transpose.
        sources: what each neighbour gives to each bucket, shape (n_neighbours, n_buckets), above 0.

    Returns:
        Buckets, int32, and weights in steps of 1/255, uint8, both of shape (n_rows, n_lookups). Lookups of weight 0 repeat the row's
        best bucket; a row without neighbours has bucket ``n_buckets``, the unknown ids' own, at weight 1.
    """
    n_rows, n_buckets = graph.shape[0], sources.shape[1]
    rows = np.full((n_rows, n_lookups), n_buckets, np.int32)
    affinities = np.zeros((n_rows, n_lookups), np.float32)
    indptr = graph.indptr.astype(np.int64)
    _map_kernels.top_affinities(
        indptr, graph.indices, graph.data, sources.indptr.astype(np.int64), sources.indices, sources.data.astype(np.float64),
        n_buckets, balanced_chunks(indptr, 32), rows, affinities,
    )  # fmt: skip
    codes = np.rint(affinities * 255).astype(np.uint8)
    # Affinities too small for 8 bits point at the row's best bucket with weight 0.
    rows = np.where(codes > 0, rows, rows[:, :1])
    codes[codes[:, 0] == 0, 0] = 255
    return rows, codes


def soft_map(rows: NDArray[np.int32], codes: NDArray[np.uint8], n_buckets: int, method: str) -> BucketMap:
    """The map of :func:`affinity_rows` of all ids, with the unknown ids' entry and table row appended."""
    rows = np.concatenate([rows, np.full((1, rows.shape[1]), n_buckets, np.int32)])
    codes = np.concatenate([codes, np.zeros((1, codes.shape[1]), np.uint8)])
    codes[-1, 0] = 255
    weights = codes * np.float32(WEIGHT_SCALE)
    return BucketMap(rows, weights, n_buckets + 1, method, weight_codes=codes, weight_scale=WEIGHT_SCALE)


def one_hot(buckets: NDArray[np.int32], n_buckets: int, values: NDArray[np.float64]) -> csr_array:
    """One entry a row: ``values[i]`` at ``buckets[i]``, shape (n_ids, n_buckets)."""
    return csr_array((values, buckets, np.arange(len(buckets) + 1)), shape=(len(buckets), n_buckets))


def compact_side(side: NDArray) -> tuple[NDArray[np.int32], int]:
    """Labels of one side renumbered 0..n-1 in ascending order, and n."""
    present, buckets = np.unique(side, return_inverse=True)
    return buckets.astype(np.int32).ravel(), len(present)
