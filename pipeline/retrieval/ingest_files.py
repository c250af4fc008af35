"""Intermediate files of the ingest stage: what its tasks hand on to each other.

Arrow IPC for ids, .npy for numbers; a partition is a hash partition by user. The files and their order are listed in
`docs/formats.md` (Ingest folder).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from graphhash.graph.vocabulary import as_ids
from pipeline.logs.columns import REJECTED_SCHEMA

EDGE_ARRAYS = ("users", "items", "weights")
# Files of fewer bytes are read instead of mapped; an empty array cannot be mapped.
LEAST_MAPPED_BYTES = 4096


@dataclass(frozen=True)
class Workspace:
    """The folder of the intermediate files.

    Args:
        folder: removed when the stage is done.
        n_partitions: hash partitions of the users.
    """

    folder: Path
    n_partitions: int

    def part(self, number: int) -> Path:
        """Rows of chunk `number`: record batch i belongs to partition i % n_partitions."""
        return self.folder / f"part-{number:06d}.arrow"

    def times(self, number: int) -> Path:
        """Times of the rows of chunk `number`, ascending, int64; written where they are read."""
        return self.folder / f"times-{number:06d}.npy"

    def rejected(self, number: int) -> Path:
        """Rejected rows of chunk `number`."""
        return self.folder / f"rejected-{number:06d}.arrow"

    def rejected_test(self, partition: int) -> Path:
        """Rows of the given test file that do not fit train."""
        return self.folder / f"rejected_test-{partition:06d}.arrow"

    def vocabulary(self, side: str) -> Path:
        """The vocabulary of "user" or "item"."""
        return self.folder / f"{side}s.parquet"

    def read_partition(self, parts: Sequence[int], partition: int) -> pa.Table | None:
        """The rows of a partition from some chunks, in their order; None where there is no record batch."""
        batches = []
        for number in parts:
            reader = pa.ipc.open_file(pa.memory_map(str(self.part(number))))
            batches += [reader.get_batch(i) for i in range(partition, reader.num_record_batches, self.n_partitions)]
        return pa.Table.from_batches(batches) if batches else None

    def write_ids(self, side: str, partition: int, ids: pa.Array) -> None:
        """Distinct raw ids of a partition; their places are the partition's local codes."""
        table = pa.table({"id": ids})
        file = self.folder / f"{side}s-{partition:06d}.arrow"
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)

    def read_ids(self, side: str, partition: int) -> pa.Array:
        """What `write_ids` wrote."""
        return as_ids(read_table(self.folder / f"{side}s-{partition:06d}.arrow")["id"])

    def save_rows(self, side: str, partition: int, rows: NDArray[np.integer]) -> None:
        """Vocabulary rows of a partition's ids, shape (n_ids,)."""
        np.save(self.folder / f"{side}_rows-{partition:06d}.npy", rows)

    def load_rows(self, side: str, partition: int) -> NDArray[np.integer]:
        """What `save_rows` saved."""
        return np.load(self.folder / f"{side}_rows-{partition:06d}.npy")

    def save_lowest(self, partition: int, hashes: NDArray[np.uint64]) -> None:
        """Lowest edge hash of each item of a partition, shape (n_items,)."""
        np.save(self.folder / f"lowest-{partition:06d}.npy", hashes)

    def load_lowest(self, partition: int) -> NDArray[np.uint64]:
        """What `save_lowest` saved."""
        return np.load(self.folder / f"lowest-{partition:06d}.npy")

    @property
    def item_lowest(self) -> Path:
        """Lowest edge hash of each item over all partitions."""
        return self.folder / "item_lowest.npy"

    def save_edges(self, name: str, partition: int, *arrays: NDArray) -> None:
        """Users, items and weights of a graph's edges in a partition, shape (n_edges,) each."""
        for key, array in zip(EDGE_ARRAYS, arrays, strict=True):
            np.save(self.folder / f"{name}-{partition:06d}.{key}.npy", array)

    def load_edges(self, name: str, partition: int) -> list[NDArray]:
        """What `save_edges` saved, memory-mapped where it is large."""
        files = [self.folder / f"{name}-{partition:06d}.{key}.npy" for key in EDGE_ARRAYS]
        return [np.load(file, mmap_mode="r" if file.stat().st_size > LEAST_MAPPED_BYTES else None) for file in files]

    def save_counts(self, name: str, partition: int, rows: NDArray[np.integer]) -> int:
        """Edges of each row of a graph in a partition. Returns the number of edges."""
        counts = np.array(np.unique(rows, return_counts=True), np.int64)
        np.save(self.folder / f"{name}-{partition:06d}.counts.npy", counts)
        return len(rows)

    def count_rows(self, name: str, n_rows: int) -> NDArray[np.int64]:
        """Edges of each row of a graph over all partitions, shape (n_rows,)."""
        counts = np.zeros(n_rows, np.int64)
        for partition in range(self.n_partitions):
            rows, n_edges = np.load(self.folder / f"{name}-{partition:06d}.counts.npy")
            counts[rows] += n_edges
        return counts


def write_rejected(file: Path, tables: Sequence[pa.Table]) -> int:
    """Write rejected rows, if there are any. Returns their number."""
    n_rejected = sum(table.num_rows for table in tables)
    if n_rejected:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, REJECTED_SCHEMA) as writer:
            for table in tables:
                writer.write_table(table)
    return n_rejected


def read_table(file: Path) -> pa.Table:
    """An Arrow IPC file, memory-mapped."""
    return pa.ipc.open_file(pa.memory_map(str(file))).read_all()
