"""Intermediate files of the ingest stage: what its tasks hand on to each other.

Plain arrays, Arrow IPC for ids. A chunk is what a task reads; a block is some of its rows; a partition is a range of users; a piece is a
range of rows of a graph as CSR. The files and their order are listed in `docs/formats.md` (Ingest folder).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from graphhash.graph.vocabulary import as_ids
from pipeline.storage.mapped import load_array

# Columns of rows; ids are int64 as they are read, or codes of the chunk, then rows of the numbering.
DTYPES = {"weight": np.float64, "time": np.int64, "row": np.int64}

# In place of weights that are all one.
_ONES = np.empty(0)
_ONES.flags.writeable = False


@dataclass(frozen=True)
class Edges:
    """Rows of a graph as CSR: indptr int64, from 0; columns; float64 weights, shape (0,) if all are one."""

    indptr: NDArray[np.int64]
    columns: NDArray[np.integer]
    weights: NDArray[np.float64]

    @property
    def rows(self) -> NDArray[np.int64]:
        """The row of each edge, from 0, shape (n_edges,)."""
        return np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))

    @property
    def full_weights(self) -> NDArray[np.float64]:
        """The weight of each edge, shape (n_edges,)."""
        return self.weights if len(self.weights) else np.ones(len(self.columns))


@dataclass(frozen=True)
class Workspace:
    """The folder of the intermediate files.

    Args:
        folder: removed when the stage is done.
    """

    folder: Path

    def column(self, name: str, chunk: int) -> Path:
        """A column of a chunk: user, item, weight, time or row."""
        return self.folder / f"{name}-{chunk:06d}.bin"

    def times(self, chunk: int) -> Path:
        """Times of the rows of a chunk, ascending, int64; written where they are read."""
        return self.folder / f"times-{chunk:06d}.npy"

    def rejected(self, chunk: int) -> Path:
        """Rejected rows of a chunk."""
        return self.folder / f"rejected-{chunk:06d}.arrow"

    def rejected_test(self, partition: int) -> Path:
        """Rows of the given test file that do not fit train."""
        return self.folder / f"rejected_test-{partition:06d}.arrow"

    def vocabulary(self, side: str) -> Path:
        """The vocabulary of "user" or "item"."""
        return self.folder / f"{side}s.parquet"

    def array(self, name: str) -> Path:
        """An array of any name."""
        return self.folder / f"{name}.npy"

    def save(self, name: str, array: NDArray) -> None:
        """Write an array."""
        np.save(self.array(name), array)

    def load(self, name: str) -> NDArray:
        """What `save` wrote, read-only, memory-mapped where it is large."""
        file = self.array(name)
        array = np.asarray(load_array(file))
        # Read-only in any case: a kernel is compiled anew for arrays that may be written.
        array.flags.writeable = False
        return array

    def has(self, name: str) -> bool:
        """Whether `save` wrote it."""
        return self.array(name).exists()

    def write_ids(self, name: str, ids: pa.Array) -> None:
        """Distinct raw ids, by their codes or rows."""
        table = pa.table({"id": ids})
        with pa.OSFile(str(self.folder / f"{name}.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)

    def read_ids(self, name: str) -> pa.Array:
        """What `write_ids` wrote, int64 or large_string, memory-mapped."""
        ids = read_table(self.folder / f"{name}.arrow")["id"]
        return ids.chunk(0) if ids.num_chunks == 1 else as_ids(ids)

    def save_edges(self, name: str, number: int, edges: Edges) -> None:
        """A piece of a graph."""
        name = f"{name}-{number:06d}"
        self.save(f"{name}.indptr", edges.indptr)
        self.save(f"{name}.columns", edges.columns)
        if len(edges.weights):
            self.save(f"{name}.weights", edges.weights)
        else:
            self.array(f"{name}.weights").unlink(missing_ok=True)

    def load_edges(self, name: str, number: int) -> Edges:
        """What `save_edges` saved."""
        name = f"{name}-{number:06d}"
        weights = self.load(f"{name}.weights") if self.has(f"{name}.weights") else _ONES
        return Edges(self.load(f"{name}.indptr"), self.load(f"{name}.columns"), weights)

    def count_rows(self, name: str, n_pieces: int) -> NDArray[np.int64]:
        """Edges of each row of a graph whose pieces are one behind the other, shape (n_rows,)."""
        return np.concatenate([np.diff(self.load(f"{name}-{number:06d}.indptr")) for number in range(n_pieces)])


def read_column(file: Path, dtype: type[np.generic] | np.dtype, start: int = 0, stop: int | None = None) -> NDArray:
    """Values [start, stop) of a column."""
    size = np.dtype(dtype).itemsize
    count = -1 if stop is None else stop - start
    return np.fromfile(file, dtype, count=count, offset=start * size)


def read_table(file: Path) -> pa.Table:
    """An Arrow IPC file, memory-mapped."""
    return pa.ipc.open_file(pa.memory_map(str(file))).read_all()
