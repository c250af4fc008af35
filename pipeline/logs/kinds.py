"""Types of the user and item ids of a log: int64 or string, the same in all of its files."""

from __future__ import annotations

import pyarrow as pa

from graphhash.errors import DataError
from pipeline.logs.columns import Columns, is_number, text_kind
from pipeline.logs.readers import READERS, require_column
from pipeline.logs.sources import Chunk, Source, open_parquet

# Whole lines of about so many bytes show the ids of a text file.
HEAD_BYTES = 2**16


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


def _check_weight_column(source: Source, columns: Columns) -> None:
    if columns.weight is None:
        return
    if source.format == "lightgcn":
        raise DataError(f"{source.file}: LightGCN files have no weights; leave weight_column={columns.weight!r} out")
    if source.format.startswith("movielens") and columns.weight != "rating":
        raise DataError(
            f"{source.file}: weight_column={columns.weight!r}, MovieLens has 'rating' alone; use that or none"
        )


def _source_kinds(source: Source, columns: Columns) -> tuple[str, str]:
    if source.format == "parquet":
        schema = open_parquet(source.file).schema_arrow
        for name in (columns.user, columns.item, columns.weight):
            if name:
                require_column(source, name, schema.names)
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


def _parquet_kind(source: Source, name: str, schema: pa.Schema) -> str:
    dtype = schema.field(name).type
    dtype = dtype.value_type if pa.types.is_dictionary(dtype) else dtype
    if pa.types.is_integer(dtype):
        return "int64"
    if pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or pa.types.is_string_view(dtype):
        return "string"
    raise DataError(f"{source.file}: column {name!r} is {dtype}, ids are integers or strings; cast the column")
