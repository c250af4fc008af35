"""Merging communities: proposals against a naive search, and modularity that rises with every accepted move."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from graphhash.clustering import merging
from graphhash.graph import _kernels, _level_kernels
from graphhash.graph.bipartite import Grouping
from graphhash.graph.local import LocalGraph
from tests.helpers import graphs


def contracted(seed, resolution=3.0, weighted=True):
    """A graph of 30 communities drawn at random, dense, with their degrees and the scale."""
    graph = graphs.random_graph(seed, 120, 90, 1500, weighted=weighted)
    local = LocalGraph(graph)
    rng = np.random.default_rng(seed)
    users, items = rng.integers(0, 30, 120).astype(np.int32), rng.integers(0, 30, 90).astype(np.int32)
    _kernels.compact_labels(users, items, 30)
    communities = local.contract(users, items, 30)
    degrees = np.bincount(users, local.user_degrees, 30), np.bincount(items, local.item_degrees, 30)
    return communities, *degrees, resolution / local.total_weight


def dense(communities):
    indptr, columns, values = communities.compact()
    matrix = np.zeros((communities.n_nodes, communities.n_nodes))
    matrix[np.repeat(np.arange(communities.n_nodes), np.diff(indptr)), columns] = values
    return matrix


def objective(matrix, users, items, scale, labels):
    """m times modularity, but for what is inside the nodes: the sum over pairs of different nodes of one group."""
    together = (labels[:, None] == labels[None, :]) & ~np.eye(len(labels), dtype=bool)
    return (together * (matrix / 2 - scale * np.outer(users, items))).sum()


def grouping_of(labels, users, items):
    n = len(labels)
    return Grouping(labels, users, items, np.bincount(labels, users, n), np.bincount(labels, items, n))


@pytest.mark.parametrize("seed", range(4))
def test_a_proposal_is_the_move_that_raises_the_objective_most(seed):
    communities, users, items, scale = contracted(seed)
    matrix = dense(communities)
    labels = np.random.default_rng(seed).integers(0, 12, 30).astype(np.int32)
    active, moved = np.arange(30) % 5 > 0, np.zeros(30, bool)
    targets, gains, to_target, to_own = communities.propose(grouping_of(labels, users, items), scale, active, moved)
    before = objective(matrix, users, items, scale, labels)
    assert (targets >= 0).any()
    for node in range(30):
        if not active[node]:
            assert targets[node] == -1
            continue
        changes = {}
        for group in set(labels[matrix[node] > 0]) - {labels[node]}:
            after = labels.copy()
            after[node] = group
            changes[group] = objective(matrix, users, items, scale, after) - before
        if targets[node] < 0:
            assert max(changes.values()) < 1e-9
        else:
            assert changes[targets[node]] == pytest.approx(max(changes.values()))
            assert gains[node] == pytest.approx(changes[targets[node]])
            assert to_target[node] == pytest.approx(matrix[node, labels == targets[node]].sum())
            assert to_own[node] == pytest.approx(matrix[node, labels == labels[node]].sum())


def test_a_neighbour_that_left_wakes_a_node():
    communities, users, items, scale = contracted(1)
    matrix = dense(communities)
    labels = np.arange(30, dtype=np.int32)
    moved = np.zeros(30, bool)
    moved[7] = True
    all_targets = communities.propose(grouping_of(labels, users, items), scale, np.ones(30, bool), moved)[0]
    targets = communities.propose(grouping_of(labels, users, items), scale, np.zeros(30, bool), moved)[0]
    assert_array_equal(targets, np.where(matrix[7] > 0, all_targets, -1))
    assert (matrix[7] > 0).any()
    assert not (matrix[7] > 0).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_accepted_moves_raise_the_objective_by_at_least_what_they_were_accepted_for(seed, weighted):
    communities, users, items, scale = contracted(seed, weighted=weighted)
    matrix = dense(communities)
    labels = np.random.default_rng(seed).integers(0, 20, 30).astype(np.int32)
    grouping = grouping_of(labels, users, items)
    targets, _gains, to_target, to_own = communities.propose(grouping, scale, np.ones(30, bool), np.zeros(30, bool))
    order = np.flatnonzero(targets >= 0)
    value, n_moves = objective(matrix, users, items, scale, labels), 0
    # One call for each prefix of the order: what its last move changed is seen.
    for end in range(1, len(order) + 1):
        after, active, moved = labels.copy(), np.ones(30, bool), np.zeros(30, bool)
        groups = grouping_of(after, users, items)
        n = _level_kernels.accept_moves(
            order[:end], targets, to_target, to_own, users, items, scale, after, groups.group_users, groups.group_items,
            active, moved,
        )  # fmt: skip
        assert_array_equal(moved, after != labels)
        assert_array_equal(active, ~moved)
        np.testing.assert_allclose(groups.group_users, np.bincount(after, users, 30))
        now = objective(matrix, users, items, scale, after)
        assert now > value if n > n_moves else now == pytest.approx(value, abs=1e-12)
        value, n_moves = now, n
    assert n_moves > 1


def test_merging_ends_where_no_node_gains_by_a_move(monkeypatch):
    monkeypatch.setattr(merging, "SETTLED_SHARE", 0.0)
    communities, users, items, scale = contracted(3)
    labels = np.arange(30, dtype=np.int32)
    n_moves = merging.move_communities(communities, users, items, scale, labels)
    assert n_moves > 2
    targets = communities.propose(grouping_of(labels, users, items), scale, np.ones(30, bool), np.zeros(30, bool))[0]
    assert_array_equal(targets, -1)


def test_merging_finds_planted_groups_of_communities():
    """Three cliques of communities, joined by single weak edges: one group each."""
    matrix = np.kron(np.eye(3), np.ones((4, 4))) * 10
    matrix[3, 4] = matrix[4, 3] = matrix[7, 8] = matrix[8, 7] = 1
    np.fill_diagonal(matrix, 0)
    from graphhash.graph.local import LocalCommunities

    columns = np.concatenate([np.flatnonzero(row) for row in matrix]).astype(np.int32)
    ends = np.cumsum((matrix > 0).sum(1))
    communities = LocalCommunities(np.concatenate([[0], ends[:-1]]), ends, columns, matrix[matrix > 0])
    degrees = matrix.sum(1) / 2
    groups, n_groups = merging.merge(communities, degrees, degrees, 1 / degrees.sum(), np.int32)
    assert n_groups == 3
    assert_array_equal(groups, np.repeat([0, 1, 2], 4))
