from __future__ import annotations

import csv
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphhash.errors import DataError
from pipeline.logs import csv as log_csv
from pipeline.logs.columns import Columns
from pipeline.logs.kinds import find_kinds
from pipeline.logs.readers import read_chunk
from pipeline.logs.sources import cut_chunks, find_sources

INTEGERS = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00\r"), max_size=8)
WORDS = st.text(st.characters(exclude_categories=["Cs", "Z", "C"]), min_size=1, max_size=8)
WEIGHTS = st.floats(2**-20, 2**20, width=32)


def read(path, *, format="auto", split="random", bad_rows="error", chunk_bytes=None, **names):
    """(rows, rejected) of a log: [(user, item, weight, row)] and [(file number, row, reason, raw)]."""
    sources = find_sources(str(path), format, split)
    chunks = cut_chunks(sources, chunk_bytes=chunk_bytes, chunk_rows=3)
    columns = Columns(**names)
    user_kind, item_kind = find_kinds(sources, columns)
    columns = Columns(**names, user_kind=user_kind, item_kind=item_kind)
    rows, rejected = [], []
    for chunk in chunks:
        for batch in read_chunk(chunk, columns, bad_rows=bad_rows, number_rows=True):
            weights = np.ones(len(batch.rows)) if batch.weights is None else batch.weights
            rows += zip(
                batch.users.to_pylist(),
                batch.items.to_pylist(),
                weights.tolist(),
                batch.rows.tolist(),
                strict=True,
            )
            rejected += [tuple(row.values()) for row in batch.rejected.to_pylist()]
    return rows, rejected


def ids(rows):
    return [row[:2] for row in rows]


