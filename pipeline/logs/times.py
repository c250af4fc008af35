"""The column of times of an interaction log: the one that is named, or the only one that looks like it; and the unit of its numbers.

Times are timestamps or dates of parquet, numbers since 1970 (seconds, or milli-, micro- or nanoseconds by their size), or texts in
ISO 8601 such as `2024-05-01` and `2024-05-01T12:30:00+02:00`. A time without an offset is taken in UTC.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from graphhash.errors import DataError
from pipeline.logs.columns import Columns
from pipeline.logs.csv import header_of
from pipeline.logs.readers import READERS, movielens_fields, require_column
from pipeline.logs.sources import Chunk, Source, open_parquet
from pipeline.logs.values import SAMPLE_IDS, is_text, matches, microseconds, numbers, plain, whole_numbers
from serving.values import NUMBER

NAMES = ("timestamp", "time", "datetime", "date", "ts", "event_time", "created_at", "timestamp_ms", "unix_time")
# Numbers up to these sizes are in this unit: seconds end in the year 5138, milliseconds begin in 1973.
SIZES = ((1e11, "s"), (1e14, "ms"), (1e17, "us"))
DIGITS = r"(?:19[7-9]|20[0-9])[0-9](?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])(?:[0-9]{4}|[0-9]{6})?"
REMEDY = "name the column of times with time_column (--time-column NAME)"


def find_times(sources: Sequence[Source], columns: Columns, named: str | None) -> Columns:
    """The columns with that of times and its unit, by the first file.

    Args:
        named: the column of the settings; None: recognised by its name or, in parquet, its type.

    Raises DataError when there is no such column or more than one, or the first times are none.
    """
    for source in sources:
        present = _names(source)
        column = named or recognise(source.file, source.format, present)
        named = column
        require_column(source, column, present)
    columns = replace(columns, time=named)
    return replace(columns, time_unit=unit_of(sources[0].file, str(named), _head(sources[0], columns)))


def _names(source: Source) -> list[str]:
    if source.format == "lightgcn":
        raise DataError(
            f"{source.file}: LightGCN files have no times; use another split (--split random) and no half_life"
        )
    if source.format.startswith("movielens"):
        return ["rating", "timestamp"] if movielens_fields(source) == 4 else ["rating"]
    if source.format == "parquet":
        return list(open_parquet(source.file).schema_arrow.names)
    return header_of(source.file, source.format, source.csv)


def recognise(file: str, format: str, present: Sequence[str], *, also: Sequence[str] = ()) -> str:
    """The only column of a file that is named like times or, in parquet, has a type of times.

    Args:
        present: all columns of the file.
        also: columns that are known to hold times.

    Raises DataError when there is none or more than one.
    """
    found = {name for name in present if name.lower() in NAMES or name in also}
    if format == "parquet":
        schema = open_parquet(file).schema_arrow
        found |= {name for name in present if pa.types.is_temporal(schema.field(name).type)}
    names = [name for name in present if name in found]
    if len(names) != 1:
        what = (
            f"columns {', '.join(names)} all look like times"
            if names
            else f"no column of times is recognised in {', '.join(present)}"
        )
        raise DataError(f"{file}: {what}; {REMEDY}")
    return names[0]


def unit_of(file: str, column: str, times: pa.Array) -> str | None:
    """Unit of the numbers in a file's first times, None for dates.

    Raises DataError when they are no times.
    """
    if pa.types.is_temporal(times.type):
        return None
    given = times.drop_null().slice(0, SAMPLE_IDS)
    if is_text(given.type) and 2 * matches(given, NUMBER).sum() <= len(given):
        if len(given) and microseconds(given, None)[1].all():
            raise DataError(
                f"{file}: column {column!r} holds {given[0].as_py()!r:.60}, no time; write times as numbers since 1970 "
                f"or in ISO 8601 (2024-05-01 12:30:00), or {REMEDY}"
            )
        return None
    _refuse_digits(file, column, given)
    sizes = np.abs(numbers(given)[0])
    middle = float(np.median(sizes[np.isfinite(sizes)])) if np.isfinite(sizes).any() else 0.0
    return next((unit for most, unit in SIZES if middle < most), "ns")


def _refuse_digits(file: str, column: str, times: pa.Array) -> None:
    """Raise DataError for dates written as digits, 20240501 or 20240501123000, which would pass for numbers since 1970."""
    whole, _ = whole_numbers(times)
    found = whole.drop_null().cast(pa.string())
    if len(found) and matches(found, DIGITS).all():
        raise DataError(
            f"{file}: column {column!r} holds {found[0].as_py()}, a date in digits; write times as numbers since 1970 or in "
            "ISO 8601 (2024-05-01 12:30:00)"
        )


def _head(source: Source, columns: Columns) -> pa.Array:
    """The first times of a file."""
    if source.format == "parquet":
        for batch in open_parquet(source.file).iter_batches(SAMPLE_IDS, columns=[columns.time], use_threads=False):
            return plain(batch.column(0))
    with open(source.file, "rb") as stream:
        stop = len(stream.read(2**16)) + len(stream.readline())
    for raw in READERS[source.format](Chunk(source, 0, 0, stop), columns):
        if raw.times is not None and len(raw.times):
            return raw.times
    return pa.array([], pa.string())
