"""The files of an interaction log, their formats, and the chunks in which tasks read them.

A path is a file, a folder (the files directly in it) or a glob:

- LightGCN: a folder with train.txt (and test.txt), or one such file: lines `user item item ...`
- MovieLens-100K: a folder with u.data, or that file; MovieLens-1M: a folder with ratings.dat, or that file
- csv, tsv, parquet: one file or several of one format, with named columns

`format="auto"` goes by these names and by the extensions .csv, .tsv, .parquet, .pq and .txt (LightGCN); csv and tsv may be compressed
(.csv.gz). Hidden files and names that start with "_" are left out of folders, and files without a row are skipped (`skip_empty`). Every
file of the log is read, a test file too, but with split="given". With split="given" there have to be a train and a test file: train.txt and
test.txt, or files named train.* and test.* (also train-..., train_...) of one table format. Files are read in the order of their names,
so how a log is cut into files does not matter.
"""

from __future__ import annotations

import glob
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from graphhash.errors import DataError, first_line
from pipeline.logs.csv import CODECS, DEFAULT_FORMAT, CsvFormat, header_of, read_records

logger = logging.getLogger(__name__)

EXTENSIONS = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".pq": "parquet"}
TABLES = ("csv", "tsv", "parquet")
# The file that gives a text format away, in a folder.
LANDMARKS = {"lightgcn": "train.txt", "movielens-100k": "u.data", "movielens-1m": "ratings.dat"}
CHUNK_BYTES = 32 * 2**20
CHUNK_ROWS = 4_000_000
# A compressed file of a few rows is smaller than this.
SMALL_BYTES = 2**16
LOOKED_FOR = "train.txt (LightGCN), u.data or ratings.dat (MovieLens), or .csv, .tsv, .parquet files"


@dataclass(frozen=True)
class Source:
    """One file of the log.

    Attributes:
        file: path as the user knows it.
        format: lightgcn, movielens-100k, movielens-1m, csv, tsv or parquet.
        is_test: it is the test file of split="given".
        csv: how a csv or tsv file is written.
    """

    file: str
    format: str
    is_test: bool = False
    csv: CsvFormat = DEFAULT_FORMAT


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


def find_sources(
    path: str,
    format: str = "auto",
    split: str = "random",
    layout: CsvFormat = DEFAULT_FORMAT,
) -> list[Source]:
    """The files of a log in reading order, empty ones among them.

    Args:
        layout: of csv and tsv files.

    Raises DataError naming the path, what was looked for and what is there.
    """
    return [replace(source, csv=layout) for source in _find(path, format, split)]


def skip_empty(sources: Sequence[Source], path: str) -> list[Source]:
    """The files that hold rows; Spark writes parts without one.

    Args:
        path: of the log, for messages.

    Raises DataError where no file of train, or of the test, holds a row.
    """
    kept = [source for source in sources if _has_rows(source)]
    for is_test in {source.is_test for source in sources}:
        of_part = [source for source in sources if source.is_test == is_test]
        if not any(source.is_test == is_test for source in kept):
            if len(of_part) > 1:
                raise DataError(f"{path}: all {len(of_part)} files hold no rows; write them again, or name another log")
            is_empty = Path(of_part[0].file).stat().st_size == 0
            what = "the file is empty" if is_empty else "the file holds no rows"
            raise DataError(f"{of_part[0].file}: {what}; remove it, or write it again")
    if len(kept) < len(sources):
        empty = [source.file for source in sources if source not in kept]
        logger.info("%d of %d files hold no rows and are skipped, the first is %s", len(empty), len(sources), empty[0])
    return kept


def format_by_name(path: Path) -> str | None:
    """csv, tsv or parquet, by the extension of a file, which may be compressed csv or tsv; else None."""
    if path.suffix in CODECS:
        inner = EXTENSIONS.get(Path(path.stem).suffix)
        return inner if inner in ("csv", "tsv") else None
    return EXTENSIONS.get(path.suffix)


def _has_rows(source: Source) -> bool:
    size = Path(source.file).stat().st_size
    if size == 0:
        return False
    if source.format == "parquet":
        return open_parquet(source.file).metadata.num_rows > 0
    if source.format not in ("csv", "tsv") or size > SMALL_BYTES:
        return True
    header = header_of(source.file, source.format, source.csv)
    names = [name for name in header if header.count(name) == 1][:1]
    if not names:
        return True
    records = read_records(source.file, source.format, source.csv, names)
    return any(len(part.rows) or part.malformed for part in records)


def _find(path: str, format: str, split: str) -> list[Source]:
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
    """A parquet file, its metadata read. Raises DataError where it is none."""
    try:
        parquet = pq.ParquetFile(file)
        meta = parquet.metadata
        if meta.num_rows != sum(meta.row_group(group).num_rows for group in range(meta.num_row_groups)):
            raise ValueError("its row groups do not add up to its rows")
        return parquet
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DataError(
            f"{file}: truncated, or not a parquet file ({first_line(error)}); write or copy it again"
        ) from None


def _in_folder(root: Path, format: str, split: str) -> list[Source]:
    files = sorted(p for p in root.iterdir() if p.is_file() and not p.name.startswith((".", "_")))
    if format == "auto":
        found = [name for name, landmark in LANDMARKS.items() if (root / landmark).is_file()]
        tables = sorted({kind for p in files if (kind := format_by_name(p)) is not None})
        if len(found) + len(tables) > 1:
            raise DataError(
                f"{root}: holds files of several formats ({', '.join(found + tables)}); name one with format"
            )
        if not found and not tables:
            there = ", ".join(p.name for p in files[:8]) or "no files"
            if pattern := _pattern_below(root):
                raise DataError(
                    f"{root}: no interaction log in the folder itself; its files are in folders below it, read them with the pattern "
                    f"'{pattern}' (values in the names of folders, as of hive partitions, are not read)"
                )
            raise DataError(
                f"{root}: no interaction log; looked for {LOOKED_FOR}; found {there}; check the path or name a format"
            )
        format = (found + tables)[0]
    if format in TABLES:
        chosen = [p for p in files if format_by_name(p) == format]
        if not chosen:
            pattern = _pattern_below(root)
            below = f"read those below it with the pattern '{pattern}', " if pattern else ""
            raise DataError(f"{root}: no {format} file in the folder; {below}name the file itself, or another format")
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
        name = by_name.get(file.name) or format_by_name(file) or ("lightgcn" if file.suffix == ".txt" else None)
        if name is None:
            raise DataError(f"{file}: unknown format; looked for {LOOKED_FOR}; name one with format")
        formats.setdefault(name, file)
    if len(formats) > 1:
        listed = ", ".join(f"{file} is {name}" for name, file in formats.items())
        raise DataError(f"files of several formats: {listed}; name files of one format")
    return next(iter(formats))


def _name_parts(files: list[Path], format: str, split: str, path: str) -> list[Source]:
    if split != "given":
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


def _pattern_below(root: Path) -> str | None:
    """A pattern for the first kind of table in the folders below, as of partitions (`date=2024-01-01/part-0.parquet`)."""
    below = (p for p in sorted(root.rglob("*")) if p.is_file() and not p.name.startswith((".", "_")))
    found = next((p for p in below if format_by_name(p) is not None), None)
    return (
        None
        if found is None
        else f"{root}/**/*{''.join(found.suffixes[-2:] if found.suffix in CODECS else [found.suffix])}"
    )


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
