"""The files of a click log, and their rows as columns in batches of bounded size.

Formats: csv and tsv with a header, parquet, libfm (also svmlight), and those of the named data sets (`pipeline.ctr.datasets`). Paths are
those of `pipeline.logs.sources`; .libfm, .svm and .svmlight are libfm. With split="given" there are a train and a test file.

A libfm line is `label index:value ...`, its label 1 and 0, or 1 and -1. Where all lines of the first block have as many features, these
are the columns f0, f1, ...: an index, or, where values are not all 1, the value. Else there is one multi-valued column `features`.

Rows are counted as a text editor and `pipeline.logs.readers` count them: from 1, a header being row 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
from numpy.typing import NDArray

from graphhash.errors import DataError
from pipeline.ctr.schema import nearest
from pipeline.logs.sources import TABLES, Source, find_sources, open_parquet

LIBFM = (".libfm", ".svm", ".svmlight")
CSV_BLOCK_BYTES = 16 * 2**20
TEXT_BLOCK_BYTES = 32 * 2**20
BATCH_ROWS = 500_000


@dataclass(frozen=True)
class LogFile:
    """One file of the log.

    Args:
        path: as the user knows it.
        format: csv, tsv, parquet, libfm, frappe or movielens-1m.
        is_test: it is the test file of split="given".
        header: column names of a csv file that has no line of them.
        layout: of libfm: for every feature "index" or "value"; empty: features are one multi-valued column.
        beside: files that are joined to it.
    """

    path: str
    format: str
    is_test: bool = False
    header: tuple[str, ...] = ()
    layout: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a file: an array per column, the number of the first row in the file, and where they come from."""

    columns: dict[str, pa.Array]
    first: int
    file: LogFile

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def where(self, mask: NDArray[np.bool_]) -> str:
        """Place of the first row that is marked, for a message."""
        return f"{self.file.path}: row {self.first + int(np.argmax(mask))}"


def find_files(path: str, format: str, split: str) -> list[LogFile]:
    """The files of a log in csv, tsv, parquet or libfm, in reading order.

    Raises:
        DataError: there is none, a file is empty, or the format holds no click log.
    """
    if format == "libfm" or (format == "auto" and _is_libfm(Path(path))):
        files = [LogFile(s.file, "libfm", s.is_test) for s in _libfm_sources(path, split)]
        _check_not_empty(files)
        layout = _layout(files[0])
        return [replace(file, layout=layout) for file in files]
    files = [LogFile(s.file, s.format, s.is_test) for s in find_sources(path, format, split)]
    for file in files:
        if file.format not in TABLES:
            raise DataError(f"{file.path}: {file.format} holds no clicks; give csv, tsv, parquet or libfm")
    _check_not_empty(files)
    return files


def read_rows(file: LogFile, names: Sequence[str] | None = None) -> Iterator[Rows]:
    """The rows of a csv, tsv, parquet or libfm file.

    Args:
        names: columns to read; None: all.

    Raises:
        DataError: a column is missing, or the file is damaged or holds no row.
    """
    first, n_rows = (1, 0) if file.format in ("parquet", "libfm") or file.header else (2, 0)
    read = {"parquet": _read_parquet, "libfm": _read_libfm}.get(file.format, _read_csv)
    for columns in read(file, names):
        rows = Rows(columns, first + n_rows, file)
        n_rows += len(rows)
        if len(rows):
            yield rows
    if not n_rows:
        raise DataError(f"{file.path}: the file holds no rows; remove it, or write it again")


def require(file: LogFile, names: Sequence[str], there: Sequence[str]) -> None:
    """Raise DataError if a column is not in the file, or is there twice."""
    for name in names:
        if there.count(name) > 1:
            raise DataError(f"{file.path}: {there.count(name)} columns are named {name!r}; rename all but one")
        if name not in there:
            shown = ", ".join(there[:30]) + (", ..." if len(there) > 30 else "")
            raise DataError(f"{file.path}: no column {name!r}; {nearest(name, there)}the columns are {shown}")


def _check_not_empty(files: Sequence[LogFile]) -> None:
    for file in files:
        if Path(file.path).stat().st_size == 0:
            raise DataError(f"{file.path}: the file is empty; remove it, or write it again")


# ---- csv, parquet


