"""Bucket maps of the features of a CTR data set: which are compressed, with whom, how far, and that all methods have the same rows."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from graphhash.errors import DataError
from graphhash.maps.quantization import row_bytes
from graphhash.maps.soft_maps import soft_maps
from graphhash.models.ctr import CtrSpec, FeatureBatch
from graphhash.models.ctr_fields import shared_tables
from pipeline.config.run_config import DataConfig, RunConfig
from pipeline.ctr import budget
from pipeline.ctr.budget import full_bytes, resolve_method, rows_of_columns
from pipeline.ctr.cluster import cluster_ctr, clustering_labels, pair_rows
from pipeline.ctr.data import Features
from pipeline.ctr.evaluate import evaluate_ctr
from pipeline.ctr.folds import cross_fitted_maps, draw_folds, fold_graphs
from pipeline.ctr.ingest import ingest_ctr
from pipeline.ctr.maps import MapOptions, Pair, alone, check_compressed, find_pairs, make_maps, pair_graph
from pipeline.ctr.models import MAP_SETTINGS
from pipeline.ctr.settings import spec_of
from pipeline.ctr.weights import save_ctr, save_maps
from pipeline.errors import ConfigError
from pipeline.maps.methods import METHODS
from tests.helpers.ctr_log import SCHEMA, columns, write_csv, write_schema

FOUR = """
label = "click"
categorical = ["user", "item", "site", "app", "device"]
[columns.user]
partner = "item"
compress = "method"
[columns.item]
partner = "user"
compress = "method"
[columns.site]
partner = "app"
compress = "method"
[columns.app]
compress = "full"
[columns.device]
compress = "double"
rows = 4
"""


def four_columns(n_rows=4000):
    rng = np.random.default_rng(3)
    log = columns(n_rows, n_users=80, n_items=50)
    log["site"] = [f"s{int(u[1:]) % 4}-{k}" for u, k in zip(log["user"], rng.integers(12, size=n_rows), strict=True)]
    log["app"] = [f"a{int(u[1:]) % 4}-{k}" for u, k in zip(log["user"], rng.integers(6, size=n_rows), strict=True)]
    return log


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An ingested log with two pairs, and its clusters."""
    folder = tmp_path_factory.mktemp("maps")
    path = write_csv(folder / "log.csv", four_columns())
    (folder / "ingest").mkdir()
    ingest_ctr(DataConfig(str(path), schema=write_schema(folder, FOUR)), folder / "ingest")
    (folder / "cluster").mkdir()
    cluster_ctr(config_of("graph"), folder / "ingest", folder / "cluster")
    return folder


def config_of(*methods, **settings):
    return RunConfig.from_flat(
        {"run.task": "ctr", "run.methods": methods, "cluster.resolution": 3.0, "train.dim": 8, **settings}
    )


def maps_of(made, method):
    features = Features.open(made / "ingest")
    train = features.part("train")
    graphs = [pair_graph(features, train, pair) for pair in find_pairs(features)]
    labels = clustering_labels(made / "cluster")
    return features, labels, make_maps(features, graphs, labels, method, MapOptions(None, "1+2", 0))


def test_a_pair_compresses_the_columns_that_ask_for_it(made):
    features = Features.open(made / "ingest")
    assert [c.name for c in features.columns] == ["user", "item", "site", "app", "device"]
    # `app` is site's partner and stays full.
    assert find_pairs(features) == [Pair((0, 1), (True, True)), Pair((2, 3), (True, False))]


