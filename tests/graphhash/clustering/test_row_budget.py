"""Budgets are hit exactly, at the lowest price in modularity that each step allows, and communities stay within their cap."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import graphhash
from graphhash.clustering.bounded import cluster_graph
from graphhash.clustering.labels import Labels
from graphhash.clustering.resolution_search import SLACK, cluster_to_rows, search_resolution
from graphhash.clustering.row_budget import cap_sizes, fit_rows, modularity_of, share_rows
from graphhash.graph.local import LocalGraph
from pipeline.distributed.graph import RayGraph
from pipeline.distributed.shards import ShardedCsr
from tests.helpers import graphs

GRAPH = graphs.random_graph(3, 200, 150, 1500)
WEIGHTED = graphs.random_graph(4, 120, 160, 1000, weighted=True)


def naive_merge(graph, labels: Labels) -> np.ndarray:
    """User labels after one merge, by trying every partner of the smallest bucket with the double sum of modularity."""
    present, sizes = np.unique(labels.users, return_counts=True)
    smallest = present[np.argmin(sizes)]
    best, best_q = None, -np.inf
    for partner in present[present != smallest]:
        users = np.where(labels.users == smallest, partner, labels.users)
        q = graphs.naive_modularity(graph, users, labels.items, labels.resolution)
        if q > best_q + 1e-12:
            best, best_q = users, q
    return best


def numbered(users, items):
    """Labels in order of first appearance, users first."""
    _, first, inverse = np.unique(np.concatenate([users, items]), return_index=True, return_inverse=True)
    rank = np.empty(len(first), int)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse][: len(users)], rank[inverse][len(users) :]


@pytest.mark.parametrize("graph", [GRAPH, WEIGHTED], ids=["plain", "weighted"])
def test_merges_lower_modularity_least(graph):
    local = LocalGraph(graph)
    found = cluster_graph(local, 5)
    expected = found
    for n_merges in (1, 2, 3, 6):
        while expected.user_rows > found.user_rows - n_merges:
            expected = Labels(naive_merge(graph, expected).astype(np.int32), expected.items, 5, 0.0)
        fitted = fit_rows(local, found, user_rows=found.user_rows - n_merges)
        users, items = numbered(expected.users, expected.items)
        assert_array_equal(fitted.users, users)
        assert_array_equal(fitted.items, items)


@pytest.mark.parametrize("graph", [GRAPH, WEIGHTED], ids=["plain", "weighted"])
@pytest.mark.parametrize("user_rows", [1, 7, 40, 100, "all"])
@pytest.mark.parametrize("item_rows", [1, 9, 140])
def test_rows_of_both_sides_are_exact(graph, user_rows, item_rows):
    local = LocalGraph(graph)
    user_rows = graph.shape[0] if user_rows == "all" else user_rows
    labels = fit_rows(local, cluster_graph(local, 3), user_rows=user_rows, item_rows=item_rows)
    assert (labels.user_rows, labels.item_rows) == (user_rows, item_rows)
    assert_array_equal(np.union1d(labels.users, labels.items), np.arange(labels.n_communities))
    expected = graphhash.modularity(graph, labels.users, labels.items, resolution=3)
    assert labels.modularity == pytest.approx(expected, abs=1e-12)


def test_a_split_halves_the_largest_bucket_and_keeps_the_half_that_holds_to_it_most():
    graph = graphs.from_pairs([(u, i) for u in range(2) for i in range(3)] + [(2, 0), (3, 3)], n_users=4, n_items=4)
    labels = Labels(np.zeros(4, np.int32), np.array([0, 0, 0, 1], np.int32), 1.0, 0.0)
    assert_array_equal(fit_rows(LocalGraph(graph), labels, user_rows=2).users, [0, 0, 1, 1])


def test_no_side_moves_when_it_fits_already():
    local = LocalGraph(GRAPH)
    found = cluster_graph(local, 3)
    fitted = fit_rows(local, found, user_rows=found.user_rows, item_rows=found.item_rows)
    assert_array_equal(fitted.users, found.users)
    assert_array_equal(fitted.items, found.items)
    assert fitted.modularity == pytest.approx(found.modularity)


@pytest.mark.parametrize("rows", [20, 101, 250, (40, 30), (30, 100), (150, 149)])
@pytest.mark.parametrize("method", ["louvain", "lpa"])
def test_cluster_hits_a_budget_exactly(rows, method):
    labels = graphhash.cluster(GRAPH, rows=rows, method=method)
    if isinstance(rows, int):
        assert labels.rows == rows
    else:
        assert (labels.user_rows, labels.item_rows) == rows
    again = graphhash.cluster(GRAPH, rows=rows, method=method, threads=1)
    assert_array_equal(labels.users, again.users)
    assert_array_equal(labels.items, again.items)


def test_a_total_is_divided_as_the_labels_divide_it():
    labels = Labels(np.arange(30, dtype=np.int32) % 20, np.arange(10, dtype=np.int32), 1.0, 0.0)
    assert share_rows(labels, 30) == (20, 10)
    assert share_rows(labels, 33) == (23, 10)
    assert share_rows(labels, 39) == (29, 10)
    assert share_rows(labels, 2) == (1, 1)


@pytest.mark.parametrize(
    "graph",
    [GRAPH, WEIGHTED, graphs.star(), graphs.two_blocks()],
    ids=["plain", "weighted", "star", "blocks"],
)
@pytest.mark.parametrize("max_size", [1, 2, 7, 1000])
def test_no_community_exceeds_the_cap(graph, max_size):
    free = graphhash.cluster(graph, resolution=0.8)
    capped = graphhash.cluster(graph, resolution=0.8, max_size=max_size)
    assert np.bincount(capped.users).max() <= max_size
    assert np.bincount(capped.items).max() <= max_size
    expected = graphhash.modularity(graph, capped.users, capped.items, resolution=0.8)
    assert capped.modularity == pytest.approx(expected, abs=1e-12)
    # Capped communities lie inside the free ones.
    for side, of in ((capped.users, free.users), (capped.items, free.items)):
        assert len(np.unique(side)) == len(np.unique(np.stack([side, of], 1), axis=0))
    if max_size == 1000:
        assert_array_equal(capped.users, free.users)


def test_a_cap_that_no_resolution_reaches_is_cut_by_row_order(monkeypatch):
    monkeypatch.setattr("graphhash.clustering.row_budget.CAP_ROUNDS", 0)
    local = LocalGraph(graphs.star())
    labels = Labels(np.zeros(6, np.int32), np.zeros(1, np.int32), 1.0, 0.0)
    capped = cap_sizes(local, labels, 4)
    assert_array_equal(capped.users, [0, 0, 0, 0, 1, 1])
    assert_array_equal(capped.items, [0])


def test_a_budget_and_a_cap_hold_together():
    labels = graphhash.cluster(GRAPH, rows=(60, 40), max_size=6)
    assert (labels.user_rows, labels.item_rows) == (60, 40)
    assert max(np.bincount(labels.users).max(), np.bincount(labels.items).max()) <= 6


def test_impossible_budgets_are_refused_with_the_numbers():
    local = LocalGraph(GRAPH)
    found = cluster_graph(local, 3)
    with pytest.raises(ValueError, match="201 rows for 200 users are out of range; give 1 to 200"):
        fit_rows(local, found, user_rows=201)
    with pytest.raises(ValueError, match="0 rows for 150 items"):
        fit_rows(local, found, item_rows=0)
    with pytest.raises(ValueError, match="10 rows of at most 5 cannot hold 200 users"):
        fit_rows(local, found, user_rows=10, max_size=5)
    with pytest.raises(ValueError, match="max_size must be at least 1, got 0"):
        cap_sizes(local, found, 0)


def test_shards_over_ray_fit_and_cap_as_one_process_does(tmp_path, ray_local):
    by_item = WEIGHTED.T.tocsr()
    by_item.sort_indices()
    stored = [
        ShardedCsr.write(tmp_path / name, side, n_shards=2) for name, side in (("users", WEIGHTED), ("items", by_item))
    ]
    local, over_ray = LocalGraph(WEIGHTED), RayGraph(*stored, 3, tmp_path)
    found = cluster_graph(local, 3)
    for settings in ({"user_rows": 20, "item_rows": 20}, {"user_rows": 90, "item_rows": 90}):
        a, b = (fit_rows(graph, found, **settings) for graph in (local, over_ray))
        assert_array_equal(a.users, b.users)
        assert_array_equal(a.items, b.items)
    a, b = (cap_sizes(graph, found, 6) for graph in (local, over_ray))
    assert_array_equal(a.users, b.users)
    assert_array_equal(a.items, b.items)
    assert modularity_of(over_ray, a.users, a.items, 3) == pytest.approx(a.modularity, abs=1e-12)


def test_the_search_ends_just_above_its_goal():
    local = LocalGraph(graphs.random_graph(6, 1500, 1000, 9000))
    labels = search_resolution(local, lambda labels: labels.rows / 700, 5.0)
    assert 700 <= labels.rows <= 700 * (1 + 2 * SLACK)


def test_the_search_stops_where_a_lower_resolution_saves_no_rows():
    tried = []

    def share(labels):
        tried.append(labels.resolution)
        return labels.rows / 2

    labels = search_resolution(LocalGraph(graphs.disconnected()), share, 1.0)
    assert labels.rows == 10
    assert len(set(tried)) == 2


def test_the_search_of_a_large_graph_merges_what_it_found(monkeypatch):
    graph = LocalGraph(graphs.random_graph(6, 1500, 1000, 9000))
    from_single_ids = cluster_to_rows(graph, rows=400)
    begun = []

    def traced(graph, resolution, *, initial=None, **settings):
        begun.append((resolution, initial))
        return cluster_graph(graph, resolution, initial=initial, **settings)

    monkeypatch.setattr("graphhash.clustering.resolution_search.LARGE_GRAPH", 2500)
    monkeypatch.setattr("graphhash.clustering.resolution_search.cluster_graph", traced)
    labels = cluster_to_rows(graph, rows=400)
    assert labels.rows == 400
    assert begun[0][1] is None
    merged = [(resolution, initial) for resolution, initial in begun if initial is not None]
    assert merged
    assert all(initial.resolution > resolution for resolution, initial in merged)
    # As good communities as those of the search that begins anew at every step.
    assert (
        modularity_of(graph, labels.users, labels.items, from_single_ids.resolution) > 0.99 * from_single_ids.modularity
    )


def test_both_sides_reach_their_goal_before_buckets_are_merged():
    """Splits are for what no resolution gives: here every bucket lies in the community of a resolution found."""
    graph = graphs.random_graph(6, 1500, 1000, 9000)
    labels = graphhash.cluster(graph, rows=(300, 200))
    free = graphhash.cluster(graph, resolution=labels.resolution)
    assert free.user_rows >= 300
    assert free.item_rows >= 200
    for side, of, rows in ((labels.users, free.users, 300), (labels.items, free.items, 200)):
        # Merged buckets are unions of the free ones.
        assert len(np.unique(np.stack([side, of], 1), axis=0)) == len(np.unique(of))
        assert len(np.unique(side)) == rows


def test_the_search_and_the_fit_are_timed():
    labels = cluster_to_rows(LocalGraph(GRAPH), 80)
    assert {"search", "fit_rows"} <= set(labels.seconds)
    assert min(labels.seconds.values()) >= 0
