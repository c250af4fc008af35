"""Ingestion of a CTR data set: entries, statistics and parts as a row-by-row program makes them, and of the training rows alone."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graphhash.errors import DataError
from graphhash.graph.interactions import TEST, TRAIN, VALIDATION
from pipeline.config.run_config import DataConfig
from pipeline.ctr import counts as ctr_counts
from pipeline.ctr.counts import PARTS, IdCounts, Moments
from pipeline.ctr.data import Features
from pipeline.ctr.ingest import ingest_ctr, ingest_log
from pipeline.ctr.log import open_log
from pipeline.ctr.maps import find_pairs, pair_graph
from pipeline.ctr.passes import cut_shares, row_parts
from pipeline.logs import csv as log_csv
from pipeline.logs import tables as tables
from tests.helpers.ctr_log import SCHEMA, columns, write_csv, write_schema


def ingest(tmp_path, log, name="out", schema=SCHEMA, **settings):
    data = DataConfig(str(write_csv(tmp_path / "log.csv", log)), schema=write_schema(tmp_path, schema), **settings)
    (tmp_path / name).mkdir()
    return ingest_ctr(data, tmp_path / name), Features.open(tmp_path / name)


def parts_of(n, **settings):
    how = {"seed": 0, "validation": 0.1, "test": 0.1} | settings
    return row_parts(0, n, **how)


def test_entries_dense_labels_and_bags_are_those_of_a_loop_over_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(log_csv, "BLOCK_BYTES", 8192)
    monkeypatch.setattr(ctr_counts, "PENDING", 50)
    log = columns()
    facts, features = ingest(tmp_path, log, min_count=3)
    parts = parts_of(len(log["click"]))
    names = [c.name for c in features.columns]
    assert names == ["user", "item", "device"]
    assert [feature.name for feature in features.multi_valued] == ["genres"]

    trained = np.flatnonzero(parts == TRAIN)
    price = np.array([np.nan if p is None else p for p in log["price"]])
    mean, std = np.nanmean(price[trained]), np.nanstd(price[trained])
    (dense,) = features.dense
    assert (dense.mean, dense.std) == pytest.approx((mean, std), rel=1e-12)
    split = {name: [v.split("|") if v else [] for v in log["genres"]] for name in ("genres",)}
    entries = {}
    for column in features.all_columns:
        values = split["genres"] if column.name == "genres" else [[v] for v in log[column.name]]
        counts = Counter(v for row in trained for v in values[row])
        known = sorted(v for v, n in counts.items() if v is not None and n >= 3)
        known += [None] if counts[None] >= 3 else []
        assert column.n_ids == len(known)
        assert column.has_missing == (None in known)
        assert features.counts(column).tolist() == [
            *(counts[v] for v in known),
            sum(n for v, n in counts.items() if v not in known),
        ]
        entries[column.name] = {v: i for i, v in enumerate(known)} | {"unknown": len(known)}
        assert features.vocabulary(column).ids.to_pylist() == [v for v in known if v is not None]

    def entry(name, value):
        return entries[name].get(value, entries[name]["unknown"])

    for name, number in PARTS.items():
        part, rows = features.part(name), np.flatnonzero(parts == number)
        assert facts[f"n_{name}"] == len(rows) == len(part) > 200
        assert part.labels.tolist() == [log["click"][r] for r in rows]
        assert part.categorical.tolist() == [[entry(c, log[c][r]) for c in names] for r in rows]
        expected = np.nan_to_num((price[rows] - mean) / std)
        assert part.dense[:, 0] == pytest.approx(expected, abs=1e-5)
        assert [[v for v in row if v >= 0] for row in part.multi_valued[0].tolist()] == [
            [entry("genres", v) for v in split["genres"][r]] for r in rows
        ]
        assert facts["positive_rate"][name] == pytest.approx(np.mean(part.labels))
        if number != TRAIN:
            users = [log["user"][r] for r in rows]
            same = {
                (a == b) == (u == v)
                for a, u in zip(part.groups, users, strict=True)
                for b, v in zip(part.groups, users, strict=True)
            }
            assert same == {True}


def contents(folder, but=()):
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.relative_to(folder).parts[0] not in but
    }


def test_nothing_of_validation_and_test_leaks_into_what_is_learned(tmp_path):
    """Held-out rows say something else altogether, and vocabularies, statistics, graphs and training rows stay the same bytes."""
    log = columns()
    _facts, features = ingest(tmp_path, log)
    held_out = np.flatnonzero(parts_of(len(log["click"])) != TRAIN)
    other = {name: list(values) for name, values in log.items()}
    for row in held_out:
        other["click"][row] = 1 - log["click"][row]
        other["user"][row], other["item"][row], other["device"][row] = f"new{row}", 900000 + int(row), "elsewhere"
        other["price"][row], other["genres"][row] = 1e6 + row, "a|b|c|d|e|f|g"
    _facts, changed = ingest(tmp_path, other, "changed")
    before, after = contents(tmp_path / "out"), contents(tmp_path / "changed")
    differing = {name for name in before if before[name] != after[name]}
    assert differing
    assert {name.split("/")[0] for name in differing} == {"validation", "test"}
    pair = find_pairs(features)[0]
    graphs = [pair_graph(f, f.part("train"), pair) for f in (features, changed)]
    assert (graphs[0] != graphs[1]).nnz == 0
    # The same change in the rows of train is seen in all of them, so the comparison above can fail.
    trained = np.flatnonzero(parts_of(len(log["click"])) == TRAIN)[:50]
    for row in trained:
        log["user"][row], log["price"][row], log["genres"][row] = "leak", 1e6, "leak"
    ingest(tmp_path, log, "trained")
    leaked = contents(tmp_path / "trained")
    assert {"schema.json", "vocabularies/00.parquet", "counts/03.npy", "train/dense.npy"} <= {
        n for n in before if before[n] != leaked.get(n)
    }


def test_the_graph_holds_the_positive_pairs_of_train_and_no_other_row(tmp_path):
    log = columns()
    _facts, features = ingest(tmp_path, log)
    parts = parts_of(len(log["click"]))
    (pair,) = find_pairs(features)
    graph = pair_graph(features, features.part("train"), pair)
    users, items = (features.vocabulary(features.columns[n]).ids.to_pylist() for n in pair.columns)
    expected = {
        (u, i)
        for u, i, y, part in zip(log["user"], log["item"], log["click"], parts, strict=True)
        if y and part == TRAIN
    }
    coo = graph.tocoo()
    # However often they occur.
    assert {(users[u], items[i]): w for u, i, w in zip(coo.row, coo.col, coo.data, strict=True)} == dict.fromkeys(
        expected, 1.0
    )


def test_parts_follow_their_shares_and_depend_on_seed_and_row_alone():
    parts = parts_of(100_000, validation=0.2, test=0.1)
    assert [np.mean(parts == p) for p in (TRAIN, VALIDATION, TEST)] == pytest.approx([0.7, 0.2, 0.1], abs=0.01)
    tail = row_parts(60_000, 40_000, seed=0, validation=0.2, test=0.1)
    assert np.array_equal(parts[60_000:], tail)
    assert not np.array_equal(parts, row_parts(0, 100_000, seed=1, validation=0.2, test=0.1))


def test_given_test_rows_come_from_their_file(tmp_path):
    log = columns(1000)
    for name, rows in (("train", slice(0, 800)), ("test", slice(800, 1000))):
        write_csv(tmp_path / "log" / f"{name}.csv", {key: values[rows] for key, values in log.items()})
    (tmp_path / "out").mkdir()
    facts = ingest_ctr(
        DataConfig(str(tmp_path / "log"), schema=write_schema(tmp_path), split="given"), tmp_path / "out"
    )
    assert facts["n_test"] == 200
    assert facts["n_train"] + facts["n_validation"] == 800
    assert Features.open(tmp_path / "out").part("test").labels.tolist() == log["click"][800:]


def test_the_same_log_in_other_batches_and_files_gives_the_same_bytes(tmp_path, monkeypatch):
    log = columns(1500)
    ingest(tmp_path, log)
    monkeypatch.setattr(log_csv, "BLOCK_BYTES", 3000)
    for name, rows in (("a", slice(0, 700)), ("b", slice(700, 1500))):
        write_csv(tmp_path / "log" / f"{name}.csv", {key: values[rows] for key, values in log.items()})
    (tmp_path / "again").mkdir()
    ingest_ctr(DataConfig(str(tmp_path / "log"), schema=write_schema(tmp_path)), tmp_path / "again")
    before, after = contents(tmp_path / "out"), contents(tmp_path / "again")
    # Sums of numbers round differently in other batches.
    numbers = {"schema.json", "train/dense.npy", "validation/dense.npy", "test/dense.npy"}
    assert {name: h for name, h in before.items() if name not in numbers} == {
        n: h for n, h in after.items() if n not in numbers
    }
    one, two = (np.load(tmp_path / name / "train" / "dense.npy") for name in ("out", "again"))
    assert one == pytest.approx(two, abs=1e-6)


def test_columns_that_say_nothing_are_dropped_and_named(tmp_path):
    log = columns(800)
    n = len(log["click"])
    log |= {
        "constant": [3.5] * n,
        "empty": [None] * n,
        "same": ["x"] * n,
        "nothing": [None] * n,
        "rare": [f"r{i}" for i in range(n)],
    }
    schema = SCHEMA.replace('["price"]', '["price", "constant", "empty"]')
    schema = schema.replace('"device"]', '"device", "same", "nothing", "rare"]\n[columns.rare]\nmin_count = 2')
    facts, features = ingest(tmp_path, log, schema=schema)
    assert facts["dropped"] == {
        "same": "it has one value in all of train", "nothing": "it has one value in all of train",
        "rare": "no id of train is frequent enough", "constant": "it is 3.5 in all of train", "empty": "it has no number in train",
    }  # fmt: skip
    assert [c.name for c in features.columns] == ["user", "item", "device"]
    assert [d.name for d in features.dense] == ["price"]
    assert features.part("train").dense.shape[1] == 1


def test_ids_that_only_the_test_has_are_unknown(tmp_path):
    log = columns(1000)
    for row in np.flatnonzero(parts_of(1000) == TEST):
        log["user"][row] = "stranger"
    facts, features = ingest(tmp_path, log)
    assert (features.part("test").categorical[:, 0] == features.columns[0].n_ids).all()
    assert facts["oov_rate"]["user"] == 1.0
    assert features.counts(features.columns[0])[-1] == 0


def test_values_beyond_the_longest_multi_valued_of_train_are_cut_and_counted(tmp_path):
    log = columns(1000)
    row = int(np.flatnonzero(parts_of(1000) == TEST)[0])
    log["genres"][row] = "war|drama|comedy|war|war"
    facts, features = ingest(tmp_path, log)
    assert features.multi_valued[0].width == 3
    assert facts["n_cut"] == 2


def no_positive_test(log, parts):
    log["click"] = [0 if part == TEST else click for click, part in zip(log["click"], parts, strict=True)]


def positives_alone(log, parts):
    log["click"] = [1] * len(parts)


def first_is(name, value):
    """The first row's value, as a text file has it."""

    def change(log, parts):
        log[name] = [None if v is None else str(v) for v in log[name]]
        log[name][0] = value

    return change


