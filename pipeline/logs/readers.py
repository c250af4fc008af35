"""Readers: a chunk of a log -> checked columns of raw ids and weights, and the rows that had to be rejected.

What an id, a weight and a bad row are is said in `pipeline.logs.columns`. With bad_rows="error"
the first one raises DataError; with "skip" it is put into `Batch.rejected` and the rest is read. What
concerns a whole file (empty, truncated, a column that is missing or of a type that holds no ids) always
raises.

Rows are counted from 1: lines in LightGCN and MovieLens files, rows in parquet, and in csv and tsv records
with the header as 1, which is the line number unless the file has blank lines or line breaks within quotes. A
.csv file whose header has tabs and no commas is read as tab-separated. Text is UTF-8. An empty csv field is
null, a quoted empty one is the empty string. A LightGCN user without items is legal and has no interactions.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
from numpy.typing import NDArray

from graphhash.errors import DataError
from pipeline.logs.columns import Batch, Columns, RawColumns, check_columns, is_number, text_kind
from pipeline.logs.sources import Chunk, Source, first_line, open_parquet

BATCH_ROWS = 1_000_000
CSV_BLOCK_BYTES = 16 * 2**20
SKIP_REMEDY = "fix or drop the row, or pass bad_rows='skip' (--bad-rows skip)"


def find_kinds(sources: list[Source], columns: Columns) -> tuple[str, str]:
    """Types of the user and the item ids of a log, ("int64" or "string") each.

    Raises DataError when a column is missing or holds no ids, or when two files disagree.
    """
    first: tuple[str, str] | None = None
    for source in sources:
        _check_weight_column(source, columns)
        kinds = _source_kinds(source, columns)
        first = first or kinds
        for column, expected, found in zip((columns.user, columns.item), first, kinds, strict=True):
            if found != expected:
                raise DataError(
                    f"column {column!r} holds {expected} in {sources[0].file} and {found} in {source.file}; "
                    "write both as integers or both as strings"
                )
    assert first is not None
    return first


def read_chunk(chunk: Chunk, columns: Columns, *, bad_rows: str, number_rows: bool = False) -> Iterator[Batch]:
    """The rows of a chunk in batches of bounded size.

    Args:
        number_rows: count `Batch.rows` from the start of the file; without it a byte-range chunk counts from
            its own start, which saves reading what lies before. Rejected rows are always counted from the
            start of the file.
    """
    before: int | None = first_line(chunk) if number_rows and chunk.start and _by_bytes(chunk.source) else None
    for raw in READERS[chunk.source.format](chunk, columns):
        batch = check_columns(raw, columns, chunk.number)
        if batch.rejected.num_rows and before is None:
            before = first_line(chunk) if _by_bytes(chunk.source) else 0
        offset = before or 0
        rejected = batch.rejected.set_column(1, "row", pc.add(batch.rejected["row"], offset))
        if bad_rows == "error" and rejected.num_rows:
            worst = rejected.sort_by("row").slice(0, 1).to_pylist()[0]
            raise DataError(
                f"{chunk.source.file}: row {worst['row']}: {worst['reason']} ({worst['raw']}); {SKIP_REMEDY}"
            )
        yield Batch(batch.users, batch.items, batch.weights, batch.rows + offset, rejected)


def _by_bytes(source: Source) -> bool:
    return source.format not in ("csv", "tsv", "parquet")


def _check_weight_column(source: Source, columns: Columns) -> None:
    if columns.weight is None:
        return
    if source.format == "lightgcn":
        raise DataError(f"{source.file}: LightGCN files have no weights; leave weight_column={columns.weight!r} out")
    if source.format.startswith("movielens") and columns.weight != "rating":
        raise DataError(
            f"{source.file}: weight_column={columns.weight!r}, MovieLens has 'rating' alone; use that or none"
        )


# ---- formats: each yields RawColumns batches


def _read_parquet(chunk: Chunk, columns: Columns) -> Iterator[RawColumns]:
    file = open_parquet(chunk.source.file)
    names = list(dict.fromkeys(name for name in (columns.user, columns.item, columns.weight) if name))
    row = chunk.first_row + 1
    try:
        groups = range(chunk.start, chunk.stop)
        for batch in file.iter_batches(BATCH_ROWS, row_groups=list(groups), columns=names, use_threads=False):
            ids = [_plain(batch.column(name)) for name in (columns.user, columns.item)]
            weights = batch.column(columns.weight) if columns.weight else None
            yield RawColumns(*ids, weights, np.arange(row, row + len(batch)), [])
            row += len(batch)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{chunk.source.file}: damaged after row {row - 1} ({reason}); write or copy it again"
        ) from None


def _read_csv(chunk: Chunk, columns: Columns) -> Iterator[RawColumns]:
    names = [name for name in (columns.user, columns.item, columns.weight) if name]
    malformed: list[tuple[int, str, str]] = []
    skipped: list[int] = []

    def on_malformed(row: pa_csv.InvalidRow) -> str:
        skipped.append(row.number)
        malformed.append((row.number, f"{row.actual_columns} fields, the header has {row.expected_columns}", row.text))
        return "skip"

    record = 2
    try:
        with _open_csv(chunk.source, names, on_malformed) as reader:
            for batch in reader:
                # Malformed records are left out by the parser but have numbers.
                span = np.arange(record, record + len(batch) + len(skipped))
                rows = span[~np.isin(span, skipped)][: len(batch)]
                record = int(rows[-1]) + 1 if len(rows) else record
                ids = [batch.column(name) for name in (columns.user, columns.item)]
                yield RawColumns(*ids, batch.column(columns.weight) if columns.weight else None, rows, malformed)
                malformed = []
                skipped[:] = [number for number in skipped if number >= record]
    except pa.ArrowException as error:
        raise DataError(f"{chunk.source.file}: near row {record}: {_one_line(error)}; write it as UTF-8 csv") from None
    if malformed:
        empty = pa.array([], pa.string())
        yield RawColumns(empty, empty, empty if columns.weight else None, np.empty(0, np.int64), malformed)


def _read_lightgcn(chunk: Chunk, columns: Columns) -> Iterator[RawColumns]:
    text = _read_bytes(chunk)
    is_separator = np.isin(text, np.frombuffer(b" \t\r\n", np.uint8))
    starts = np.flatnonzero(~is_separator & np.concatenate([[True], is_separator[:-1]]))
    lines = np.cumsum(text == ord("\n"), dtype=np.int64)[starts] + 1
    del is_separator
    is_user = np.ones(len(starts), bool)
    is_user[1:] = lines[1:] != lines[:-1]
    words = _words(text, starts, chunk)
    # The user of each item is the last line head before it.
    heads = np.flatnonzero(is_user)
    user_of = heads[np.cumsum(is_user) - 1][~is_user]
    items = words.filter(pa.array(~is_user))
    yield RawColumns(words.take(pa.array(user_of)), items, None, lines[~is_user], [])


def _read_movielens(chunk: Chunk, columns: Columns) -> Iterator[RawColumns]:
    data = _read_bytes(chunk).tobytes()
    if chunk.source.format == "movielens-1m":
        data = data.replace(b"::", b"\t")
    n_fields = _movielens_fields(chunk.source)
    names = ["user", "item", "rating", "timestamp"][:n_fields]
    malformed: list[tuple[int, str, str]] = []

    def on_malformed(row: pa_csv.InvalidRow) -> str:
        malformed.append(
            (row.number, f"{row.actual_columns} fields, the first line has {row.expected_columns}", row.text)
        )
        return "skip"

    try:
        table = pa_csv.read_csv(
            pa.BufferReader(data),
            read_options=pa_csv.ReadOptions(column_names=names, use_threads=False, block_size=len(data) + 1),
            parse_options=pa_csv.ParseOptions(
                delimiter="\t", quote_char=False, ignore_empty_lines=False, invalid_row_handler=on_malformed
            ),
            convert_options=_as_text(names),
        ).combine_chunks()
    except pa.ArrowException as error:
        raise DataError(f"{chunk.source.file}: {_one_line(error)}; check that it is {chunk.source.format}") from None
    rows = np.arange(1, len(table) + len(malformed) + 1)
    rows = rows[~np.isin(rows, [number for number, _, _ in malformed])]
    # A blank line comes out as a row of nulls.
    kept = ~np.logical_and.reduce([table[name].is_null().to_numpy() for name in names])
    table = table.filter(pa.array(kept))
    user, item, rating = (_joined(table[name]) for name in names[:3])
    yield RawColumns(user, item, rating if columns.weight else None, rows[kept], malformed)


READERS = {
    "parquet": _read_parquet,
    "csv": _read_csv,
    "tsv": _read_csv,
    "lightgcn": _read_lightgcn,
    "movielens-100k": _read_movielens,
    "movielens-1m": _read_movielens,
}


# ---- parsing


def _open_csv(source: Source, names: list[str], on_malformed: object = None) -> pa_csv.CSVStreamingReader:
    delimiter = _delimiter(source)
    header = _csv_header(source, delimiter)
    for name in names:
        _require_column(source, name, header)
    return pa_csv.open_csv(
        source.file,
        read_options=pa_csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK_BYTES),
        parse_options=pa_csv.ParseOptions(
            delimiter=delimiter, newlines_in_values=True, invalid_row_handler=on_malformed
        ),
        convert_options=_as_text(names),
    )


def _as_text(names: list[str]) -> pa_csv.ConvertOptions:
    """Every column as text: the type rule is ours. Null is an unquoted empty field ("NA" is an id)."""
    return pa_csv.ConvertOptions(
        include_columns=names,
        column_types={name: pa.string() for name in names},
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )


def _delimiter(source: Source) -> str:
    if source.format == "tsv":
        return "\t"
    with open(source.file, "rb") as stream:
        header = stream.readline(2**20)
    return "\t" if b"\t" in header and b"," not in header else ","


def _csv_header(source: Source, delimiter: str) -> list[str]:
    """Column names. Raises DataError for a file with a header alone."""
    options = pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=lambda row: "skip")
    try:
        with pa_csv.open_csv(
            source.file,
            parse_options=options,
            read_options=pa_csv.ReadOptions(block_size=2**20, use_threads=False),
        ) as reader:
            return reader.schema.names
    except pa.ArrowException as error:
        raise DataError(
            f"{source.file}: no readable csv ({_one_line(error)}); write it as UTF-8 csv with a header"
        ) from None


def _movielens_fields(source: Source) -> int:
    with open(source.file, "rb") as stream:
        line = stream.readline(2**16)
    separator = b"::" if source.format == "movielens-1m" else b"\t"
    n_fields = line.count(separator) + 1
    if n_fields not in (3, 4):
        shape = "user, item, rating and perhaps timestamp between " + ("'::'" if separator == b"::" else "tabs")
        raise DataError(f"{source.file}: row 1 has {n_fields} fields, {source.format} has {shape}; check the format")
    return n_fields


def _read_bytes(chunk: Chunk) -> NDArray[np.uint8]:
    return np.fromfile(chunk.source.file, np.uint8, count=chunk.stop - chunk.start, offset=chunk.start)


def _words(text: NDArray[np.uint8], starts: NDArray[np.int64], chunk: Chunk) -> pa.Array:
    """The words that begin at `starts`, shape (n_words,), as large_string."""
    offsets = np.append(starts, len(text)).astype(np.int64)
    words = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(starts), [None, pa.py_buffer(offsets), pa.py_buffer(text)]
    )
    try:
        return pc.ascii_trim(words.cast(pa.large_string()), characters=" \t\r\n")
    except pa.ArrowException:
        raise DataError(f"{chunk.source.file}: not UTF-8 text; write it as UTF-8") from None


# ---- types of ids


def _source_kinds(source: Source, columns: Columns) -> tuple[str, str]:
    if source.format == "parquet":
        schema = open_parquet(source.file).schema_arrow
        for name in (columns.user, columns.item, columns.weight):
            if name:
                _require_column(source, name, schema.names)
        if columns.weight and not is_number(schema.field(columns.weight).type):
            found = schema.field(columns.weight).type
            raise DataError(
                f"{source.file}: column {columns.weight!r} is {found}, weights are numbers; cast the column"
            )
        return _parquet_kind(source, columns.user, schema), _parquet_kind(source, columns.item, schema)
    head = _head(source, columns)
    return text_kind(head[0]), text_kind(head[1])


def _head(source: Source, columns: Columns) -> tuple[pa.Array, pa.Array]:
    """The first users and items of a text file. Raises DataError when it has no row at all."""
    if source.format in ("csv", "tsv"):
        chunk = Chunk(source, 0, 0, 0)
    else:
        with open(source.file, "rb") as stream:
            # Whole lines: a line that is longer is read to its end.
            stop = len(stream.read(2**16)) + len(stream.readline())
        chunk = Chunk(source, 0, 0, stop)
    seen = False
    for raw in READERS[source.format](chunk, columns):
        seen = seen or bool(raw.malformed)
        if len(raw.users):
            return raw.users, raw.items
    if seen:
        return pa.array([], pa.string()), pa.array([], pa.string())
    raise DataError(f"{source.file}: the file holds no interactions; remove it, or write it again")


def _parquet_kind(source: Source, name: str, schema: pa.Schema) -> str:
    dtype = schema.field(name).type
    dtype = dtype.value_type if pa.types.is_dictionary(dtype) else dtype
    if pa.types.is_integer(dtype):
        return "int64"
    if pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or pa.types.is_string_view(dtype):
        return "string"
    raise DataError(f"{source.file}: column {name!r} is {dtype}, ids are integers or strings; cast the column")


def _require_column(source: Source, name: str, names: list[str]) -> None:
    if names.count(name) == 1:
        return
    if names.count(name) > 1:
        raise DataError(f"{source.file}: {names.count(name)} columns are named {name!r}; rename all but one")
    nearest = difflib.get_close_matches(name, names, 1, cutoff=0.4)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise DataError(
        f"{source.file}: no column {name!r}; the columns are {', '.join(names)}{hint}; name it with "
        "user_column, item_column or weight_column"
    )


def _plain(ids: pa.Array) -> pa.Array:
    return ids.dictionary_decode() if pa.types.is_dictionary(ids.type) else ids


def _joined(column: pa.ChunkedArray) -> pa.Array:
    joined = column.combine_chunks()
    return pa.concat_arrays(joined.chunks) if isinstance(joined, pa.ChunkedArray) else joined


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0]
