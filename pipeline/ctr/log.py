"""A CTR data set: its files and its schema, found from the settings, and its rows in one order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from graphhash.errors import DataError
from pipeline.ctr.columns import guess_schema, with_kinds, with_made_columns
from pipeline.ctr.datasets import NAMED, find_name, named_files, read_named
from pipeline.ctr.libfm import LibfmFile, find_libfm, is_libfm, read_libfm
from pipeline.ctr.published import PUBLISHED, has_published_files, say_published
from pipeline.ctr.schema import Category, CtrSchema, MultiValued, read_schema
from pipeline.ctr.times import TimeColumn, find_time_column, time_column
from pipeline.logs.csv import CsvFormat
from pipeline.logs.sources import TABLES
from pipeline.logs.tables import LogFile, Rows, column_names, find_files, listed_names, read_rows

if TYPE_CHECKING:
    from pipeline.config.run_config import DataConfig

FeatureT = TypeVar("FeatureT", Category, MultiValued)
# As in pipeline.config.run_config, where a column of this name need not be there.
# What a column without a name is called where columns are listed.
NAMELESS = "(without a name)"
DEFAULT_COLUMNS = ("user_id", "item_id")


@dataclass(frozen=True)
class CtrLog:
    """Files in reading order, what their columns are, the columns that the schema was guessed without, and that of a split by time."""

    files: tuple[LogFile, ...]
    schema: CtrSchema
    left_out: dict[str, str]
    time: TimeColumn | None = None

    def rows(self, seed: int) -> Iterator[Rows]:
        """All rows, file by file, with the columns of the schema."""
        for file in self.files:
            for rows in _read(file, self.schema.names, seed):
                yield with_made_columns(rows, self.schema)

    def times(self, seed: int) -> Iterator[NDArray[np.int64]]:
        """Microseconds since 1970 of all rows, in the same order; with a split by time.

        Raises:
            DataError: a time is missing or is none.
        """
        assert self.time is not None
        for file in self.files:
            for rows in _read(file, [self.time.name], seed):
                yield self.time.microseconds(rows)


def log_paths(data: DataConfig) -> list[Path]:
    """Every file that decides what is ingested; DataError where the schema is none."""
    files = _files(data)
    if data.schema:
        read_schema(Path(data.schema))
    paths = [path for file in files for path in (file.path, *file.joined)]
    return [*map(Path, paths), *([Path(data.schema)] if data.schema else [])]


def named_settings(path: str, format: str) -> dict[str, Any]:
    """The shares, or the split, that a named data set brings along, by key."""
    name = find_name(path, format)
    shares = NAMED[name].shares if name else None
    given = name in PUBLISHED and has_published_files(Path(path))
    split = {"data.split": "given"} if given else {}
    return split if shares is None else {"data.validation": shares[0], "data.test": shares[1], **split}


def check_published(data: DataConfig) -> bool | None:
    """Log whether the files are those of a published split, and whether they are; None: the data set is none that was published split."""
    name = find_name(data.path, data.format)
    return say_published(name, _files(data)) if name in PUBLISHED else None


def open_log(data: DataConfig) -> CtrLog:
    """The log that the settings name, its schema read, known by name or guessed.

    Raises:
        DataError: a file is missing, or the schema does not fit it.
    """
    files = tuple(_files(data))
    name = find_name(data.path, data.format)
    left_out: dict[str, str] = {}
    columns = None
    schema = read_schema(Path(data.schema)) if data.schema else NAMED[name].schema if name else None
    if schema is not None:
        columns = schema.names
    first = files[0]
    head = next(_read(first, columns, data.seed))
    time: str | None = None
    if data.split == "temporal":
        time = find_time_column(first, head, schema, data.time_column)
    if schema is None:
        for column, default in zip((data.user_column, data.item_column), DEFAULT_COLUMNS, strict=True):
            if column != default and column not in head.columns:
                raise DataError(
                    f"{first.path}: no column {column!r}; the columns are {listed_names(list(head.columns))}"
                )
        schema, left_out = guess_schema(head, data.label_column, data.user_column, data.item_column, time)
        if first.format in TABLES and "" in column_names(first):
            left_out[NAMELESS] = "the index of a pandas frame"
    elif data.label_column not in (None, schema.label):
        raise DataError(
            f"data.label_column={data.label_column} contradicts the schema, whose label is {schema.label!r}; leave it out"
        )
    kinds = {data.user_column: data.user_kind, data.item_column: data.item_kind}
    schema = replace(
        schema,
        categories=tuple(
            replace(c, kind=kinds.get(c.name, c.kind)) if c.kind == "auto" else c for c in schema.categories
        ),
    )
    if data.min_count > 1:
        schema = replace(
            schema,
            categories=tuple(_counted(c, data.min_count) for c in schema.categories),
            multi_valued=tuple(_counted(feature, data.min_count) for feature in schema.multi_valued),
        )
    split_by = None if time is None else time_column(next(_read(first, [time], data.seed)), time, schema)
    return CtrLog(files, with_kinds(schema, head), left_out, split_by)


def open_later_log(data: DataConfig, schema: CtrSchema) -> CtrLog:
    """A later log with the columns of a run's schema, whatever the run's split.

    Raises:
        DataError: a file is missing.
    """
    return CtrLog(tuple(_files(replace(data, split="random", schema=None))), schema, {})


def _files(data: DataConfig) -> list[LogFile]:
    name = find_name(data.path, data.format)
    if name:
        return named_files(name, data.path, data.split)
    if is_libfm(data.path, data.format):
        return find_libfm(data.path, data.split)
    return find_files(data.path, data.format, data.split, CsvFormat.of(data))


def _read(file: LogFile, names: Sequence[str] | None, seed: int) -> Iterator[Rows]:
    """The rows of a file of any format; a named data set has its own columns and draws negatives from the seed."""
    if file.format in NAMED:
        return read_named(file, seed)
    return read_libfm(file, names) if isinstance(file, LibfmFile) else read_rows(file, names)


def _counted(column: FeatureT, min_count: int) -> FeatureT:
    return column if column.min_count is not None else replace(column, min_count=min_count)