def _read_csv(file: LogFile, names: Sequence[str] | None) -> Iterator[dict[str, pa.Array]]:
    parse = pa_csv.ParseOptions(delimiter=delimiter(file), newlines_in_values=True)
    read = pa_csv.ReadOptions(block_size=CSV_BLOCK_BYTES, column_names=list(file.header) or None)
    try:
        there = list(file.header) or csv_header(file)
        require(file, names or [], there)
        names = list(names or dict.fromkeys(there))
        require(file, names, there)
        # Every column as text: the type rule is ours. Null is an unquoted empty field.
        convert = pa_csv.ConvertOptions(
            include_columns=names,
            column_types={name: pa.string() for name in names},
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        )
        with pa_csv.open_csv(file.path, read_options=read, parse_options=parse, convert_options=convert) as reader:
            for batch in reader:
                yield {name: batch.column(name) for name in names}
    except pa.ArrowException as error:
        raise DataError(f"{file.path}: {_one_line(error)}; write it as UTF-8 csv with a header") from None


def csv_header(file: LogFile) -> list[str]:
    """Names in the first line."""
    with open(file.path, "rb") as stream:
        line = stream.readline(2**20).lstrip(b"\xef\xbb\xbf")
    options = pa_csv.ParseOptions(delimiter=delimiter(file))
    # Read as a row of data, so that a header without rows is one too.
    names = pa_csv.read_csv(
        pa.BufferReader(line),
        parse_options=options,
        read_options=pa_csv.ReadOptions(autogenerate_column_names=True),
        convert_options=pa_csv.ConvertOptions(null_values=[], column_types={}, strings_can_be_null=False),
    )
    return [str(names.column(i)[0].as_py()) for i in range(names.num_columns)]


def delimiter(file: LogFile) -> str:
    """Tab for tsv, and for a .csv file whose first line has tabs and no comma."""
    if file.format == "tsv":
        return "\t"
    with open(file.path, "rb") as stream:
        line = stream.readline(2**20)
    return "\t" if b"\t" in line and b"," not in line else ","


def _read_parquet(file: LogFile, names: Sequence[str] | None) -> Iterator[dict[str, pa.Array]]:
    parquet = open_parquet(file.path)
    there = parquet.schema_arrow.names
    require(file, names or list(dict.fromkeys(there)), there)
    names = list(names or there)
    try:
        for batch in parquet.iter_batches(BATCH_ROWS, columns=names):
            columns = {name: batch.column(name) for name in names}
            yield {
                name: array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
                for name, array in columns.items()
            }
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file.path}: damaged ({_one_line(error)}); write or copy it again") from None


# ---- libfm


def _is_libfm(path: Path) -> bool:
    return path.suffix in LIBFM or (path.is_dir() and any(p.suffix in LIBFM for p in path.iterdir()))


def _libfm_sources(path: str, split: str) -> list[Source]:
    root = Path(path)
    # Found like files of a table format, whose names they have but for the extension.
    if root.is_dir():
        found = sorted(p for p in root.iterdir() if p.suffix in LIBFM and not p.name.startswith((".", "_")))
        if not found:
            raise DataError(f"{path}: no libfm file ({', '.join(LIBFM)}) in the folder; name the file itself")
        if split == "random":
            return [Source(str(p), "libfm") for p in found]
        parts = {
            word: [p for p in found if p.stem.split(".")[0].split("-")[0].split("_")[0] == word]
            for word in ("train", "test")
        }
        if not parts["train"] or not parts["test"]:
            raise DataError(
                f"{path}: split='given' needs a train and a test file (train.libfm, test.libfm); or use split='random'"
            )
        return [Source(str(p), "libfm", word == "test") for word, files in parts.items() for p in files]
    if split == "given":
        raise DataError(f"{path}: split='given' needs a folder with a train and a test file; or use split='random'")
    return [Source(s.file, "libfm") for s in find_sources(path, "csv", "random")]


def _layout(file: LogFile) -> tuple[str, ...]:
    for block, first in _line_blocks(file, 2**20):
        _labels, counts, _indices, values = _parse_libfm(file, block, first)
        if len(set(counts.tolist())) != 1 or not counts[0]:
            return ()
        table = values.reshape(len(counts), -1)
        return tuple("index" if (table[:, j] == 1).all() else "value" for j in range(table.shape[1]))
    raise DataError(f"{file.path}: the file holds no rows; remove it, or write it again")


