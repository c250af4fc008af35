"""Soft maps by Ray tasks from files are those of one process, bit for bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import graphhash
from graphhash.maps.affinities import row_degrees
from graphhash.maps.soft_maps import SoftPlan
from pipeline.distributed import maps as ray_maps
from pipeline.distributed.maps import StoredGraph
from pipeline.distributed.shards import ShardedCsr
from pipeline.maps.methods import METHODS, Inputs
from tests.helpers import graphs


def ingested(graph, folder, n_shards):
    """What the ingest stage leaves for maps."""
    ShardedCsr.write(folder / "train", graph, n_shards=n_shards)
    by_item = graph.T.tocsr()
    by_item.sort_indices()
    ShardedCsr.write(folder / "train_by_item", by_item, n_shards=n_shards)
    return folder


def skewed(weighted):
    """One item that nearly everyone used, rows of every length, and ids without neighbours."""
    rng = np.random.default_rng(5)
    users = np.concatenate([rng.integers(0, 3000, 9000), np.arange(2900)])
    items = np.concatenate([(200 * rng.random(9000) ** 2).astype(int), np.full(2900, 7)])
    # So uneven that the order of summing shows.
    weights = np.exp(rng.normal(0, 4, len(users))) if weighted else None
    return graphhash.biadjacency(users, items, weights, n_users=3005, n_items=210)


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.content_hash == other.content_hash
        assert (one.method, one.shared, one.n_buckets) == (other.method, other.shared, other.n_buckets)
        assert_array_equal(one.rows, other.rows)
        assert_array_equal(one.weights, other.weights)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("hops", ["1", "2", "1+2"])
def test_one_two_and_seven_shards_give_the_maps_of_one_process(hops, weighted, tmp_path, ray_local):
    graph = skewed(weighted)
    labels = graphhash.cluster(graph, resolution=6)
    expected = graphhash.soft_maps(graph, labels, indices_per_id=5, hops=hops)
    for n_shards in (1, 2, 7):
        stored = StoredGraph(ingested(graph, tmp_path / str(n_shards), n_shards), tmp_path, n_shards)
        assert_same(ray_maps.soft_maps(stored, labels, indices_per_id=5, hops=hops), expected)
    # Nothing is left but what was there.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "7"]


def test_affinities_do_not_depend_on_the_shards_before_they_are_rounded(tmp_path, ray_local, monkeypatch):
    """Profiles are few, and might hide a difference."""
    graph = skewed(weighted=True)
    labels = graphhash.cluster(graph, resolution=6)
    seen = []
    monkeypatch.setattr(SoftPlan, "bucket_map", lambda plan, side, *found: seen.append(found) or found, raising=True)
    graphhash.soft_maps(graph, labels, indices_per_id=16)
    stored = StoredGraph(ingested(graph, tmp_path, 3), tmp_path, 9)
    ray_maps.soft_maps(stored, labels, indices_per_id=16, hops="1+2")
    for one, other in zip(seen[:2], seen[2:], strict=True):
        for found, expected in zip(one[:2], other[:2], strict=True):
            assert_array_equal(found, expected)


@pytest.mark.parametrize("hops", ["1", "2", "1+2"])
def test_sources_of_a_row_are_in_the_same_order_whatever_is_beside_it(hops):
    graph = graphs.random_graph(4, 50, 30, 300, weighted=True)
    degrees = row_degrees(graph), row_degrees(graph.T.tocsr())
    plan = SoftPlan.of(graphhash.cluster(graph, resolution=6), *degrees, hops)
    whole = plan.sources("users", graph, 0)
    for start, stop in [(u, u + 1) for u in range(50)] + [(0, 20), (20, 50)]:
        part = plan.sources("users", graph[start:stop], start)
        entries = slice(whole.indptr[start], whole.indptr[stop])
        assert_array_equal(part.indices, whole.indices[entries])
        assert_array_equal(part.data, whole.data[entries])


def test_degrees_of_a_range_are_those_of_the_whole():
    graph = skewed(weighted=True).T.tocsr()
    whole = row_degrees(graph)
    for cuts in ([0, 1, 8, 210], [0, 7, 100, 209, 210]):
        parts = [row_degrees(graph[a:b]) for a, b in itertools.pairwise(cuts)]
        assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("method", ["soft", "double_soft"])
def test_methods_make_the_same_maps_with_and_without_a_stored_graph(method, tmp_path, ray_local):
    graph = graphs.random_graph(3, 80, 60, 500, weighted=True)
    labels = graphhash.cluster(graph, resolution=3)
    stored = StoredGraph(ingested(graph, tmp_path, 2), tmp_path, 3)
    inputs = (graph, labels, 4, "1+2", 0)
    assert_same(METHODS[method].make(Inputs(*inputs, stored=stored)), METHODS[method].make(Inputs(*inputs)))


def test_what_is_impossible_is_refused_before_any_task(tmp_path, ray_local):
    graph = graphs.random_graph(3)
    labels = graphhash.cluster(graphs.random_graph(3, n_users=61), resolution=3)
    stored = StoredGraph(ingested(graph, tmp_path, 2), tmp_path, 2)
    with pytest.raises(ValueError, match="biadjacency is 60 x 40, labels hold 61 users and 40 items"):
        ray_maps.soft_maps(stored, labels, indices_per_id=4, hops="1")
    with pytest.raises(ValueError, match="indices_per_id must be at least 2, one of them hashed, got 1"):
        ray_maps.double_soft_maps(stored, labels, indices_per_id=1, hops="1", seed=0)


def test_a_damaged_shard_is_named(tmp_path, ray_local):
    graph = graphs.random_graph(3)
    stored = StoredGraph(ingested(graph, tmp_path, 2), tmp_path, 2)
    (tmp_path / "train" / "shard-00001.indices.npy").write_bytes(b"no array")
    with pytest.raises(graphhash.DataError, match=r"shard-00001\.indices\.npy: missing or short"):
        ray_maps.soft_maps(stored, graphhash.cluster(graph, resolution=3), indices_per_id=4, hops="2")
