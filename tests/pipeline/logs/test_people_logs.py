"""Logs as people have them: kinds of files that users of recommenders report, each read right or refused in one line with the remedy."""

from __future__ import annotations

import datetime
import gzip
import os
import random
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from graphhash.errors import DataError, GraphHashError
from pipeline.bundles.recommend import read_ids
from pipeline.config.run_config import DataConfig
from pipeline.ctr.ingest import ingest_ctr
from pipeline.ctr.log import open_log
from pipeline.errors import ConfigError
from pipeline.logs import csv as log_csv
from pipeline.logs.kinds import open_sources
from pipeline.logs.readers import read_chunk
from pipeline.logs.sources import cut_chunks
from pipeline.logs.values import is_text

LINES = ["user_id,item_id,click", *(f"{u},{i},{(u + i) % 2}" for u in range(30) for i in range(40))]
TEXT = "\n".join(LINES) + "\n"
PAIRS = [(u, i) for u in range(30) for i in range(40)]
N_MUTATIONS = int(os.environ.get("GRAPHHASH_MUTATIONS", "300"))


def read(path: Path | str, **settings) -> tuple[list[tuple], int]:
    """Kept pairs and the number of rejected rows."""
    sources, columns = open_sources(DataConfig(str(path), **settings))
    pairs, n_rejected = [], 0
    for chunk in cut_chunks(sources):
        for batch in read_chunk(chunk, columns, bad_rows=settings.get("bad_rows", "error")):
            pairs += list(zip(batch.users.to_pylist(), batch.items.to_pylist(), strict=True))
            n_rejected += batch.rejected.num_rows
    return pairs, n_rejected


def ingest(path: Path | str, **settings) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        return ingest_ctr(DataConfig(str(path), **settings), Path(folder))


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(message: str):
    return pytest.raises(DataError, match=message)


# ---- files


@pytest.mark.parametrize("extension", [*log_csv.CODECS])
def test_compressed_csv_is_read_and_a_cut_one_refused(extension, tmp_path):
    path = tmp_path / f"log.csv{extension}"
    with pa.output_stream(str(path), compression=log_csv.CODECS[extension]) as stream:
        stream.write(TEXT.encode())
    assert read(path) == (PAIRS, 0)
    assert read(tmp_path) == (PAIRS, 0)
    assert ingest(path)["n_train"] > 900
    if extension != ".br":  # Arrow does not notice where a brotli stream is cut.
        path.write_bytes(path.read_bytes()[:-6])
        with refused(r"log\.csv.*: near row"):
            read(path)


