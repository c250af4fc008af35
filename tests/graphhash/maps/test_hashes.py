"""Hashing baselines and graph maps against naive second implementations, at exact budgets."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.sparse import csr_array

import graphhash
from graphhash.clustering.row_budget import fit_rows
from graphhash.graph.local import LocalGraph
from graphhash.maps import hashes
from graphhash.maps.affinities import POWER, affinity_rows
from graphhash.maps.hashes import universal_hash
from graphhash.maps.soft_maps import ITEM_DAMPING
from pipeline.maps.methods import METHODS, Inputs
from tests.helpers import graphs

PRIME = 2**31 - 1


def naive_hash(ids, n_buckets, seed, skip=0):
    """Carter and Wegman's hash in Python's integers, which do not overflow; ``skip`` hashes were drawn before."""
    rng = np.random.default_rng(seed)
    for _ in range(skip + 1):
        a, b = int(rng.integers(1, PRIME)), int(rng.integers(0, PRIME))
    return [(a * int(x) + b) % PRIME % n_buckets for x in ids]


def test_the_universal_hash_does_not_overflow():
    ids = np.array([0, 1, 2**30, PRIME - 1])
    for seed in range(20):
        assert universal_hash(ids, 1000, np.random.default_rng(seed)).tolist() == naive_hash(ids, 1000, seed)


def test_double_is_two_hashes_over_all_rows():
    bucket_map = graphhash.double_map(500, 101, seed=7)
    assert bucket_map.rows[:-1, 0].tolist() == naive_hash(range(500), 100, 7)
    assert bucket_map.rows[:-1, 1].tolist() == naive_hash(range(500), 100, 7, skip=1)
    assert (bucket_map.weights[:-1] == 1).all()


@pytest.mark.parametrize(("n_ids", "n_buckets"), [(100, 21), (100, 22), (1000, 300), (7, 7), (70840, 11000)])
def test_quotient_and_remainder_tell_all_ids_apart(n_ids, n_buckets):
    bucket_map = graphhash.quotient_remainder_map(n_ids, n_buckets)
    assert bucket_map.n_buckets == n_buckets
    pairs = bucket_map.rows[:-1]
    assert len(np.unique(pairs, axis=0)) == n_ids
    remainders = pairs[:, 0].max() + 1
    assert_array_equal(pairs[:, 0], np.arange(n_ids) % remainders if n_ids > remainders else np.arange(n_ids))
    # The parts share no row, and stay below the unknown ids'.
    assert set(pairs[:, 0]) & set(pairs[:, 1]) == set()
    assert pairs.max() < n_buckets - 1


def test_too_small_a_table_for_quotient_and_remainder_is_refused():
    with pytest.raises(
        ValueError, match="cannot tell 10000 ids apart by quotient and remainder: it needs at least 202"
    ):
        graphhash.quotient_remainder_map(10_000, 100)
    graphhash.quotient_remainder_map(10_000, 202)


def test_lsh_gives_equal_features_one_row_and_opposite_ones_another():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(40, 6))
    bucket_map = graphhash.lsh_map(np.concatenate([base, base * 3, -base]), 1000, seed=1)
    same, scaled, opposite = np.split(bucket_map.rows[:-1, 0], 3)
    assert_array_equal(same, scaled)
    assert (same != opposite).all()
    assert bucket_map.n_buckets == 1000
    # Sparse features are the same features.
    assert_array_equal(graphhash.lsh_map(csr_array(base), 1000, seed=1).rows[:-1, 0], same)


def test_lsh_of_the_graph_gives_equal_neighbourhoods_one_row_in_any_block(monkeypatch):
    graph = graphs.from_pairs(
        [(u, i) for u in (0, 1, 4) for i in (0, 2, 5)] + [(u, i) for u in (2, 3) for i in (1, 3, 4, 5)]
    )
    degrees = np.asarray(graph.sum(axis=0)).ravel()
    bucket_map = graphhash.lsh_structure_map(graph, degrees, 500, seed=0)
    rows = bucket_map.rows[:-1, 0]
    assert rows[0] == rows[1] == rows[4] != rows[2] == rows[3]
    monkeypatch.setattr(hashes, "_BLOCK", 2)
    assert_array_equal(graphhash.lsh_structure_map(graph, degrees, 500, seed=0).rows, bucket_map.rows)


def test_features_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="features must be finite"):
        graphhash.lsh_map(np.array([[1.0], [np.nan]]), 10, seed=0)


def test_double_graph_is_the_graph_map_and_a_hash_into_its_rows():
    labels = graphhash.cluster(graphs.random_graph(0), resolution=3)
    for plain, double in zip(graphhash.graph_maps(labels), graphhash.double_graph_maps(labels, seed=3), strict=True):
        assert_array_equal(double.rows[:, 0], plain.rows[:, 0])
        assert double.n_buckets == plain.n_buckets
        assert double.rows[:-1, 1].min() >= 0
        assert double.rows[:-1, 1].max() < plain.n_buckets - 1
        assert len(np.unique(double.rows[:-1, 1])) > 1


def test_multilevel_gives_every_level_rows_of_its_own():
    graph = graphs.random_graph(0)
    levels = [graphhash.cluster(graph, resolution=g) for g in (1, 4)]
    users, _ = graphhash.multilevel_maps(levels)
    assert users.n_buckets == levels[0].user_rows + levels[1].user_rows + 1
    for level, labels in enumerate(levels):
        for row in np.unique(users.rows[:-1, level]):
            assert len(np.unique(labels.users[users.rows[:-1, level] == row])) == 1
    assert users.rows[:-1, 0].max() < users.rows[:-1, 1].min()


@pytest.mark.parametrize("hops", ["1", "2", "1+2"])
def test_soft_affinities_are_those_of_dense_algebra(hops):
    graph = graphs.random_graph(6, 60, 40, 400, weighted=True)
    labels = graphhash.cluster(graph, resolution=3)
    dense = graph.toarray().astype(np.float64)
    normal = dense / np.sqrt(dense.sum(1, keepdims=True)) / np.sqrt(np.maximum(dense.sum(0), 1e-300))
    of_users, of_items = (np.eye(max(side) + 1)[side][:, np.unique(side)] for side in (labels.users, labels.items))
    damped = dense / np.sqrt(dense.sum(1, keepdims=True)) / np.sqrt(dense.sum(0) + ITEM_DAMPING * dense.sum(0).mean())
    one = damped @ of_items, normal.T @ of_users
    two = damped @ (damped.T @ of_users), normal.T @ (normal @ of_items)

    # The shared table has the communities' users before their items.
    def unit(rows):
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)

    both = np.hstack([unit(two[0]), unit(one[0])]), np.hstack([unit(one[1]), unit(two[1])])
    expected = {"1": one, "2": two, "1+2": both}[hops]
    maps = graphhash.soft_maps(graph, labels, indices_per_id=4, hops=hops)
    for affinities, found in zip(expected, maps, strict=True):
        assert found.shared == (hops == "1+2")
        assert found.n_buckets == affinities.shape[1] + (2 if found.shared else 1)
        for row in np.flatnonzero(affinities.sum(1) > 0):
            best = np.argsort(-affinities[row], kind="stable")[:4]
            kept = np.zeros(affinities.shape[1])
            kept[best] = affinities[row, best] ** POWER
            kept /= np.linalg.norm(kept)
            read = np.bincount(found.rows[row], found.weights[row], affinities.shape[1])
            assert_allclose(read, kept, atol=1e-6)


def test_ranges_of_rows_give_the_rows_of_the_whole():
    graph = graphs.random_graph(6, 60, 40, 400)
    sources = csr_array(np.random.default_rng(0).random((40, 9)) * (np.random.default_rng(1).random((40, 9)) < 0.3))
    whole = affinity_rows(graph, sources, 3, split=4)
    parts = [affinity_rows(graph[a:b], sources, 3, split=4) for a, b in ((0, 7), (7, 60))]
    for i in range(2):
        assert_array_equal(np.concatenate([part[i] for part in parts]), whole[i])


def test_double_soft_adds_a_hashed_row_of_weight_one():
    graph = graphs.random_graph(0)
    labels = graphhash.cluster(graph, resolution=3)
    softs = graphhash.soft_maps(graph, labels, indices_per_id=3)
    for soft, double in zip(softs, graphhash.double_soft_maps(graph, labels, indices_per_id=4, seed=0), strict=True):
        assert_array_equal(double.rows[:-1, :3], soft.rows[:-1])
        assert_array_equal(double.weights[:, :3], soft.weights)
        assert (double.weights[:-1, 3] == 1).all()
        assert double.weights[-1, 3] == 0
        assert double.rows[:-1, 3].max() < soft.n_buckets - 2


@pytest.mark.parametrize("hops", ["1", "1+2"])
def test_double_soft_keeps_a_share_of_the_rows_for_ids_alone(hops):
    graph, _, _ = graphs.planted(1, 20, 25, 0.3, 0.02)
    graph = graph.tolil()
    graph[7] = 0
    graph = graph.tocsr()
    labels = graphhash.cluster(graph, rows=150)
    rng = np.random.default_rng(0)
    frequencies = [rng.permutation(n) for n in graph.shape]
    settings = {"indices_per_id": 4, "hops": hops, "frequencies": frequencies, "seed": 5}
    maps = graphhash.double_soft_maps(graph, labels, share=0.6, own=0.25, **settings)
    free = [int(0.6 * labels.user_rows), int(0.6 * labels.item_rows)]
    n_rows = [m.n_buckets for m in maps]
    assert n_rows == [152, 152] if hops == "1+2" else sum(n_rows) == 152
    for number, (found, degrees) in enumerate(zip(maps, frequencies, strict=True)):
        last, mixed = found.rows[:-1, -1], found.rows[:-1, :-1]
        low = found.n_buckets - (2 if found.shared else 1) - (free[number] if not found.shared else sum(free[number:]))
        assert last.min() >= low
        assert last.max() < low + free[number]
        n_own = free[number] // 4
        heavy = np.argsort(-degrees)[:n_own]
        assert_array_equal(last[heavy], low + np.arange(n_own))
        others = np.setdiff1d(np.arange(found.n_ids), heavy)
        hashed = naive_hash(others, free[number] - n_own, [5, number])
        assert (last[others] - low - n_own).tolist() == hashed
        assert (found.weights[:-1, -1] == 1).all()
        assert found.weights[-1, -1] == 0
        lonely = found.rows[:-1, 0] == found.oov_row
        assert lonely.sum() == (1 if number == 0 else 0)
        n_communities = found.n_buckets - (2 if found.shared else 1) - (sum(free) if found.shared else free[number])
        assert mixed[~lonely].max() < n_communities
    again = graphhash.double_soft_maps(graph, labels, share=0.6, own=0.25, **settings)
    assert [m.content_hash for m in maps] == [m.content_hash for m in again]


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_fold_sees_its_own_graph_and_the_communities_all(share):
    graph, _, _ = graphs.planted(1, 20, 25, 0.3, 0.02)
    labels = graphhash.cluster(graph, rows=150)
    folds = []
    for seed in range(3):
        part = graph.copy()
        part.data = np.where(np.random.default_rng(seed).random(graph.nnz) < 0.3, 0, part.data)
        part.eliminate_zeros()
        folds.append(part)
    merged = labels
    if share:
        rows = {
            "user_rows": labels.user_rows - labels.user_rows // 2,
            "item_rows": labels.item_rows - labels.item_rows // 2,
        }
        merged = fit_rows(LocalGraph(graph), labels, **rows)
    soft = graphhash.soft_maps(graph, merged, indices_per_id=3, folds=folds)
    double = graphhash.double_soft_maps(graph, labels, indices_per_id=4, share=share, folds=folds, seed=6)
    whole = graphhash.double_soft_maps(graph, labels, indices_per_id=4, share=share, seed=6)
    for side in range(2):
        n_ids, n_mixed = graph.shape[side], soft[side].n_buckets - 2
        assert soft[side].n_ids == double[side].n_ids == 3 * n_ids
        assert double[side].n_buckets == whole[side].n_buckets
        assert double[side].oov_row == whole[side].oov_row
        for number, part in enumerate(folds):
            alone, ids = (
                graphhash.soft_maps(part, merged, indices_per_id=3)[side],
                slice(number * n_ids, (number + 1) * n_ids),
            )
            assert_array_equal(soft[side].rows[ids], alone.rows[:-1])
            # Profiles are made of all folds together.
            assert_allclose(soft[side].weights[ids], alone.weights[:-1], atol=0.05)
            known = alone.rows[:-1, 0] < n_mixed
            assert_array_equal(double[side].rows[ids][known, :3], alone.rows[:-1][known])
            assert_array_equal(double[side].rows[ids, 3], whole[side].rows[:-1, 3])
    with pytest.raises(ValueError, match="biadjacency is"):
        graphhash.soft_maps(graph, labels, folds=[graph[:-1]])


def test_double_soft_refuses_shares_that_leave_nothing():
    graph = graphs.random_graph(0)
    labels = graphhash.cluster(graph, resolution=3)
    for wrong in ({"share": 1.0}, {"share": -0.1}, {"own": 1.0}):
        with pytest.raises(ValueError, match=r"share and own must be in \[0, 1\)"):
            graphhash.double_soft_maps(graph, labels, indices_per_id=3, seed=0, **wrong)
    with pytest.raises(ValueError, match=r"share 0.01 of .* leaves a side no row to hash into; raise it"):
        graphhash.double_soft_maps(graph, labels, indices_per_id=3, share=0.01, seed=0)
    with pytest.raises(ValueError, match="indices_per_id must be at least 2"):
        graphhash.double_soft_maps(graph, labels, indices_per_id=1, share=0.5, seed=0)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.reads_communities])
def test_every_method_takes_as_many_rows_as_the_communities(method):
    graph, _, _ = graphs.planted(1, 20, 25, 0.3, 0.02)
    labels = graphhash.cluster(graph, rows=150)
    maps = METHODS[method].make(Inputs(graph, labels, 4, "1+2", 0, graphs.features(graph)))
    n_rows = maps[0].n_buckets if maps[0].shared else sum(m.n_buckets for m in maps)
    assert n_rows == 150 + 2
    assert [m.n_ids for m in maps] == list(graph.shape)


def test_smoothing_energy_of_tied_rows_is_that_of_the_edges_between_buckets():
    """tr(X^T L X) = sum over edges of |x_u - x_i|^2: with one row a community, only edges between communities pay."""
    graph = graphs.random_graph(3, 50, 40, 300, weighted=True)
    labels = graphhash.cluster(graph, resolution=2)
    table = np.random.default_rng(0).normal(size=(labels.n_communities, 5))
    vectors = np.concatenate([table[labels.users], table[labels.items]])
    dense = graph.toarray().astype(np.float64)
    adjacency = np.block([[np.zeros((50, 50)), dense], [dense.T, np.zeros((40, 40))]])
    laplacian = np.diag(adjacency.sum(1)) - adjacency
    energy = np.trace(vectors.T @ laplacian @ vectors)
    between = np.zeros((labels.n_communities, labels.n_communities))
    users, items = graph.nonzero()
    np.add.at(between, (labels.users[users], labels.items[items]), dense[users, items])
    distances = ((table[:, None] - table[None, :]) ** 2).sum(-1)
    np.fill_diagonal(between, 0)
    assert energy == pytest.approx((between * distances).sum())
    assert energy > 0
