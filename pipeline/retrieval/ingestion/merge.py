"""The steps that cut the rows of the log by users, and merge the rows of a pair into an edge.

Blocks are read in order, so equal pairs are added in log order, and the result does not depend on the number of partitions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from graphhash.errors import DataError
from graphhash.graph import _edge_kernels as kernels
from graphhash.graph.interactions import seed_state
from pipeline.retrieval.ingestion.files import Edges, Workspace
from pipeline.retrieval.ingestion.ranges import Block, Layout, Rows
from pipeline.retrieval.ingestion.times import ALL_ROWS, TrainRows

MAX_WEIGHT = float(np.finfo(np.float32).max)


def cut_block(work: Workspace, layout: Layout, block: Block) -> None:
    """Number the ids of a block, and write its rows in order of partitions."""
    layout.cut(work, block)


def merge_partition(
    work: Workspace, layout: Layout, partition: int, train: TrainRows = ALL_ROWS, seed: int | None = None
) -> int:
    """Write the distinct edges of a partition in rows of the numbering, sorted. Returns their number.

    Args:
        train: which rows of the log to take.
        seed: where these rows are those of the vocabularies: of the edge hashes, whose lowest of each item are written.

    Raises:
        DataError: the merged weight of a pair exceeds float32, or ageing left it too small.
    """
    rows = train.of(layout.read(work, layout.blocks, partition))
    low, high = layout.ranges.bounds[partition : partition + 2].tolist()
    edges = merged(rows, low, high - low)
    if len(edges.weights) and edges.weights.max() > MAX_WEIGHT:
        raise DataError(
            f"the weights of one user-item pair add up to {edges.weights.max():g}, "
            f"float32 ends at {MAX_WEIGHT:g}; scale the weights down"
        )
    train.check(edges.weights)
    work.save_edges("edges", partition, edges)
    if seed is not None:
        save_lowest(work, partition, edges, low, (seed, layout.items.n_ids))
    return len(edges.columns)


def merged(rows: Rows, low: int, n_rows: int) -> Edges:
    """Edges of rows of the log by user, ascending, each pair once; weights of equal pairs add up in float64, in log order.

    Args:
        low, n_rows: first user, and number of users.
    """
    indptr, columns, weights = kernels.group_rows(rows.users, rows.items, rows.weights, low, n_rows)
    weights = kernels.merge_rows(indptr, columns, weights)
    return Edges(indptr, columns[: indptr[-1]], weights)


def save_lowest(work: Workspace, partition: int, edges: Edges, low: int, of: tuple[int, int]) -> None:
    """Write the items of a partition, the lowest hash and the number of edges of each.

    Args:
        low: row of the first user.
        of: seed, and number of items.
    """
    seed, n_items = of
    lowest, counts = kernels.lowest_of_columns(edges.indptr, edges.columns, low, seed_state(seed)[0], n_items)
    items = np.flatnonzero(counts)
    for name, values in (("items", items), ("hashes", lowest[items]), ("counts", counts[items])):
        work.save(f"lowest-{partition:06d}.{name}", values)


def lowest_of_items(work: Workspace, n_partitions: int, n_items: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The lowest edge hash of each item over all partitions, and its number of edges, shape (n_items,) each."""
    lowest, counts = np.full(n_items, np.iinfo(np.uint64).max, np.uint64), np.zeros(n_items, np.int64)
    for partition in range(n_partitions):
        rows = work.load(f"lowest-{partition:06d}.items")
        # Rows are distinct within a partition, so a plain assignment is enough.
        lowest[rows] = np.minimum(lowest[rows], work.load(f"lowest-{partition:06d}.hashes"))
        counts[rows] += work.load(f"lowest-{partition:06d}.counts")
    return lowest, counts
