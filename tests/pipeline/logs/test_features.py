"""The method `lsh`: features of files against a naive reading, errors in one line, and a small run."""

from __future__ import annotations

import csv
import json
import statistics

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import graphhash
from graphhash.graph.vocabulary import Vocabulary
from pipeline.config.run_config import RunConfig
from pipeline.errors import ConfigError
from pipeline.logs.features import feature_files, load_features, read_features
from pipeline.maps.methods import METHODS, Inputs
from pipeline.runs.plan import plan
from pipeline.runs.run import run
from tests.helpers import graphs

IDS = [3, 7, 8, 20, 31]
TEXT = "age,item_id,height\n20,7,1.5\n30,31,1e0\n25,99,7\n40,3,-2\n"


def naive(path, vocabulary):
    """One id and one column at a time; csv alone."""
    rows = {int(row["item_id"]): row for row in csv.DictReader(path.open())}
    names = [name for name in next(iter(rows.values())) if name != "item_id"]
    features = [[0.0] * len(names) for _ in vocabulary]
    for j, name in enumerate(names):
        values = [float(rows[i][name]) for i in vocabulary if i in rows]
        mean, deviation = statistics.fmean(values), statistics.pstdev(values)
        for place, i in enumerate(vocabulary):
            if i in rows:
                features[place][j] = (float(rows[i][name]) - mean) / deviation
    return features


def written(folder, name="items.csv", text=TEXT):
    (folder / name).write_text(text)
    return folder / name


def as_table(path):
    """The same content as the csv file, in another format."""
    rows = list(csv.DictReader(written(path.parent, "x.csv").open()))
    columns = {name: [float(row[name]) for row in rows] for name in ("age", "height")}
    pq.write_table(pa.table({**columns, "item_id": [int(row["item_id"]) for row in rows]}), path)


def test_features_are_those_of_a_naive_reading(tmp_path):
    found = read_features(written(tmp_path), "item_id", Vocabulary(IDS))
    expected = naive(tmp_path / "items.csv", IDS)
    assert found.dtype == np.float32
    assert_allclose(found, expected, atol=1e-6)
    # Ids 8 and 20 have no row, and id 99 is not in the log.
    assert_array_equal(np.flatnonzero((found == 0).all(axis=1)), [2, 3])


def test_tsv_and_parquet_and_text_ids_say_the_same(tmp_path):
    expected = read_features(written(tmp_path), "item_id", Vocabulary(IDS))
    tsv = written(tmp_path, "items.tsv", TEXT.replace(",", "\t"))
    assert_array_equal(read_features(tsv, "item_id", Vocabulary(IDS)), expected)
    as_table(tmp_path / "items.parquet")
    assert_array_equal(read_features(tmp_path / "items.parquet", "item_id", Vocabulary(IDS)), expected)
    for file in (tsv, tmp_path / "items.parquet"):
        assert_array_equal(read_features(file, "item_id", Vocabulary([str(i) for i in IDS])), expected)


def test_units_change_nothing_and_a_column_of_one_value_says_nothing(tmp_path):
    lines = ["item_id,a,b,c", "3,1,1e300,0.1", "7,2,2e300,0.1", "8,4,4e300,0.1"]
    found = read_features(written(tmp_path, text="\n".join(lines) + "\n"), "item_id", Vocabulary(IDS))
    assert_allclose(found[:, 0], found[:, 1], rtol=1e-6)
    assert (found[:, 2] == 0).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "items.csv: the file is empty; write a column of ids"),
        ("item_id,age\n", "items.csv: no rows; write the features of some ids"),
        ("id,age\n7,1\n", "items.csv: no column 'item_id' for the ids, columns are id, age; rename one"),
        ("item_id\n7\n", "items.csv: no column of features beside 'item_id'; add one of numbers"),
        ("item_id,a,a\n7,1,2\n", "items.csv: two columns are named 'a'; rename one"),
        ("item_id,a\n7,1\n8,red\n", "row 3: column 'a' is 'red'; features are finite numbers; fill or"),
        ("item_id,a\n7,1\n8,\n", "row 3: column 'a' is empty; features are finite numbers"),
        ("item_id,a\n7,nan\n8,1\n", "row 2: column 'a' is 'nan'; features are finite numbers"),
        ("item_id,a\n7,1\n8,1e999\n", "row 3: column 'a' is '1e999'; features are finite numbers"),
        ("item_id,a\n7,1\n,1\n", "row 3: column 'item_id' is empty; drop the row, or write its id"),
        ("item_id,a\n7,1\nx,1\n", "row 3: column 'item_id' is 'x'; the log's ids are whole numbers"),
        (
            "item_id,a\n7,1\n9999999999999999999,1\n",
            "column 'item_id' is '9999999999999999999'; the log's ids are whole",
        ),
        ("item_id,a\n7,1\n8,1\n7,2\n", "items.csv: id 7 has more than one row; keep one"),
        ("item_id,a\n70,1\n80,2\n", r"none of its 2 ids \(column 'item_id', first 70\) is in the log"),
        ("item_id,a\n7,1,2\n", "items.csv: row 2: 3 fields, the header has 2"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path, text, message):
    with pytest.raises(graphhash.DataError, match=message) as error:
        read_features(written(tmp_path, text=text), "item_id", Vocabulary(IDS))
    assert "\n" not in str(error.value)


