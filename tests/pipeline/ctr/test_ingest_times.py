"""The split of a CTR data set by time: against a naive one, nothing later in what is trained on, and values that train lacks."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graphhash.errors import DataError
from pipeline.config.run_config import DataConfig, RunConfig
from pipeline.ctr.data import Features
from pipeline.ctr.ingest import ingest_ctr
from pipeline.ctr.log import open_log
from pipeline.ctr.maps import find_pairs, pair_graph
from pipeline.errors import ConfigError
from pipeline.logs import csv as log_csv
from tests.helpers.ctr_log import SCHEMA, columns, write_csv, write_schema

START = 1_700_000_000
DAY = 86_400


def timed(n_rows=1000, seed=0):
    """The log with times of 200 different days, in no order."""
    days = np.random.default_rng(seed).integers(0, 200, n_rows)
    return columns(n_rows) | {"timestamp": (START + DAY * days).tolist()}


def ingest(tmp_path, log, name="out", schema=SCHEMA, **settings):
    data = DataConfig(
        str(write_csv(tmp_path / f"{name}.csv", log)),
        schema=write_schema(tmp_path, schema),
        split="temporal",
        **settings,
    )
    (tmp_path / name).mkdir()
    return ingest_ctr(data, tmp_path / name), Features.open(tmp_path / name)


def naive_parts(times, validation, test):
    ordered = sorted(times)
    test_from = ordered[len(times) - round(test * len(times))]
    before = [time for time in ordered if time < test_from]
    validation_from = before[len(before) - round(validation * len(times))]
    return ["test" if t >= test_from else "validation" if t >= validation_from else "train" for t in times]


def test_shares_give_the_parts_of_a_naive_split(tmp_path, monkeypatch):
    monkeypatch.setattr(log_csv, "BLOCK_BYTES", 4096)
    log = timed()
    facts, features = ingest(tmp_path, log, validation=0.2, test=0.3)
    parts = naive_parts(log["timestamp"], 0.2, 0.3)
    assert {part: facts[f"n_{part}"] for part in ("train", "validation", "test")} == Counter(parts)
    for part in ("train", "validation", "test"):
        expected = [click for click, p in zip(log["click"], parts, strict=True) if p == part]
        assert features.part(part).labels.tolist() == expected
    first = min(t for t, part in zip(log["timestamp"], parts, strict=True) if part == "test")
    assert facts["times"] == {"column": "timestamp", "first": facts["times"]["first"]}
    assert facts["times"]["first"]["test"] == datetime.fromtimestamp(first, UTC).replace(tzinfo=None).isoformat(" ")


@pytest.mark.parametrize(
    "settings", [{}, {"validation_from": "2024-02-01", "test_from": "2024-04-01"}], ids=["shares", "dates"]
)
def test_later_rows_change_nothing_that_is_trained_on(settings, tmp_path):
    """Fails where a later row reaches vocabularies, counts, statistics, widths, the graph or the rows of train."""
    log = timed()
    parts = naive_parts(log["timestamp"], 0.1, 0.1)
    if settings:
        bounds = [
            datetime.fromisoformat(settings[k]).replace(tzinfo=UTC).timestamp()
            for k in ("validation_from", "test_from")
        ]
        parts = ["train" if t < bounds[0] else "validation" if t < bounds[1] else "test" for t in log["timestamp"]]
    other = {name: list(values) for name, values in log.items()}
    for row, part in enumerate(parts):
        if part != "train":
            other["user"][row], other["item"][row] = f"later{row}", 5000 + row
            other["device"][row], other["price"][row] = "d9", 1e6 + row
            other["genres"][row] = "war|new|comedy|drama|late"
            other["click"][row] = 1 - other["click"][row]
    _, features = ingest(tmp_path, log, **settings)
    facts, changed = ingest(tmp_path, other, "other", **settings)
    assert facts["n_train"] == parts.count("train") > 300
    for file in (
        "schema.json",
        *(f"train/{name}.npy" for name in ("labels", "categorical", "dense", "multi_valued_0")),
    ):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "other" / file).read_bytes(), file
    for column in features.all_columns:
        assert (features.counts(column) == changed.counts(column)).all()
        assert features.vocabulary(column).content_hash == changed.vocabulary(column).content_hash
    graphs = []
    for each in (features, changed):
        (pair,) = find_pairs(each)
        graphs.append(pair_graph(each, each.part("train"), pair))
    assert (graphs[0] != graphs[1]).nnz == 0
    assert graphs[0].nnz > 50


def test_values_that_train_lacks_are_counted_and_said(tmp_path, caplog):
    log = timed()
    parts = naive_parts(log["timestamp"], 0.1, 0.1)
    tested = [row for row, part in enumerate(parts) if part == "test"]
    for place, row in enumerate(tested):
        log["user"][row] = f"new{place % 3}"
        log["genres"][row] = "war|unheard" if place % 2 else "war"
    with caplog.at_level("INFO"):
        facts, _ = ingest(tmp_path, log)
    n_unheard = len(tested) // 2
    assert facts["oov_rate"]["user"] == 1.0
    assert facts["oov_values"] == {"user": 3, "item": 0, "device": 0, "genres": 1}
    assert facts["oov_rate"]["genres"] == pytest.approx(n_unheard / (len(tested) + n_unheard), abs=1e-6)
    assert "train lacks (share of the test's): user 3 (100.0 %), genres 1 (" in caplog.text
    assert f"split temporal: test from {facts['times']['first']['test']}: {len(tested)} rows" in caplog.text


@pytest.mark.parametrize(
    ("name", "settings"),
    [("timestamp", {}), ("seen", {"time_column": "seen"})],
    ids=["recognised", "named"],
)
def test_the_time_of_the_split_is_no_feature_of_an_inferred_schema(name, settings, tmp_path):
    log = timed()
    log[name] = log.pop("timestamp")
    data = DataConfig(
        str(write_csv(tmp_path / "log.csv", log)), user_column="user", item_column="item", split="temporal", **settings
    )
    opened = open_log(data)
    assert name not in opened.schema.names
    assert opened.left_out == {name: "the time of the split"}
    assert np.concatenate(list(opened.times(0))).tolist() == [t * 10**6 for t in log[name]]


def test_times_of_the_schema_are_read_in_their_format(tmp_path):
    log = timed()
    stamps = [datetime.fromtimestamp(t, UTC) for t in log.pop("timestamp")]
    log["hour"] = [int(stamp.strftime("%y%m%d%H")) for stamp in stamps]
    schema = SCHEMA.replace('"device"]', '"device", "hour_weekday"]') + '[times]\nhour = "%y%m%d%H"\n'
    facts, _ = ingest(tmp_path, log, schema=schema, test_from="2024-04-01", validation_from="2024-02-01")
    bound = datetime(2024, 4, 1, tzinfo=UTC)
    assert facts["n_test"] == sum(stamp >= bound for stamp in stamps)
    assert "hour_weekday" in facts["columns"]


def test_parquet_timestamps_are_recognised_by_their_type(tmp_path):
    log = timed()
    times = pa.array(log.pop("timestamp"), pa.timestamp("s"))
    pq.write_table(pa.table(log | {"when": times}), tmp_path / "log.parquet", row_group_size=100)
    (tmp_path / "out").mkdir()
    facts = ingest_ctr(
        DataConfig(str(tmp_path / "log.parquet"), split="temporal", test_from="2024-04-01"), tmp_path / "out"
    )
    assert facts["times"] == {
        "column": "when",
        "first": {"validation": facts["times"]["first"]["validation"], "test": "2024-04-01 00:00:00"},
    }
    assert facts["left_out"] == {"when": "the time of the split"}


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda log: log.pop("timestamp"), {}, "no column of times is recognised in click, user"),
        (lambda log: log.update(ts=log["timestamp"]), {}, "columns timestamp, ts all look like times; name the column"),
        (lambda log: log, {"time_column": "timestmp"}, "no column 'timestmp'; did you mean 'timestamp'"),
        (lambda log: log["timestamp"].__setitem__(6, None), {}, "row 8: column 'timestamp' is missing; fix or drop"),
        (lambda log: log, {"test_from": "2044-01-01"}, "data.test_from=2044-01-01 is after the latest row, 2024-"),
        (lambda log: log, {"test_from": "2004-01-01"}, "no row is before 2004-01-01 00:00:00"),
        (
            lambda log: log.update(click=[(t // DAY) % 2 * (t < 1_714_000_000) for t in log["timestamp"]]),
            {"test_from": "2024-05-01"},
            "test has no positive labels in .* give more data, other dates or shares",
        ),
    ],
    ids=["none", "two", "typo", "null", "too late", "too early", "one label"],
)
def test_what_cannot_be_split_by_time_is_an_error_with_the_remedy(change, settings, message, tmp_path):
    log = timed()
    change(log)
    with pytest.raises(DataError, match=message):
        ingest(tmp_path, log, **settings)


def test_libfm_files_and_formats_without_a_year_are_refused(tmp_path):
    (tmp_path / "log.libfm").write_text("1 1:1 2:1\n0 3:1 4:1\n")
    with pytest.raises(DataError, match="libfm files have no times"):
        open_log(DataConfig(str(tmp_path / "log.libfm"), split="temporal"))
    schema = SCHEMA + '[times]\nhour = "%H"\n'
    log = columns(100) | {"hour": [f"{row % 24:02d}" for row in range(100)]}
    with pytest.raises(DataError, match="the time 'hour' has the format '%H', without a year; name another"):
        ingest(tmp_path, log, schema=schema)


def test_movielens_of_four_fields_is_split_by_its_timestamp(tmp_path):
    (tmp_path / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072\n")
    (tmp_path / "movies.dat").write_text("10::A (1995)::Drama\n11::B (1996)::War|Drama\n")
    rows = [f"{1 + n % 2}::{10 + n // 2 % 2}::{5 - n % 3}::{START + (7 * n) % 40 * DAY}" for n in range(40)]
    (tmp_path / "ratings.dat").write_text("\n".join(rows) + "\n")
    (tmp_path / "out").mkdir()
    facts = ingest_ctr(DataConfig(str(tmp_path), split="temporal", validation=0.2, test=0.2), tmp_path / "out")
    assert (facts["n_train"], facts["n_validation"], facts["n_test"]) == (24, 8, 8)
    assert facts["times"]["column"] == "timestamp"
    assert "timestamp" not in json.loads((tmp_path / "out" / "schema.json").read_text())["log"].values()


def test_leave_last_out_is_refused_with_the_reason():
    with pytest.raises(
        ConfigError, match=r"leave-last-out is not supported with run.task=ctr: a user's last sample has one"
    ):
        RunConfig.from_flat({"run.task": "ctr", "data.path": "x", "data.split": "leave-last-out"})
