"""A first part of a CTR data set, ingested by the functions of the stage, and the sizes of all of it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config.run_config import DataConfig
from pipeline.ctr.counts import PARTS
from pipeline.ctr.data import Column, Features
from pipeline.ctr.ingest import ingest_log
from pipeline.ctr.log import CtrLog, open_log
from pipeline.ctr.maps import find_pairs
from pipeline.logs.extent import bytes_per_line, grown
from pipeline.logs.sources import open_parquet
from pipeline.logs.tables import LogFile
from pipeline.training.memory import peak_mib

# Rows that are ingested, of all files together.
SAMPLE_ROWS = 50_000
# Files that are not read all at once.
IN_BATCHES = ("csv", "tsv", "parquet", "libfm")
MIB = 2**20


@dataclass
class _Reading:
    """What was read of the files: seconds, rows, and whether each came to its end."""

    seconds: float = 0.0
    n_rows: int = 0
    n_of_file: dict[str, int] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Head(CtrLog):
    """The first rows of every file of a log.

    Args:
        limits: rows of each file.
    """

    limits: tuple[float, ...] = ()
    reading: _Reading = field(default_factory=_Reading)

    def rows(self, seed: int) -> Iterator[Any]:
        for file, limit in zip(self.files, self.limits, strict=True):
            n_before = 0
            for rows in self._read(file, CtrLog((file,), self.schema, self.left_out).rows(seed)):
                taken = int(min(len(rows), limit - n_before))
                if taken < len(rows):
                    rows = type(rows)({name: a.slice(0, taken) for name, a in rows.columns.items()}, rows.first, file)
                n_before += taken
                yield rows
                if n_before >= limit:
                    break

    def times(self, seed: int) -> Iterator[NDArray[np.int64]]:
        for file, limit in zip(self.files, self.limits, strict=True):
            n_before = 0
            for times in CtrLog((file,), self.schema, self.left_out, self.time).times(seed):
                taken = int(min(len(times), limit - n_before))
                n_before += taken
                yield times[:taken]
                if n_before >= limit:
                    break

    def _read(self, file: LogFile, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, noted in ``reading``."""
        note, n_rows, left = self.reading, 0, iter(batches)
        note.cut.add(file.path)
        while True:
            started = time.perf_counter()
            rows = next(left, None)
            note.seconds += time.perf_counter() - started
            if rows is None:
                note.cut.discard(file.path)
                return
            n_rows += len(rows)
            note.n_rows += len(rows)
            note.n_of_file[file.path] = n_rows
            yield rows


@dataclass(frozen=True)
class CtrSample:
    """An ingested part of a data set, and the sizes of all of it.

    Args:
        features: of the part.
        n_rows: of train, validation and test of the whole data set.
        n_ids: of every column of the whole data set.
        is_exact: whether the part is the whole.
        seconds, peak_bytes: of the ingestion of the whole data set; bytes beside what the process held before.
    """

    features: Features
    n_rows: dict[str, int]
    n_ids: tuple[int, ...]
    is_exact: bool
    seconds: float
    peak_bytes: int

    @property
    def growth(self) -> tuple[float, ...]:
        """How many times as many ids a column has as in the part."""
        columns = self.features.all_columns
        return tuple(n / column.n_ids for n, column in zip(self.n_ids, columns, strict=True))

    @property
    def table_growth(self) -> tuple[float, ...]:
        """How many times as many rows a column's table has where it is compressed: the columns of a pair share out their rows by ids."""
        growth, columns = list(self.growth), self.features.columns
        for pair in find_pairs(self.features):
            own = [c for c, on in zip(pair.columns, pair.compressed, strict=True) if on]
            together = sum(self.n_ids[c] for c in own) / sum(columns[c].n_ids for c in own)
            for c in own:
                growth[c] = together
        return tuple(growth)

    @property
    def times(self) -> float:
        """How many times as many training rows there are as in the part."""
        return self.n_rows["train"] / len(self.features.part("train"))


def sample_ctr(data: DataConfig, ingested: Path | None, folder: Path) -> CtrSample:
    """Ingest the first rows of a data set into a folder.

    Args:
        ingested: the folder of its ingestion, which tells the sizes; None: they are estimated.

    Raises:
        DataError: the log cannot be read, or its first rows cannot be ingested by themselves.
    """
    log = open_log(data)
    sizes = [_n_rows(file) for file in log.files]
    share = min(1.0, SAMPLE_ROWS / max(1, sum(n for n in sizes if n is not None)))
    limits = tuple(
        SAMPLE_ROWS if n is None else math.inf if share == 1 else max(1, math.ceil(share * n)) for n in sizes
    )
    head = _Head(log.files, log.schema, log.left_out, log.time, limits)
    before, started = peak_mib(reset=True), time.perf_counter()
    ingest_log(head, data, folder)
    took, held = time.perf_counter() - started, (peak_mib() - before) * MIB
    features, note = Features.open(folder), head.reading
    n_sampled = sum(len(features.part(part)) for part in PARTS)
    n_read = note.n_rows / 2  # In two passes.
    n_all = sum(_whole(file, n, note) for file, n in zip(log.files, sizes, strict=True))
    is_exact = n_sampled == n_all and not any(file.path in note.cut for file in log.files)
    if ingested is not None:
        whole = Features.open(ingested)
        n_rows = {part: len(whole.part(part)) for part in PARTS}
        known = {column.name: column.n_ids for column in whole.all_columns}
        n_ids = tuple(known.get(column.name, column.n_ids) for column in features.all_columns)
    else:
        n_rows = {part: round(len(features.part(part)) * n_all / n_sampled) for part in PARTS}
        n_ids = tuple(
            column.n_ids if is_exact else _grown(features, column, data.min_count, n_rows["train"])
            for column in features.all_columns
        )
    seconds = note.seconds * n_all / n_read + (took - note.seconds) * n_all / n_sampled
    return CtrSample(features, n_rows, n_ids, is_exact, seconds, round(held))


def _n_rows(file: LogFile) -> int | None:
    """Rows of a file, by its footer or about by its bytes; None where all of it is read at once."""
    if file.format not in IN_BATCHES:
        return None
    if file.format == "parquet":
        return int(open_parquet(file.path).metadata.num_rows)
    return math.ceil(Path(file.path).stat().st_size / bytes_per_line(file.path))


def _whole(file: LogFile, n_rows: int | None, note: _Reading) -> int:
    """Rows of a file, counted where it was read to its end, or at once."""
    counted = note.n_of_file[file.path]
    return counted if n_rows is None or file.path not in note.cut else max(counted, n_rows)


def _grown(features: Features, column: Column, min_count: int, n_rows: int) -> int:
    """Ids of a column in so many training rows, from those of the first half of the part and of all of it."""
    train = features.part("train")
    number = features.all_columns.index(column)
    n_categorical = len(features.columns)
    values = train.categorical[:, number] if column.width is None else train.multi_valued[number - n_categorical]
    half = np.asarray(values[: len(values) // 2]).ravel()
    counts = np.bincount(half[half >= 0], minlength=column.n_ids + 1)[: column.n_ids]
    found = int((counts >= max(1, min_count)).sum())
    return grown(np.array([(0, 0), (len(values) // 2, found), (len(values), column.n_ids)]), n_rows)
