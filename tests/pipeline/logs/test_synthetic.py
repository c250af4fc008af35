from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.logs import synthetic as module
from pipeline.logs.sources import find_sources
from pipeline.logs.synthetic import synth

SIZES = {"n_users": 300, "n_items": 200, "n_interactions": 5000, "n_communities": 8, "mixing": 0.2}


def log_of(folder):
    return pa.concat_tables(pq.read_table(file) for file in sorted(folder.glob("log-*.parquet")))


def communities_of(folder, side):
    table = pq.read_table(folder / "communities" / f"{side}s.parquet")
    return dict(zip(table[f"{side}_id"].to_pylist(), table["community"].to_pylist(), strict=True))


def share_inside(folder):
    users, items = communities_of(folder, "user"), communities_of(folder, "item")
    return np.mean([users[row["user_id"]] == items[row["item_id"]] for row in log_of(folder).to_pylist()])


def test_the_log_has_the_rows_asked_for_and_no_pair_twice(tmp_path):
    result = synth(tmp_path / "log", **SIZES, seed=0)
    log = log_of(tmp_path / "log")
    assert len(log) == len(set(zip(*(log[c].to_pylist() for c in ("user_id", "item_id")), strict=True))) == 5000
    users, items = (communities_of(tmp_path / "log", side) for side in ("user", "item"))
    assert set(log["user_id"].to_pylist()) == set(users)
    assert len(users) == 300
    assert set(log["item_id"].to_pylist()) <= set(items)
    assert len(items) == 200
    assert set(items.values()) == set(range(8))
    assert result["n_interactions"] == 5000
    assert result["n_files"] == 1


def test_the_seed_fixes_every_byte_and_another_seed_does_not(tmp_path):
    def content(folder):
        return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*.parquet"))}

    for name, seed in [("a", 3), ("b", 3), ("c", 4)]:
        synth(tmp_path / name, **SIZES, seed=seed)
    assert content(tmp_path / "a") == content(tmp_path / "b") != content(tmp_path / "c")


def test_a_log_of_several_blocks_and_files_is_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_EDGES", 400)
    monkeypatch.setattr(module, "ROWS_PER_FILE", 1500)
    assert synth(tmp_path, **SIZES, seed=0)["n_files"] == 4
    log = log_of(tmp_path)
    assert len(log) == log.group_by(["user_id", "item_id"]).aggregate([]).num_rows == 5000


@pytest.mark.parametrize("mixing", [0.0, 0.2, 1.0])
def test_mixing_is_the_share_drawn_from_all_items(mixing, tmp_path):
    sizes = {"n_users": 1000, "n_items": 2000, "n_interactions": 10_000, "n_communities": 4, "mixing": mixing}
    synth(tmp_path, **sizes, seed=0)
    assert share_inside(tmp_path) == pytest.approx(1 - mixing + mixing / 4, abs=0.03)


def test_activity_and_popularity_have_heavy_tails(tmp_path):
    sizes = {"n_users": 5000, "n_items": 3000, "n_interactions": 100_000, "n_communities": 10, "mixing": 0.3}
    synth(tmp_path, **sizes, seed=0)
    for column in ("user_id", "item_id"):
        counts = np.sort(log_of(tmp_path)[column].value_counts().field("counts").to_numpy())[::-1]
        assert counts[0] > 8 * np.median(counts)


def test_raw_ids_are_no_row_numbers(tmp_path):
    synth(tmp_path, **SIZES, seed=0)
    for side in ("user", "item"):
        ids = np.array(list(communities_of(tmp_path, side)))
        assert ids.dtype == np.int64
        assert ids.min() > 10**9
        assert np.any(np.diff(ids) < 0)
        assert np.ptp(ids) > 10 * len(ids)


def test_the_folder_can_be_read_as_a_log_and_written_again(tmp_path):
    synth(tmp_path, **SIZES, seed=0)
    assert [source.file for source in find_sources(str(tmp_path))] == [str(tmp_path / "log-00000.parquet")]
    synth(tmp_path, **SIZES | {"n_interactions": 600}, seed=0)
    assert len(log_of(tmp_path)) == 600


def test_a_full_community_overflows_into_all_items(tmp_path):
    sizes = {"n_users": 10, "n_items": 40, "n_interactions": 200, "n_communities": 20, "mixing": 0.0}
    synth(tmp_path, **sizes, seed=0)
    log = log_of(tmp_path)
    assert len(log) == log.group_by(["user_id", "item_id"]).aggregate([]).num_rows == 200


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_users": 0}, "users=0"),
        ({"n_interactions": 299}, "interactions=299 must be 300..30000"),
        ({"n_interactions": 30_001}, "interactions=30001 must be 300..30000"),
        ({"n_communities": 201}, "communities=201 are more than items=200"),
        ({"mixing": 1.5}, "mixing=1.5 is a share"),
    ],
)
def test_sizes_that_cannot_be_met_are_refused(change, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        synth(tmp_path / "log", **SIZES | change, seed=0)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds something that is no synthetic log"):
        synth(tmp_path, **SIZES, seed=0)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
