"""Splits by time against naive ones, nothing later in what is trained on, and weights by age."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graphhash.errors import DataError
from graphhash.graph.vocabulary import Vocabulary
from pipeline.config.run_config import DataConfig, RunConfig
from pipeline.errors import ConfigError
from pipeline.logs.values import microseconds
from pipeline.retrieval import ingest as module
from pipeline.retrieval.ingest import ingest
from tests.pipeline.retrieval.test_ingest_filters import csv_file, edges_of

DAY = 86_400
HEADER = "user_id,item_id,timestamp"


def random_log(n_rows=400, seed=0):
    """Rows (user, item, seconds) with repeated pairs and equal times, in no order of time."""
    rng = np.random.default_rng(seed)
    columns = (rng.zipf(1.5, n_rows) % 25, rng.integers(0, 20, n_rows), 10**9 + rng.integers(0, 150, n_rows) * DAY)
    return [tuple(map(int, row)) for row in zip(*columns, strict=True)]


def parquet_file(path, log):
    users, items, times = zip(*log, strict=True)
    pq.write_table(pa.table({"user_id": users, "item_id": items, "timestamp": times}), path, row_group_size=50)
    return str(path)


def merged(rows):
    weights = {}
    for user, item, _ in rows:
        weights[user, item] = weights.get((user, item), 0.0) + 1.0
    return weights


def expected_parts(train, validation, test):
    """Merged pairs of each part; held-out rows of ids that train lacks, and of pairs known before, are left out."""
    found = {"train": merged(train)}
    users, items, known = {r[0] for r in train}, {r[1] for r in train}, set(found["train"])
    for name, rows in (("validation", validation), ("test", test)):
        found[name] = merged(r for r in rows if r[0] in users and r[1] in items and r[:2] not in known)
        known |= set(found[name])
    return found


def naive_temporal(log, validation, test):
    times = sorted(row[2] for row in log)
    test_from = times[len(log) - round(test * len(log))]
    before = [time for time in times if time < test_from]
    validation_from = before[len(before) - round(validation * len(log))]
    train = [row for row in log if row[2] < validation_from]
    return (
        train,
        [row for row in log if validation_from <= row[2] < test_from],
        [row for row in log if row[2] >= test_from],
    )


def naive_last_out(log, n):
    parts = {"train": [], "validation": [], "test": []}
    for user in {row[0] for row in log}:
        rows = sorted((row for row in log if row[0] == user), key=lambda row: row[2])
        firsts = [k for k, row in enumerate(rows) if row[1] not in {r[1] for r in rows[:k]}]
        n_test = min(n, len(firsts) - 1)
        n_validation = min(n, len(firsts) - 1 - n_test)
        test_at = firsts[-n_test] if n_test else len(rows)
        validation_at = firsts[-n_test - n_validation] if n_test + n_validation else len(rows)
        parts["train"] += rows[:validation_at]
        parts["validation"] += rows[validation_at:test_at]
        parts["test"] += rows[test_at:]
    return tuple(parts.values())


@pytest.mark.parametrize(
    "settings", [{"split": "temporal"}, {"split": "leave-last-out", "last_n": 2}], ids=["temporal", "last"]
)
def test_a_split_by_time_is_the_naive_one_for_any_partitions(settings, tmp_path, monkeypatch):
    log = random_log()
    path = parquet_file(tmp_path / "log.parquet", log)
    parts = naive_temporal(log, 0.2, 0.3) if settings["split"] == "temporal" else naive_last_out(log, 2)
    expected = expected_parts(*parts)
    assert all(expected.values())
    hashes = set()
    for n_shards in (1, 5):
        monkeypatch.setattr(module, "PARTITION_EDGES", 10**6 if n_shards == 1 else 30)
        out = tmp_path / f"out{n_shards}"
        facts = ingest(DataConfig(path, validation=0.2, test=0.3, shards=n_shards, **settings), out)
        assert {name: edges_of(out, name) for name in expected} == expected
        users, items = {row[0] for row in parts[0]}, {row[1] for row in parts[0]}
        assert Vocabulary.load(out / "users.parquet").ids.to_pylist() == sorted(users)
        assert Vocabulary.load(out / "items.parquet").ids.to_pylist() == sorted(items)
        for name, rows in (("validation", parts[1]), ("test", parts[2])):
            found = facts["times"]["parts"][name]
            assert found["rows"] == len(rows)
            assert found["unseen_users"] == len({row[0] for row in rows} - users)
            assert found["unseen_items"] == len({row[1] for row in rows} - items)
            assert found["rows_of_unseen"] == sum(row[0] not in users or row[1] not in items for row in rows)
            n_kept = sum(row[:2] in expected[name] for row in rows)
            assert found["rows"] - found["rows_of_unseen"] - found["rows_repeated"] == n_kept
        hashes.add((facts["users_hash"], facts["items_hash"]))
    assert len(hashes) == 1


def trained_on(out):
    """The bytes of what training reads."""
    files = [out / "users.parquet", out / "items.parquet", *sorted((out / "train").iterdir())]
    files += sorted((out / "train_by_item").iterdir())
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


@pytest.mark.parametrize(
    "settings",
    [
        {"split": "temporal", "validation_from": "2001-12-01", "test_from": "2002-01-01"},
        {"split": "leave-last-out"},
    ],
    ids=["temporal", "last"],
)
def test_what_comes_later_changes_nothing_that_is_trained_on(settings, tmp_path):
    """Other items, users and times in the held-out rows: vocabularies, graph, core and weights stay, byte by byte."""
    log = random_log()
    settings |= {"half_life": 30.0, "min_user_interactions": 2, "min_item_interactions": 2}
    if settings["split"] == "temporal":
        later = datetime(2001, 12, 1, tzinfo=UTC).timestamp()
        held_out = [row for row in log if row[2] >= later]
    else:
        _, validation, test = naive_last_out(log, 1)
        held_out = validation + test
    kept = [row for row in log if row not in held_out]
    ingest(DataConfig(parquet_file(tmp_path / "a.parquet", log), **settings), tmp_path / "a")
    if settings["split"] == "temporal":
        changed = kept + [(1000 + user, 2000 + item, time + DAY) for user, item, time in held_out]
    else:
        # What a user takes up at last is another item, and later; what it had before, it may have again.
        known = {row[:2] for row in kept}
        changed = kept + [(u, i + (0 if (u, i) in known else 1000), t + 1000 * DAY) for u, i, t in held_out]
    ingest(DataConfig(parquet_file(tmp_path / "b.parquet", changed), **settings), tmp_path / "b")
    assert trained_on(tmp_path / "a") == trained_on(tmp_path / "b")
    # The check sees a row that reaches train.
    ingest(DataConfig(parquet_file(tmp_path / "c.parquet", [*log, (*kept[0][:2], 10**9)]), **settings), tmp_path / "c")
    assert trained_on(tmp_path / "a") != trained_on(tmp_path / "c")


def test_equal_times_are_of_the_later_part_and_in_reading_order(tmp_path):
    rows = [(1, 10, 5), (1, 11, 5), (1, 12, 5), (2, 10, 4), (2, 11, 6), (2, 12, 4)]
    path = csv_file(tmp_path / "log.csv", rows, HEADER)
    # Half of the rows: the third latest has the time 5, and so have three.
    facts = ingest(DataConfig(path, split="temporal", validation=0.0, test=0.5), tmp_path / "out")
    assert set(edges_of(tmp_path / "out")) == {(2, 10), (2, 12)}
    assert facts["times"]["parts"]["test"]["rows"] == 4
    assert facts["times"]["first"] == {"validation": "1970-01-01 00:00:05", "test": "1970-01-01 00:00:05"}
    ingest(DataConfig(path, split="leave-last-out", validation=0.0), tmp_path / "out")
    assert set(edges_of(tmp_path / "out")) == {(1, 10), (1, 11), (2, 10), (2, 12)}
    assert set(edges_of(tmp_path / "out", "test")) == {(1, 12), (2, 11)}


def test_the_first_item_of_every_user_is_trained_on(tmp_path):
    rows = [(1, 10, 1), (2, 10, 1), (2, 11, 2), (3, 10, 1), (3, 11, 2), (3, 12, 3), (4, 12, 0)]
    ingest(DataConfig(csv_file(tmp_path / "log.csv", rows, HEADER), split="leave-last-out"), tmp_path / "out")
    assert set(edges_of(tmp_path / "out")) == {(1, 10), (2, 10), (3, 10), (4, 12)}
    assert edges_of(tmp_path / "out", "validation") == {}  # Item 11 is not in train.
    assert set(edges_of(tmp_path / "out", "test")) == {(3, 12)}


SECONDS = [1_000_000_000, 1_000_086_400, 1_000_172_800, 1_000_259_200]
STAMPS = [datetime.fromtimestamp(second, UTC).replace(tzinfo=None) for second in SECONDS]
SPELLINGS = {
    "seconds": SECONDS,
    "floats": [second + 0.0 for second in SECONDS],
    "milliseconds": [second * 1000 for second in SECONDS],
    "microseconds": [second * 10**6 for second in SECONDS],
    "nanoseconds": [second * 10**9 for second in SECONDS],
    "timestamps": pa.array(STAMPS, pa.timestamp("ns")),
    "zoned": pa.array(STAMPS, pa.timestamp("ms", "UTC")),
    "iso": [stamp.isoformat(" ") for stamp in STAMPS],
    "offsets": [(stamp + timedelta(hours=2)).isoformat() + "+02:00" for stamp in STAMPS],
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_times_in_any_spelling_are_the_same(spelling, format, tmp_path):
    table = pa.table({"user_id": [1, 1, 2, 2], "item_id": [10, 11, 10, 11], "Timestamp": SPELLINGS[spelling]})
    path = tmp_path / f"log.{format}"
    if format == "parquet":
        pq.write_table(table, path)
    else:
        rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
        csv_file(path, rows, ",".join(table.column_names))
    facts = ingest(DataConfig(str(path), split="temporal", validation=0.25, test=0.25), tmp_path / "out")
    assert facts["times"]["column"] == "Timestamp"
    assert facts["times"]["first"] == {"validation": str(STAMPS[2]), "test": str(STAMPS[3])}


@pytest.mark.parametrize(
    ("values", "unit"),
    [
        (pa.array([2**62, None, 1], pa.timestamp("s")), None),
        (pa.array([2**60, -(2**60), 1000], pa.timestamp("ms", "UTC")), None),
        (pa.array([2**30, -(2**30), 0], pa.date32()), None),
        (pa.array([-9.9e10, 1e300, 1.0]), "s"),
        (pa.array([2**63 - 1, -(2**63), 1]), "s"),
        (pa.array(["2024-13-01", "99999-01-01", "1970-01-01T00:00:01.000000Z"]), None),
        (pa.array(["1e300", "nan", "1.0"]), "s"),
        (pa.array([True, False, None]), "s"),
    ],
)
def test_times_outside_of_the_calendar_are_none(values, unit):
    found, wrong = microseconds(values, unit)
    assert wrong[:2].all()
    assert wrong[2] or found[2] == (0 if pa.types.is_date(values.type) else 10**6)


def test_weights_halve_with_age_and_later_rows_count_for_nothing(tmp_path, caplog):
    rows = [(1, 10, 0), (1, 10, 10 * DAY), (2, 10, 20 * DAY), (2, 11, 10 * DAY), (1, 11, 90 * DAY)]
    path = csv_file(tmp_path / "log.csv", rows, HEADER)
    config = DataConfig(path, split="temporal", test_from="1970-02-01", validation=0.0, half_life=10.0)
    with caplog.at_level(logging.INFO):
        facts = ingest(config, tmp_path / "out")
    assert edges_of(tmp_path / "out") == {(1, 10): 0.75, (2, 10): 1.0, (2, 11): 0.5}
    assert edges_of(tmp_path / "out", "test") == {(1, 11): 1.0}
    assert facts["times"]["newest"] == "1970-01-21 00:00:00"
    assert "weights: halved every 10 days before 1970-01-21 00:00:00" in caplog.text
    assert "split temporal: test from 1970-02-01 00:00:00: 1 rows" in caplog.text
    ingest(DataConfig(path, validation=0.0, test=0.0, half_life=70.0), tmp_path / "out")
    assert edges_of(tmp_path / "out")[2, 10] == 0.5
    with pytest.raises(
        DataError, match=r"half_life=0.1 days leaves the oldest interactions a weight of .*; give a longer"
    ):
        ingest(DataConfig(path, half_life=0.1), tmp_path / "out")


@pytest.mark.parametrize(
    ("rows", "header", "settings", "message"),
    [
        ([(1, 2, 3)], "user_id,item_id,when", {}, "no column of times is recognised in user_id, item_id, when; name the"),
        ([(1, 2, 3, 4)], "user_id,item_id,time,date", {}, "columns time, date all look like times; name the column"),
        ([(1, 2, "31/12/2024")], HEADER, {}, "holds '31/12/2024', no time; write times as numbers"),
        ([(1, 2, 20241231), (1, 3, 20250101)], HEADER, {}, "holds 20241231, a date in digits; write times as numbers since"),
        ([(1, 2, 3), (1, 3, "")], HEADER, {}, "row 3: column 'timestamp' is null"),
        ([(1, 2, 3), (1, 3, 4), (1, 3, "x")], HEADER, {}, "row 4: column 'timestamp' is not a time in s since 1970"),
        ([(1, 2, 3)], HEADER, {"test_from": "2020-01-01"}, "data.test_from=2020-01-01 is after the latest row, 1970"),
        ([(1, 2, 3), (2, 2, 3)], HEADER, {"test": 0.5}, "no row is before 1970-01-01 00:00:03"),
    ],
)  # fmt: skip
def test_what_cannot_be_split_by_time_is_an_error_with_the_remedy(rows, header, settings, message, tmp_path):
    path = csv_file(tmp_path / "log.csv", rows, header)
    with pytest.raises(DataError) as caught:
        ingest(DataConfig(path, split="temporal", **settings), tmp_path / "out")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data.split": "temporal", "data.test_from": "may"}, "data.test_from='may' is no time; write one such as"),
        ({"data.test_from": "2024-05-01"}, "data.test_from=2024-05-01 needs data.split=temporal"),
        ({"data.last_n": 2}, "data.last_n=2 needs data.split=leave-last-out"),
        ({"data.time_column": "t"}, "data.time_column=t is read with"),
        ({"data.split": "temporal", "data.validation_from": "2024-05-02", "data.test_from": "2024-05-01"}, "is after data"),
        ({"data.half_life": 3.0, "run.task": "ctr"}, "data.half_life=3.0 is not supported with run.task=ctr"),
    ],
)  # fmt: skip
def test_settings_of_time_that_contradict_are_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_flat(settings)
    assert message in str(caught.value)
