"""Reading csv and tsv files: every column as text, from files of any encoding and compression, with the number of every record.

Arrow takes the end of a file for the end of an open quote, and then swallows all rows behind the quote. A line of our own is therefore
appended to what Arrow reads: if it does not come out as the last record, a quote is open.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
from numpy.typing import NDArray

from graphhash.errors import DataError, first_line

if TYPE_CHECKING:
    from pipeline.config.run_config import DataConfig

BLOCK_BYTES = 16 * 2**20
# Longest header that is looked at, with a few lines behind it.
HEAD_BYTES = 2**20
# Extension of a compressed file -> Arrow's name of the codec.
CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4", ".br": "brotli"}
SEPARATORS = (",", "\t", ";", "|")
# Lines behind the header that have to have as many fields.
LINES_COMPARED = 5
END = "graphhash-end-of-file"


@dataclass(frozen=True)
class CsvFormat:
    """How csv and tsv files are written.

    Args:
        separator: between fields; None: a tab in tsv, else recognised from the first lines.
        encoding: as Python names it.
        columns: names of the columns of files without a header; empty: the first line has the names.
    """

    separator: str | None = None
    encoding: str = "utf-8"
    columns: tuple[str, ...] = ()

    @classmethod
    def of(cls, data: DataConfig) -> CsvFormat:
        """What the settings say."""
        return cls(data.separator, data.encoding, data.columns or ())

    @property
    def first_row(self) -> int:
        """Number of the first record that holds values: a header is row 1."""
        return 1 if self.columns else 2


DEFAULT_FORMAT = CsvFormat()


@dataclass(frozen=True)
class Records:
    """Consecutive records of a file.

    Args:
        batch: the columns that were asked for, as text.
        rows: numbers of the records, int64, shape (n,).
        malformed: number, reason and text of the records before the last of them that have another number of fields.
    """

    batch: pa.RecordBatch
    rows: NDArray[np.int64]
    malformed: list[tuple[int, str, str]]


def as_text(names: Sequence[str], *, only: bool = True) -> pa_csv.ConvertOptions:
    """Columns as text, because Arrow would take a column's type from its first rows.

    Null is an unquoted empty field: "NA" is an id, and a quoted empty field is the empty string.

    Args:
        only: leave all other columns out.
    """
    return pa_csv.ConvertOptions(
        include_columns=list(names) if only else None,
        column_types={name: pa.string() for name in names},
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )


def delimiter_of(file: str, format: str, layout: CsvFormat = DEFAULT_FORMAT) -> str:
    """The text between two fields: the one that is named, a tab in tsv, else the one that cuts the first lines alike.

    Of several, the one that gives the most fields; the comma where none does.

    Raises:
        DataError: the file cannot be read, or is of another encoding.
    """
    if layout.separator is not None:
        return layout.separator
    if format == "tsv":
        return "\t"
    lines = _head(file, layout)
    n_fields = {separator: _n_fields(lines, separator) for separator in SEPARATORS}
    if layout.columns and len(layout.columns) in n_fields.values():
        return next(separator for separator, n in n_fields.items() if n == len(layout.columns))
    return max(SEPARATORS, key=lambda separator: n_fields[separator])


def header_of(file: str, format: str, layout: CsvFormat = DEFAULT_FORMAT) -> list[str]:
    """Column names of a file, which may have no rows.

    Raises:
        DataError: the file cannot be read, or is of another encoding; or its first line is no csv.
    """
    if layout.columns:
        return list(layout.columns)
    separator = delimiter_of(file, format, layout)
    try:
        return next(csv.reader(_head(file, layout), delimiter=separator), [])
    except csv.Error as error:
        raise DataError(f"{file}: no readable csv ({error}); write it as UTF-8 csv with a header") from None


def read_records(
    file: str, format: str, layout: CsvFormat, names: Sequence[str], *, use_threads: bool = False
) -> Iterator[Records]:
    """The records of a file in batches of bounded size.

    Args:
        names: columns to read, each of which the file has once.
        use_threads: let Arrow use its threads; malformed records then have no number (0).

    Raises:
        DataError: the file is damaged or of another encoding, or a quote is left open.
    """
    header = header_of(file, format, layout)
    separator = delimiter_of(file, format, layout)
    numbering, held = _Numbering(separator.join([END] * len(header)), layout.first_row), None
    marked = None
    try:
        with open_stream(file, layout.encoding) as stream:
            marked = _Marked(stream, f"\n{numbering.mark}\n".encode())
            options = pa_csv.ReadOptions(
                use_threads=use_threads, block_size=BLOCK_BYTES, column_names=header if layout.columns else None
            )
            parsing = pa_csv.ParseOptions(
                delimiter=separator, newlines_in_values=True, invalid_row_handler=numbering.note_malformed
            )
            with pa_csv.open_csv(pa.PythonFile(marked), options, parsing, as_text(names)) as reader:
                for batch in reader:
                    if held is not None:
                        yield held
                    held = numbering.numbered(batch)
    except (pa.ArrowException, OSError, ValueError) as error:
        is_text = isinstance(error, UnicodeError) and marked is not None
        raise _unreadable(file, marked.n_lines + 1 if is_text and marked else numbering.next, error, layout) from None
    held = numbering.without_mark(held)
    if not numbering.is_whole:
        raise DataError(
            f"{file}: row {numbering.open_row}: a quote is opened and never closed; close it, or write it twice within quotes"
        )
    if numbering.malformed:
        held = _with_malformed(held, numbering.malformed, names)
    if held is not None:
        yield held


class _Numbering:
    """Numbers of the records of a file as they come, and whether the line behind them came out as a record.

    Args:
        mark: that line.
        first: number of the first record.
    """

    def __init__(self, mark: str, first: int):
        self.mark, self.next = mark, first
        self.is_whole = False
        self.malformed: list[tuple[int, str, str]] = []
        self.open_row = first
        self._skipped: list[int] = []
        self._is_open = False

    def note_malformed(self, row: pa_csv.InvalidRow) -> str:
        """Arrow's handler of records with another number of fields."""
        text = row.text.strip()
        if text == self.mark:
            self.is_whole = True
        elif text.endswith(self.mark):
            self._is_open = True  # The quote begins in this record.
        else:
            if row.number is not None:
                self._skipped.append(row.number)
            reason = f"{row.actual_columns} fields, the header has {row.expected_columns}"
            self.malformed.append((row.number or 0, reason, row.text))
        return "skip"

    def numbered(self, batch: pa.RecordBatch) -> Records:
        """The next batch, with the malformed records that were noted."""
        # Malformed records are left out by the parser but have numbers.
        span = np.arange(self.next, self.next + len(batch) + len(self._skipped))
        rows = span[~np.isin(span, self._skipped)][: len(batch)]
        self.next = int(rows[-1]) + 1 if len(rows) else self.next
        found, self.malformed = Records(batch, rows, self.malformed), []
        self._skipped = [number for number in self._skipped if number >= self.next]
        return found

    def without_mark(self, last: Records | None) -> Records | None:
        """The last batch without the line behind the file."""
        if not self.is_whole and last is not None and len(last.rows) and _is_mark(last.batch):
            self.is_whole = True
            last = Records(last.batch.slice(0, len(last.rows) - 1), last.rows[:-1], last.malformed)
        self.open_row = self.next + len(self._skipped) if self._is_open else self.next - 1
        return last


