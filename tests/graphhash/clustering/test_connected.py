"""Clustering where some ids have no interaction: they share a community of their own side, and the others are clustered as ever."""

from __future__ import annotations

import numpy as np
import pytest

from graphhash import biadjacency, cluster
from graphhash.clustering.connected import cluster_connected


def two_blocks(isolated: bool):
    """Users 0-3 with items 0-2, users 4-6 with items 3-5; and two users and an item of nobody."""
    pairs = [(u, i) for u in range(4) for i in range(3)] + [(u, i) for u in range(4, 7) for i in range(3, 6)]
    users, items = np.array(pairs).T
    return biadjacency(users, items, n_users=9 if isolated else 7, n_items=7 if isolated else 6)


def test_ids_without_interactions_share_a_community_per_side():
    labels = cluster_connected(two_blocks(True), resolution=1.0)
    assert labels.users[7] == labels.users[8]
    assert labels.users[7] not in labels.users[:7]
    assert labels.items[6] not in [*labels.items[:6], *labels.users]
    assert (labels.user_rows, labels.item_rows) == (3, 3)
    # Alone, every one of them would be a community.
    assert cluster(two_blocks(True), resolution=1.0).user_rows == 4


def test_the_others_are_clustered_as_without_them():
    whole, part = cluster_connected(two_blocks(True), resolution=1.0), cluster(two_blocks(False), resolution=1.0)
    assert np.array_equal(whole.users[:7], part.users)
    assert np.array_equal(whole.items[:6], part.items)
    assert whole.modularity == part.modularity
    assert np.array_equal(cluster_connected(two_blocks(False), resolution=1.0).users, part.users)


@pytest.mark.parametrize("rows", [7, (4, 3)])
def test_rows_count_these_communities(rows):
    labels = cluster_connected(two_blocks(True), rows=rows)
    assert labels.rows == 7
    if isinstance(rows, tuple):
        assert (labels.user_rows, labels.item_rows) == rows
