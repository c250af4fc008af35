"""The files of an interaction log, their formats, and the chunks in which tasks read them.

A path is a file, a folder (the files directly in it) or a glob:

- LightGCN: a folder with train.txt (and test.txt), or one such file: lines `user item item ...`
- MovieLens-100K: a folder with u.data, or that file; MovieLens-1M: a folder with ratings.dat, or that file
- csv, tsv, parquet: one file or several of one format, with named columns

`format="auto"` goes by these names and by the extensions .csv, .tsv, .parquet, .pq and .txt (LightGCN). Hidden files and names that
start with "_" are left out of folders. With split="random" every file of the log is read, a test file too. With split="given" there
have to be a train and a test file: train.txt and test.txt, or files named train.* and test.* (also train-..., train_...) of one table
format. Files are read in the order of their names, so how a log is cut into files does not matter.
"""

from __future__ import annotations

import glob
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from graphhash.errors import DataError, first_line

EXTENSIONS = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".pq": "parquet"}
TABLES = ("csv", "tsv", "parquet")
# The file that gives a text format away, in a folder.
LANDMARKS = {"lightgcn": "train.txt", "movielens-100k": "u.data", "movielens-1m": "ratings.dat"}
CHUNK_BYTES = 32 * 2**20
CHUNK_ROWS = 4_000_000
LOOKED_FOR = "train.txt (LightGCN), u.data or ratings.dat (MovieLens), or .csv, .tsv, .parquet files"


@dataclass(frozen=True)
class Source:
    """One file of the log.

    Attributes:
        file: path as the user knows it.
        format: lightgcn, movielens-100k, movielens-1m, csv, tsv or parquet.
        is_test: it is the test file of split="given".
    """

    file: str
    format: str
    is_test: bool = False


@dataclass(frozen=True)
class Chunk:
    """What one task reads.

    Attributes:
        source: the file.
        number: position of the file in the log, from 0.
        start, stop: bytes at line starts (LightGCN, MovieLens), row groups (parquet), or 0 and the size of
            the file (csv, tsv: quoted line breaks forbid cutting them).
        first_row: rows of the file before this chunk (parquet only; 0 for text, see `lines_before`).
    """

    source: Source
    number: int
    start: int
    stop: int
    first_row: int = 0


def find_sources(path: str, format: str = "auto", split: str = "random") -> list[Source]:
    """The files of a log in reading order.

    Raises DataError naming the path, what was looked for and what is there.
    """
    root = Path(path)
    if root.is_dir():
        return _in_folder(root, format, split)
    if root.is_file():
        return _name_parts([root], _one_format([root], format), split, path)
    if glob.has_magic(path):
        files = sorted(p for p in map(Path, glob.glob(path, recursive=True)) if p.is_file())
        if files:
            return _name_parts(files, _one_format(files, format), split, path)
        raise DataError(f"{path}: no file matches; check the pattern, and quote it so that the shell leaves it alone")
    raise DataError(f"{path}: no such file or folder; check the path")


def cut_chunks(
    sources: Sequence[Source], *, chunk_bytes: int | None = None, chunk_rows: int | None = None
) -> list[Chunk]:
    """The chunks of all files, in order.

    Raises DataError for an empty file and for a parquet file that is none.
    """
    chunk_bytes, chunk_rows = chunk_bytes or CHUNK_BYTES, chunk_rows or CHUNK_ROWS
    chunks: list[Chunk] = []
    for number, source in enumerate(sources):
        size = Path(source.file).stat().st_size
        if size == 0:
            raise DataError(f"{source.file}: the file is empty; remove it, or write it again")
        if source.format == "parquet":
            chunks += _row_groups(source, number, chunk_rows)
        elif source.format in ("csv", "tsv"):
            chunks.append(Chunk(source, number, 0, size))
        else:
            bounds = _line_starts(source.file, size, chunk_bytes)
            chunks += [Chunk(source, number, a, b) for a, b in itertools.pairwise(bounds)]
    return chunks


def estimated_rows(chunks: Sequence[Chunk]) -> int:
    """About how many interactions the chunks hold, from sizes alone, to choose a number of partitions."""
    bytes_per_row = {"lightgcn": 5, "movielens-100k": 16, "movielens-1m": 12, "csv": 12, "tsv": 12}
    rows = 0
    for chunk in chunks:
        if chunk.source.format == "parquet":
            meta = open_parquet(chunk.source.file).metadata
            rows += sum(meta.row_group(group).num_rows for group in range(chunk.start, chunk.stop))
        else:
            rows += (chunk.stop - chunk.start) // bytes_per_row[chunk.source.format]
    return rows