def far_test_row(log, parts):
    row = int(np.flatnonzero(parts == TEST)[0])
    log["price"] = ["1e60" if i == row else None if v is None else str(v) for i, v in enumerate(log["price"])]


def last_item_is_text(log, parts):
    log["item"] = [*map(str, log["item"][:-1]), "x"]


def long_lists(log, parts):
    log["genres"] = ["|".join(["war"] * 300)] * len(parts)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (no_positive_test, "test has no positive labels in"),
        (positives_alone, "train has positive labels alone in"),
        (first_is("click", "2"), "row 2: label 'click' is 2"),
        (first_is("click", None), "row 2: label 'click' is missing"),
        (far_test_row, "too far from the rest"),
        (last_item_is_text, "row 601: column 'item' is 'x'"),
        (long_lists, "'genres' has a row of 300 values"),
        (lambda log, parts: log.pop("user"), "no column 'user'"),
    ],
)
def test_bad_logs_are_one_line_with_the_remedy(tmp_path, change, words):
    log = columns(600)
    change(log, parts_of(600))
    with pytest.raises(DataError) as error:
        ingest(tmp_path, log)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_no_rows_left_for_a_part_is_an_error_unless_none_were_asked_for(tmp_path):
    log = {name: values[:12] for name, values in columns(12).items()}
    log["click"] = [0, 1] * 6
    with pytest.raises(DataError, match=r"has no rows of 12|needs labels 0 and 1"):
        ingest(tmp_path, log, validation=0.01, test=0.01)
    facts, features = ingest(tmp_path, log, "all", validation=0.0, test=0.0)
    assert facts["n_train"] == 12
    assert len(features.part("test")) == 0
    assert facts["positive_rate"]["test"] is None