def test_gzip_of_several_members_is_read_whole(tmp_path):
    half = TEXT.index("\n", len(TEXT) // 2) + 1
    write(tmp_path / "log.csv.gz", gzip.compress(TEXT[:half].encode()) + gzip.compress(TEXT[half:].encode()))
    assert read(tmp_path) == (PAIRS, 0)


@pytest.mark.parametrize("kind", ["parquet", "csv", "bytes"])
def test_empty_parts_are_skipped_unless_all_are_empty(kind, tmp_path, caplog):
    table = pa.table({"user_id": [1, 2], "item_id": [3, 4], "click": [0, 1]})
    for number, part in enumerate((table, table.slice(0, 0), table)):
        if kind == "parquet":
            pq.write_table(part, tmp_path / f"part-{number}.parquet")
        elif kind == "csv" or len(part):
            pa_csv.write_csv(part, tmp_path / f"part-{number}.csv")
        else:
            write(tmp_path / f"part-{number}.csv", "")
    write(tmp_path / "_SUCCESS", "")
    with caplog.at_level("INFO"):
        assert read(tmp_path) == ([(1, 3), (2, 4)] * 2, 0)
    assert "1 of 3 files hold no rows" in caplog.text
    assert len(open_log(DataConfig(str(tmp_path))).files) == 2
    for name in ("part-0", "part-2"):
        next(tmp_path.glob(f"{name}.*")).unlink()
    with refused("holds no rows|is empty"):
        read(tmp_path)


def test_partitioned_folders_name_the_pattern_that_reads_them(tmp_path):
    for day in ("01", "02"):
        (tmp_path / f"day={day}").mkdir()
        pq.write_table(pa.table({"user_id": [1], "item_id": [int(day)]}), tmp_path / f"day={day}" / "part-0.parquet")
    with refused(r"read them with the pattern '.*/\*\*/\*\.parquet'") as error:
        read(tmp_path)
    assert read(str(error.value).split("'")[1]) == ([(1, 1), (1, 2)], 0)


# ---- csv


@pytest.mark.parametrize(("separator", "extra"), [(";", "1,5"), ("|", "a"), ("\t", "a,b"), (",", "x")])
def test_separators_are_recognised_and_may_be_named(separator, extra, tmp_path):
    lines = [separator.join([*line.split(","), extra if n else "price"]) for n, line in enumerate(LINES)]
    path = write(tmp_path / "log.csv", "\n".join(lines))
    assert read(path) == (PAIRS, 0)
    assert read(path, separator=separator) == (PAIRS, 0)
    assert ingest(path)["n_train"] > 900


def test_a_separator_within_a_header_of_another_one_is_text(tmp_path):
    path = write(tmp_path / "log.csv", 'user_id,item_id,"a;b;c;d;e"\n1,2,x\n3,4,y\n')
    assert read(path) == ([(1, 2), (3, 4)], 0)


def test_files_without_a_header_take_named_columns(tmp_path):
    path = write(tmp_path / "log.csv", "\n".join(LINES[1:]))
    assert read(path, columns=("user_id", "item_id", "click")) == (PAIRS, 0)
    assert ingest(path, columns=("user_id", "item_id", "click"))["n_train"] > 900
    with refused(r"row 3: .*item_id=x"):
        read(write(path, "1,2,0\n2,3,0\n4,x,0\n"), columns=("user_id", "item_id", "click"))
    with pytest.raises(ConfigError, match=r"data\.columns=a,a must name every column"):
        DataConfig("log.csv", columns=("a", "a"))


@pytest.mark.parametrize(("encoding", "name"), [("latin-1", "grüße"), ("utf-16", "日本"), ("cp1252", "€")])
def test_other_encodings_are_named_in_the_refusal_and_read_when_given(encoding, name, tmp_path):
    path = write(tmp_path / "log.csv", TEXT.replace("click", name).encode(encoding))
    for task in (read, ingest):
        with refused("not utf-8 text|no column|no readable csv|embedded"):
            task(path)
    assert read(path, encoding=encoding) == (PAIRS, 0)
    assert ingest(path, encoding=encoding, label_column=name)["n_train"] > 900
    with pytest.raises(ConfigError, match=r"data\.encoding='latin-99' is unknown"):
        DataConfig("log.csv", encoding="latin-99")


@pytest.mark.parametrize("place", ["last", "middle", "first row", "last row"])
@pytest.mark.parametrize("block", [64, 2**20])
def test_a_quote_that_is_never_closed_is_named_with_its_row(place, block, tmp_path, monkeypatch):
    lines = ["user_id,title,item_id", *(f"{n},movie {n},{n}" for n in range(2, 200))]
    row = {"first row": 2, "last row": 199}.get(place, 100)
    broken = f'{row},movie,"{row}' if place == "last" else f'{row},"movie {row},{row}'
    path = write(tmp_path / "log.csv", "\n".join([*lines[: row - 1], broken, *lines[row:]]) + "\n")
    with refused(rf"log\.csv: row {row}: a quote is opened and never closed"):
        read(path, bad_rows="skip")
    monkeypatch.setattr(log_csv, "BLOCK_BYTES", block)
    with refused(r"log\.csv: (near )?row"):
        read(path, bad_rows="skip")


def test_quotes_inside_of_fields_and_closed_ones_over_lines_are_text(tmp_path):
    path = write(tmp_path / "log.csv", 'user_id,item_id,t\n1,2,5" disk\n3,4,"two\nlines"\n5,6,"a ""word"""')
    assert read(path) == ([(1, 2), (3, 4), (5, 6)], 0)


def test_a_nameless_index_is_left_out_and_said(tmp_path):
    lines = [f"{n - 1 if n else ''},{line}" for n, line in enumerate(LINES)]
    facts = ingest(write(tmp_path / "log.csv", "\n".join(lines)))
    assert list(facts["columns"]) == ["user_id", "item_id"]
    assert facts["left_out"] == {"(without a name)": "the index of a pandas frame"}
    for name in ("Unnamed: 0", "__index_level_0__"):
        facts = ingest(write(tmp_path / "log.csv", "\n".join([name + lines[0], *lines[1:]])))
        assert facts["left_out"] == {name: "the index of a pandas frame"}


# ---- ids


def test_ids_that_are_mostly_numbers_are_text_by_option(tmp_path, caplog):
    path = write(
        tmp_path / "log.csv", "user_id,item_id\n" + "".join(f"{n},{n}{'A' * (n % 7 == 0)}\n" for n in range(1, 50))
    )
    with refused(r"row 8: .*--item-kind string"):
        read(path)
    with caplog.at_level("INFO"):
        assert read(path, item_kind="string")[0][6] == (7, "7A")
    assert "columns: users user_id (int64), items item_id (string), every row weighs 1" in caplog.text
    assert read(path, item_kind="string", user_kind="string")[0][0] == ("1", "1")


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (pa.array([1.0, None, 3.0]), [1, 3]),
        (pa.array([2**63, 2**64 - 1, 5], pa.uint64()), [str(2**63), str(2**64 - 1), "5"]),
        (pa.array([10, None, 12], pa.decimal128(20, 0)), ["10", "12"]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array(["a", None, "c"], pa.large_string()), ["a", "c"]),
    ],
)
def test_ids_of_parquet_are_what_they_mean(ids, expected, tmp_path):
    pq.write_table(pa.table({"user_id": [1, 2, 3], "item_id": ids}), tmp_path / "log.parquet")
    pairs, n_rejected = read(tmp_path, bad_rows="skip")
    assert [item for _, item in pairs] == expected
    assert n_rejected == ids.null_count