# `lsh` needs features, and two methods more rows than these few ids leave.
@pytest.mark.parametrize(
    "method",
    [
        name
        for name, method in METHODS.items()
        if method.reads_communities and name not in ("lsh", "quotient_remainder", "multilevel")
    ],
)
def test_all_methods_have_the_rows_of_graph_and_every_model_takes_them(made, method):
    _features, labels, maps = maps_of(made, method)
    user_rows, item_rows = labels[0].user_rows + 1, labels[0].item_rows + 1
    rows = [user_rows + item_rows] * 2 if maps[0].shared else [user_rows, item_rows]
    if method == "baco":
        # It divides the same rows between the sides as it finds them.
        assert maps[0].n_buckets + maps[1].n_buckets == user_rows + item_rows
    else:
        assert [m.n_buckets for m in maps[:2]] == rows
    # One side of a shared table has no use for the other side's unknown row.
    expected = labels[1].user_rows + 1 + (labels[1].item_rows if maps[0].shared else 0)
    assert maps[2].n_buckets == expected or method == "baco"
    assert maps[3].identity
    assert not maps[2].shared
    # A hash of a schema is a column's own, whatever the method.
    assert (maps[4].method, maps[4].n_buckets) == ("double", 4)
    shared_tables(maps)
    model = CtrSpec("dlrm", 8).build(maps, 0)
    entries = torch.tensor([[m.n_ids for m in maps], [0] * len(maps)])
    assert torch.isfinite(model(FeatureBatch(entries, torch.zeros(2, 0)))).all()


@pytest.mark.parametrize("method", ["soft", "double_soft", "graph"])
def test_no_row_reads_mixtures_that_know_its_label(made, method):
    features, labels, maps = maps_of(made, method)
    train, pairs = features.part("train"), find_pairs(features)
    graphs, fold = [pair_graph(features, train, pair) for pair in pairs], draw_folds(len(train), 0)
    options = MapOptions(None, "1+2", 0)
    folded = dict(cross_fitted_maps(features, train, graphs, labels, method, fold, options))
    assert list(folded) == ([] if method == "graph" else [0, 1, 2])
    flipped = dataclasses.replace(
        train, labels=np.where(fold == 3, 1 - np.asarray(train.labels), train.labels).astype(np.uint8)
    )
    again = dict(cross_fitted_maps(features, flipped, graphs, labels, method, fold, options))
    changed = []
    for number in folded:
        # Whatever the labels of a fold's rows are, these rows read the same; the other folds do not.
        _, own = folded[number].index.of_fold(3)
        others = np.setdiff1d(np.arange(folded[number].n_entries), own)
        assert_array_equal(folded[number].rows[own], again[number].rows[own])
        weights = [each[number].codebook[each[number].codes[others]] for each in (folded, again)]
        changed.append((weights[0] != weights[1]).any())
    assert any(changed) == (method != "graph")
    model = CtrSpec("dlrm", 8).build(maps, 0)
    model.use_folds(folded)
    batch = FeatureBatch(
        torch.from_numpy(np.array(train.categorical)).long(),
        torch.zeros(len(train), 0),
        (),
        torch.from_numpy(fold).long(),
    )
    assert torch.equal(model(batch), model(dataclasses.replace(batch, fold=None))) == (method == "graph")


def test_a_pair_that_other_rows_have_stays_in_a_folds_graph(made):
    features = Features.open(made / "ingest")
    train, pair = features.part("train"), find_pairs(features)[0]
    fold = draw_folds(len(train), 0)
    first, second = (np.asarray(train.categorical[:, number]) for number in pair.columns)
    for number, graph in enumerate(fold_graphs(features, train, pair, fold)):
        there = {(u, i) for u, i, y, f in zip(first, second, train.labels, fold, strict=True) if y and f != number}
        rows, columns = graph.nonzero()
        assert set(zip(rows, columns, strict=True)) == {
            (u, i) for u, i in there if u < graph.shape[0] and i < graph.shape[1]
        }


def test_a_fold_with_all_the_positives_leaves_an_empty_graph(made):
    features, labels, maps = maps_of(made, "soft")
    train, pairs = features.part("train"), find_pairs(features)
    graphs = [pair_graph(features, train, pair) for pair in pairs]
    fold = np.where(np.asarray(train.labels) > 0, 2, 0).astype(np.uint8)
    folded = dict(cross_fitted_maps(features, train, graphs, labels, "soft", fold, MapOptions(None, "1+2", 0)))[0]
    (_, empty), (ids, others) = folded.index.of_fold(2), folded.index.of_fold(0)
    assert (folded.rows[empty] == maps[0].oov_row).all()
    assert_array_equal(folded.rows[others], maps[0].rows[ids])


def test_full_leaves_every_column_full(made):
    _features, _labels, maps = maps_of(made, "full")
    assert all(m.identity for m in maps)


