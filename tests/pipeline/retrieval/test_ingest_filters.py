"""Filters of the ingest: the core is the one that removing one id after the other leaves, and low ratings are no interactions."""

from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graphhash.errors import DataError
from graphhash.graph.vocabulary import Vocabulary
from pipeline.config.run_config import DataConfig, RunConfig
from pipeline.distributed.shards import ShardedCsr
from pipeline.errors import ConfigError
from pipeline.retrieval import ingest as module
from pipeline.retrieval.ingest import ingest
from pipeline.updates.log import read_new_log

NO_SPLIT = {"validation": 0.0, "test": 0.0}


def edges_of(out, part="train"):
    """{(user, item): weight} of a part, with raw ids."""
    ids = [Vocabulary.load(out / f"{side}.parquet").ids.to_pylist() for side in ("users", "items")]
    matrix = ShardedCsr.open(out / part).load().tocoo()
    return {
        (ids[0][u], ids[1][i]): float(w)
        for u, i, w in zip(*(c.tolist() for c in matrix.coords), matrix.data, strict=True)
    }


def naive_core(pairs, least_items, least_users):
    """Remove one id after the other."""
    pairs = set(pairs)
    while True:
        for side, least in ((0, least_items), (1, least_users)):
            ids = sorted({pair[side] for pair in pairs})
            few = next((one for one in ids if sum(pair[side] == one for pair in pairs) < least), None)
            if few is not None:
                pairs = {pair for pair in pairs if pair[side] != few}
                break
        else:
            return pairs