@pytest.mark.parametrize("first", [2**63, 12345678901234567890])
def test_unsigned_ids_in_text_are_text(first, tmp_path):
    write(tmp_path / "log.csv", f"user_id,item_id\n{first},1\n{first + 1},2\n")
    assert read(tmp_path)[0] == [(str(first), 1), (str(first + 1), 2)]


def test_user_ids_of_a_file_stand_as_they_are(tmp_path):
    path = write(tmp_path / "users.txt", "\ufeffanna\r\n ben \n\nx\u2028y\n42".encode())
    assert read_ids(path) == ["anna", " ben ", "x\u2028y", "42"]
    with refused("users.txt: not UTF-8"):
        read_ids(write(path, b"\xff"))
    with refused("cannot be read"):
        read_ids(tmp_path / "gone")


# ---- columns of labelled samples


def labelled(folder: Path, values: list, name: str = "x", n: int = 1200) -> Path:
    table = pa.table(
        {
            "user_id": np.arange(n) % 30,
            "item_id": np.arange(n) // 30,
            name: (values * n)[:n],
            "click": np.arange(n) % 2,
        }
    )
    pq.write_table(table, folder / "log.parquet")
    return folder / "log.parquet"


@pytest.mark.parametrize("words", [("True", "False"), ("true", "false"), ("TRUE", "FALSE"), ("1", "0"), ("1.0", "0.0")])
def test_labels_are_booleans_in_any_spelling(words, tmp_path):
    lines = ["user_id,item_id,click", *(f"{u},{i},{words[(u + i) % 2]}" for u, i in PAIRS)]
    assert 0.4 < ingest(write(tmp_path / "log.csv", "\n".join(lines)))["positive_rate"]["train"] < 0.6


@pytest.mark.parametrize(
    "values",
    [
        [{"a": 1}],
        [[[1]]],
        [b"\xff", b"\x00"],
        [datetime.datetime(2024, 1, 1), datetime.datetime(2024, 1, 2)],
        [datetime.date(2024, 1, 1)],
        [datetime.timedelta(1)],
        ["2024-01-01 10:00:00", "2024-01-02T11:00:00+0100"],
        ["31.12.2024", "01.01.2025 10:00"],
    ],
)
def test_what_is_neither_id_nor_number_is_left_out_with_the_reason(values, tmp_path):
    facts = ingest(labelled(tmp_path, values))
    assert list(facts["left_out"]) == ["x"]
    assert list(facts["columns"]) == ["user_id", "item_id"]
    schema = write(tmp_path / "schema.toml", 'label = "click"\ncategorical = ["user_id", "x"]')
    if not isinstance(values[0], str):
        with refused("column 'x' is .*(cast it|name it in)"):
            ingest(tmp_path / "log.parquet", schema=str(schema))


def test_what_a_column_was_taken_for_and_mostly_unknown_ones_are_said(tmp_path, caplog):
    path = labelled(tmp_path, [f"s{n}" for n in range(1000)], "session")
    with caplog.at_level("INFO"):
        ingest(path)
    assert "columns: label click; categorical user_id (int64), item_id (int64), session (string)" in caplog.text
    assert "mostly out of vocabulary in the test: session" in caplog.text