def test_damaged_output_is_named(tmp_path):
    _facts, features = ingest(tmp_path, columns(600))
    (tmp_path / "out" / "train" / "labels.npy").write_bytes(b"no")
    with pytest.raises(DataError, match=r"labels.npy: cannot be read"):
        features.part("train")
    (tmp_path / "out" / "schema.json").write_text(json.dumps({"columns": []}))
    with pytest.raises(DataError, match="not a readable schema"):
        Features.open(tmp_path / "out")


def test_counts_and_moments_do_not_depend_on_batches(monkeypatch):
    monkeypatch.setattr(ctr_counts, "PENDING", 10)
    rng = np.random.default_rng(0)
    ids, numbers = rng.integers(50, size=2000), rng.normal(1e6, 1e-2, 2000)
    counts, moments = IdCounts("int64"), Moments()
    for start in range(0, 2000, 70):
        counts.add(pa.array(ids[start : start + 70]))
        moments.add(numbers[start : start + 70])
    values, n = counts.counted()
    expected = np.unique(ids, return_counts=True)
    assert values.to_pylist() == expected[0].tolist()
    assert n.tolist() == expected[1].tolist()
    assert (moments.mean, moments.std) == pytest.approx((numbers.mean(), numbers.std()), rel=1e-6)


@pytest.mark.parametrize("kind", ["dictionary", "list"])
def test_parquet_columns_of_their_own_types_are_read(tmp_path, kind):
    log = columns(600)
    table = pa.table(log)
    if kind == "dictionary":
        table = table.set_column(1, "user", table["user"].dictionary_encode())
    else:
        lists = [v.split("|") if v else None for v in log["genres"]]
        table = table.set_column(5, "genres", pa.array(lists))
    ingest(tmp_path, log)
    pq.write_table(table, tmp_path / "log.parquet")
    (tmp_path / "again").mkdir()
    ingest_ctr(DataConfig(str(tmp_path / "log.parquet"), schema=write_schema(tmp_path)), tmp_path / "again")
    one, two = (Features.open(tmp_path / name).part("train") for name in ("out", "again"))
    assert np.array_equal(one.categorical, two.categorical)
    assert np.array_equal(one.multi_valued[0], two.multi_valued[0])


@pytest.mark.parametrize("split", ["random", "temporal"])
def test_shares_of_the_files_write_the_same_bytes(tmp_path, split):
    log = {**columns(), "at": list(range(len(columns()["click"])))}
    files = tmp_path / "log"
    files.mkdir()
    for number, rows in enumerate((slice(0, 900), slice(900, 1900), slice(1900, 1910), slice(1910, None))):
        write_csv(files / f"{number}.csv", {name: values[rows] for name, values in log.items()})
    how = {"time_column": "at"} if split == "temporal" else {}
    data = DataConfig(str(files), schema=write_schema(tmp_path, SCHEMA), split=split, min_count=2, **how)
    folders, facts = [tmp_path / "1", tmp_path / "3"], []
    for n_shares, folder in zip((1, 3), folders, strict=True):
        folder.mkdir()
        facts.append(ingest_log(open_log(data), data, folder, n_shares=n_shares) | {"seconds": 0})
    assert len(cut_shares(open_log(data), data, None, 3)) == 3
    assert facts[0] == facts[1]
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) for folder in folders]
    assert names[0] == names[1]
    for name in names[0]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