def test_a_map_alone_reads_what_it_read_before(made):
    features = Features.open(made / "ingest")
    pair = find_pairs(features)[1]
    graph = pair_graph(features, features.part("train"), pair)
    labels = clustering_labels(made / "cluster")[1]
    for shared in soft_maps(graph, labels, indices_per_id=4):
        own = alone(shared)
        table = np.random.default_rng(0).normal(size=(shared.n_buckets, 3))
        # The table without the other side's unknown row, the own one last.
        kept = np.vstack([table[: shared.n_buckets - 2], table[shared.oov_row]])
        before = (shared.weights[:, :, None] * table[shared.rows]).sum(1)
        assert (own.weights[:, :, None] * kept[own.rows]).sum(1) == pytest.approx(before, abs=1e-12)
        assert own.n_buckets == shared.n_buckets - 1
        assert not own.shared
    assert alone(own) is own


def test_hash_functions_of_two_pairs_differ(made):
    _features, _labels, maps = maps_of(made, "double")
    n = min(maps[0].n_ids, maps[2].n_ids)
    assert not np.array_equal(maps[0].rows[:n] % 5, maps[2].rows[:n] % 5)


def test_small_columns_stay_full_unless_told_otherwise(tmp_path):
    schema = SCHEMA.replace('compress = "method"\n', "")
    (tmp_path / "out").mkdir()
    ingest_ctr(
        DataConfig(str(write_csv(tmp_path / "log.csv", columns())), schema=write_schema(tmp_path, schema)),
        tmp_path / "out",
    )
    features = Features.open(tmp_path / "out")
    assert find_pairs(features) == []
    with pytest.raises(ConfigError, match="no column is compressed"):
        check_compressed(features, ["soft"])
    check_compressed(features, ["full"])


def test_rows_are_a_budget_of_all_pairs_together(made, tmp_path):
    result = cluster_ctr(
        config_of("graph", **{"cluster.resolution": None, "cluster.rows": 60}), made / "ingest", tmp_path
    )
    first, second = result["pairs"]
    # Rows of unknown ids count: two of the first pair, one of the second, whose other side has no table.
    n = [80 + 50, 48]
    assert first["rows"] + 2 == 60 * n[0] // sum(n)
    assert second["user_rows"] + 1 == 60 * n[1] // sum(n)


def test_too_few_rows_name_the_least_budget(made, tmp_path):
    def cluster(rows):
        out = tmp_path / str(rows)
        out.mkdir()
        cluster_ctr(config_of("graph", **{"cluster.resolution": None, "cluster.rows": rows}), made / "ingest", out)

    with pytest.raises(
        DataError, match=r"rows leave .*, which need 8; raise the budget to (\d+) rows or more"
    ) as caught:
        cluster(4)
    least = int(str(caught.value).split("raise the budget to ")[1].split()[0])
    cluster(least)
    with pytest.raises(DataError, match="raise the budget"):
        cluster(least - 1)


def test_a_ratio_of_the_bytes_is_kept_by_every_method(made, tmp_path):
    ratio = 0.45
    settings = {
        "cluster.resolution": None,
        "cluster.ratio": ratio,
        "train.hidden": ("4",),
        "train.dim": 32,
        "map.indices_per_id": 3,
    }
    config = config_of("soft", "double_soft", "graph", **settings)
    cluster_dir = tmp_path / "cluster"
    cluster_dir.mkdir()
    cluster_ctr(config, made / "ingest", cluster_dir)
    features = Features.open(made / "ingest")
    graphs = [pair_graph(features, features.part("train"), pair) for pair in find_pairs(features)]
    labels = clustering_labels(cluster_dir)
    used = []
    for method in config.run.methods:
        maps = make_maps(features, graphs, labels, method, MapOptions(3, "1+2", 0))
        (tmp_path / method).mkdir()
        save_maps(maps, tmp_path / method)
        save_ctr(spec_of(config, method).build(maps, 0), tmp_path / method)
        facts = dict.fromkeys(("training_bytes", "training_bytes_measured", "compressed"))
        (tmp_path / method / "history.json").write_text(json.dumps({"facts": facts}))
        metrics = evaluate_ctr(config, method, made / "ingest", tmp_path / method)
        assert metrics["bytes_full"] == full_bytes(spec_of(config, "full"), features)
        columns_of = metrics["bytes_of"]["columns"]
        assert (
            metrics["bytes"]
            == sum(sum(parts.values()) for parts in columns_of.values()) + metrics["bytes_of"]["layers"]
        )
        assert metrics["bytes_ratio"] <= ratio
        assert (metrics["auc"] is None) == ("auc" in metrics["unmeasured"])
        used.append(metrics["bytes_ratio"])
    assert max(used) > 0.9 * ratio