def _read_libfm(file: LogFile, names: Sequence[str] | None) -> Iterator[dict[str, pa.Array]]:
    there = ["label", *(f"f{j}" for j in range(len(file.layout)))] if file.layout else ["label", "features"]
    require(file, names or there, there)
    for block, first in _line_blocks(file, TEXT_BLOCK_BYTES):
        labels, counts, indices, values = _parse_libfm(file, block, first)
        columns: dict[str, pa.Array] = {"label": labels}
        if file.layout:
            wrong = counts != len(file.layout)
            if wrong.any():
                row = int(np.argmax(wrong))
                raise DataError(
                    f"{file.path}: row {first + row} has {counts[row]} features, the first rows have {len(file.layout)}; "
                    "write as many in every line"
                )
            index_table, value_table = indices.reshape(len(counts), -1), values.reshape(len(counts), -1)
            for j, kind in enumerate(file.layout):
                if kind == "index":
                    _check_ones(file, first, value_table[:, j] != 1)
                columns[f"f{j}"] = pa.array(index_table[:, j] if kind == "index" else value_table[:, j])
        else:
            _check_ones(
                file, first, np.bincount(np.repeat(np.arange(len(counts)), counts), values != 1, len(counts)) > 0
            )
            offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
            columns["features"] = pa.ListArray.from_arrays(offsets, pa.array(indices))
        yield {name: columns[name] for name in names or there}


def _check_ones(file: LogFile, first: int, wrong: NDArray[np.bool_]) -> None:
    if wrong.any():
        row = first + int(np.argmax(wrong))
        raise DataError(
            f"{file.path}: row {row} has a value that is not 1 where the first rows have 1; write numbers as csv or parquet"
        )


def _parse_libfm(file: LogFile, block: bytes, first: int) -> tuple[pa.Array, NDArray, NDArray, NDArray]:
    """Labels, number of features of every line, and indices and values of all features in order."""
    text = np.frombuffer(block, np.uint8)
    is_separator = np.isin(text, np.frombuffer(b" \t\r\n", np.uint8))
    starts = np.flatnonzero(~is_separator & np.concatenate([[True], is_separator[:-1]]))
    if not len(starts):
        raise DataError(f"{file.path}: row {first} is empty; remove the line")
    lines = np.cumsum(text == ord("\n"), dtype=np.int64)[starts]
    is_label = np.diff(lines, prepend=-1) > 0
    if (np.diff(lines[is_label], prepend=-1) != 1).any():
        gap = int(np.argmax(np.diff(lines[is_label], prepend=-1) != 1))
        raise DataError(f"{file.path}: row {first + gap} is empty; remove the line")
    words = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(starts), [None, pa.py_buffer(np.append(starts, len(text))), pa.py_buffer(block)]
    )
    try:
        words = pc.ascii_trim(words.cast(pa.large_string()), characters=" \t\r\n")
        labels = words.filter(pa.array(is_label)).cast(pa.float64())
        parts = pc.split_pattern(words.filter(pa.array(~is_label)), ":")
        lengths = pc.list_value_length(parts).to_numpy(zero_copy_only=False)
        if (lengths != 2).any():
            word = words.filter(pa.array(~is_label))[int(np.argmax(lengths != 2))].as_py()
            raise DataError(f"{file.path}: {word!r} is no index:value; write lines as 'label index:value index:value'")
        flat = parts.flatten()
        indices = flat.take(pa.array(np.arange(0, len(flat), 2))).cast(pa.int64()).to_numpy()
        values = flat.take(pa.array(np.arange(1, len(flat), 2))).cast(pa.float64()).to_numpy()
    except pa.ArrowException as error:
        raise DataError(f"{file.path}: {_one_line(error)}; write lines as 'label index:value index:value'") from None
    labels = pc.if_else(pc.equal(labels, -1.0), 0.0, labels)
    counts = np.diff(np.append(np.flatnonzero(is_label), len(starts))) - 1
    return labels, counts, indices, values


def _line_blocks(file: LogFile, n_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Whole lines of about so many bytes, and the number of the first."""
    line = 1
    with open(file.path, "rb") as stream:
        while block := stream.read(n_bytes):
            block += stream.readline()
            yield block, line
            line += block.count(b"\n")


def _one_line(error: BaseException | Any) -> str:
    return str(error).splitlines()[0]
