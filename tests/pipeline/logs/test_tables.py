"""Tables of labelled samples: every format gives the same rows, and bad files are named."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graphhash.errors import DataError
from pipeline.logs import csv as log_csv
from pipeline.logs import tables
from pipeline.logs.tables import find_files, read_rows
from tests.helpers.ctr_log import columns, write_csv


def rows_of(path, names=None, split="random"):
    return [rows for file in find_files(str(path), "auto", split) for rows in read_rows(file, names)]


def as_lists(path, names):
    parts = rows_of(path, names)
    return {
        name: [None if v in (None, "") else str(v) for part in parts for v in part.columns[name].to_pylist()]
        for name in names
    }


def test_csv_tsv_and_parquet_hold_the_same_rows(tmp_path, monkeypatch):
    log = columns(500)
    expected = {name: [None if v is None else str(v) for v in values] for name, values in log.items()}
    write_csv(tmp_path / "a.csv", log)
    pq.write_table(pa.table(log), tmp_path / "a.parquet", row_group_size=70)
    lines = [
        "\t".join(log),
        *("\t".join("" if v is None else str(v) for v in row) for row in zip(*log.values(), strict=True)),
    ]
    (tmp_path / "a.tsv").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(log_csv, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(tables, "BATCH_ROWS", 64)
    for name in ("a.csv", "a.tsv", "a.parquet"):
        parts = rows_of(tmp_path / name)
        assert len(parts) > 1, name
        # Numbers of rows go on from batch to batch.
        assert [p.first for p in parts] == list(parts[0].first + np.cumsum([0, *map(len, parts)])[:-1])
        assert as_lists(tmp_path / name, list(log)) == expected, name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "file is empty"),
        ("click,user\n", "holds no rows"),
        ("click,user\n1,a\n0\n", "1 fields, the header has 2"),
        ("click,usr\n1,a\n", r"no column 'user'; did you mean 'usr'\? the columns are click, usr"),
        ("click,user,user\n1,a,b\n", "2 columns are named 'user'"),
    ],
)
def test_a_bad_csv_is_one_line_with_the_file(tmp_path, text, words):
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(DataError, match=words) as error:
        rows_of(tmp_path / "log.csv", ["click", "user"])
    assert "log.csv" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_parquet_is_named(tmp_path):
    (tmp_path / "log.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"log.parquet: truncated, or not a parquet file"):
        rows_of(tmp_path / "log.parquet")


def test_a_format_without_labels_is_refused(tmp_path):
    (tmp_path / "train.txt").write_text("1 2 3\n")
    with pytest.raises(DataError, match="lightgcn holds no labels"):
        find_files(str(tmp_path), "auto", "random")
