"""Ranges of rows with about as many edges each, and the rows of the log cut by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from graphhash.graph._edge_kernels import cut_by_range
from pipeline.retrieval.ingestion.files import DTYPES, Workspace, read_column
from pipeline.retrieval.ingestion.ids import Numbering

# Ranges begin at multiples of a power of two, so that the range of a row is one look into a small table.
CELLS_PER_RANGE = 64
# Places of a block, and rows behind each, that tell how many rows the users have.
SAMPLED_PLACES, SAMPLED_ROWS = 16, 256


@dataclass(frozen=True, eq=False)
class Ranges:
    """Ranges of rows, one behind the other.

    Args:
        shift: a cell is 2^shift rows.
        part_of_cell: int32, range of each cell.
        bounds: first row of each range and the number of all, int64, shape (n_ranges + 1,).
    """

    shift: int
    part_of_cell: NDArray[np.int32]
    bounds: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @classmethod
    def balanced(cls, rows: NDArray[np.integer], n_edges: NDArray[np.integer], n_rows: int, n_ranges: int) -> Ranges:
        """Ranges of about as many edges each.

        Args:
            rows, n_edges: some rows, in any order and more than once, and edges of each, shape (n,).
            n_rows: of all.
        """
        n_cells = max(4096, CELLS_PER_RANGE * n_ranges)
        shift = max(0, (max(n_rows, 1) - 1).bit_length() - (n_cells.bit_length() - 1))
        n_cells = (max(n_rows, 1) - 1 >> shift) + 1
        counts = np.bincount(np.asarray(rows) >> shift, weights=n_edges, minlength=n_cells)
        before = np.cumsum(counts) - counts / 2
        parts = np.minimum(before * n_ranges // max(counts.sum(), 1), n_ranges - 1).astype(np.int32)
        bounds = np.minimum(np.searchsorted(parts, np.arange(n_ranges + 1)) << shift, n_rows)
        bounds[-1] = n_rows
        return cls(shift, parts, bounds)


@dataclass(frozen=True)
class Block:
    """Rows [start, stop) of a chunk.

    Args:
        number: of the block, in reading order.
    """

    number: int
    chunk: int
    start: int
    stop: int


@dataclass(frozen=True)
class Rows:
    """Rows of the log in reading order.

    Args:
        users, items: rows of the numbering, shape (n,).
        weights: float64, shape (n,), or (0,) where every row weighs 1.
        times: microseconds since 1970, int64, shape (n,); None where they are not read.
        numbers: of the rows in their file, int64, shape (n,); None but in test files.
    """

    users: NDArray[np.integer]
    items: NDArray[np.integer]
    weights: NDArray[np.float64]
    times: NDArray[np.int64] | None = None
    numbers: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.users)

    def only(self, kept: NDArray[np.bool_]) -> Rows:
        """The marked rows."""
        return Rows(
            self.users[kept],
            self.items[kept],
            self.weights[kept] if len(self.weights) else self.weights,
            None if self.times is None else self.times[kept],
            None if self.numbers is None else self.numbers[kept],
        )

    def weighted(self, weights: NDArray[np.float64]) -> Rows:
        """The same with other weights."""
        return replace(self, weights=weights)

    @property
    def full_weights(self) -> NDArray[np.float64]:
        """The weight of each row, shape (n,)."""
        return self.weights if len(self.weights) else np.ones(len(self))


@dataclass(frozen=True)
class Layout:
    """How the rows of the log lie on disk: numbered, and cut by ranges of users.

    Args:
        users, items: the numberings.
        ranges: of users, the partitions.
        columns: what there is besides users and items: weight, time.
        blocks: of train.
        tests: of the given test file; they have the column row as well.
    """

    users: Numbering
    items: Numbering
    ranges: Ranges
    columns: tuple[str, ...]
    blocks: tuple[Block, ...]
    tests: tuple[Block, ...]

    def read(self, work: Workspace, blocks: Sequence[Block], partition: int) -> Rows:
        """The rows of a partition from some blocks, in reading order."""
        found: dict[str, list[NDArray]] = {"user": [], "item": [], "weight": [], "time": [], "row": []}
        for block in blocks:
            start, stop = work.load(f"bounds-{block.number:06d}")[partition : partition + 2].tolist()
            for name in self._names(block):
                file = work.column(f"cut_{name}", block.number)
                found[name].append(read_column(file, self._dtype(name), start, stop))
        user, item, weight, time, row = (
            np.concatenate([np.empty(0, self._dtype(name)), *parts]) for name, parts in found.items()
        )
        return Rows(user, item, weight, time if "time" in self.columns else None, row if found["row"] else None)

    def cut(self, work: Workspace, block: Block) -> None:
        """Number the ids of a block, and write its rows in order of partitions."""
        place = (work, block.chunk, block.start, block.stop)
        users, items = self.users.rows(*place), self.items.rows(*place)
        others = self._names(block)[2:]
        users, items, order, bounds = cut_by_range(
            users, items, self.ranges.part_of_cell, self.ranges.shift, len(self.ranges), bool(others)
        )
        work.save(f"bounds-{block.number:06d}", bounds)
        users.tofile(work.column("cut_user", block.number))
        items.tofile(work.column("cut_item", block.number))
        for name in others:
            values = read_column(work.column(name, block.chunk), DTYPES[name], block.start, block.stop)
            values[order].tofile(work.column(f"cut_{name}", block.number))

    def _names(self, block: Block) -> tuple[str, ...]:
        return ("user", "item", *self.columns, *(("row",) if block in self.tests else ()))

    def _dtype(self, name: str) -> np.dtype:
        return np.dtype({"user": self.users.dtype, "item": self.items.dtype, **DTYPES}[name])


def cut_blocks(n_rows: Sequence[int], rows_per_block: int) -> list[Block]:
    """The blocks of all chunks, in order.

    Args:
        n_rows: of each chunk.
    """
    blocks: list[Block] = []
    for chunk, n in enumerate(n_rows):
        for start in range(0, n, rows_per_block):
            blocks.append(Block(len(blocks), chunk, start, min(start + rows_per_block, n)))
    return blocks


def ranges_of_users(work: Workspace, users: Numbering, blocks: Sequence[Block], n_ranges: int) -> Ranges:
    """Ranges of users with about as many rows each, by a sample of the rows."""
    sample = [np.empty(0, users.dtype)]
    for block in blocks if n_ranges > 1 else ():
        for start in np.linspace(block.start, block.stop, SAMPLED_PLACES, endpoint=False).astype(int).tolist():
            sample.append(users.rows(work, block.chunk, start, min(start + SAMPLED_ROWS, block.stop)))
    rows = np.concatenate(sample)
    return Ranges.balanced(rows, np.ones(len(rows), np.int64), users.n_ids, n_ranges)
