"""Bucket maps of communities: one row per community, doubled by a hash, and of several resolutions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphhash.clustering.labels import Labels, compact_side
from graphhash.maps.bucket_map import BucketMap, plain_map
from graphhash.maps.hashes import universal_hash


def graph_maps(labels: Labels) -> tuple[BucketMap, BucketMap]:
    """GraphHash: ids of one community share a row (Wu et al., WWW 2025, eq. 6).

    Args:
        labels: one community per user and item.

    Returns: user map and item map; each table has a row per community that holds ids of that side, and the OOV row.
    """
    sides = []
    for side in (labels.users, labels.items):
        buckets, n_buckets = compact_side(side)
        sides.append(plain_map(buckets[:, None], n_buckets + 1, "graph"))
    return sides[0], sides[1]


def double_graph_maps(labels: Labels, *, seed: int) -> tuple[BucketMap, BucketMap]:
    """The sum of the community's row and a row hashed from the id, of the same table (Wu et al., WWW 2025, section 4).

    Args:
        labels: one community per user and item.
        seed: draws the hash functions.

    Returns: user map and item map, each of two indices per id.
    """
    sides = []
    for number, side in enumerate((labels.users, labels.items)):
        buckets, n_buckets = compact_side(side)
        hashed = universal_hash(np.arange(len(side)), n_buckets, np.random.default_rng([seed, number]))
        sides.append(plain_map(np.stack([buckets, hashed], axis=1), n_buckets + 1, "double_graph"))
    return sides[0], sides[1]


def multilevel_maps(levels: Sequence[Labels]) -> tuple[BucketMap, BucketMap]:
    """The sum of one row per level; each level has rows of its own in the table.

    Args:
        levels: communities of the same users and items, coarse to fine.

    Returns: user map and item map, each of ``len(levels)`` indices per id.
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
