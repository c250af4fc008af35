"""The size of a log before it is ingested, from a part of it: rows by bytes or row groups, ids by how their number grows.

A log that is read to its end within the time is counted exactly.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graphhash.errors import DataError
from graphhash.graph.id_columns import IdCodes
from pipeline.config.run_config import DataConfig
from pipeline.logs.columns import Batch, Columns
from pipeline.logs.extent import bytes_per_line, grown
from pipeline.logs.kinds import open_sources
from pipeline.logs.readers import read_chunk
from pipeline.logs.sources import Chunk, Source, cut_chunks, open_parquet

# Text is read in pieces of so many bytes, so that the clock is looked at often.
PIECE_BYTES = 2**22
# Rows in which pairs are compared: repeated ones become one interaction.
PAIR_ROWS = 2_000_000
# Interactions that are clustered to measure a clustering.
GRAPH_EDGES = 100_000
# A third row group of parquet is waited for so many times as long as the sample should take.
WAIT = 4
ID_TYPES = {"int64": pa.int64(), "string": pa.large_string()}


@dataclass(frozen=True)
class LogSample:
    """What the first part of a log says of all of it.

    Args:
        n_rows: of train, and of a given test file.
        n_test_rows: those of the test file.
        n_users, n_items: distinct ids.
        n_interactions: distinct pairs, of train.
        is_exact: whether the log was read to its end.
        seconds: to read and number all rows in one thread, and to sort all pairs.
        graph: some interactions, float32.
    """

    n_rows: int
    n_test_rows: int
    n_users: int
    n_items: int
    n_interactions: int
    is_exact: bool
    seconds: tuple[float, float]
    graph: csr_array


def sample_log(config: DataConfig, seconds: float) -> LogSample:
    """Read a part of the log, for about so many seconds: row groups of parquet and pieces of text that are spread over it, or the first
    rows of a csv file.

    Raises:
        DataError: the log cannot be read, or no row of it is good.
    """
    sources, columns = open_sources(config)
    trained = [source for source in sources if not source.is_test]
    chunks = spread(cut_chunks(trained, chunk_bytes=PIECE_BYTES, chunk_rows=1))
    codes = IdCodes(columns.user_kind), IdCodes(columns.item_kind)
    parts: list[tuple[NDArray[np.int32], NDArray[np.int32]]] = []
    # Good rows and distinct ids of both sides after each half of a batch, and at the end of each chunk.
    growth, ends = [(0, 0, 0)], dict[Chunk, tuple[int, int, int]]()
    n_raw, n_read, is_whole = 0, 0.0, True
    for kind in {columns.user_kind, columns.item_kind}:
        IdCodes(kind).encode(pa.array([0] if kind == "int64" else ["0"], ID_TYPES[kind]))  # Loads the compiled loops.
    started = time.perf_counter()
    for chunk, batch in _batches(chunks, columns, config.bad_rows):
        longer = WAIT if chunk.source.format == "parquet" and len(ends) < 3 else 1
        if time.perf_counter() - started > longer * seconds and growth[-1][0]:
            is_whole = False
            break
        # In halves, so that growth is known within a single batch.
        for rows in (slice(None, len(batch.rows) // 2), slice(len(batch.rows) // 2, None)):
            parts.append((codes[0].encode(batch.users[rows]), codes[1].encode(batch.items[rows])))
            growth.append((growth[-1][0] + len(parts[-1][0]), len(codes[0]), len(codes[1])))
        ends[chunk] = growth[-1]
        n_rows = len(batch.rows) + batch.n_below + batch.rejected.num_rows
        n_raw, n_read = n_raw + n_rows, n_read + _units(chunk, n_rows)
    took = time.perf_counter() - started
    if not growth[-1][0]:
        raise DataError(f"{config.path}: no row of train is good; check the columns")
    n_train = n_raw if is_whole else max(n_raw, round(n_raw * sum(map(_size, chunks)) / n_read))
    n_test = _rows_of_test(sources, n_raw / n_read)
    n_good = round(n_train * growth[-1][0] / n_raw)
    started = time.perf_counter()
    share, graph = _pairs(parts)
    sorting = (time.perf_counter() - started) / min(growth[-1][0], PAIR_ROWS)
    # Rows of a chunk may be those of a few users in any order: then ids grow from chunk to chunk, and hardly within one.
    points = np.array([(0, 0, 0), *ends.values()] if len(ends) > 1 else growth)
    n_users, n_items = (growth[-1][side] if is_whole else grown(points[:, [0, side]], n_good) for side in (1, 2))
    return LogSample(
        n_rows=n_train + n_test,
        n_test_rows=n_test,
        n_users=n_users,
        n_items=n_items,
        n_interactions=round(n_good * share),
        is_exact=is_whole and n_good <= PAIR_ROWS and not n_test,
        seconds=(took * (n_train + n_test) / n_raw, sorting * n_good),
        graph=graph,
    )


def spread(chunks: Sequence[Chunk]) -> list[Chunk]:
    """The chunks in an order of which every first part is spread over the log: by the reversed bits of their places (van der Corput)."""
    n_bits = max(1, (len(chunks) - 1).bit_length())
    return [chunks[n] for n in sorted(range(len(chunks)), key=lambda n: int(f"{n:0{n_bits}b}"[::-1], 2))]


def distinct(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """The distinct values, ascending; of mostly distinct ones, some times as fast as ``numpy.unique``."""
    values = np.sort(values)
    return values[np.concatenate([[True], values[1:] != values[:-1]])]


def _batches(chunks: Sequence[Chunk], columns: Columns, bad_rows: str) -> Generator[tuple[Chunk, Batch]]:
    for chunk in chunks:
        for batch in read_chunk(chunk, columns, bad_rows=bad_rows):
            yield chunk, batch


def _size(chunk: Chunk) -> float:
    """Rows of parquet, else bytes."""
    if chunk.source.format != "parquet":
        return chunk.stop - chunk.start
    meta = open_parquet(chunk.source.file).metadata
    return sum(meta.row_group(group).num_rows for group in range(chunk.start, chunk.stop))


def _units(chunk: Chunk, n_rows: int) -> float:
    """What rows of a chunk are of its size."""
    if chunk.source.format in ("csv", "tsv"):
        return n_rows * bytes_per_line(chunk.source.file)  # Read in many batches.
    return n_rows if chunk.source.format == "parquet" else chunk.stop - chunk.start


def _rows_of_test(sources: Sequence[Source], rows_per_unit: float) -> int:
    """Rows of a given test file, by its size."""
    chunks = cut_chunks([source for source in sources if source.is_test]) if any(s.is_test for s in sources) else []
    return round(rows_per_unit * sum(map(_size, chunks)))


def _pairs(parts: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]]) -> tuple[float, csr_array]:
    """The share of rows that are the first of their pair, and some users with their interactions."""
    users, items = (np.concatenate(column)[:PAIR_ROWS].astype(np.int64) for column in zip(*parts, strict=True))
    n_items = int(items.max()) + 1
    pairs = distinct(users * n_items + items)
    rows, columns = np.divmod(pairs[:GRAPH_EDGES], n_items)
    kept, columns = np.unique(columns, return_inverse=True)
    shape = (int(rows[-1]) + 1, len(kept))
    graph = csr_array((np.ones(len(rows), np.float32), (rows, columns)), shape=shape)
    return len(pairs) / len(users), graph
