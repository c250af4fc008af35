"""The split of a CTR data set by time: its column of times, and the part of every row.

Validation begins at one time, the test at a later one (`pipeline.logs.time_bounds`). Vocabularies, statistics and graphs are those of the
rows before both, so nothing later reaches train. Times are read in the format that [times] of the schema gives, or as
`pipeline.logs.times` reads them. A split holds 17 bytes per row of the log in memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from numpy.typing import NDArray

from graphhash.errors import DataError
from pipeline.ctr.libfm import LibfmFile
from pipeline.ctr.schema import CtrSchema
from pipeline.logs.sources import TABLES
from pipeline.logs.tables import LogFile, Rows, column_names, require
from pipeline.logs.time_bounds import find_bounds
from pipeline.logs.times import recognise, unit_of
from pipeline.logs.values import microseconds, microseconds_in
from serving.values import TimeFormat, time_format

if TYPE_CHECKING:
    from pipeline.config.run_config import DataConfig


@dataclass(frozen=True)
class TimeColumn:
    """A column of times, and how it is read.

    Args:
        name: of the column.
        form: the format of [times] in the schema; None: numbers or dates.
        unit: of numbers: "s", "ms", "us" or "ns"; None: dates.
    """

    name: str
    form: TimeFormat | None = None
    unit: str | None = None

    def microseconds(self, rows: Rows) -> NDArray[np.int64]:
        """Microseconds since 1970 in UTC of every row, shape (n,).

        Raises:
            DataError: a time is missing or is none.
        """
        values = rows.columns[self.name]
        found, wrong = microseconds(values, self.unit) if self.form is None else microseconds_in(values, self.form)
        if wrong.any():
            value = values[int(np.argmax(wrong))].as_py()
            what = "is missing" if value in (None, "") else f"is {value!r:.60}, no time"
            raise DataError(f"{rows.where(wrong)}: column {self.name!r} {what}; fix or drop the row")
        return found


class TimeFacts(TypedDict):
    """What `ingest.json` holds of a split by time: the column, and the time at which a part begins."""

    column: str
    first: dict[str, str | None]


def find_time_column(file: LogFile, head: Rows, schema: CtrSchema | None, named: str | None) -> str:
    """The column that is named, or the only one that is recognised or stands in [times] of the schema.

    Args:
        head: first rows of the file, of a data set that is known by name with all of its columns.

    Raises:
        DataError: there is no such column or more than one.
    """
    if isinstance(file, LibfmFile):
        raise DataError(f"{file.path}: libfm files have no times; use another split (--split random)")
    present = [name for name in column_names(file) if name] if file.format in TABLES else list(head.columns)
    if named is not None:
        require(file, [named], present)
        return named
    return recognise(file.path, file.format, present, also=[name for name, _ in schema.times] if schema else [])


def time_column(head: Rows, name: str, schema: CtrSchema) -> TimeColumn:
    """How a column of times is read, by the schema or by its first rows.

    Raises:
        DataError: they are no times, or the format has no year.
    """
    form = dict(schema.times).get(name)
    if form is None:
        return TimeColumn(name, unit=unit_of(head.file.path, name, head.columns[name]))
    if "%y" not in form.lower():
        raise DataError(
            f"{head.file.path}: the time {name!r} has the format {form!r}, without a year; name another with time_column (--time-column)"
        )
    return TimeColumn(name, form=time_format(form))


def split_by_time(
    data: DataConfig, column: TimeColumn, times: Iterable[NDArray[np.int64]]
) -> tuple[NDArray[np.uint8], TimeFacts]:
    """TRAIN, VALIDATION or TEST of every row, shape (n_rows,), and what is recorded of the split.

    Args:
        times: microseconds since 1970 of consecutive rows, in reading order.

    Raises:
        DataError: no row is left for train, or none from a date of the settings.
    """
    of_rows = np.concatenate(list(times))
    bounds = find_bounds(data, [np.sort(of_rows)])
    return bounds.parts(of_rows), {"column": column.name, "first": bounds.as_texts()}
