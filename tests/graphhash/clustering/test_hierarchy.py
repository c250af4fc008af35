"""Levels of communities: nested ones split the level before, the others stand alone, and files carry raw ids."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.testing import assert_array_equal

import graphhash
from graphhash.clustering.hierarchy import hierarchy_graph
from graphhash.graph.vocabulary import Vocabulary
from pipeline.config.run_config import RunConfig
from pipeline.distributed.graph import RayGraph
from pipeline.distributed.shards import ShardedCsr
from pipeline.errors import ConfigError
from pipeline.retrieval.cluster import cluster_run
from tests.helpers import graphs

RESOLUTIONS = (0.8, 3, 12)
GRAPHS = [make() for make in graphs.ALL.values()] + [graphs.random_graph(2, 200, 150, 1500)]


def stored(graph, folder):
    by_item = graph.T.tocsr()
    by_item.sort_indices()
    return [
        ShardedCsr.write(folder / name, side, n_shards=2)
        for name, side in (("train", graph), ("train_by_item", by_item))
    ]


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda g: f"{g.shape[0]}x{g.shape[1]}-{g.nnz}")
@pytest.mark.parametrize("method", ["louvain", "leiden"])
def test_a_fine_community_lies_in_one_coarse_community(graph, method):
    levels = graphhash.hierarchy(graph, resolutions=RESOLUTIONS, method=method)
    nodes = np.concatenate([levels.users, levels.items])
    assert nodes.shape == (sum(graph.shape), 3)
    assert nodes.dtype == np.int32
    for coarse, fine in ((0, 1), (1, 2)):
        assert len(np.unique(nodes[:, [coarse, fine]], axis=0)) == len(np.unique(nodes[:, fine]))
    for i, resolution in enumerate(RESOLUTIONS):
        q = graphs.naive_modularity(graph, levels.users[:, i], levels.items[:, i], resolution)
        assert levels.modularity[i] == pytest.approx(q, abs=1e-9)


@pytest.mark.parametrize("nested", [True, False])
def test_the_first_level_and_every_level_that_stands_alone_is_the_clustering_at_its_resolution(nested):
    graph = GRAPHS[-1]
    levels = graphhash.hierarchy(graph, resolutions=RESOLUTIONS, nested=nested)
    for i in range(1 if nested else 3):
        labels = graphhash.cluster(graph, resolution=RESOLUTIONS[i])
        assert_array_equal(levels.users[:, i], labels.users)
        assert_array_equal(levels.items[:, i], labels.items)
    assert levels.nested == nested


def test_nested_blocks_are_found_on_both_levels():
    """Four complete blocks, two and two joined by one edge: the joined ones share a coarse community."""
    pairs = [(u + 4 * b, i + 4 * b) for b in range(4) for u in range(4) for i in range(4)]
    graph = graphs.from_pairs([*pairs, (0, 4), (8, 12)])
    levels = graphhash.hierarchy(graph, resolutions=(0.1, 1))
    assert_array_equal(levels.users[:, 0], np.repeat([0, 1], 8))
    assert_array_equal(levels.users[:, 1], np.repeat([0, 1, 2, 3], 4))


def test_threads_and_shards_change_nothing(tmp_path, ray_local):
    graph = graphs.random_graph(7, 200, 150, 2000, weighted=True)
    one, two = (graphhash.hierarchy(graph, resolutions=RESOLUTIONS, threads=threads) for threads in (1, 2))
    over_ray = hierarchy_graph(RayGraph(*stored(graph, tmp_path), 3, tmp_path), RESOLUTIONS)
    for levels in (two, over_ray):
        assert_array_equal(levels.users, one.users)
        assert_array_equal(levels.items, one.items)


def test_the_stage_writes_levels_with_raw_ids(tmp_path):
    graph = GRAPHS[-1]
    stored(graph, tmp_path)
    Vocabulary.from_ids([f"u{i:03}" for i in range(200)]).save(tmp_path / "users.parquet")
    Vocabulary.from_ids(np.arange(150) * 7).save(tmp_path / "items.parquet")
    (tmp_path / "cluster").mkdir()
    config = RunConfig.from_flat({"cluster.resolution": 2.0, "cluster.levels": ("0.8", "3", "12")})
    facts = cluster_run(config, tmp_path, tmp_path / "cluster")
    expected = graphhash.hierarchy(graph, resolutions=RESOLUTIONS)
    for side, levels, first in (("users", expected.users, "u000"), ("items", expected.items, 0)):
        table = pq.read_table(tmp_path / "cluster" / f"levels_{side}.parquet")
        assert table.column_names == [f"{side[:-1]}_id", "level_1", "level_2", "level_3"]
        assert table.column(0)[0].as_py() == first
        assert_array_equal(np.stack([table.column(f"level_{i}") for i in (1, 2, 3)], axis=1), levels)
    assert [level["resolution"] for level in facts["levels"].values()] == list(RESOLUTIONS)
    assert facts["levels"]["level_3"]["user_rows"] == len(np.unique(expected.users[:, 2]))
    assert facts["seconds"]["levels"] >= 0


@pytest.mark.parametrize("resolutions", [(), (3, 1), (1, 1), (float("nan"),)])
def test_resolutions_that_do_not_ascend_are_refused(resolutions):
    with pytest.raises(ValueError, match="ascending and at least one"):
        graphhash.hierarchy(graphs.two_blocks(), resolutions=resolutions)


@pytest.mark.parametrize("levels", [("a",), ("3", "1"), ("0",), ("inf",)])
def test_levels_of_the_configuration_are_checked(levels):
    with pytest.raises(ConfigError, match="must be ascending resolutions above 0"):
        RunConfig.from_flat({"cluster.levels": levels})


def test_balanced_has_no_levels():
    with pytest.raises(ConfigError, match="levels need a clustering by resolution"):
        RunConfig.from_flat({"cluster.levels": ("1",), "cluster.method": "balanced"})
