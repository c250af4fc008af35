"""Types of the user and item ids of a log: int64 or string, the same in all of its files.

The settings name a type, or it is found: parquet says integers or text; whole floats are int64, unsigned numbers beyond int64 and
decimals are text. In text files the first 1,000 ids of a file decide (`pipeline.logs.values.kind_of`).
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from graphhash.errors import DataError, first_line
from pipeline.logs.columns import Columns
from pipeline.logs.csv import CsvFormat
from pipeline.logs.readers import READERS, require_column
from pipeline.logs.sources import Chunk, Source, find_sources, open_parquet, skip_empty
from pipeline.logs.times import find_times
from pipeline.logs.values import SAMPLE_IDS, is_number, is_text, kind_of, plain, whole_numbers

if TYPE_CHECKING:
    from pipeline.config.run_config import DataConfig

logger = logging.getLogger(__name__)

# Whole lines of about so many bytes show the ids of a text file.
HEAD_BYTES = 2**16


def open_sources(data: DataConfig) -> tuple[list[Source], Columns]:
    """The files of a log that hold rows, and what to read of each.

    Raises DataError as `find_sources`, `skip_empty`, `find_kinds` and `find_times`.
    """
    path = str(data.path)
    sources = skip_empty(find_sources(path, data.format, data.split, CsvFormat.of(data)), path)
    columns = Columns.of(data)
    user_kind, item_kind = find_kinds(sources, columns, (data.user_kind, data.item_kind))
    if data.reads_times:
        columns = find_times(sources, columns, data.time_column)
    others = f"weights {columns.weight}" if columns.weight else "every row weighs 1, and repeated pairs add up"
    others += f", ratings {columns.rating}" if columns.rating else ""
    others += f", times {columns.time} ({columns.time_unit or 'dates'})" if columns.time else ""
    logger.info("columns: users %s (%s), items %s (%s), %s", columns.user, user_kind, columns.item, item_kind, others)
    return sources, replace(columns, user_kind=user_kind, item_kind=item_kind)


def find_kinds(sources: list[Source], columns: Columns, wanted: tuple[str, str] = ("auto", "auto")) -> tuple[str, str]:
    """Types of the user and the item ids of a log, ("int64" or "string") each.

    Args:
        wanted: what the settings say of each; "auto": what the files hold.

    Raises DataError when a column is missing or holds no ids, or when two files disagree.
    """
    first: tuple[str, str] | None = None
    for source in sources:
        _check_number_columns(source, columns)
        kinds = _source_kinds(source, columns, wanted)
        first = first or kinds
        for side, column, expected, found in zip(
            ("user", "item"), (columns.user, columns.item), first, kinds, strict=True
        ):
            if found != expected:
                raise DataError(
                    f"column {column!r} holds {expected} in {sources[0].file} and {found} in {source.file}; "
                    f"write both as integers or both as strings, or take all as text: --{side}-kind string"
                )
    assert first is not None
    return first


def holds_whole_numbers(source: Source, columns: Columns) -> tuple[bool, bool]:
    """Whether the first users and the first items of a file are whole numbers, in whatever type they are written."""
    users, items = _head(source, columns)
    return tuple(kind_of(ids) == "int64" for ids in (users, items))  # type: ignore[return-value]  # Two of them.


def _check_number_columns(source: Source, columns: Columns) -> None:
    """Raise DataError where a format cannot have the columns of weights and ratings, or parquet has them as no numbers."""
    if columns.rating is not None and source.format == "lightgcn":
        raise DataError(
            f"{source.file}: LightGCN files have no ratings, which positive_from={columns.positive_from} needs; leave it out"
        )
    for key, name in (("weight_column", columns.weight), ("rating_column", columns.rating)):
        if name is None:
            continue
        if source.format == "lightgcn":
            raise DataError(f"{source.file}: LightGCN files have no weights; leave weight_column={name!r} out")
        if source.format.startswith("movielens") and name != "rating":
            raise DataError(f"{source.file}: {key}={name!r}, MovieLens has 'rating' alone; use that or none")


def _source_kinds(source: Source, columns: Columns, wanted: tuple[str, str]) -> tuple[str, str]:
    if source.format == "parquet":
        schema = open_parquet(source.file).schema_arrow
        for name in columns.names:
            require_column(source, name, schema.names)
        for name in (columns.user, columns.item):
            _check_id_type(source, name, schema)
        for what, column in (("weights", columns.weight), ("ratings", columns.rating)):
            if column and not is_number(found := schema.field(column).type):
                raise DataError(f"{source.file}: column {column!r} is {found}, {what} are numbers; cast the column")
    kinds = []
    for name, ids, kind in zip((columns.user, columns.item), _head(source, columns), wanted, strict=True):
        if kind == "auto" and source.format == "parquet":
            kinds.append("string" if is_text(ids.type) else _number_kind(source, name, ids))
        else:
            kinds.append(kind_of(ids) if kind == "auto" else kind)
    return kinds[0], kinds[1]


def _check_id_type(source: Source, name: str, schema: pa.Schema) -> None:
    dtype = schema.field(name).type
    dtype = dtype.value_type if pa.types.is_dictionary(dtype) else dtype
    if not (is_number(dtype) or is_text(dtype)):
        raise DataError(f"{source.file}: column {name!r} is {dtype}, ids are integers or strings; cast the column")


def _number_kind(source: Source, name: str, ids: pa.Array) -> str:
    """Type of ids that a parquet file holds as numbers."""
    if pa.types.is_floating(ids.type):
        _, wrong = whole_numbers(ids)
        if wrong.any():
            value = ids[int(np.argmax(wrong))].as_py()
            raise DataError(
                f"{source.file}: column {name!r} is {ids.type} and holds {value}, ids are whole numbers up to 2^53 or strings; "
                "cast the column"
            )
    return kind_of(ids)


def _head(source: Source, columns: Columns) -> tuple[pa.Array, pa.Array]:
    """The first users and items of a file. Raises DataError when it has no row at all."""
    if source.format == "parquet":
        return _parquet_head(source, columns)
    if source.format in ("csv", "tsv"):
        chunk = Chunk(source, 0, 0, 0)
    else:
        with open(source.file, "rb") as stream:
            # Whole lines: a line that is longer is read to its end.
            stop = len(stream.read(HEAD_BYTES)) + len(stream.readline())
        chunk = Chunk(source, 0, 0, stop)
    seen = False
    for raw in READERS[source.format](chunk, columns):
        seen = seen or bool(raw.malformed)
        if len(raw.users):
            return raw.users, raw.items
    if seen:
        return pa.array([], pa.string()), pa.array([], pa.string())
    raise DataError(f"{source.file}: the file holds no interactions; remove it, or write it again")


def _parquet_head(source: Source, columns: Columns) -> tuple[pa.Array, pa.Array]:
    file = open_parquet(source.file)
    names = list(dict.fromkeys((columns.user, columns.item)))
    try:
        for batch in file.iter_batches(SAMPLE_IDS, columns=names, use_threads=False):
            batch.validate(full=True)
            return plain(batch.column(columns.user)), plain(batch.column(columns.item))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{source.file}: damaged after row 0 ({first_line(error)}); write or copy it again") from None
    raise DataError(f"{source.file}: the file holds no rows; remove it, or write it again")
