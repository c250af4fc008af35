"""Refinement: communities in one piece, no loss of modularity, and the same labels however the graph is reached."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy.sparse import block_array, csr_array
from scipy.sparse.csgraph import connected_components

import graphhash
from graphhash.clustering import refinement
from graphhash.clustering.bounded import cluster_graph
from graphhash.clustering.state import ClusteringState
from graphhash.graph.local import LocalGraph
from pipeline.distributed.graph import RayGraph
from pipeline.distributed.shards import ShardedCsr
from tests.helpers import graphs

RANDOM = [graphs.random_graph(seed, 80, 60, n, weighted=seed % 2 == 1) for seed, n in enumerate([90, 150, 300, 600])]
ALL = [make() for make in graphs.ALL.values()] + RANDOM


def pieces(graph: csr_array, labels: np.ndarray) -> dict[int, int]:
    """Connected pieces of every community, one community after the other, by scipy."""
    square = block_array([[None, graph], [graph.T, None]]).tocsr()
    return {
        int(label): connected_components(square[labels == label][:, labels == label], directed=False)[0]
        for label in np.unique(labels)
    }


@pytest.mark.parametrize("graph", ALL, ids=lambda g: f"{g.shape[0]}x{g.shape[1]}-{g.nnz}")
@pytest.mark.parametrize("n_labels", [1, 3, 12])
def test_components_are_the_connected_pieces_of_every_community(graph, n_labels):
    rng = np.random.default_rng(n_labels)
    n_users, n_items = graph.shape
    labels = rng.integers(0, n_labels, n_users + n_items).astype(np.int32)
    local = LocalGraph(graph)
    roots = np.concatenate(refinement.components(local, labels[:n_users], labels[n_users:]))
    expected = pieces(graph, labels)
    for label, n_pieces in expected.items():
        assert len(np.unique(roots[labels == label])) == n_pieces
    assert_array_equal(labels[roots], labels)
    assert (roots <= np.arange(len(roots))).all()
    assert_array_equal(roots[roots], roots)
    n_disconnected = refinement.n_disconnected(local, labels[:n_users], labels[n_users:])
    assert n_disconnected == sum(n > 1 for n in expected.values())


def test_a_long_path_is_one_piece():
    path = graphs.from_pairs([(i // 2 + i % 2, i // 2) for i in range(4001)])
    users, items = (np.zeros(n, np.int32) for n in path.shape)
    roots = refinement.components(LocalGraph(path), users, items)
    assert not roots[0].any()
    assert not roots[1].any()


def test_splitting_never_lowers_modularity():
    for graph in ALL:
        rng = np.random.default_rng(0)
        users, items = (rng.integers(0, 4, n).astype(np.int32) for n in graph.shape)
        split_users, split_items, n = refinement.split_disconnected(LocalGraph(graph), users, items)
        assert len(np.union1d(split_users, split_items)) == n
        before = graphhash.modularity(graph, users, items, resolution=2.0)
        assert graphhash.modularity(graph, split_users, split_items, resolution=2.0) >= before - 1e-12


def test_refinement_never_lowers_modularity():
    for graph in ALL:
        run = ClusteringState(LocalGraph(graph), 2.0)
        run.half_sweeps(1)
        before = run.modularity()
        for _ in range(3):
            refinement.refine(run)
            assert run.n_communities == len(np.union1d(run.labels["users"], run.labels["items"]))
            after = run.modularity()
            assert after == pytest.approx(graphhash.modularity(graph, *run.labels.values(), resolution=2.0))
            assert after >= before - 1e-12
            before = after


def test_refinement_frees_a_part_that_louvain_moves_cannot():
    """Two complete blocks in one community: no single user or item gains by leaving, the block does."""
    graph = graphs.two_blocks()
    run = ClusteringState(LocalGraph(graph), 1.0)
    run.labels = {side: np.zeros(6, np.int32) for side in ("users", "items")}
    run.n_communities = 1
    run.merge_communities()
    run.half_sweeps(4)
    assert run.modularity() == pytest.approx(0)
    refinement.refine(run)
    assert run.modularity() == pytest.approx(0.5)


@pytest.mark.parametrize("graph", ALL, ids=lambda g: f"{g.shape[0]}x{g.shape[1]}-{g.nnz}")
@pytest.mark.parametrize("resolution", [0.5, 1.0, 4.0])
def test_leiden_communities_are_connected_and_its_modularity_no_lower_than_louvains(graph, resolution):
    louvain, leiden = (graphhash.cluster(graph, resolution=resolution, method=m) for m in ("louvain", "leiden"))
    assert set(pieces(graph, np.concatenate([leiden.users, leiden.items])).values()) == {1}
    assert leiden.modularity >= louvain.modularity - 1e-12
    expected = graphs.naive_modularity(graph, leiden.users, leiden.items, resolution)
    assert leiden.modularity == pytest.approx(expected, abs=1e-9)
    assert all(after >= before - 1e-12 for before, after in zip(leiden.history, leiden.history[1:], strict=False))


def test_label_propagation_ends_where_no_user_or_item_gains():
    graph = graphs.random_graph(2, 200, 150, 2000)
    labels = graphhash.cluster(graph, resolution=3, method="lpa")
    moved = graphs.naive_half_sweep(graph, labels.users, labels.items, 3, fresh=1000)
    assert_array_equal(moved, labels.users)
    transposed = csr_array(graph.T)
    assert_array_equal(graphs.naive_half_sweep(transposed, labels.items, labels.users, 3, fresh=1000), labels.items)
    assert labels.modularity <= graphhash.cluster(graph, resolution=3).modularity
    assert len(labels.history) == 1


@pytest.mark.parametrize("method", ["leiden", "lpa"])
def test_labels_do_not_depend_on_threads_or_shards(method, tmp_path, ray_local):
    graph = graphs.random_graph(7, 300, 200, 3000, weighted=True)
    one, two = (graphhash.cluster(graph, resolution=5, method=method, threads=threads) for threads in (1, 2))
    by_item = graph.T.tocsr()
    by_item.sort_indices()
    stored = [
        ShardedCsr.write(tmp_path / name, side, n_shards=2) for name, side in (("users", graph), ("items", by_item))
    ]
    over_ray = cluster_graph(RayGraph(*stored, 3, tmp_path), 5, method=method)
    for labels in (two, over_ray):
        assert_array_equal(labels.users, one.users)
        assert_array_equal(labels.items, one.items)
        assert labels.history == one.history


def test_an_unknown_method_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown clustering method 'leidn'; did you mean 'leiden'\?"):
        graphhash.cluster(graphs.two_blocks(), resolution=1, method="leidn")
