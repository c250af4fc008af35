"""Reading click logs: every format gives the same rows, named data sets follow their protocols, and bad files are named."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graphhash.errors import DataError
from pipeline.config.run_config import DataConfig
from pipeline.ctr.columns import bag_of, dense_of, ids_of, labels_of
from pipeline.ctr.datasets import find_name, named_files, read_named, unobserved
from pipeline.ctr.log import open_log
from pipeline.ctr.schema import Category
from pipeline.logs import tables as ctr_readers
from pipeline.logs.tables import find_files, read_rows
from tests.helpers.clicks import columns, write_csv


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
    monkeypatch.setattr(ctr_readers, "CSV_BLOCK_BYTES", 4096)
    monkeypatch.setattr(ctr_readers, "BATCH_ROWS", 64)
    for name in ("a.csv", "a.tsv", "a.parquet"):
        parts = rows_of(tmp_path / name)
        assert len(parts) > 1, name
        # Numbers of rows go on from batch to batch.
        assert [p.first for p in parts] == list(parts[0].first + np.cumsum([0, *map(len, parts)])[:-1])
        assert as_lists(tmp_path / name, list(log)) == expected, name


def test_libfm_of_fixed_width_has_a_column_per_place(tmp_path, monkeypatch):
    monkeypatch.setattr(ctr_readers, "TEXT_BLOCK_BYTES", 30)
    (tmp_path / "log.libfm").write_text("1 10:1 21:1 30:0.5\n-1 11:1 20:1 30:2\n-1 10:1 20:1 30:1\n1 12:1 20:1 30:3")
    assert as_lists(tmp_path / "log.libfm", ["label", "f0", "f1", "f2"]) == {
        "label": ["1.0", "0.0", "0.0", "1.0"], "f0": ["10", "11", "10", "12"], "f1": ["21", "20", "20", "20"],
        "f2": ["0.5", "2.0", "1.0", "3.0"],
    }  # fmt: skip
    log = open_log(DataConfig(str(tmp_path / "log.libfm")))
    assert [c.name for c in log.schema.categories] == ["f0", "f1"] and log.schema.dense == ("f2",)


def test_libfm_of_changing_width_is_one_multi_valued_column(tmp_path):
    (tmp_path / "log.svm").write_text("1 3:1 5:1\n0\n0 4:1\n")
    (rows,) = rows_of(tmp_path / "log.svm")
    assert rows.columns["features"].to_pylist() == [[3, 5], [], [4]]
    assert open_log(DataConfig(str(tmp_path / "log.svm"))).schema.bags[0].name == "features"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "file is empty"),
        ("1 3:1\n\n0 4:1\n", "row 2 is empty"),
        ("1 3:1 x\n", "'x' is no index:value"),
        ("1 3:1 4:1\n0 3:1 a:1\n", "write lines as"),
        ("yes 3:1\n", "write lines as"),
    ],
)
def test_a_bad_libfm_file_is_named_with_its_line(tmp_path, text, words):
    (tmp_path / "log.libfm").write_text(text)
    with pytest.raises(DataError, match=words) as error:
        rows_of(tmp_path / "log.libfm")
    assert "\n" not in str(error.value)


def test_a_later_libfm_line_of_another_shape_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ctr_readers, "TEXT_BLOCK_BYTES", 8)
    file = ctr_readers.LogFile(str(tmp_path / "log.libfm"), "libfm", layout=("index", "index"))
    (tmp_path / "log.libfm").write_text("1 3:1 4:1\n0 3:1\n")
    with pytest.raises(DataError, match=r"row 2 has 1 features, the first rows have 2"):
        list(read_rows(file))
    (tmp_path / "log.libfm").write_text("1 3:1 4:1\n0 3:1 4:7\n")
    with pytest.raises(DataError, match=r"row 2 has a value that is not 1"):
        list(read_rows(file))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "file is empty"),
        ("click,user\n", "holds no rows"),
        ("click,user\n1,a\n0\n", "Expected 2 columns, got 1"),
        ("click,usr\n1,a\n", r"no column 'user'; did you mean 'usr'\? the columns are click, usr"),
        ("click,user,user\n1,a,b\n", "2 columns are named 'user'"),
    ],
)
def test_a_bad_csv_is_one_line_with_the_file(tmp_path, text, words):
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(DataError, match=words) as error:
        rows_of(tmp_path / "log.csv", ["click", "user"])
    assert "log.csv" in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_parquet_is_named(tmp_path):
    (tmp_path / "log.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"log.parquet: truncated, or not a parquet file"):
        rows_of(tmp_path / "log.parquet")


def test_a_format_without_clicks_is_refused(tmp_path):
    (tmp_path / "train.txt").write_text("1 2 3\n")
    with pytest.raises(DataError, match="lightgcn holds no clicks"):
        find_files(str(tmp_path), "auto", "random")


# ---- columns


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
        labels_of(rows, schema)


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


def test_bags_are_texts_with_separators_or_lists(tmp_path):
    lists = [["a", "b"], [], None, ["b", None]]
    pq.write_table(pa.table({"tags": lists, "text": ["a|b", "", None, "b|"]}), tmp_path / "log.parquet")
    (rows,) = rows_of(tmp_path / "log.parquet")
    for name in ("tags", "text"):
        counts, values = bag_of(rows, name, "|", "string")
        assert counts.tolist() == [2, 0, 0, 1] and values.to_pylist() == ["a", "b", "b"]


def test_a_schema_is_guessed_from_types(tmp_path):
    log = columns(1200) | {"row": list(range(1200)), "tags": [["x"]] * 1200}
    pq.write_table(pa.table(log), tmp_path / "log.parquet")
    log = open_log(DataConfig(str(tmp_path / "log.parquet"), user_column="user", item_column="item"))
    schema = log.schema
    assert (schema.label, schema.group, schema.dense) == ("click", "user", ("price",))
    assert {c.name: (c.kind, c.partner) for c in schema.categories} == {
        "user": ("string", "item"), "item": ("int64", "user"), "device": ("string", None), "genres": ("string", None),
    }  # fmt: skip
    assert [bag.name for bag in schema.bags] == ["tags"] and log.left_out == {"row": "it differs in every row"}


def test_a_guess_needs_a_label_and_the_columns_that_were_named(tmp_path):
    write_csv(tmp_path / "log.csv", {"a": [1, 0], "b": [1, 2]})
    with pytest.raises(DataError, match="name it with label_column"):
        open_log(DataConfig(str(tmp_path / "log.csv")))
    with pytest.raises(DataError, match="no column 'c' for the label"):
        open_log(DataConfig(str(tmp_path / "log.csv"), label_column="c"))
    with pytest.raises(DataError, match="no column 'uid'; the columns are a, b"):
        open_log(DataConfig(str(tmp_path / "log.csv"), label_column="a", user_column="uid"))


# ---- named data sets


def test_negatives_are_unobserved_different_and_repeatable():
    rng = np.random.default_rng(0)
    users, items = rng.integers(20, size=300), rng.integers(30, size=300)
    drawn = unobserved(users, items, 30, 2, 5)
    seen = set(zip(users.tolist(), items.tolist(), strict=True))
    assert not any((u, i) in seen for u, pair in zip(users.tolist(), drawn.tolist(), strict=True) for i in pair)
    assert (drawn[:, 0] != drawn[:, 1]).all()
    assert np.array_equal(drawn, unobserved(users, items, 30, 2, 5)) and not np.array_equal(
        drawn, unobserved(users, items, 30, 2, 6)
    )
    with pytest.raises(DataError, match="used 2 of 3 items"):
        unobserved(np.array([0, 0]), np.array([0, 1]), 3, 2, 0)


def write_frappe(folder):
    lines = ["user\titem\tcnt\tdaytime\tweekday\tisweekend\thomework\tcost\tweather\tcountry\tcity"]
    lines += [
        f"{u}\t{(u * 3 + k) % 11}\t1\tmorning\tsunday\tweekend\thome\tfree\tsunny\tSpain\t{u}"
        for u in range(6)
        for k in range(3)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "frappe.csv").write_text("\n".join(lines) + "\n")


def test_frappe_has_two_negatives_of_the_same_context_behind_each_positive(tmp_path):
    write_frappe(tmp_path)
    assert find_name(str(tmp_path), "auto") == "frappe"
    (file,) = named_files("frappe", str(tmp_path), "random")
    (rows,) = read_named(file, 0)
    got = {name: values.to_pylist() for name, values in rows.columns.items()}
    assert got["label"] == [1, 0, 0] * 18
    assert got["user"] == [str(u) for u in range(6) for _ in range(9)] and got["city"] == got["user"]
    used = {(u, i) for u, i, label in zip(got["user"], got["item"], got["label"], strict=True) if label}
    assert not any(
        (u, i) in used for u, i, label in zip(got["user"], got["item"], got["label"], strict=True) if not label
    )


def test_movielens_joins_users_and_movies(tmp_path):
    (tmp_path / "ratings.dat").write_text("1::10::5::99\n2::11::3::98\n1::11::4::97\n")
    (tmp_path / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072-12\n")
    (tmp_path / "movies.dat").write_bytes("10::Amélie (2001)::Comedy|Romance\n11::Nothing::Drama\n".encode("latin-1"))
    (file,) = named_files("movielens-1m", str(tmp_path), "random")
    (rows,) = read_named(file, 0)
    got = {name: values.to_pylist() for name, values in rows.columns.items()}
    assert (
        got["gender"] == ["F", "M", "F"]
        and got["zip_prefix"] == ["480", "700", "480"]
        and got["year"] == ["2001", None, None]
    )
    schema = open_log(DataConfig(str(tmp_path))).schema
    assert labels_of(rows, schema).tolist() == [1, 0, 1]
    counts, values = bag_of(rows, "genres", "|", "string")
    assert counts.tolist() == [2, 1, 1] and values.to_pylist() == ["Comedy", "Romance", "Drama", "Drama"]
    (tmp_path / "users.dat").unlink()
    with pytest.raises(DataError, match=r"no users.dat, which movielens-1m needs"):
        named_files("movielens-1m", str(tmp_path), "random")


def test_avazu_takes_hour_and_weekday_from_the_time_and_the_header_of_train(tmp_path):
    names = "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,device_id,device_ip,"
    names += "device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21"
    row = "1,1,14102113,1005,0,s,sd,sc,a,ad,ac,d,ip,m,1,0,15706,320,50,1722,0,35,-1,79"
    (tmp_path / "train").write_text(f"{names}\n{row}\n")
    (tmp_path / "test").write_text(row.replace("14102113", "14102600") + "\n")
    log = open_log(DataConfig(str(tmp_path), split="given"))
    train, test = log.rows(0)
    assert [file.is_test for file in log.files] == [False, True]
    # 21 October 2014 was a Tuesday, the 26th a Sunday.
    assert [rows.columns["hour_hour"][0].as_py() for rows in (train, test)] == [13, 0]
    assert [rows.columns["hour_weekday"][0].as_py() for rows in (train, test)] == [1, 6]
    (tmp_path / "train").write_text(f"{names}\n{row.replace('14102113', 'noon')}\n")
    with pytest.raises(DataError, match=r"row 2: column 'hour' is 'noon', no time like"):
        list(open_log(DataConfig(str(tmp_path))).rows(0))
