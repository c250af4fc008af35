"""libfm files (also svmlight) of labelled samples: lines `label index:value index:value ...`.

Labels are 1 and 0, or 1 and -1. If all lines of the first block have the same number of features, these are the columns
f0, f1, ...: the index, or, where values are not all 1, the value. Otherwise there is one multi-valued column `features`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from graphhash.errors import DataError, first_line
from pipeline.logs.sources import Source, find_sources
from pipeline.logs.tables import LogFile, Rows, check_not_empty, numbered, require

EXTENSIONS = (".libfm", ".svm", ".svmlight")
BLOCK_BYTES = 32 * 2**20
HEAD_BYTES = 2**20
LINE_REMEDY = "write lines as 'label index:value index:value'"


@dataclass(frozen=True)
class LibfmFile(LogFile):
    """A libfm file.

    Args:
        layout: for every feature of a line "index" or "value"; empty: features are one multi-valued column.
    """

    layout: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lines:
    """Parsed lines.

    Args:
        labels: float64, 0 or 1 or whatever else the file holds, shape (n_lines,).
        counts: features of every line, shape (n_lines,).
        indices, values: of all features in order, shape (n_features,).
        first: number of the first line.
    """

    labels: pa.Array
    counts: NDArray[np.int64]
    indices: NDArray[np.int64]
    values: NDArray[np.float64]
    first: int


def is_libfm(path: str, format: str) -> bool:
    """Whether a path holds libfm files, by the format that is asked for or by their names."""
    root = Path(path)
    if format != "auto":
        return format == "libfm"
    return root.suffix in EXTENSIONS or (root.is_dir() and any(p.suffix in EXTENSIONS for p in root.iterdir()))


def find_libfm(path: str, split: str) -> list[LogFile]:
    """The files of a data set in libfm, in reading order.

    Raises:
        DataError: there is none, or a file is empty.
    """
    files = [LibfmFile(s.file, "libfm", s.is_test) for s in _sources(path, split)]
    check_not_empty(files)
    layout = _layout(files[0])
    return [replace(file, layout=layout) for file in files]


def read_libfm(file: LibfmFile, names: Sequence[str] | None = None) -> Iterator[Rows]:
    """The rows of a file.

    Args:
        names: columns to read; None: all.

    Raises:
        DataError: a column is missing, a line is malformed or of another layout, or the file holds no row.
    """
    return numbered(file, _read(file, names))


def _sources(path: str, split: str) -> list[Source]:
    root = Path(path)
    # The names of train and test files are those of the table formats, but for the extension.
    if root.is_dir():
        found = sorted(p for p in root.iterdir() if p.suffix in EXTENSIONS and not p.name.startswith((".", "_")))
        if not found:
            raise DataError(f"{path}: no libfm file ({', '.join(EXTENSIONS)}) in the folder; name the file itself")
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
    for block, first in _line_blocks(file, HEAD_BYTES):
        lines = _parse(file, block, first)
        if len(set(lines.counts.tolist())) != 1 or not lines.counts[0]:
            return ()
        table = lines.values.reshape(len(lines.counts), -1)
        return tuple("index" if (table[:, j] == 1).all() else "value" for j in range(table.shape[1]))
    raise DataError(f"{file.path}: the file holds no rows; remove it, or write it again")


def _read(file: LibfmFile, names: Sequence[str] | None) -> Iterator[dict[str, pa.Array]]:
    present = ["label", *(f"f{j}" for j in range(len(file.layout)))] if file.layout else ["label", "features"]
    require(file, names or present, present)
    for block, first in _line_blocks(file, BLOCK_BYTES):
        lines = _parse(file, block, first)
        columns = {"label": lines.labels} | (_fixed(file, lines) if file.layout else _multi_valued(file, lines))
        yield {name: columns[name] for name in names or present}


def _fixed(file: LibfmFile, lines: Lines) -> dict[str, pa.Array]:
    """A column per feature of a line."""
    n_features = len(file.layout)
    wrong = lines.counts != n_features
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(
            f"{file.path}: row {lines.first + row} has {lines.counts[row]} features, the first rows have {n_features}; "
            "write as many in every line"
        )
    indices, values = lines.indices.reshape(-1, n_features), lines.values.reshape(-1, n_features)
    for j, kind in enumerate(file.layout):
        if kind == "index":
            _check_ones(file, lines.first, values[:, j] != 1)
    return {f"f{j}": pa.array((indices if kind == "index" else values)[:, j]) for j, kind in enumerate(file.layout)}


def _multi_valued(file: LibfmFile, lines: Lines) -> dict[str, pa.Array]:
    """One column of lists of indices."""
    n_lines = len(lines.counts)
    row_of = np.repeat(np.arange(n_lines), lines.counts)
    _check_ones(file, lines.first, np.bincount(row_of, lines.values != 1, n_lines) > 0)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lines.counts)]).astype(np.int32))
    return {"features": pa.ListArray.from_arrays(offsets, pa.array(lines.indices))}


def _check_ones(file: LogFile, first: int, wrong: NDArray[np.bool_]) -> None:
    if wrong.any():
        row = first + int(np.argmax(wrong))
        raise DataError(
            f"{file.path}: row {row} has a value that is not 1 where the first rows have 1; write numbers as csv or parquet"
        )


def _parse(file: LogFile, block: bytes, first: int) -> Lines:
    """The lines of a block; `first` is the number of its first line."""
    text = np.frombuffer(block, np.uint8)
    is_separator = np.isin(text, np.frombuffer(b" \t\r\n", np.uint8))
    starts = np.flatnonzero(~is_separator & np.concatenate([[True], is_separator[:-1]]))
    if not len(starts):
        raise DataError(f"{file.path}: row {first} is empty; remove the line")
    lines = np.cumsum(text == ord("\n"), dtype=np.int64)[starts]
    is_label = np.diff(lines, prepend=-1) > 0
    steps = np.diff(lines[is_label], prepend=-1)
    if (steps != 1).any():
        raise DataError(f"{file.path}: row {first + int(np.argmax(steps != 1))} is empty; remove the line")
    words = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(starts), [None, pa.py_buffer(np.append(starts, len(text))), pa.py_buffer(block)]
    )
    try:
        words = pc.ascii_trim(words.cast(pa.large_string()), characters=" \t\r\n")
        labels = words.filter(pa.array(is_label)).cast(pa.float64())
        indices, values = _features(file, words.filter(pa.array(~is_label)))
    except pa.ArrowException as error:
        raise DataError(f"{file.path}: {first_line(error)}; {LINE_REMEDY}") from None
    labels = pc.if_else(pc.equal(labels, -1.0), 0.0, labels)
    counts = np.diff(np.append(np.flatnonzero(is_label), len(starts))) - 1
    return Lines(labels, counts, indices, values, first)


def _features(file: LogFile, words: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Index and value of every `index:value`."""
    parts = pc.split_pattern(words, ":")
    lengths = pc.list_value_length(parts).to_numpy(zero_copy_only=False)
    if (lengths != 2).any():
        word = words[int(np.argmax(lengths != 2))].as_py()
        raise DataError(f"{file.path}: {word!r} is no index:value; {LINE_REMEDY}")
    flat = parts.flatten()
    indices = flat.take(pa.array(np.arange(0, len(flat), 2))).cast(pa.int64()).to_numpy()
    return indices, flat.take(pa.array(np.arange(1, len(flat), 2))).cast(pa.float64()).to_numpy()


def _line_blocks(file: LogFile, n_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Whole lines of about so many bytes, and the number of the first."""
    line = 1
    with open(file.path, "rb") as stream:
        while block := stream.read(n_bytes):
            block += stream.readline()
            yield block, line
            line += block.count(b"\n")
