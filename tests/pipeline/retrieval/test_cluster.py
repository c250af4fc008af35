"""The cluster stage: shards over Ray give the labels of one process, and its files say what it did."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import graphhash
from graphhash.clustering.bounded import cluster_graph
from graphhash.errors import DataError
from graphhash.maps.quantization import bias_bytes, row_bytes
from pipeline.config.run_config import RunConfig
from pipeline.distributed import graph as ray_graph
from pipeline.distributed.graph import RayCommunities, RayGraph
from pipeline.distributed.shards import ShardedCsr
from pipeline.maps.communities import load_communities
from pipeline.maps.methods import METHODS
from pipeline.retrieval.budget import (
    BudgetSettings,
    GraphSize,
    planned_precisions,
    resolve_method,
    rows_for_ratio,
    spendable,
)
from pipeline.retrieval.cluster import cluster_run
from tests.helpers import graphs


def ingested(graph, folder, n_shards=3):
    """What the ingest stage leaves for clustering."""
    by_user = ShardedCsr.write(folder / "train", graph, n_shards=n_shards)
    by_item = graph.T.tocsr()
    by_item.sort_indices()
    return by_user, ShardedCsr.write(folder / "train_by_item", by_item, n_shards=n_shards)


def test_more_rows_than_ids_name_the_range(tmp_path):
    (tmp_path / "ingest").mkdir()
    (tmp_path / "out").mkdir()
    ingested(graphs.random_graph(11, 30, 20, 200, weighted=False), tmp_path / "ingest")
    settings = {"data.path": "log", "run.out": str(tmp_path), "cluster.rows": 52}
    with pytest.raises(
        DataError, match=r"cluster.rows=52 is no budget for 50 users and items; give 4 to 51, or use method"
    ):
        cluster_run(RunConfig.from_flat(settings), tmp_path / "ingest", tmp_path / "out")
    facts = cluster_run(RunConfig.from_flat(settings | {"cluster.rows": 4}), tmp_path / "ingest", tmp_path / "out")
    assert facts["rows"] == 2


@pytest.mark.parametrize("weighted", [False, True])
def test_one_two_and_seven_shards_give_the_labels_of_one_process(weighted, tmp_path, ray_local):
    graph = graphs.random_graph(11, 300, 200, 3000, weighted=weighted)
    stored = ingested(graph, tmp_path)
    expected = graphhash.cluster(graph, resolution=4)
    for n_shards in (1, 2, 7):
        labels = cluster_graph(RayGraph(*stored, n_shards, tmp_path), 4)
        assert_array_equal(labels.users, expected.users)
        assert_array_equal(labels.items, expected.items)
        assert labels.history == expected.history


def test_gowalla_gets_the_same_labels_over_ray(tmp_path, ray_local):
    graph = graphs.gowalla("train.txt")
    expected = graphhash.cluster(graph, resolution=200)
    labels = cluster_graph(RayGraph(*ingested(graph, tmp_path), 2, tmp_path), 200)
    assert_array_equal(labels.users, expected.users)
    assert_array_equal(labels.items, expected.items)


def test_levels_kept_in_files_are_those_in_memory_and_leave_nothing_behind(tmp_path, ray_local, monkeypatch):
    graph = graphs.random_graph(11, 300, 200, 3000, weighted=True)
    expected = graphhash.cluster(graph, resolution=4)
    stored, work = ingested(graph, tmp_path), tmp_path / "work"
    work.mkdir()
    over_ray = RayGraph(*stored, 3, work)
    # As if the graph had no ids: not even the smallest level may come into this process.
    shuffle = ray_graph._shuffle
    levels = []

    def keep_all(*arguments):
        levels.append(shuffle(*arguments[:-1], -1))
        return levels[-1]

    monkeypatch.setattr(ray_graph, "_shuffle", keep_all)
    labels = cluster_graph(over_ray, 4)
    assert len(levels) > 2
    assert all(isinstance(level, RayCommunities) for level in levels)
    assert_array_equal(labels.users, expected.users)
    assert_array_equal(labels.items, expected.items)
    levels.clear()
    assert list(work.iterdir()) == []


def test_a_full_disk_is_told_with_the_folder(tmp_path, ray_local):
    stored = ingested(graphs.random_graph(11, 300, 200, 3000), tmp_path)
    with pytest.raises(graphhash.DataError, match=r"gone: cannot keep a level of the clustering .* free some space"):
        cluster_graph(RayGraph(*stored, 2, tmp_path / "gone"), 4)


def test_a_graph_written_anew_in_the_same_folder_is_read_anew(tmp_path, ray_local):
    for seed in (1, 2):
        graph = graphs.random_graph(seed, 40, 30, 200)
        over_ray = RayGraph(*ingested(graph, tmp_path), 2, tmp_path)
        assert_array_equal(over_ray.user_degrees, graph.sum(axis=1))


def config_of(**settings) -> RunConfig:
    return RunConfig.from_flat({key.replace("__", "."): value for key, value in settings.items()})


def test_the_stage_writes_labels_and_facts_that_agree(tmp_path):
    graph, _, _ = graphs.planted(1, 10, 20, 0.4, 0.02)
    ingested(graph, tmp_path)
    out = tmp_path / "cluster"
    out.mkdir()
    facts = cluster_run(config_of(cluster__resolution=2.0), tmp_path, out)
    assert json.loads((out / "cluster.json").read_text()) == facts
    labels = load_communities(out, facts)
    assert facts["modularity"] == pytest.approx(graphhash.modularity(graph, labels.users, labels.items, resolution=2.0))
    assert facts["rows"] == labels.rows == len(set(labels.users)) + len(set(labels.items))
    users, items = graph.nonzero()
    assert facts["share_inside"] == pytest.approx((labels.users[users] == labels.items[items]).mean())
    assert facts["sizes"]["users"]["largest"] == np.bincount(labels.users).max()


@pytest.mark.parametrize("methods", [("soft", "graph", "full"), ("graph",)])
def test_a_ratio_bounds_every_byte_of_the_heaviest_method(methods):
    config = config_of(cluster__ratio=0.25, run__methods=methods, train__dim=64, train__loss="bpr")
    n_users, n_items, n_edges = 3000, 2000, 40_000
    size = GraphSize(n_users, n_items, n_edges)
    rows = rows_for_ratio(BudgetSettings.of(config), 0.25, planned_precisions(config), size)
    used = []
    for name in methods:
        if name == "full":
            continue
        spec = METHODS[name]
        maps = spec.map_bytes(resolve_method(config, name, size, rows).indices_per_id, 2, n_users, n_items)
        row = row_bytes(64, planned_precisions(config)[name])
        used.append((row * rows + maps + spec.item_bias * bias_bytes(n_items, planned_precisions(config)[name]), row))
    allowed = spendable(0.25, n_users, n_items, 64)
    heaviest, row = max(used)
    assert allowed - row < heaviest <= allowed


def test_a_row_budget_counts_the_rows_of_unknown_ids(tmp_path):
    graph, _, _ = graphs.planted(1, 20, 25, 0.3, 0.02)
    ingested(graph, tmp_path)
    out = tmp_path / "cluster"
    out.mkdir()
    facts = cluster_run(config_of(cluster__rows=120), tmp_path, out)
    assert facts["rows"] + 2 == 120


def test_a_row_budget_per_side_is_hit_exactly(tmp_path):
    graph, _, _ = graphs.planted(1, 20, 25, 0.3, 0.02)
    ingested(graph, tmp_path)
    out = tmp_path / "cluster"
    out.mkdir()
    facts = cluster_run(config_of(cluster__user_rows=90, cluster__item_rows=40, cluster__max_size=30), tmp_path, out)
    assert (facts["user_rows"] + 1, facts["item_rows"] + 1) == (90, 40)
    assert max(facts["sizes"][side]["largest"] for side in ("users", "items")) <= 30
    assert facts["n_disconnected"] >= 0
    assert {
        "load",
        "half_sweeps",
        "contract",
        "louvain",
        "modularity",
        "search",
        "fit_rows",
        "describe",
        "total",
    } == set(facts["seconds"])


def test_damaged_labels_are_refused(tmp_path):
    (tmp_path / "labels_users.npy").write_bytes(b"not an array")
    with pytest.raises(graphhash.DataError, match="labels cannot be read"):
        load_communities(tmp_path, {"resolution": 1, "modularity": 0, "history": []})
