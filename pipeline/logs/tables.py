"""Tables of labelled samples: the files of a CTR data set, and their rows as columns in batches of bounded size.

Formats: csv and tsv with a header, and parquet. Paths are those of `pipeline.logs.sources`. With split="given" there are a
train and a test file. Rows are counted as a text editor and `pipeline.logs.readers` count them: from 1, a header being row 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from graphhash.errors import DataError, did_you_mean, first_line
from pipeline.logs.csv import DEFAULT_FORMAT, CsvFormat, header_of, read_records
from pipeline.logs.sources import TABLES, find_sources, open_parquet, skip_empty
from pipeline.logs.values import plain

BATCH_ROWS = 500_000
# Column names that an error message lists at most.
NAMES_SHOWN = 30


@dataclass(frozen=True)
class LogFile:
    """One file of the data set.

    Args:
        path: as the user knows it.
        format: csv, tsv or parquet, or one that a task reads by itself.
        is_test: it is the test file of split="given".
        csv: how a csv or tsv file is written.
        joined: files whose columns are joined to it by id.
        is_validation: it is the validation file of split="given".
    """

    path: str
    format: str
    is_test: bool = False
    csv: CsvFormat = DEFAULT_FORMAT
    joined: tuple[str, ...] = ()
    is_validation: bool = False


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a file.

    Args:
        columns: an array per column, all of the same length.
        first: number of the first row in the file.
        file: where the rows come from.
    """

    columns: dict[str, pa.Array]
    first: int
    file: LogFile

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def where(self, mask: NDArray[np.bool_]) -> str:
        """Place of the first marked row, for a message.

        Args:
            mask: shape (n_rows,).
        """
        return f"{self.file.path}: row {self.first + int(np.argmax(mask))}"


def find_files(
    path: str,
    format: str,
    split: str,
    layout: CsvFormat = DEFAULT_FORMAT,
) -> list[LogFile]:
    """The files of a data set in csv, tsv or parquet that hold rows, in reading order.

    Raises:
        DataError: there is none, none holds a row, or the format holds no labels.
    """
    sources = find_sources(path, format, split, layout)
    for source in sources:
        if source.format not in TABLES:
            raise DataError(f"{source.file}: {source.format} holds no labels; give csv, tsv, parquet or libfm")
    return [LogFile(s.file, s.format, s.is_test, s.csv) for s in skip_empty(sources, path)]


def read_rows(file: LogFile, names: Sequence[str] | None = None) -> Iterator[Rows]:
    """The rows of a csv, tsv or parquet file.

    Args:
        names: columns to read; None: all.

    Raises:
        DataError: a column is missing, or the file is damaged or holds no row.
    """
    if file.format == "parquet":
        return numbered(file, _read_parquet(file, names))
    return numbered(file, _read_csv(file, names), first=file.csv.first_row)


def column_names(file: LogFile) -> list[str]:
    """All column names of a csv, tsv or parquet file, in order.

    Raises:
        DataError: the file cannot be read.
    """
    if file.format == "parquet":
        return list(open_parquet(file.path).schema_arrow.names)
    return header_of(file.path, file.format, file.csv)


def numbered(file: LogFile, batches: Iterable[dict[str, pa.Array]], first: int = 1) -> Iterator[Rows]:
    """Batches of columns as rows with their numbers.

    Args:
        first: number of the first row.

    Raises:
        DataError: there is no row.
    """
    n_rows = 0
    for columns in batches:
        rows = Rows(columns, first + n_rows, file)
        n_rows += len(rows)
        if len(rows):
            yield rows
    if not n_rows:
        raise DataError(f"{file.path}: the file holds no rows; remove it, or write it again")


def require(file: LogFile, names: Sequence[str], present: Sequence[str]) -> None:
    """Raise DataError if a column is not in the file, or is there twice."""
    for name in names:
        if present.count(name) > 1:
            raise DataError(f"{file.path}: {present.count(name)} columns are named {name!r}; rename all but one")
        if name not in present:
            hint = did_you_mean(name, present, cutoff=0.5)
            raise DataError(f"{file.path}: no column {name!r}; {hint}the columns are {listed_names(present)}")


def listed_names(names: Sequence[str]) -> str:
    """The first column names of a file, for a message."""
    return ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")


def check_not_empty(files: Sequence[LogFile]) -> None:
    """Raise DataError for a file of no bytes."""
    for file in files:
        if Path(file.path).stat().st_size == 0:
            raise DataError(f"{file.path}: the file is empty; remove it, or write it again")


def _read_csv(file: LogFile, names: Sequence[str] | None) -> Iterator[dict[str, pa.Array]]:
    present = header_of(file.path, file.format, file.csv)
    names = list(names or _named(file.path, present))
    require(file, names, present)
    row = file.csv.first_row
    for part in read_records(file.path, file.format, file.csv, names, use_threads=True):
        if part.malformed:
            _number, reason, text = part.malformed[0]
            raise DataError(
                f"{file.path}: after row {row - 1}: {reason} ({text:.80}); write as many fields in every row"
            )
        row += len(part.rows)
        yield {name: part.batch.column(name) for name in names}


def _read_parquet(file: LogFile, names: Sequence[str] | None) -> Iterator[dict[str, pa.Array]]:
    parquet = open_parquet(file.path)
    present = parquet.schema_arrow.names
    names = list(names or _named(file.path, present))
    require(file, names, present)
    n_rows = 0
    try:
        for batch in parquet.iter_batches(BATCH_ROWS, columns=names):
            batch.validate(full=True)  # Text that is not UTF-8 would fail later.
            n_rows += len(batch)
            yield {name: plain(batch.column(name)) for name in names}
        if n_rows != parquet.metadata.num_rows:
            raise ValueError(f"it holds {n_rows} rows where it states {parquet.metadata.num_rows}")
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{file.path}: damaged ({first_line(error)}); write or copy it again") from None


def _named(path: str, present: Sequence[str]) -> list[str]:
    """All columns but those without a name, each once. Raises DataError where there is none."""
    named = list(dict.fromkeys(name for name in present if name))
    if not named:
        raise DataError(
            f"{path}: no column has a name; write a header, or name the columns (--header no --columns A,B,C)"
        )
    return named