def csv_file(path, rows, header="user_id,item_id,rating"):
    path.write_text(header + "\n" + "".join(f"{','.join(map(str, row))}\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("kind", ["int64", "string"])
def test_the_core_is_the_naive_one_for_any_partitions(kind, tmp_path, monkeypatch):
    rng = np.random.default_rng(3)
    log = [(int(u), int(i)) for u, i in zip(rng.zipf(1.4, 500) % 40, rng.integers(0, 30, 500), strict=True)]
    log = log if kind == "int64" else [(f"u{u}", f"i{i}") for u, i in log]
    log += log[::3]  # Duplicates count once.
    expected = naive_core(log, 4, 6)
    assert 0 < len(expected) < len(set(log))
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({"user_id": [u for u, _ in log], "item_id": [i for _, i in log]}), path)
    contents = set()
    for n_shards in (1, 7):
        monkeypatch.setattr(module, "PARTITION_EDGES", 10**6 if n_shards == 1 else 30)
        out = tmp_path / f"out{n_shards}"
        config = DataConfig(
            str(path), min_user_interactions=4, min_item_interactions=6, shards=n_shards, validation=0.2, test=0.2
        )
        facts = ingest(config, out)
        parts = [edges_of(out, part) for part in ("train", "validation", "test")]
        assert set().union(*parts) == expected
        assert sum(map(len, parts)) == len(expected)
        assert Vocabulary.load(out / "items.parquet").ids.to_pylist() == sorted({i for _, i in expected})
        merged = {pair: float(log.count(pair)) for pair in expected}
        assert {pair: weight for part in parts for pair, weight in part.items()} == merged
        assert facts["removed"] == {
            "rows_below": 0,
            "users": len({u for u, _ in log}) - len({u for u, _ in expected}),
            "items": len({i for _, i in log}) - len({i for _, i in expected}),
            "interactions": len(set(log)) - len(expected),
            "test_rows": 0,
        }
        contents.add((str(parts), facts["users_hash"], facts["items_hash"]))
    assert len(contents) == 1


def test_without_filters_nothing_is_said(tmp_path):
    facts = ingest(DataConfig(csv_file(tmp_path / "log.csv", [(1, 2, 3), (2, 2, 1)]), **NO_SPLIT), tmp_path / "out")
    assert "removed" not in facts


ROWS = [(1, 10, 5), (1, 11, 3.5), (2, 10, 4), (2, 11, 1), (3, 12, 2)]


@pytest.mark.parametrize("format", ["csv", "parquet", "movielens-100k", "movielens-1m"])
def test_ratings_below_are_no_interactions(format, tmp_path, caplog):
    path = tmp_path / {"movielens-100k": "u.data", "movielens-1m": "ratings.dat"}.get(format, f"log.{format}")
    if format == "csv":
        csv_file(path, ROWS)
    elif format == "parquet":
        users, items, ratings = zip(*ROWS, strict=True)
        pq.write_table(pa.table({"user_id": users, "item_id": items, "rating": pa.array(ratings, pa.float32())}), path)
    else:
        separator = "::" if format == "movielens-1m" else "\t"
        path.write_text("".join(separator.join(map(str, (*row, 7))) + "\n" for row in ROWS))
    with caplog.at_level(logging.INFO):
        facts = ingest(DataConfig(str(path), positive_from=4, **NO_SPLIT), tmp_path / "out")
    assert edges_of(tmp_path / "out") == {(1, 10): 1.0, (2, 10): 1.0}
    assert (facts["n_users"], facts["n_items"], facts["removed"]["rows_below"]) == (2, 1, 3)
    assert "filters: removed 3 rows of a lower rating" in caplog.text
    # An update reads a later log in the same way.
    known = {side: Vocabulary.load(tmp_path / "out" / f"{side}.parquet") for side in ("users", "items")}
    later = read_new_log(str(path), DataConfig(positive_from=3.5), known)
    assert later.graph.nnz == 3
    assert later.n_new == {"users": 0, "items": 1}


def test_stars_are_weights_and_ratings_at_once(tmp_path):
    path = csv_file(tmp_path / "log.csv", [(1, 10, 5, 9), (2, 10, 0, 9), (2, 11, 4, 9)], "user_id,item_id,stars,other")
    ingest(DataConfig(path, weight_column="stars", positive_from=1, **NO_SPLIT), tmp_path / "out")
    assert edges_of(tmp_path / "out") == {(1, 10): 5.0, (2, 11): 4.0}
    ingest(DataConfig(path, rating_column="stars", positive_from=4.5, **NO_SPLIT), tmp_path / "out")
    assert edges_of(tmp_path / "out") == {(1, 10): 1.0}


def test_kept_rejected_and_low_rows_are_all_rows(tmp_path):
    rows = [(1, 10, 5), (1, 11, ""), (2, 10, "x"), (2, "", 1), ("", 10, 5), (1, 12, "nan"), (2, 11, 4)]
    config = DataConfig(csv_file(tmp_path / "log.csv", rows), positive_from=4, bad_rows="skip", **NO_SPLIT)
    facts = ingest(config, tmp_path / "out")
    assert (facts["n_train"], facts["n_rejected"], facts["removed"]["rows_below"]) == (2, 4, 1)
    reasons = pq.read_table(tmp_path / "out" / "rejected.parquet")["reason"].to_pylist()
    assert reasons[:2] == ["column 'rating' is null", "column 'rating' is not a number"]


def test_given_test_rows_of_removed_ids_are_left_out(tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    csv_file(folder / "train.csv", [(1, 10, 5), (1, 11, 5), (2, 10, 5), (2, 11, 5), (3, 12, 5), (4, 13, 1)])
    csv_file(folder / "test.csv", [(1, 12, 5), (3, 10, 5), (4, 10, 5), (2, 13, 2)])
    config = DataConfig(str(folder), split="given", validation=0.0, positive_from=4, min_user_interactions=2)
    facts = ingest(config, tmp_path / "out")
    assert set(edges_of(tmp_path / "out")) == {(1, 10), (1, 11), (2, 10), (2, 11)}
    assert (facts["n_test"], facts["n_rejected"]) == (0, 0)
    assert facts["removed"] == {"rows_below": 2, "users": 1, "items": 1, "interactions": 1, "test_rows": 3}


def test_what_leaves_nothing_is_an_error_with_the_remedy(tmp_path):
    path = csv_file(tmp_path / "log.csv", [(1, 10, 5), (2, 10, 3)])
    with pytest.raises(DataError, match=r"no users with 2 items and items with 1 users are left; lower"):
        ingest(DataConfig(path, min_user_interactions=2), tmp_path / "out")
    with pytest.raises(DataError, match=r"no row of train has a rating from 6 in column 'rating'; lower positive_from"):
        ingest(DataConfig(path, positive_from=6), tmp_path / "out")
    with pytest.raises(DataError, match=r"no column 'stars'.*rating_column"):
        ingest(DataConfig(path, positive_from=4, rating_column="stars"), tmp_path / "out")
    (tmp_path / "train.txt").write_text("1 10\n")
    with pytest.raises(DataError, match=r"LightGCN files have no ratings, which positive_from=4.* needs; leave it out"):
        ingest(DataConfig(str(tmp_path / "train.txt"), positive_from=4), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"data.rating_column=stars is read with data.positive_from alone"):
        DataConfig(path, rating_column="stars")
    with pytest.raises(ConfigError, match=r"data.positive_from=4.0 is not supported with run.task=ctr"):
        RunConfig.from_flat({"run.task": "ctr", "data.positive_from": 4.0})
    assert not (tmp_path / "out").exists()