def test_parquet_rows_count_from_one_and_text_columns_are_refused(tmp_path):
    file = tmp_path / "items.parquet"
    pq.write_table(pa.table({"item_id": [7, 8], "a": [1.0, None]}), file)
    with pytest.raises(graphhash.DataError, match="row 2: column 'a' is empty"):
        read_features(file, "item_id", Vocabulary(IDS))
    pq.write_table(pa.table({"item_id": [7, 8], "a": pa.array([1, 2], pa.date32())}), file)
    with pytest.raises(graphhash.DataError, match=r"column 'a' is date32\[day\]; features are"):
        read_features(file, "item_id", Vocabulary(IDS))
    file.write_bytes(b"PAR1 no more")
    with pytest.raises(graphhash.DataError, match=r"items\.parquet: no readable parquet"):
        read_features(file, "item_id", Vocabulary(IDS))


def test_a_side_without_a_file_is_refused_before_anything_runs(tmp_path):
    log = written(tmp_path, "log.csv", "user_id,item_id\n1,7\n")
    users = written(tmp_path, "users.csv", "user_id,a\n1,1\n")
    settings = {"data.path": str(log), "run.methods": ("lsh",), "data.user_features": str(users)}
    with pytest.raises(ConfigError, match=r"method lsh needs data\.item_features; .*--item-features"):
        plan(RunConfig.from_flat(settings), "train")
    with pytest.raises(graphhash.DataError, match=r"gone\.csv: no such file of features; check the path"):
        feature_files(RunConfig.from_flat(settings | {"data.item_features": str(tmp_path / "gone.csv")}).data)
    graph = graphs.random_graph(0)
    with pytest.raises(ValueError, match="it needs features of users and items"):
        METHODS["lsh"].make(Inputs(graph, graphhash.cluster(graph, resolution=2), 1, "1", 0))


def test_only_lsh_is_trained_again_when_features_change(tmp_path):
    log = written(tmp_path, "log.csv", "user_id,item_id\n1,7\n")
    users, items = written(tmp_path, "users.csv", "user_id,a\n1,1\n"), written(tmp_path)

    def keys(**more):
        settings = {"data.path": str(log), "run.methods": ("lsh", "graph")}
        settings |= {"data.user_features": str(users), "data.item_features": str(items)}
        steps = plan(RunConfig.from_flat(settings | more), "evaluate")
        return {name: step.key for name, step in steps.items()}

    before = keys()
    items.write_text(TEXT + "8,1,1\n")
    after = keys()
    assert {name for name in before if before[name] != after[name]} == {"train lsh", "refit lsh", "evaluate lsh"}
    swapped = keys(**{"data.user_features": str(items), "data.item_features": str(users)})
    assert {name for name in after if after[name] != swapped[name]} == {"train lsh", "refit lsh", "evaluate lsh"}


def test_a_run_hashes_alike_ids_into_one_row_and_trains(tmp_path):
    graph, blocks, _ = graphs.planted(0, 4, 20, 0.5, 0.02)
    users, items = graph.nonzero()
    pairs = "".join(f"u{user},{item}\n" for user, item in zip(users, items, strict=True))
    log = written(tmp_path, "log.csv", "user_id,item_id\n" + pairs)
    # A column for each block.
    ones = [",".join(str(int(block == b)) for b in range(4)) for block in blocks]
    lines = [f"{i},{line}\n" for i, line in enumerate(ones)]
    user_file = written(tmp_path, "users.csv", "user_id,a,b,c,d\n" + "".join(f"u{line}" for line in lines))
    item_file = written(tmp_path, "items.csv", "item_id,a,b,c,d\n" + "".join(lines[:-1]))
    config = RunConfig.from_flat(
        {
            "data.path": str(log),
            "data.user_features": str(user_file),
            "data.item_features": str(item_file),
            "data.shards": 2,
            "cluster.rows": 40,
            "train.dim": 8,
            "train.epochs": 4,
            "run.methods": ("lsh",),
            "run.out": str(tmp_path / "out"),
            "run.mlflow": False,
        }
    )
    metrics = run(config, until="evaluate").metrics
    assert metrics[0]["method"] == "lsh"
    assert metrics[0]["rows"] == 40
    out = tmp_path / "out"
    facts = json.loads((out / "cluster" / "cluster.json").read_text())
    features = load_features(config.data, out / "ingest")
    for seed, (side, matrix) in enumerate(zip(("users", "items"), features, strict=True)):
        bucket_map = graphhash.BucketMap.load(out / "methods" / "lsh" / f"{side}.npz")
        n_rows = facts[f"{side[:-1]}_rows"] + 1
        assert_array_equal(bucket_map.rows, graphhash.lsh_map(matrix, n_rows, seed=seed).rows)
        ids = Vocabulary.load(out / "ingest" / f"{side}.parquet").ids.to_pylist()
        block_of = [blocks[int(str(i).lstrip("u"))] for i in ids]
        for block in range(4):
            # Item 79 has no features.
            rows = [
                row
                for row, b, raw in zip(bucket_map.rows[:-1, 0], block_of, ids, strict=True)
                if b == block and raw != 79
            ]
            assert len(set(rows)) == 1