TYPES = [
    pa.int8(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.decimal128(22, 2), pa.string(), pa.large_string(),
    pa.string_view(), pa.bool_(), pa.timestamp("us"), pa.timestamp("ns", "UTC"), pa.date32(), pa.null(), pa.list_(pa.int64()), pa.binary(),
    pa.duration("s"), pa.dictionary(pa.int32(), pa.string()), pa.struct([("a", pa.int64())]),
]  # fmt: skip


def values_of(dtype: pa.DataType, n_rows: int) -> pa.Array:
    """Values 0 to 39 of a type, every tenth null."""
    whole = pa.array([None if n % 10 == 9 else n % 40 for n in range(n_rows)], pa.int64())
    if pa.types.is_null(dtype):
        return pa.nulls(n_rows)
    if pa.types.is_struct(dtype):
        return pa.StructArray.from_arrays([whole], ["a"])
    if pa.types.is_list(dtype):
        return pa.array([[n % 40] for n in range(n_rows)], dtype)
    if pa.types.is_date(dtype):
        return whole.cast(pa.int32()).cast(dtype)
    if pa.types.is_float16(dtype):
        return pa.array([None if n is None else np.float16(n) for n in whole.to_pylist()], dtype)
    if pa.types.is_dictionary(dtype):
        return whole.cast(pa.string()).dictionary_encode()
    return whole.cast(pa.string()).cast(dtype) if pa.types.is_binary(dtype) or is_text(dtype) else whole.cast(dtype)


@pytest.mark.parametrize("column", ["user_id", "x"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_type_of_parquet_is_read_or_refused_in_one_line(dtype, column, tmp_path):
    """Ids of float16 ended in a traceback."""
    columns = {"user_id": np.arange(120) % 30, "item_id": np.arange(120) // 4, "click": np.arange(120) % 2}
    pq.write_table(pa.table(columns | {column: values_of(dtype, 120)}), tmp_path / "log.parquet")
    messages = []
    try:
        pairs, n_rejected = read(tmp_path / "log.parquet", bad_rows="skip")
        assert len(pairs) + n_rejected == 120
    except GraphHashError as error:
        messages.append(str(error))
    try:
        ingest(tmp_path / "log.parquet")
    except GraphHashError as error:
        messages.append(str(error))
    assert not [message for message in messages if "\n" in message]


def test_float16_ids_are_those_of_any_float(tmp_path):
    for dtype in (pa.float16(), pa.float64()):
        pq.write_table(
            pa.table({"user_id": values_of(dtype, 40), "item_id": list(range(40))}), tmp_path / f"{dtype}.parquet"
        )
    half, double = (
        read(tmp_path / f"{dtype}.parquet", bad_rows="skip", user_kind="string")
        for dtype in (pa.float16(), pa.float64())
    )
    assert half == double
    assert len(half[0]) == 36


# ---- damage


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A log with a mutation or some: bytes flipped, cut out, repeated or swapped."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 3, 10))):
        place = rng.randrange(len(data)) if data else 0
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[place] = rng.randrange(256)
        elif kind == 1:
            data[place:place] = rng.choice((b'"', b",", b"\n", b"\r", b";", b"\xff", b"\x00", b"NaN", b"1e999", b"-"))
        elif kind == 2:
            del data[place : place + rng.choice((1, 2, 30, 10**6))]
        elif kind == 3:
            data[place:place] = data[place : place + 40]
        elif kind == 4:
            lines = bytes(data).split(b"\n")
            rng.shuffle(lines)
            data = bytearray(b"\n".join(lines))
        else:
            data = bytearray(bytes(data).replace(b"1", rng.choice((b"1.0", b"x", b"True", b"")), rng.randrange(1, 50)))
    return bytes(data)


def n_rows_of(path: Path) -> int | None:
    """Rows of a file as pyarrow counts them, well-formed or not; None where it cannot read it."""
    try:
        if path.suffix == ".parquet":
            return pq.ParquetFile(path).metadata.num_rows
        skipped = []
        layout = log_csv.DEFAULT_FORMAT
        table = pa_csv.read_csv(
            path,
            parse_options=pa_csv.ParseOptions(
                delimiter=log_csv.delimiter_of(str(path), "csv", layout),
                newlines_in_values=True,
                invalid_row_handler=lambda row: skipped.append(row) or "skip",
            ),
        )
        return table.num_rows + len(skipped)
    except (OSError, ValueError, pa.ArrowException):
        return None


@pytest.mark.timeout(3600)  # With more mutations (GRAPHHASH_MUTATIONS).
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_no_damage_shows_a_traceback_or_loses_a_row(kind, tmp_path):
    rng = random.Random(7)
    path = tmp_path / f"log.{kind}"
    if kind == "csv":
        content = TEXT[:3000].encode()
    else:
        table = pa.table({"user_id": list(range(99)), "item_id": [f"i{n}" for n in range(99)], "click": [0, 1, 1] * 33})
        pq.write_table(table, path)
        content = path.read_bytes()
    messages: list[str] = []
    for number in range(N_MUTATIONS // 2):
        path.write_bytes(damaged(content, rng))
        try:
            pairs, n_rejected = read(path, bad_rows="skip")
            assert len(pairs) + n_rejected == n_rows_of(path), number
        except GraphHashError as error:
            messages.append(str(error))
        try:
            ingest(path)
        except GraphHashError as error:
            messages.append(str(error))
    assert messages
    assert not [message for message in messages if "\n" in message]