def test_a_small_share_of_the_bytes_affords_fewer_lookups(made):
    features = Features.open(made / "ingest")
    most = MAP_SETTINGS["soft"]["indices_per_id"]
    found = [
        resolve_method(
            config_of("soft", **{"cluster.resolution": None, "cluster.ratio": ratio, "train.dim": 64}), features, "soft"
        ).indices_per_id
        for ratio in (0.2, 0.5, 0.9)
    ]
    assert 4 <= found[0] < found[1] <= found[2] <= most
    soft = resolve_method(config_of("soft"), features, "soft")
    assert (soft.name, soft.indices_per_id, soft.hops, soft.precision) == ("soft", most, "1+2", "int8")
    # Without a budget it is the task's, as if it were given.
    assert resolve_method(config_of("soft", **{"cluster.resolution": None}), features, "soft") == soft
    assert resolve_method(config_of("soft", **{"map.indices_per_id": 5}), features, "soft").indices_per_id == 5
    assert resolve_method(config_of("graph"), features, "graph").indices_per_id == 1


def test_a_ratio_that_layers_alone_pass_is_refused(made):
    features = Features.open(made / "ingest")
    with pytest.raises(DataError, match=r"a ratio of 0.01 leaves no rows: layers and full columns take"):
        rows_of_columns(config_of("soft"), features, "ratio", 0.01)
    with pytest.raises(DataError, match=r"lower train.cross_rank \(such as to 8\), raise the ratio"):
        rows_of_columns(config_of("soft", **{"train.model": "dcnv2"}), features, "ratio", 0.01)
    with pytest.raises(DataError, match=r"10 rows leave 7 for columns 'user' and 'item'"):
        pair_rows(features, find_pairs(features), 10)


def test_ids_without_an_edge_share_a_row(tmp_path):
    log = columns()
    log["click"] = [0 if u < "u020" else y for u, y in zip(log["user"], log["click"], strict=True)]
    (tmp_path / "ingest").mkdir()
    ingest_ctr(
        DataConfig(str(write_csv(tmp_path / "log.csv", log)), schema=write_schema(tmp_path)), tmp_path / "ingest"
    )
    (tmp_path / "cluster").mkdir()
    result = cluster_ctr(config_of("graph"), tmp_path / "ingest", tmp_path / "cluster")
    assert result["pairs"][0]["n_isolated"] == [20, 0]
    _features, _labels, (users, *_others) = maps_of(tmp_path, "graph")
    assert len(set(users.rows[:20, 0].tolist())) == 1
    assert users.rows[0, 0] not in users.rows[20:, 0]


def test_row_numbers_beyond_two_bytes_take_four(made, monkeypatch):
    features = Features.open(made / "ingest")
    config, pairs = config_of("graph"), find_pairs(features)
    n_ids = [
        features.columns[c].n_ids for pair in pairs for c, on in zip(pair.columns, pair.compressed, strict=True) if on
    ]
    short = rows_of_columns(config, features, "ratio", 0.9)
    row = row_bytes(spec_of(config, "full").dim, "int8")
    monkeypatch.setattr(budget, "SHORT_ROWS", 1)
    long = rows_of_columns(config, features, "ratio", 0.9)
    assert short - long == pytest.approx(sum(2 * (n + 1) for n in n_ids) / row, abs=1)
    # As many rows as two bytes can number are better than fewer with four; columns of fewer ids keep their two.
    between = (short + long) // 2
    monkeypatch.setattr(budget, "SHORT_ROWS", between * max(n_ids) // sum(n_ids))
    assert long < rows_of_columns(config, features, "ratio", 0.9) < short