def open_stream(file: str, encoding: str = "utf-8") -> pa.NativeFile:
    """The bytes of a file as UTF-8, decompressed by its extension.

    Raises:
        OSError: the file cannot be opened.
    """
    stream = pa.input_stream(file, compression=CODECS.get(Path(file).suffix))
    return stream if encoding == "utf-8" else pa.transcoding_input_stream(stream, encoding, "utf-8")


class _Marked(io.RawIOBase):
    """A stream of UTF-8, and a line behind it.

    Text is checked here: of a malformed record that is no UTF-8, Arrow prints a traceback.
    """

    def __init__(self, stream: pa.NativeFile, line: bytes):
        self._stream, self._line = stream, line
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.n_lines = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size if size >= 0 else None)
        try:
            self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            self.n_lines += data[: error.start].count(b"\n")
            raise
        self.n_lines += data.count(b"\n")
        if data and size >= 0:
            return data
        size = len(self._line) if size < 0 else size
        rest, self._line = self._line[:size], self._line[size:]
        return data + rest


def _is_mark(batch: pa.RecordBatch) -> bool:
    return all(column[-1].as_py() == END for column in batch.columns)


def _with_malformed(held: Records | None, malformed: list[tuple[int, str, str]], names: Sequence[str]) -> Records:
    if held is None:
        empty = pa.record_batch({name: pa.array([], pa.string()) for name in names})
        return Records(empty, np.empty(0, np.int64), malformed)
    return Records(held.batch, held.rows, held.malformed + malformed)


def _head(file: str, layout: CsvFormat) -> list[str]:
    """The first lines of a file, with their ends; the last of them may be cut."""
    try:
        with open_stream(file, layout.encoding) as stream:
            data = stream.read(HEAD_BYTES)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(file, 1, error, layout) from None
    if len(data) == HEAD_BYTES:
        data = data[: data.rfind(b"\n") + 1] or data
    # The header and a few lines are all that is looked at, so that other lines are free to hold anything.
    text = b"".join(data.splitlines(keepends=True)[: 10 * LINES_COMPARED])
    try:
        return io.StringIO(text.decode("utf-8-sig"), newline="").readlines()
    except UnicodeDecodeError as error:
        raise _unreadable(file, text[: error.start].count(b"\n") + 1, error, layout) from None


def _n_fields(lines: Sequence[str], separator: str) -> int:
    """Fields of the first line; 1 where most of the lines behind it have another number of them."""
    try:
        rows = [row for row, _ in zip(csv.reader(lines, delimiter=separator), range(LINES_COMPARED + 1), strict=False)]
    except csv.Error:
        return 1
    first, *others = [len(row) for row in rows if row] or [1]
    return first if 2 * others.count(first) >= len(others) else 1


def _unreadable(file: str, row: int, error: Exception, layout: CsvFormat) -> DataError:
    """What a user is told of an error of Arrow or of a codec."""
    reason = first_line(error)
    if isinstance(error, UnicodeError) or "UTF8" in reason or "utf" in reason.lower():
        return DataError(
            f"{file}: near row {row}: not {layout.encoding} text; name its encoding (--encoding latin-1, data.encoding), or convert it "
            "(iconv -f LATIN1 -t UTF-8)"
        )
    if "straddling" in reason:
        reason = f"a row is longer than {BLOCK_BYTES:,} bytes: perhaps a quote is left open"
    return DataError(f"{file}: near row {row}: {reason}; write it as UTF-8 csv")
