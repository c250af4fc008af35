"""Clustering: the gain, one half-sweep, whole runs, and graphs with a known answer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy.sparse import csr_array

import graphhash
from graphhash.clustering import api as clustering
from graphhash.clustering.bounded import cluster_graph
from graphhash.graph.local import LocalGraph, Rows, exact_weights, sum_parts
from tests.helpers import graphs

SOUTHERN_WOMEN_BEST_Q = 0.3455


@pytest.mark.parametrize("name", graphs.ALL)
@pytest.mark.parametrize("resolution", [0.5, 1.0, 4.0])
def test_modularity_equals_its_double_sum(name, resolution):
    graph = graphs.ALL[name]()
    rng = np.random.default_rng(3)
    users, items = rng.integers(0, 3, graph.shape[0]), rng.integers(0, 3, graph.shape[1])
    expected = graphs.naive_modularity(graph, users, items, resolution)
    assert graphhash.modularity(graph, users, items, resolution=resolution) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_move_gain_equals_change_in_modularity(weighted):
    """gain(u -> c) - gain(u -> own) = m * (Q after - Q before), for random moves of users."""
    graph = graphs.random_graph(5, weighted=weighted)
    dense = graph.toarray().astype(np.float64)
    total, resolution = dense.sum(), 2.0
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 6, graph.shape[0]), rng.integers(0, 6, graph.shape[1])
    item_totals = np.bincount(items, dense.sum(0), 6)
    for _ in range(50):
        user, target = rng.integers(graph.shape[0]), rng.integers(6)
        weight = np.bincount(items, dense[user], 6)
        gain = weight - resolution / total * dense[user].sum() * item_totals
        moved = users.copy()
        moved[user] = target
        change = graphhash.modularity(graph, moved, items, resolution=resolution) - graphhash.modularity(
            graph, users, items, resolution=resolution
        )
        assert (gain[target] - gain[users[user]]) / total == pytest.approx(change, abs=1e-12)


@pytest.mark.parametrize("name", graphs.ALL)
@pytest.mark.parametrize("resolution", [0.7, 1.0, 3.0])
def test_half_sweep_equals_the_naive_one(name, resolution):
    graph = graphs.ALL[name]()
    local = LocalGraph(graph)
    rng = np.random.default_rng(1)
    n_labels = 5
    users = rng.integers(0, n_labels, graph.shape[0]).astype(np.int32)
    items = rng.integers(0, n_labels, graph.shape[1]).astype(np.int32)
    totals = np.bincount(items, local.item_degrees, n_labels + graph.shape[0])
    moved, awake = local.move(
        "users", users, items, totals, resolution / local.total_weight, n_labels, np.ones(len(users), bool)
    )
    assert_array_equal(moved, graphs.naive_half_sweep(graph, users, items, resolution, n_labels))
    expected_awake = np.zeros(graph.shape[1], bool)
    for user in np.flatnonzero(moved != users):
        expected_awake[graph.indices[graph.indptr[user] : graph.indptr[user + 1]]] = True
    assert_array_equal(awake, expected_awake)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("resolution", [1.0, 5.0])
def test_modularity_never_falls_from_half_sweep_to_half_sweep(weighted, resolution):
    graph = graphs.random_graph(2, 200, 150, 2000, weighted=weighted)
    local = LocalGraph(graph)
    labels = {"users": np.arange(200, dtype=np.int32), "items": np.arange(200, 350, dtype=np.int32)}
    degrees = {"users": local.user_degrees, "items": local.item_degrees}
    n_labels = 350 + 350
    q = [-np.inf]
    for _ in range(6):
        for side, other, fresh in (("users", "items", 350), ("items", "users", 550)):
            totals = np.bincount(labels[other], degrees[other], n_labels)
            active = np.ones(len(labels[side]), bool)
            scale = resolution / local.total_weight
            labels[side], _ = local.move(side, labels[side], labels[other], totals, scale, fresh, active)
            q.append(graphhash.modularity(graph, labels["users"], labels["items"], resolution=resolution))
    assert all(after >= before - 1e-12 for before, after in itertools.pairwise(q))
    assert q[-1] > 0


@pytest.mark.parametrize("name", graphs.ALL)
def test_contracted_graph_holds_the_weight_between_communities(name):
    graph = graphs.ALL[name]()
    dense = graph.toarray().astype(np.float64)
    rng = np.random.default_rng(4)
    users = rng.integers(0, 4, graph.shape[0]).astype(np.int32)
    items = rng.integers(0, 4, graph.shape[1]).astype(np.int32)
    expected = np.zeros((4, 4))
    for u in range(dense.shape[0]):
        for i in range(dense.shape[1]):
            expected[users[u], items[i]] += dense[u, i]
    expected = expected + expected.T
    np.fill_diagonal(expected, 0)
    contracted = dense_graph(LocalGraph(graph).contract(users, items, 4))
    np.testing.assert_allclose(contracted, expected, rtol=1e-6)
    # The same from what shards of both sides contribute, for the first communities and the others apart.
    total = float(graph.data.sum(dtype=np.float64))
    parts = []
    for matrix, labels, other in ((graph, users, items), (graph.T.tocsr(), items, users)):
        weights = exact_weights(matrix.data, total)
        for start, stop in ((0, 1), (1, matrix.shape[0])):
            edges = slice(matrix.indptr[start], matrix.indptr[stop])
            indptr = (matrix.indptr[start : stop + 1] - matrix.indptr[start]).astype(np.int64)
            parts.append(
                Rows(indptr, matrix.indices[edges], weights[edges]).contract(labels[start:stop], other, 4).compact()
            )
    summed = np.zeros((4, 4))
    for start, stop in ((0, 1), (1, 4)):
        cut = [(p[start : stop + 1] - p[start], c[p[start] : p[stop]], v[p[start] : p[stop]]) for p, c, v in parts]
        summed[start:stop] = dense_graph(sum_parts(cut, start, 4))
    assert_array_equal(summed, contracted)


def dense_graph(communities) -> np.ndarray:
    indptr, columns, values = communities.compact()
    return csr_array((values, columns, indptr), shape=(len(indptr) - 1, communities.n_nodes)).toarray()


@pytest.mark.parametrize("name", graphs.ALL)
@pytest.mark.parametrize("resolution", [1.0, 3.0])
def test_reported_modularity_is_the_labels_own_and_no_less_than_doing_nothing(name, resolution):
    graph = graphs.ALL[name]()
    labels = graphhash.cluster(graph, resolution=resolution)
    assert labels.users.shape == (graph.shape[0],)
    assert labels.items.shape == (graph.shape[1],)
    expected = graphs.naive_modularity(graph, labels.users, labels.items, resolution)
    assert labels.modularity == pytest.approx(expected, abs=1e-9)
    everything_together = 1 - resolution
    assert labels.modularity >= max(0, everything_together) - 1e-12
    assert all(after >= before - 1e-12 for before, after in zip(labels.history, labels.history[1:], strict=False))


def test_two_blocks_are_found_exactly():
    labels = graphhash.cluster(graphs.two_blocks(), resolution=1)
    assert_array_equal(labels.users, np.repeat([labels.users[0], labels.users[3]], 3))
    assert_array_equal(labels.items, labels.users)
    assert labels.rows == 4
    assert labels.modularity == pytest.approx(0.5)


def test_southern_women_reach_the_known_optimum():
    labels = graphhash.cluster(graphs.southern_women(), resolution=1)
    assert labels.modularity >= 0.34
    assert labels.modularity <= SOUTHERN_WOMEN_BEST_Q + 1e-4


def test_planted_communities_are_recovered():
    from sklearn.metrics import adjusted_mutual_info_score

    graph, users, items = graphs.planted(0, 8, 40, 0.3, 0.01)
    labels = graphhash.cluster(graph, resolution=1)
    assert adjusted_mutual_info_score(users, labels.users) > 0.99
    assert adjusted_mutual_info_score(items, labels.items) > 0.99


@pytest.mark.parametrize("weighted", [False, True])
def test_labels_do_not_depend_on_threads(weighted):
    graph = graphs.random_graph(7, 500, 400, 6000, weighted=weighted)
    one, two = (graphhash.cluster(graph, resolution=5, threads=threads) for threads in (1, 2))
    assert_array_equal(one.users, two.users)
    assert_array_equal(one.items, two.items)
    assert one.history == two.history


def test_duplicate_interactions_weigh_as_much_as_weights():
    pairs = [(0, 0), (0, 0), (1, 1), (1, 0), (2, 1), (2, 1), (2, 1)]
    merged = graphs.from_pairs([(0, 0), (1, 1), (1, 0), (2, 1)], weights=np.array([2, 1, 1, 3.0]))
    a, b = graphhash.cluster(graphs.from_pairs(pairs), resolution=1), graphhash.cluster(merged, resolution=1)
    assert_array_equal(a.users, b.users)
    assert a.modularity == b.modularity


def test_scaling_all_weights_by_a_power_of_two_changes_nothing():
    graph = graphs.random_graph(8, weighted=True)
    scaled = graph.copy()
    scaled.data *= 1024
    a, b = graphhash.cluster(graph, resolution=2), graphhash.cluster(scaled, resolution=2)
    assert_array_equal(a.users, b.users)
    assert_array_equal(a.items, b.items)


def test_exact_weights_sum_to_the_same_in_any_order():
    rng = np.random.default_rng(0)
    weights = rng.lognormal(0, 5, 100_000).astype(np.float32)
    total = float(weights.sum(dtype=np.float64))
    rounded = exact_weights(weights, total).astype(np.float64)
    sums = {float(np.cumsum(rng.permutation(rounded))[-1]) for _ in range(5)}
    assert len(sums) == 1
    assert abs(rounded - weights).max() < total * 2.0**-51
    assert (rounded > 0).all()
    assert len(exact_weights(np.ones(5, np.float32), 5.0)) == 0


@pytest.mark.parametrize("rows", [40, 120, 300])
def test_a_row_budget_is_hit_exactly(rows):
    graph, _, _ = graphs.planted(1, 20, 25, 0.3, 0.02)
    assert graphhash.cluster(graph, rows=rows).rows == rows


def test_more_resolution_gives_more_rows():
    graph, _, _ = graphs.planted(1, 20, 25, 0.3, 0.02)
    rows = [graphhash.cluster(graph, resolution=g).rows for g in (0.5, 2, 10, 50)]
    assert rows == sorted(rows)
    assert rows[0] < rows[-1]


def test_a_user_without_interactions_stays_alone():
    labels = graphhash.cluster(graphs.isolated_user(), resolution=1)
    assert (labels.users[[0, 1, 3]] != labels.users[2]).all()
    assert labels.users[2] not in labels.items


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either a resolution or a number of rows"),
        ({"resolution": 1, "rows": 5}, "either a resolution or a number of rows"),
        ({"resolution": 0}, "resolution must be finite and above 0, got 0"),
        ({"resolution": float("nan")}, "resolution must be finite"),
        ({"rows": 1}, "rows must be at least 2"),
        ({"rows": 100}, "100 rows are no fewer than the 12 ids"),
        ({"resolution": 1, "max_cycles": 0}, "max_cycles at least 1"),
    ],
)
def test_bad_settings_are_refused_with_the_value(settings, message):
    with pytest.raises(ValueError, match=message):
        graphhash.cluster(graphs.two_blocks(), **settings)


def test_a_budget_below_the_connected_pieces_is_met_by_merging_them():
    assert graphhash.cluster(graphs.disconnected(), rows=4).rows == 4


def test_a_graph_without_edges_or_with_bad_weights_is_refused():
    with pytest.raises(ValueError, match="no edges"):
        graphhash.cluster(csr_array((3, 4), dtype=np.float32), resolution=1)
    for bad in (-1.0, 0.0, np.nan, np.inf):
        graph = graphs.two_blocks()
        graph.data[0] = bad
        with pytest.raises(ValueError, match="finite and above 0"):
            graphhash.cluster(graph, resolution=1)


def test_labels_check_themselves():
    with pytest.raises(ValueError, match="1-D int32"):
        clustering.Labels(np.zeros(2), np.zeros(2, np.int32), 1.0, 0.0)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        clustering.Labels(np.array([-1], np.int32), np.zeros(2, np.int32), 1.0, 0.0)


def test_progress_is_told_after_every_cycle():
    told = []
    labels = cluster_graph(LocalGraph(graphs.random_graph(0)), 2.0, on_cycle=lambda *facts: told.append(facts))
    assert [n for n, _, _ in told] == list(range(1, len(labels.history)))
    assert told[-1][1] == labels.modularity


def test_gowalla_reaches_the_modularity_and_rows_that_the_readme_states():
    labels = graphhash.cluster(graphs.gowalla("train.txt"), resolution=200)
    assert labels.modularity >= 0.1145
    assert labels.rows <= 11_700


@pytest.mark.parametrize("method", ["louvain", "leiden", "lpa"])
def test_given_labels_are_a_start_that_is_never_made_worse(method):
    graph = graphs.random_graph(2, 200, 150, 2000)
    rng = np.random.default_rng(0)
    for users, items in (
        (rng.integers(0, 20, 200), rng.integers(0, 20, 150)),
        (np.zeros(200, int), np.zeros(150, int)),
    ):
        start = graphhash.Labels(users.astype(np.int32), items.astype(np.int32), 2.0, 0.0)
        before = graphhash.modularity(graph, start.users, start.items, resolution=2)
        labels = graphhash.cluster(graph, resolution=2, method=method, initial=start)
        assert labels.modularity > before
        assert_array_equal(start.users, users)
    best = graphhash.cluster(graph, resolution=2, method=method)
    assert graphhash.cluster(graph, resolution=2, method=method, initial=best).modularity >= best.modularity


def test_given_labels_of_another_graph_are_refused():
    labels = graphhash.cluster(graphs.star(), resolution=1)
    with pytest.raises(ValueError, match="initial labels are of 6 users and 1 items, the graph has 6 and 6"):
        graphhash.cluster(graphs.two_blocks(), resolution=1, initial=labels)
    with pytest.raises(ValueError, match="initial labels go with a resolution"):
        graphhash.cluster(graphs.star(), rows=2, initial=labels)
