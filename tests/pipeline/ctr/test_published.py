"""Data sets with a published split: their files, their recipes, and how their values are read."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace

import numpy as np
import pytest

from graphhash.errors import DataError
from pipeline.config.run_config import DataConfig, RunConfig
from pipeline.ctr import published
from pipeline.ctr.columns import labels_of
from pipeline.ctr.data import Features
from pipeline.ctr.datasets import NAMED, find_name
from pipeline.ctr.ingest import ingest_ctr
from pipeline.ctr.log import named_settings, open_log
from pipeline.ctr.published import CRITEO_IDS, FILES, FRAPPE_CONTEXT, NUMBERS, PUBLISHED
from pipeline.runs.run import run
from serving import Scorer
from serving.raw_columns import buckets_of
from serving.values import log_square_buckets
from tests.pipeline.ctr.test_datasets import write_frappe


def write_split(folder, name, rows=40):
    """Files with the header of a published data set; every value of a column is its own, label 0 or 1 in turn."""
    folder.mkdir(exist_ok=True)
    header = PUBLISHED[name].header
    for part, n in zip(FILES, (rows, rows // 2, rows // 4), strict=True):
        lines = [",".join(header)]
        for row in range(n):
            lines.append(",".join(str(row % 2) if c in ("label", "Label", "click") else str(row % 7) for c in header))
        (folder / part).write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "avazu_x4"])
def test_three_files_are_train_validation_and_test(name, tmp_path, caplog):
    folder = write_split(tmp_path / "data", name)
    assert find_name(str(folder), "auto") == name
    assert named_settings(str(folder), "auto") == {
        "data.split": "given", "data.validation": PUBLISHED[name].shares[0], "data.test": PUBLISHED[name].shares[1]
    }  # fmt: skip
    data = DataConfig(str(folder), split="given", validation=0.2)
    (tmp_path / "out").mkdir()
    with caplog.at_level(logging.INFO):
        facts = ingest_ctr(data, tmp_path / "out")
    assert [facts[f"n_{part}"] for part in ("train", "validation", "test")] == [40, 20, 10]
    assert facts["published"] is False
    assert "train.csv has the md5" in caplog.text
    features = Features.open(tmp_path / "out")
    np.testing.assert_array_equal(features.part("validation").labels, np.arange(20) % 2)


def test_published_files_are_known_by_their_md5(tmp_path, monkeypatch, caplog):
    folder = write_split(tmp_path / "data", "frappe_x1")
    md5 = tuple(hashlib.md5((folder / name).read_bytes()).hexdigest() for name in FILES)
    monkeypatch.setitem(published.PUBLISHED, "frappe_x1", replace(PUBLISHED["frappe_x1"], md5=md5))
    (tmp_path / "out").mkdir()
    with caplog.at_level(logging.INFO):
        facts = ingest_ctr(DataConfig(str(folder), split="given", validation=0.2), tmp_path / "out")
    assert facts["published"] is True
    assert "the published files, by their md5" in caplog.text


def test_the_recipe_is_followed_on_the_original_file_and_that_is_said(tmp_path, caplog):
    write_frappe(tmp_path / "frappe")
    data = DataConfig(str(tmp_path / "frappe"), "frappe_x1", validation=0.2, test=0.3)
    (tmp_path / "out").mkdir()
    with caplog.at_level(logging.WARNING):
        facts = ingest_ctr(data, tmp_path / "out")
    assert facts["n_train"] + facts["n_validation"] + facts["n_test"] == 3 * 18
    assert facts["published"] is False
    assert (
        "the published files (train.csv, valid.csv, test.csv) are not there: the same recipe is followed" in caplog.text
    )
    assert NAMED["frappe_x1"].shares == (0.2, 0.1)


def test_tags_of_movielens_have_two_unobserved_tags_behind_each(tmp_path):
    rng = np.random.default_rng(0)
    rows = {(str(u), str(i), f"tag {t}") for u, i, t in rng.integers(0, (8, 9, 12), (60, 3))}
    lines = [f"{u},{i},{t},99" for u, i, t in sorted(rows)]
    (tmp_path / "tags.csv").write_text("userId,movieId,tag,timestamp\n" + "\n".join(lines) + "\n")
    log = open_log(DataConfig(str(tmp_path), "movielenslatest_x1"))
    (made,) = log.rows(3)
    got = [made.columns[name].to_pylist() for name in ("user_id", "item_id", "tag_id", "label")]
    triples = [((u, i, t), label) for u, i, t, label in zip(*got, strict=True)]
    assert {triple for triple, label in triples if label} == rows
    assert all(triple not in rows for triple, label in triples if not label)
    assert len(triples) == 3 * len(rows)
    assert [pair for pair, _ in triples[1::3]] != [pair for pair, _ in triples[2::3]]


def test_criteo_is_read_from_its_raw_file_with_counts_in_buckets(tmp_path):
    values = ["", "-2", "0", "1", "2", "3", "20", "1500", "1000000", "7", "8", "9", "10"]
    lines = ["\t".join([str(row % 2), *values, *(["68fd1e64"] * 26)]) for row in range(40)]
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    log = open_log(DataConfig(str(tmp_path), "criteo_x4"))
    rows = next(log.rows(0))
    found = [rows.columns[f"{name}_bucket"][0].as_py() for name in NUMBERS]
    # floor(ln(x)^2): ln 3 = 1.0986, ln 20 = 2.9957, ln 1500 = 7.3132, ln 10^6 = 13.8155.
    assert found[:9] == [0, -2, 0, 1, 2, 1, 8, 53, 190]
    assert {category.min_count for category in log.schema.categories} == {10}
    assert len(log.schema.categories) == 13 + 26
    assert labels_of(rows, "Label").tolist()[:2] == [0, 1]


def test_serving_reads_numbers_in_the_same_buckets():
    raw = [None, "-2", 0, 1.9, "2", 3, "20", 1500.0, float("nan"), 1e30, -1e30]
    numbers = np.array([np.nan, -2, 0, 1.9, 2, 3, 20, 1500, np.nan, 1e30, -1e30])
    np.testing.assert_array_equal(buckets_of(raw, "I1"), log_square_buckets(numbers))
    assert log_square_buckets(numbers)[:8].tolist() == [0, -2, 0, 1, 2, 1, 8, 53]


def test_avazu_x4_needs_two_rows_of_a_value_and_knows_hour_and_weekday(tmp_path):
    header = PUBLISHED["avazu_x4"].header
    for part in FILES:
        rows = [",".join(header)]
        for row in range(20):
            rows.append(
                ",".join(
                    {"click": str(row % 2), "hour": f"141021{row:02d}", "id": str(row)}.get(c, str(row % 3))
                    for c in header
                )
            )
        (tmp_path / part).write_text("\n".join(rows) + "\n")
    assert find_name(str(tmp_path), "auto") == "avazu_x4"
    log = open_log(DataConfig(str(tmp_path), split="given"))
    first, *_ = log.rows(0)
    assert first.columns["hour_hour"].to_pylist() == list(range(20))
    assert {category.min_count for category in log.schema.categories} == {2}


def test_what_has_neither_files_nor_a_recipe_is_said(tmp_path):
    for name in ("criteo_x1", "avazu_x1"):
        with pytest.raises(
            DataError, match=rf"{name} has the files train.csv, valid.csv, test.csv, which are not there; check"
        ):
            open_log(DataConfig(str(tmp_path), name))
    with pytest.raises(DataError, match=r"which are not there, nor tags.csv; check the path"):
        open_log(DataConfig(str(tmp_path), "movielenslatest_x1"))
    assert len(CRITEO_IDS) == 26
    assert len(FRAPPE_CONTEXT) == 8


def test_a_bundle_takes_raw_counts_for_their_buckets(tmp_path):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 3000, (600, 13))
    ids = rng.integers(0, 4, (600, 26))
    lines = ["\t".join(map(str, (int(c[0] > 1500), *c, *i))) for c, i in zip(counts, ids, strict=True)]
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    settings = {"run.task": "ctr", "run.mlflow": False, "run.methods": ("full",), "run.out": str(tmp_path / "out")}
    settings |= {"data.path": str(tmp_path), "data.format": "criteo_x4", "train.dim": 4, "train.hidden": ("4",)}
    run(RunConfig.from_flat(settings | {"train.epochs": 1, "train.refit": False}))
    scorer = Scorer(tmp_path / "out" / "bundle", provider="cpu")
    assert "I1" in scorer.columns
    assert "I1_bucket" not in scorer.columns
    raw = {f"I{n + 1}": counts[:50, n].tolist() for n in range(13)} | {
        f"C{n + 1}": ids[:50, n].tolist() for n in range(26)
    }
    made = {
        f"{name}_bucket" if name in NUMBERS else name: log_square_buckets(np.array(values, float))
        if name in NUMBERS
        else values
        for name, values in raw.items()
    }
    np.testing.assert_array_equal(scorer.predict(raw), scorer.predict(made))
