"""Columns of labelled samples, checked: labels, numbers, ids, multi-valued features, and a guessed schema."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graphhash.errors import DataError
from pipeline.config.run_config import DataConfig
from pipeline.ctr.columns import dense_of, ids_of, labels_of, multi_valued_of
from pipeline.ctr.log import open_log
from pipeline.ctr.schema import Category
from pipeline.logs.tables import find_files, read_rows
from tests.helpers.ctr_log import columns, write_csv


def rows_of(path, names=None, split="random"):
    return [rows for file in find_files(str(path), "auto", split) for rows in read_rows(file, names)]


def one_batch(tmp_path, name, values, **also):
    write_csv(tmp_path / "log.csv", {name: values, "other": ["x"] * len(values), **also})
    (rows,) = rows_of(tmp_path / "log.csv")
    return rows


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["1", None, "0"], r"row 3: label 'click' is missing"),
        (["1", "0", "2"], r"row 4: label 'click' is 2, labels are 0 and 1"),
        (["1", "yes"], r"row 3: column 'click' is 'yes', and no number"),
    ],
)
def test_labels_are_0_and_1_and_never_missing(tmp_path, values, words):
    (tmp_path / "schema.toml").write_text('label = "click"\ncategorical = ["other"]')
    rows = one_batch(tmp_path, "click", values)
    schema = open_log(DataConfig(str(tmp_path / "log.csv"), schema=str(tmp_path / "schema.toml"))).schema
    with pytest.raises(DataError, match=words):
        labels_of(rows, schema.label, schema.label_from)


def test_numbers_may_be_missing_but_neither_infinite_nor_words(tmp_path):
    rows = one_batch(tmp_path, "price", ["1.5", None, "nan", "-2e3"])
    assert dense_of(rows, "price") == pytest.approx([1.5, np.nan, np.nan, -2000], nan_ok=True)
    with pytest.raises(DataError, match=r"row 3: column 'price' is infinite"):
        dense_of(one_batch(tmp_path, "price", ["1", "inf"]), "price")
    with pytest.raises(DataError, match=r"row 3: column 'price' is 'cheap', and no number"):
        dense_of(one_batch(tmp_path, "price", ["1", "cheap"]), "price")


def test_ids_are_of_one_kind_and_the_empty_text_is_missing(tmp_path):
    whole = Category("id", kind="int64")
    assert ids_of(one_batch(tmp_path, "id", ["7", None, "-3"]), whole).to_pylist() == [7, None, -3]
    assert ids_of(one_batch(tmp_path, "id", ["07", "", "a"]), Category("id", kind="string")).to_pylist() == [
        "07",
        None,
        "a",
    ]
    with pytest.raises(
        DataError, match=r"row 3: column 'id' is 'x7', the first ids are whole numbers.*kind = \"string\""
    ):
        ids_of(one_batch(tmp_path, "id", ["7", "x7"]), whole)
    with pytest.raises(DataError, match=r"row 3: column 'id' is '99999999999999999999'"):
        ids_of(one_batch(tmp_path, "id", ["7", "99999999999999999999"]), whole)


def test_whole_numbers_beside_nulls_come_from_pandas_as_floats(tmp_path):
    pq.write_table(pa.table({"id": [1.0, float("nan"), 3.0], "half": [1.0, 2.5, 3.0]}), tmp_path / "log.parquet")
    (rows,) = rows_of(tmp_path / "log.parquet")
    assert ids_of(rows, Category("id", kind="int64")).to_pylist() == [1, None, 3]
    with pytest.raises(DataError, match=r"row 2: column 'half' is 2.5, ids are whole numbers"):
        ids_of(rows, Category("half", kind="int64"))


def test_multi_valued_features_are_texts_with_separators_or_lists(tmp_path):
    lists = [["a", "b"], [], None, ["b", None]]
    pq.write_table(pa.table({"tags": lists, "text": ["a|b", "", None, "b|"]}), tmp_path / "log.parquet")
    (rows,) = rows_of(tmp_path / "log.parquet")
    for name in ("tags", "text"):
        counts, values = multi_valued_of(rows, name, "|", "string")
        assert counts.tolist() == [2, 0, 0, 1]
        assert values.to_pylist() == ["a", "b", "b"]


def test_a_schema_is_guessed_from_types(tmp_path):
    log = columns(1200) | {"row": list(range(1200)), "tags": [["x"]] * 1200}
    pq.write_table(pa.table(log), tmp_path / "log.parquet")
    log = open_log(DataConfig(str(tmp_path / "log.parquet"), user_column="user", item_column="item"))
    schema = log.schema
    assert (schema.label, schema.group, schema.dense) == ("click", "user", ("price",))
    assert {c.name: (c.kind, c.partner) for c in schema.categories} == {
        "user": ("string", "item"), "item": ("int64", "user"), "device": ("string", None), "genres": ("string", None),
    }  # fmt: skip
    assert [feature.name for feature in schema.multi_valued] == ["tags"]
    assert log.left_out == {"row": "it differs in every row"}


def test_a_guess_needs_a_label_and_the_columns_that_were_named(tmp_path):
    write_csv(tmp_path / "log.csv", {"a": [1, 0], "b": [1, 2]})
    with pytest.raises(DataError, match="name it with label_column"):
        open_log(DataConfig(str(tmp_path / "log.csv")))
    with pytest.raises(DataError, match="no column 'c' for the label"):
        open_log(DataConfig(str(tmp_path / "log.csv"), label_column="c"))
    with pytest.raises(DataError, match="no column 'uid'; the columns are a, b"):
        open_log(DataConfig(str(tmp_path / "log.csv"), label_column="a", user_column="uid"))
