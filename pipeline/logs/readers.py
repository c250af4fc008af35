"""Readers of interaction logs: a chunk of a file -> checked columns of raw ids and weights, and rejected rows.

What an id, a weight and a bad row are is defined in `pipeline.logs.columns`. With bad_rows="error" the first bad row raises
DataError; with "skip" it goes into `Batch.rejected`. Errors that concern a whole file (empty, truncated, a column that is missing
or whose type cannot be an id) always raise.

Rows are counted from 1: lines in LightGCN and MovieLens files, rows in parquet, and records in csv and tsv, with the header as 1;
this is the line number unless the file has blank lines or line breaks within quotes. An empty csv field is null, a quoted empty one is
the empty string. A LightGCN user without items is legal and has no interactions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
from numpy.typing import NDArray

from graphhash.errors import DataError, did_you_mean, first_line
from pipeline.logs.columns import NOT_WHOLE, Batch, Columns, RawColumns, check_columns
from pipeline.logs.csv import as_text, header_of, read_records
from pipeline.logs.sources import Chunk, Source, lines_before, open_parquet
from pipeline.logs.values import plain

BATCH_ROWS = 1_000_000
SKIP_REMEDY = "fix or drop the row, or pass bad_rows='skip' (--bad-rows skip)"


def read_chunk(chunk: Chunk, columns: Columns, *, bad_rows: str, number_rows: bool = False) -> Iterator[Batch]:
    """The rows of a chunk in batches of bounded size.

    Args:
        number_rows: count `Batch.rows` from the start of the file; without it a byte-range chunk counts from
            its own start, which saves reading what lies before. Rejected rows are always counted from the
            start of the file.
    """
    before: int | None = lines_before(chunk) if number_rows and chunk.start and _by_bytes(chunk.source) else None
    for raw in READERS[chunk.source.format](chunk, columns):
        batch = check_columns(raw, columns, chunk.number)
        if batch.rejected.num_rows and before is None:
            before = lines_before(chunk) if _by_bytes(chunk.source) else 0
        offset = before or 0
        rejected = batch.rejected.set_column(1, "row", pc.add(batch.rejected["row"], offset))
        if bad_rows == "error" and rejected.num_rows:
            worst = rejected.sort_by("row").slice(0, 1).to_pylist()[0]
            side = "user" if repr(columns.user) in worst["reason"] else "item"
            as_text = f"take every id as text (--{side}-kind string), " if NOT_WHOLE in worst["reason"] else ""
            raise DataError(
                f"{chunk.source.file}: row {worst['row']}: {worst['reason']} ({worst['raw']}); {as_text}{SKIP_REMEDY}"
            )
        yield replace(batch, rows=batch.rows + offset, rejected=rejected)


def _by_bytes(source: Source) -> bool:
    return source.format not in ("csv", "tsv", "parquet")


def _read_parquet(chunk: Chunk, columns: Columns) -> Iterator[RawColumns]:
    file = open_parquet(chunk.source.file)
    names = columns.names
    row = chunk.first_row + 1
    try:
        groups = range(chunk.start, chunk.stop)
        for batch in file.iter_batches(BATCH_ROWS, row_groups=list(groups), columns=names, use_threads=False):
            batch.validate(full=True)  # Text that is not UTF-8 would fail later.
            users, items = (plain(batch.column(name)) for name in (columns.user, columns.item))
            weights = batch.column(columns.weight) if columns.weight else None
            ratings = batch.column(columns.rating) if columns.rating else None
            times = batch.column(columns.time) if columns.time else None
            yield RawColumns(users, items, weights, np.arange(row, row + len(batch)), [], ratings, times)
            row += len(batch)
        n_rows = sum(file.metadata.row_group(group).num_rows for group in groups)
        if row - chunk.first_row - 1 != n_rows:
            raise ValueError(f"it holds {row - chunk.first_row - 1} rows where it states {n_rows}")
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"{chunk.source.file}: damaged after row {row - 1} ({first_line(error)}); write or copy it again"
        ) from None


def _read_csv(chunk: Chunk, columns: Columns) -> Iterator[RawColumns]:
    source = chunk.source
    header = header_of(source.file, source.format, source.csv)
    names = columns.names
    for name in names:
        require_column(source, name, header)
    for part in read_records(source.file, source.format, source.csv, names):
        users, items = part.batch.column(columns.user), part.batch.column(columns.item)
        weights = part.batch.column(columns.weight) if columns.weight else None
        ratings = part.batch.column(columns.rating) if columns.rating else None
        times = part.batch.column(columns.time) if columns.time else None
        yield RawColumns(users, items, weights, part.rows, part.malformed, ratings, times)


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
    n_fields = movielens_fields(chunk.source)
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
            convert_options=as_text(names),
        ).combine_chunks()
    except pa.ArrowException as error:
        raise DataError(f"{chunk.source.file}: {first_line(error)}; check that it is {chunk.source.format}") from None
    rows = np.arange(1, len(table) + len(malformed) + 1)
    rows = rows[~np.isin(rows, [number for number, _, _ in malformed])]
    # A blank line comes out as a row of nulls.
    kept = ~np.logical_and.reduce([table[name].is_null().to_numpy() for name in names])
    table = table.filter(pa.array(kept))
    user, item, rating = (_joined(table[name]) for name in names[:3])
    weights, ratings = (rating if name else None for name in (columns.weight, columns.rating))
    times = _joined(table["timestamp"]) if columns.time else None
    yield RawColumns(user, item, weights, rows[kept], malformed, ratings, times)


READERS = {
    "parquet": _read_parquet,
    "csv": _read_csv,
    "tsv": _read_csv,
    "lightgcn": _read_lightgcn,
    "movielens-100k": _read_movielens,
    "movielens-1m": _read_movielens,
}


def movielens_fields(source: Source) -> int:
    """Columns of a MovieLens file, 3 or 4. Raises DataError for another number."""
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


def require_column(source: Source, name: str, names: list[str]) -> None:
    """Raise DataError unless a file has exactly one column of this name."""
    if names.count(name) == 1:
        return
    if names.count(name) > 1:
        raise DataError(f"{source.file}: {names.count(name)} columns are named {name!r}; rename all but one")
    hint = did_you_mean(name, names, cutoff=0.4)
    raise DataError(
        f"{source.file}: no column {name!r}; {hint}the columns are {', '.join(names)}; name it with "
        "user_column, item_column, weight_column, rating_column or time_column"
    )


def _joined(column: pa.ChunkedArray) -> pa.Array:
    joined = column.combine_chunks()
    return pa.concat_arrays(joined.chunks) if isinstance(joined, pa.ChunkedArray) else joined