def lines_before(chunk: Chunk) -> int:
    """Lines of the file before a byte-range chunk.

    It reads them all, so it is asked only where a row is reported.
    """
    n_lines = 0
    with open(chunk.source.file, "rb") as stream:
        left = chunk.start
        while left:
            block = stream.read(min(left, 2**24))
            n_lines += block.count(b"\n")
            left -= len(block)
    return n_lines


def open_parquet(file: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{file}: truncated, or not a parquet file ({first_line(error)}); write or copy it again"
        ) from None


def _in_folder(root: Path, format: str, split: str) -> list[Source]:
    files = sorted(p for p in root.iterdir() if p.is_file() and not p.name.startswith((".", "_")))
    if format == "auto":
        found = [name for name, landmark in LANDMARKS.items() if (root / landmark).is_file()]
        tables = sorted({EXTENSIONS[p.suffix] for p in files if p.suffix in EXTENSIONS})
        if len(found) + len(tables) > 1:
            raise DataError(
                f"{root}: holds files of several formats ({', '.join(found + tables)}); name one with format"
            )
        if not found and not tables:
            there = ", ".join(p.name for p in files[:8]) or "no files"
            raise DataError(
                f"{root}: no interaction log; looked for {LOOKED_FOR}; found {there}; check the path or name a format"
            )
        format = (found + tables)[0]
    if format in TABLES:
        chosen = [p for p in files if EXTENSIONS.get(p.suffix) == format]
        if not chosen:
            raise DataError(f"{root}: no {format} file in the folder; name the file itself, or another format")
        return _name_parts(chosen, format, split, str(root))
    landmark = root / LANDMARKS[format]
    if not landmark.is_file():
        raise DataError(f"{root}: no {landmark.name} in the folder, which {format} needs; check the path or the format")
    if format == "lightgcn":
        chosen = [p for p in (landmark, root / "test.txt") if p.is_file()]
        return _name_parts(chosen, format, split, str(root))
    return _name_parts([landmark], format, split, str(root))


def _one_format(files: list[Path], format: str) -> str:
    if format != "auto":
        return format
    by_name = {landmark: name for name, landmark in LANDMARKS.items()}
    formats: dict[str, Path] = {}
    for file in files:
        name = by_name.get(file.name) or EXTENSIONS.get(file.suffix) or ("lightgcn" if file.suffix == ".txt" else None)
        if name is None:
            raise DataError(f"{file}: unknown format; looked for {LOOKED_FOR}; name one with format")
        formats.setdefault(name, file)
    if len(formats) > 1:
        listed = ", ".join(f"{file} is {name}" for name, file in formats.items())
        raise DataError(f"files of several formats: {listed}; name files of one format")
    return next(iter(formats))


def _name_parts(files: list[Path], format: str, split: str, path: str) -> list[Source]:
    if split == "random":
        return [Source(str(file), format) for file in files]
    train = [file for file in files if file.stem == "train" or file.name.startswith(("train.", "train-", "train_"))]
    test = [file for file in files if file.stem == "test" or file.name.startswith(("test.", "test-", "test_"))]
    if not train or not test:
        there = ", ".join(file.name for file in files[:8])
        raise DataError(
            f"{path}: split='given' needs a train and a test file (train.txt and test.txt, or train.* and "
            f"test.* of one table format), found {there}; name their folder, or use split='random'"
        )
    return [Source(str(file), format) for file in train] + [Source(str(file), format, is_test=True) for file in test]


def _row_groups(source: Source, number: int, chunk_rows: int) -> list[Chunk]:
    meta = open_parquet(source.file).metadata
    if meta.num_rows == 0:
        raise DataError(f"{source.file}: the file holds no rows; remove it, or write it again")
    chunks, start, before, rows = [], 0, 0, 0
    for group in range(meta.num_row_groups):
        rows += meta.row_group(group).num_rows
        if rows >= chunk_rows or group == meta.num_row_groups - 1:
            chunks.append(Chunk(source, number, start, group + 1, before))
            start, before, rows = group + 1, before + rows, 0
    return chunks


def _line_starts(file: str, size: int, chunk_bytes: int) -> list[int]:
    bounds = [0]
    with open(file, "rb") as stream:
        while bounds[-1] + chunk_bytes < size:
            stream.seek(bounds[-1] + chunk_bytes - 1)
            stream.readline()
            bounds.append(stream.tell())
    return bounds if bounds[-1] == size else [*bounds, size]
