"""Balanced label propagation against a naive one, and its maps of two rows per user."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import graphhash
from graphhash.clustering import balanced
from graphhash.graph.local import LocalGraph
from pipeline.config.run_config import RunConfig
from pipeline.errors import ConfigError
from pipeline.maps.methods import METHODS, Inputs
from pipeline.retrieval.budget import BudgetSettings, GraphSize, planned_precisions, rows_for_ratio, spendable
from tests.helpers import graphs

GRAPHS = {
    "plain": graphs.random_graph(3, 60, 45, 400),
    "weighted": graphs.random_graph(4, 40, 60, 300, weighted=True),
    "isolated_user": graphs.isolated_user(),
}


def numbered(users, items):
    labels = np.concatenate([users, items])
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))[inverse]
    return rank[: len(users)], rank[len(users) :]


def naive_passes(graph, rows, resolution):
    """Dictionaries and the definition of the gain, one node after the other; stops at `rows` or when nothing moves."""
    dense = graph.toarray().astype(np.float64)
    n_users, n_items = dense.shape
    edges = np.block([[np.zeros((n_users, n_users)), dense], [dense.T, np.zeros((n_items, n_items))]])
    volumes = np.concatenate([dense.sum(1) / math.sqrt(dense.sum()), dense.sum(0) / math.sqrt(n_items)])
    is_user = np.arange(n_users + n_items) < n_users
    labels = np.arange(n_users + n_items)

    def n_rows():
        return len(set(labels[:n_users])) + len(set(labels[n_users:]))

    for _ in range(balanced.MAX_PASSES):
        moved = False
        for node in range(len(labels)):
            if n_rows() <= rows:
                return labels[:n_users], labels[n_users:]

            def gain(label, node=node):
                there = (labels == label) & (is_user != is_user[node])
                return edges[node, there].sum() - resolution * volumes[node] * volumes[there].sum()

            candidates = sorted({int(labels[other]) for other in np.flatnonzero(edges[node])} - {int(labels[node])})
            best = max(candidates, key=lambda label: (round(gain(label), 9), -label), default=None)
            if best is not None and gain(best) > gain(labels[node]) + 1e-9:
                labels[node] = best
                moved = True
        if not moved:
            break
    return labels[:n_users], labels[n_users:]


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("resolution", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_passes_equal_the_naive_ones(name, resolution, share):
    graph = GRAPHS[name]
    rows = max(2, int(share * sum(graph.shape)))
    local = LocalGraph(graph)
    found = balanced._propagate(local, graph, resolution, rows)
    for a, b in zip(found, numbered(*naive_passes(graph, rows, resolution)), strict=True):
        assert_array_equal(a, b)


@pytest.mark.parametrize("rows", [10, 40, 80, (12, 30), (59, 2)])
def test_rows_are_exact(rows):
    labels = graphhash.cluster(GRAPHS["plain"], rows=rows, method="balanced")
    assert labels.rows == rows if isinstance(rows, int) else (labels.user_rows, labels.item_rows) == rows
    expected = graphhash.modularity(GRAPHS["plain"], labels.users, labels.items, resolution=labels.resolution)
    assert labels.modularity == pytest.approx(expected, abs=1e-12)


def test_the_gain_is_barbers_at_the_reported_resolution():
    """Labels at which no pass moves anything: no move raises Barber's modularity either."""
    graph = GRAPHS["plain"]
    local = LocalGraph(graph)
    users, items = balanced._propagate(local, graph, 3.0, 2)
    resolution = 3.0 * math.sqrt(graph.sum() / graph.shape[1])
    before = graphhash.modularity(graph, users, items, resolution=resolution)
    for user in range(len(users)):
        for label in np.unique(items[graph[[user]].indices]):
            moved = users.copy()
            moved[user] = label
            assert graphhash.modularity(graph, moved, items, resolution=resolution) <= before + 1e-9