def file(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# ---- what goes in comes out


@pytest.mark.parametrize("extension", ["csv", "tsv", "parquet"])
@given(st.data())
@settings(max_examples=40, deadline=None)
def test_tables_round_trip(extension, data):
    # In csv a column is what most of its values look like, so a string column gets a letter in front.
    user, item = (data.draw(st.sampled_from([INTEGERS, TEXT.map("x".__add__)])) for _ in range(2))
    log = data.draw(st.lists(st.tuples(user, item, WEIGHTS), min_size=1, max_size=20))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"log.{extension}"
        if extension == "parquet":
            users, items, weights = zip(*log, strict=True)
            table = pa.table({"w": weights, "item": items, "other": [None] * len(log), "user": users})
            pq.write_table(table, path, row_group_size=2)
        else:
            with path.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.writer(stream, delimiter="\t" if extension == "tsv" else ",")
                writer.writerow(["w", "item", "other", "user"])
                writer.writerows([weight, i, "", u] for u, i, weight in log)
        rows, rejected = read(path, user="user", item="item", weight="w")
    assert [row[:3] for row in rows] == log
    assert rejected == []
    first = 1 if extension == "parquet" else 2
    assert [row[3] for row in rows] == list(range(first, first + len(log)))


@given(
    st.sampled_from([INTEGERS, WORDS.map("x".__add__)]).flatmap(
        lambda word: st.lists(st.tuples(word, st.lists(word, max_size=5)), min_size=1, max_size=12)
    ),
    st.sampled_from(["\n", "\r\n"]),
    st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_lightgcn_text_round_trips_whatever_the_chunks(lines, newline, chunk_bytes):
    expected = [(user, item, 1.0, n) for n, (user, items) in enumerate(lines, 1) for item in items]
    text = newline.join(" ".join(map(str, [user, *items])) for user, items in lines)
    with tempfile.TemporaryDirectory() as folder:
        path = file(Path(folder), "train.txt", text + newline)
        if not expected:
            with pytest.raises(DataError, match="holds no interactions"):
                read(path)
            return
        assert read(path, chunk_bytes=chunk_bytes) == (expected, [])


@pytest.mark.parametrize("name", ["u.data", "ratings.dat"])
@pytest.mark.parametrize("n_fields", [3, 4])
def test_movielens_takes_three_and_four_fields_and_ratings_only_when_asked(name, n_fields, tmp_path):
    separator = "\t" if name == "u.data" else "::"
    log = [(1, 1193, 5), (1, 661, 3), (2, 1357, 4)]
    file(tmp_path, name, "".join(separator.join(map(str, [*row, 978300760][:n_fields])) + "\n" for row in log))
    for path in (tmp_path, tmp_path / name):
        assert read(path, chunk_bytes=12)[0] == [(u, i, 1.0, n) for n, (u, i, _) in enumerate(log, 1)]
        assert [row[2] for row in read(path, weight="rating")[0]] == [5, 3, 4]


def test_a_folder_or_glob_is_read_in_the_order_of_names_and_not_below(tmp_path):
    for name, item in [("b.csv", 2), ("a.csv", 1), ("_SUCCESS.csv", 8), (".hidden.csv", 9)]:
        file(tmp_path, name, f"user_id,item_id\n7,{item}\n")
    (tmp_path / "below").mkdir()
    file(tmp_path / "below", "c.csv", "user_id,item_id\n7,3\n")
    file(tmp_path, "README.md", "words")
    assert ids(read(tmp_path)[0]) == [(7, 1), (7, 2)]
    assert ids(read(tmp_path / "[ab].csv")[0]) == [(7, 1), (7, 2)]


def test_text_details(tmp_path):
    rows = read(file(tmp_path, "a.csv", 'user_id,item_id\n"",NA\n"a,b"," x "\nnull,"q""r"\n'))[0]
    assert ids(rows) == [("", "NA"), ("a,b", " x "), ("null", 'q"r')]
    assert ids(read(file(tmp_path, "bom.csv", "\ufeffuser_id,item_id\r\n1,2\r\n\r\n3,4"))[0]) == [
        (1, 2),
        (3, 4),
    ]
    assert ids(read(file(tmp_path, "tabs.csv", "user_id\titem_id\n1\t2\n"))[0]) == [(1, 2)]
    assert ids(read(file(tmp_path, "z.csv", "user_id,item_id\n01,2\n02,3\n"))[0]) == [("01", 2), ("02", 3)]
    assert ids(read(file(tmp_path, "t.txt", "1  2\t3 \n\n 4 5"), format="lightgcn")[0]) == [
        (1, 2),
        (1, 3),
        (4, 5),
    ]


def test_parquet_dictionaries_and_narrow_integers_are_ids(tmp_path):
    table = pa.table({"user_id": pa.array(["b", "a"]).dictionary_encode(), "item_id": pa.array([1, 2], pa.uint8())})
    pq.write_table(table, tmp_path / "a.parquet")
    assert ids(read(tmp_path)[0]) == [("b", 1), ("a", 2)]


def test_given_split_marks_the_test_file(tmp_path):
    for name in ("test.csv", "train-1.csv", "train-0.csv", "other.csv"):
        file(tmp_path, name, "user_id,item_id\n1,2\n")
    sources = find_sources(str(tmp_path), split="given")
    assert [(Path(s.file).name, s.is_test) for s in sources] == [
        ("train-0.csv", False), ("train-1.csv", False), ("test.csv", True),
    ]  # fmt: skip
    assert len(find_sources(str(tmp_path), split="random")) == 4


# ---- bad rows: one line with file, row, column, value and remedy; or a skip


BAD_ROWS = {
    "null user": ("3,,1", "column 'item_id' is null (user_id=3, item_id=, w=1)"),
    "null item": (",3,1", "column 'user_id' is null (user_id=, item_id=3, w=1)"),
    "other type": (
        "3,abc,1",
        "column 'item_id' holds int64 ids, this value is another type (user_id=3, item_id=abc, w=1)",
    ),
    "float id": (
        "3.5,4,1",
        "column 'user_id' holds int64 ids, this value is another type (user_id=3.5, item_id=4, w=1)",
    ),
    "leading zero": ("03,4,1", "column 'user_id' holds int64 ids, this value is another type"),
    "too large": (f"{2**63},4,1", "column 'user_id' holds int64 ids, this value is another type"),
    "null weight": ("3,4,", "column 'w' is null"),
    "negative": ("3,4,-1", "column 'w' is not above zero (user_id=3, item_id=4, w=-1)"),
    "zero": ("3,4,0", "column 'w' is not above zero"),
    "nan": ("3,4,nan", "column 'w' is not finite"),
    "inf": ("3,4,inf", "column 'w' is not finite"),
    "huge": ("3,4,1e39", "column 'w' does not fit float32"),
    "tiny": ("3,4,1e-60", "column 'w' does not fit float32"),
    "no number": ("3,4,much", "column 'w' is not a number (user_id=3, item_id=4, w=much)"),
    "few fields": ("3,4", "2 fields, the header has 3 (3,4)"),
    "many fields": ("3,4,5,6", "4 fields, the header has 3 (3,4,5,6)"),
}


@pytest.mark.parametrize(("line", "words"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_csv_row_is_named_or_skipped(line, words, tmp_path):
    path = file(tmp_path, "log.csv", f"user_id,item_id,w\n1,2,1\n1,5,1\n{line}\n2,2,0.5\n")
    with pytest.raises(DataError) as error:
        read(path, weight="w")
    assert f"{path}: row 4: {words}" in str(error.value)
    assert "bad_rows='skip'" in str(error.value)
    assert "\n" not in str(error.value)
    rows, rejected = read(path, weight="w", bad_rows="skip")
    assert rows == [(1, 2, 1.0, 2), (1, 5, 1.0, 3), (2, 2, 0.5, 5)]
    assert [(number, row) for number, row, _, _ in rejected] == [(0, 4)]
    assert words.startswith(rejected[0][2])


def test_row_numbers_hold_across_blocks_and_several_malformed_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(log_csv, "BLOCK_BYTES", 64)
    lines = [f"{n},{n}" if n % 7 else f"{n}" for n in range(2, 200)]
    path = file(tmp_path, "log.csv", "user_id,item_id\n" + "\n".join(lines) + "\n")
    rows, rejected = read(path, bad_rows="skip")
    assert rows == [(n, n, 1.0, n) for n in range(2, 200) if n % 7]
    assert sorted(row[1] for row in rejected) == [n for n in range(2, 200) if n % 7 == 0]


def test_only_bad_rows_leave_nothing_but_rejects(tmp_path):
    path = file(tmp_path, "log.csv", "user_id,item_id\n1\n2\n")
    assert read(path, bad_rows="skip")[0] == []
    assert len(read(path, bad_rows="skip")[1]) == 2


PARQUET_ROWS = {
    "null id": (
        {"item_id": pa.array([1, None])},
        "row 2: column 'item_id' is null (user_id=2, item_id=, w=1)",
    ),
    "null weight": ({"w": pa.array([1.0, None])}, "row 2: column 'w' is null"),
    "nan": ({"w": pa.array([1.0, float("nan")])}, "row 2: column 'w' is not finite"),
    "negative": (
        {"w": pa.array([1, -3])},
        "row 2: column 'w' is not above zero (user_id=2, item_id=2, w=-3)",
    ),
    "float": (
        {"item_id": pa.array([1.0, float("nan")])},
        "row 2: column 'item_id' is null (user_id=2, item_id=nan, w=1)",
    ),
}


@pytest.mark.parametrize(("change", "words"), PARQUET_ROWS.values(), ids=PARQUET_ROWS)
def test_a_bad_parquet_row_is_named_or_skipped(change, words, tmp_path):
    path = tmp_path / "log.parquet"
    columns = {"user_id": pa.array([1, 2]), "item_id": pa.array([1, 2]), "w": pa.array([1, 1])}
    pq.write_table(pa.table(columns | change), path, row_group_size=1)
    with pytest.raises(DataError) as error:
        read(path, weight="w")
    assert f"{path}: {words}" in str(error.value)
    rows, rejected = read(path, weight="w", bad_rows="skip")
    assert ids(rows) == [(1, 1)]
    assert [row[1] for row in rejected] == [2]


@pytest.mark.parametrize("chunk_bytes", [None, 4])
def test_bad_rows_of_text_formats_are_named_by_line(chunk_bytes, tmp_path):
    path = file(tmp_path, "train.txt", "1 2 3\n4 5 x\n6 7\n")
    with pytest.raises(DataError, match=r"train.txt: row 2: column 'item_id' holds int64 .*\(user_id=4, item_id=x\)"):
        read(path, chunk_bytes=chunk_bytes)
    rows, rejected = read(path, bad_rows="skip", chunk_bytes=chunk_bytes)
    assert ids(rows) == [(1, 2), (1, 3), (4, 5), (6, 7)]
    assert [row[1] for row in rejected] == [2]

    path = file(tmp_path, "ratings.dat", "1::2::5\n\n1::3\n2::2::bad\n2::3::4\n")
    assert ids(read(path, bad_rows="skip", chunk_bytes=chunk_bytes)[0]) == [(1, 2), (2, 2), (2, 3)]
    rows, rejected = read(path, weight="rating", bad_rows="skip", chunk_bytes=chunk_bytes)
    assert [row[3] for row in rows] == [1, 5]
    assert [row[1] for row in rejected] == [3, 4]
    with pytest.raises(DataError, match=r"ratings\.dat: row 3: 2 fields, the first line has 3"):
        read(path, chunk_bytes=chunk_bytes)


# ---- bad files: always an error


def table(**columns):
    return pa.table(columns)


BAD_FILES = {
    "empty csv": ({"a.csv": b""}, "a.csv: the file is empty"),
    "header alone": ({"a.csv": b"user_id,item_id\n"}, "a.csv: the file holds no interactions"),
    "empty text": ({"train.txt": b""}, "train.txt: the file is empty"),
    "no items": ({"train.txt": b"1\n2\n"}, "train.txt: the file holds no interactions"),
    "no parquet rows": (
        {"a.parquet": table(user_id=pa.array([], pa.int64()), item_id=pa.array([], pa.int64()))},
        "a.parquet: the file holds no rows",
    ),
    "missing column": (
        {"a.csv": b"user_id,itemid,x\n1,2,3\n"},
        "a.csv: no column 'item_id'; did you mean 'itemid'? the columns are user_id, itemid, x",
    ),
    "missing parquet column": (
        {"a.parquet": table(uid=[1], item_id=[2])},
        "no column 'user_id'; did you mean 'uid'? the columns are uid, item_id",
    ),
    "column twice": ({"a.csv": b"user_id,item_id,item_id\n1,2,3\n"}, "2 columns are named 'item_id'"),
    "float ids": (
        {"a.parquet": table(user_id=[1.5], item_id=[2])},
        "column 'user_id' is double and holds 1.5, ids are whole numbers",
    ),
    "truncated parquet": (
        {"a.parquet": b"PAR1 and then nothing"},
        "a.parquet: truncated, or not a parquet file",
    ),
    "not utf-8": ({"a.csv": b"user_id,item_id\n1,\xff\xfe\n"}, "a.csv: near row 2"),
    "text not utf-8": ({"train.txt": b"1 \xff\n"}, "train.txt: not UTF-8"),
    "mixed formats": (
        {"a.csv": b"user_id,item_id\n1,2\n", "b.parquet": table(user_id=[1], item_id=[2])},
        "holds files of several formats (csv, parquet)",
    ),
    "mixed types": (
        {"a.csv": b"user_id,item_id\n1,2\n", "b.csv": b"user_id,item_id\n1,x\n"},
        "column 'item_id' holds int64 in",
    ),
    "nothing known": ({"a.doc": b"x"}, "no interaction log; looked for train.txt"),
    "one field": (
        {"u.data": b"1,2,3\n"},
        "u.data: row 1 has 1 fields, movielens-100k has user, item, rating",
    ),
}


@pytest.mark.parametrize("bad_rows", ["error", "skip"])
@pytest.mark.parametrize(("files", "words"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_named(files, words, bad_rows, tmp_path):
    for name, content in files.items():
        if isinstance(content, bytes):
            file(tmp_path, name, content)
        else:
            pq.write_table(content, tmp_path / name)
    with pytest.raises(DataError) as error:
        read(tmp_path, bad_rows=bad_rows)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_parquet_file_damaged_inside_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    rng = np.random.default_rng(0)
    pq.write_table(pa.table({"user_id": rng.integers(0, 2**60, 5000), "item_id": rng.integers(0, 2**60, 5000)}), path)
    content = bytearray(path.read_bytes())
    content[4:2000] = b"\xff" * 1996
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: damaged after row 0"):
        read(path)
    path.write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"a\.parquet: truncated"):
        read(path)


def test_weights_have_to_be_numbers_and_the_format_has_to_have_them(tmp_path):
    pq.write_table(table(user_id=[1], item_id=[2], w=["3"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column 'w' is string, weights are numbers"):
        read(tmp_path, weight="w")
    with pytest.raises(DataError, match="LightGCN files have no weights"):
        read(file(tmp_path, "train.txt", "1 2\n"), weight="w")
    with pytest.raises(DataError, match="MovieLens has 'rating' alone"):
        read(file(tmp_path, "u.data", "1\t2\t3\n"), weight="w")


def test_paths_and_names_that_do_not_fit(tmp_path):
    for path, options, words in [
        (tmp_path / "none", {}, "no such file or folder"),
        (tmp_path / "*.csv", {}, "no file matches"),
        (file(tmp_path, "log.xyz", "1 2"), {}, "unknown format; looked for"),
        (tmp_path, {"format": "movielens-1m"}, "no ratings.dat in the folder"),
        (tmp_path, {"format": "csv"}, "no csv file in the folder"),
        (
            file(tmp_path, "train.txt", "1 2\n"),
            {"split": "given"},
            "split='given' needs a train and a test file",
        ),
    ]:
        with pytest.raises(DataError, match=words.replace("*", r"\*")):
            read(path, **options)


def test_real_movielens_and_gowalla_have_the_published_counts(real_data):
    for name, n_rows, n_users, n_items in [
        ("ml-100k", 100_000, 943, 1_682), ("ml-1m", 1_000_209, 6_040, 3_706), ("gowalla", 1_027_370, 29_858, 40_981),
    ]:  # fmt: skip
        rows, rejected = read(real_data / name)
        assert (len(rows), len({r[0] for r in rows}), len({r[1] for r in rows}), rejected) == (
            n_rows,
            n_users,
            n_items,
            [],
        )
