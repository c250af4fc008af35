"""Beyond 2^31: edges, ids and labels that int32 cannot count, with forged offsets instead of so much data."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import graphhash
from graphhash.clustering import state as clustering
from graphhash.graph import _refine_kernels
from graphhash.graph.bipartite import label_dtype
from graphhash.graph.local import LocalGraph, Rows, exact_weights
from pipeline.distributed.shards import _index_dtype
from tests.helpers import graphs

BEYOND = 2**31 + 7


def test_types_change_where_int32_ends():
    assert label_dtype(2**31 - 1) is np.int32
    assert label_dtype(2**31) is np.int64
    assert _index_dtype(2**31 - 1) is np.int32
    assert _index_dtype(2**31) is np.int64


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("method", ["louvain", "leiden", "lpa"])
def test_int64_labels_are_the_int32_ones(method, weighted, monkeypatch):
    graph = graphs.random_graph(4, 150, 100, 1500, weighted=weighted)
    expected = graphhash.cluster(graph, resolution=3, method=method)
    types = []
    move = LocalGraph.move

    def noting(self, side, labels, *others):
        types.append(labels.dtype)
        return move(self, side, labels, *others)

    monkeypatch.setattr(LocalGraph, "move", noting)
    monkeypatch.setattr(clustering, "label_dtype", lambda n_labels: np.int64)
    labels = graphhash.cluster(graph, resolution=3, method=method)
    assert set(types) == {np.dtype(np.int64)}
    assert labels.users.dtype == np.int32
    assert_array_equal(labels.users, expected.users)
    assert_array_equal(labels.items, expected.items)


@pytest.fixture
def near_and_far(tmp_path):
    """A graph's rows, and the same rows at the end of an array of more than 2^31 columns numbers (a sparse file)."""
    graph = graphs.random_graph(4, 150, 100, 1500)
    graph.data[:] = 1
    weights = exact_weights(graph.data, float(graph.nnz))
    indptr = graph.indptr.astype(np.int64)
    file = np.memmap(tmp_path / "indices", np.int32, "w+", shape=(BEYOND + graph.nnz,))
    file[BEYOND:] = graph.indices
    return Rows(indptr, graph.indices, weights), Rows(indptr + BEYOND, file, weights)


def test_edges_past_2_to_the_31_are_read_where_they_are(near_and_far):
    near, far = near_and_far
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 9, 150).astype(np.int32), rng.integers(0, 9, 100).astype(np.int32)
    totals = np.bincount(items, rng.random(100))
    assert_array_equal(near.degrees, far.degrees)
    for results in zip(
        near.move(users, items, totals, 0.01, 9, np.ones(150, bool)),
        far.move(users, items, totals, 0.01, 9, np.ones(150, bool)),
        strict=True,
    ):
        assert_array_equal(*results)
    for results in zip(near.contract(users, items, 9).compact(), far.contract(users, items, 9).compact(), strict=True):
        assert_array_equal(*results)
    pieces = np.empty((2, 250), np.int64)
    for rows, roots in zip((near, far), pieces, strict=True):
        # The forests follow the cut of the rows; what they join does not.
        _refine_kernels.join_forests(*rows.joined(users, items), roots[:150], roots[150:])
    assert_array_equal(*pieces)
    assert len(np.unique(pieces[0])) < 250
    assert near.weight_inside(users, items) == far.weight_inside(users, items) > 0
    assert_array_equal(near.inside(users, items).indices, far.inside(users, items).indices)


def test_int64_columns_are_the_int32_ones():
    graph = graphs.random_graph(4, 150, 100, 1500, weighted=True)
    weights = exact_weights(graph.data, float(graph.data.sum(dtype=np.float64)))
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 9, 150), rng.integers(0, 9, 100)
    indptr = graph.indptr.astype(np.int64)
    moved = []
    for indices in (graph.indices, graph.indices.astype(np.int64)):
        rows = Rows(indptr, indices, weights)
        moved.append(
            rows.move(users, items, np.bincount(items, minlength=9).astype(float), 0.01, 9, np.ones(150, bool))[0]
        )
        assert rows.contract(users, items, 9).columns.dtype == np.int64
    assert_array_equal(*moved)