def test_users_read_their_own_and_the_next_best_community():
    graph = GRAPHS["weighted"]
    labels = graphhash.balanced_labels(graph, rows=40)
    users, items = graphhash.balanced_maps(graph, labels)
    assert (users.indices_per_id, items.indices_per_id) == (2, 1)
    assert (users.n_buckets, items.n_buckets) == (labels.user_rows + 1, labels.item_rows + 1)
    present = np.unique(labels.users)
    assert_array_equal(present[users.rows[:-1, 0]], labels.users)
    dense = graph.toarray().astype(np.float64)
    scale = labels.resolution / dense.sum()
    n_alone = 0
    for user in range(len(labels.users)):
        gains = {}
        for label in set(labels.items[dense[user] > 0]) & set(present) - {labels.users[user]}:
            there = labels.items == label
            gains[label] = dense[user, there].sum() - scale * dense[user].sum() * dense[:, there].sum()
        if gains:
            best = max(sorted(gains), key=lambda label: round(gains[label], 9))
            assert present[users.rows[user, 1]] == best
            assert_array_equal(users.weights[user], [0.5, 0.5])
        else:
            n_alone += 1
            assert_array_equal(users.weights[user], [1, 0])
    assert n_alone < len(labels.users)


def test_a_user_without_interactions_reads_one_row():
    labels = graphhash.balanced_labels(graphs.isolated_user(), rows=6)
    users, _ = graphhash.balanced_maps(graphs.isolated_user(), labels)
    assert_array_equal(users.weights[2], [1, 0])


def test_labels_do_not_depend_on_threads_and_keep_the_cap():
    graph = graphs.random_graph(7, 300, 200, 3000)
    one, two = (graphhash.cluster(graph, rows=160, method="balanced", max_size=9, threads=t) for t in (1, 2))
    assert_array_equal(one.users, two.users)
    assert_array_equal(one.items, two.items)
    assert one.rows == 160
    assert max(np.bincount(one.users).max(), np.bincount(one.items).max()) <= 9


def test_a_ratio_counts_two_lookups_of_users_and_one_of_items():
    config = RunConfig.from_flat({"cluster.ratio": 0.25, "run.methods": ("baco",), "train.dim": 32})
    size = GraphSize(3000, 2000, 30_000)
    rows = rows_for_ratio(BudgetSettings.of(config), 0.25, planned_precisions(config), size)
    graph = graphs.random_graph(0, 300, 200, 3000)
    users, items = METHODS["baco"].make(Inputs(graph, graphhash.cluster(graph, rows=100), 2, "1", 0))
    assert users.nbytes + items.nbytes == METHODS["baco"].map_bytes(None, 2, 300, 200)
    allowed = spendable(0.25, 3000, 2000, 32)
    assert allowed - 34 < 34 * rows + METHODS["baco"].map_bytes(None, 2, 3000, 2000) <= allowed


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="give rows instead of resolution=3"):
        graphhash.cluster(graphs.two_blocks(), resolution=3, method="balanced")
    with pytest.raises(ValueError, match="resolution must be finite and above 0, got 0"):
        graphhash.balanced_labels(graphs.two_blocks(), rows=4, resolution=0)
    with pytest.raises(ValueError, match="from 2 to the 12 ids, got 13"):
        graphhash.balanced_labels(graphs.two_blocks(), rows=13)
    with pytest.raises(ConfigError, match=r"takes no cluster.shards=2"):
        RunConfig.from_flat({"cluster.method": "balanced", "cluster.shards": 2})
    with pytest.raises(ConfigError, match=r"instead of cluster.resolution=3"):
        RunConfig.from_flat({"cluster.method": "balanced", "cluster.resolution": 3.0})
    labels = graphhash.balanced_labels(graphs.two_blocks(), rows=4)
    with pytest.raises(ValueError, match="biadjacency is 6 x 1, labels hold 6 users and 6 items"):
        graphhash.balanced_maps(graphs.star(), labels)
