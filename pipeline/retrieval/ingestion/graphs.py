"""The steps that make the graphs: edges are split into train, validation and test, gathered by item, and written in shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from graphhash.graph import _edge_kernels as kernels
from graphhash.graph.interactions import TEST, TRAIN, VALIDATION, seed_state
from pipeline.distributed.shards import ShardFacts, write_shard
from pipeline.retrieval.ingestion.files import Edges, Workspace
from pipeline.retrieval.ingestion.ranges import Ranges


@dataclass(frozen=True)
class Split:
    """How edges are split.

    Args:
        validation, test: shares of the edges.
        given: the parts that are there already: those of a split by time, and a test file.
    """

    seed: int
    validation: float
    test: float
    given: tuple[str, ...] = ()


def split_partition(work: Workspace, partition: int, split: Split, items: Ranges) -> dict[str, int]:
    """Write the edges of each part of the split in vocabulary rows, by user; those of train also cut by ranges of items.

    Returns: edges of train, validation and test.
    """
    edges, low = work.load_edges("edges", partition), int(work.load("user_starts")[partition])
    parts = np.zeros(len(edges.columns), np.uint8)
    if split.validation or split.test:
        kernels.draw_parts(
            edges.indptr, edges.columns, low, seed_state(split.seed)[0], work.load("item_lowest"),
            float(split.validation), float(split.test), parts,
        )  # fmt: skip
    counts = {}
    for name, part in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        if name in split.given:
            counts[name] = len(work.load_edges(name, partition).columns)
            continue
        picked = Edges(*kernels.pick_edges(edges.indptr, edges.columns, edges.weights, parts, part))
        work.save_edges(name, partition, picked)
        counts[name] = len(picked.columns)
        if name == "train":
            _cut_by_item(work, partition, picked, low, items)
    return counts


def gather_items(work: Workspace, number: int, items: Ranges, n_partitions: int) -> None:
    """Write the edges of a range of items by item, users ascending."""
    parts: list[list[NDArray]] = [[], [], []]
    is_weighted = any(work.has(f"by_item-{partition:06d}.weights") for partition in range(n_partitions))
    for partition in range(n_partitions):
        name = f"by_item-{partition:06d}"
        start, stop = work.load(f"{name}.bounds")[number : number + 2].tolist()
        parts[0].append(work.load(f"{name}.items")[start:stop])
        parts[1].append(work.load(f"{name}.users")[start:stop])
        if is_weighted:
            has_weights = work.has(f"{name}.weights")
            parts[2].append(work.load(f"{name}.weights")[start:stop] if has_weights else np.ones(stop - start))
    weights = np.concatenate(parts[2]) if is_weighted else np.empty(0)
    low, high = items.bounds[number : number + 2].tolist()
    grouped = kernels.group_rows(np.concatenate(parts[0]), np.concatenate(parts[1]), weights, low, high - low)
    work.save_edges("train_by_item", number, Edges(*grouped))


def build_shard(work: Workspace, out: Path, name: str, shard: int, rows: tuple[int, int], n_cols: int) -> ShardFacts:
    """Gather rows [start, stop) of graph `name` from its pieces, and write them as one shard of `out / name`."""
    starts = work.load("item_starts" if name == "train_by_item" else "user_starts")
    counts: list[NDArray] = [np.zeros(1, np.int64)]
    columns: list[NDArray] = []
    weights: list[NDArray | int] = []
    for piece in range(len(starts) - 1):
        start, stop = (int(min(max(row - starts[piece], 0), starts[piece + 1] - starts[piece])) for row in rows)
        if start == stop:
            continue
        edges = work.load_edges(name, piece)
        low, high = edges.indptr[start], edges.indptr[stop]
        counts.append(np.diff(edges.indptr[start : stop + 1]))
        columns.append(edges.columns[low:high])
        weights.append(edges.weights[low:high] if len(edges.weights) else int(high - low))
    indptr = np.cumsum(np.concatenate(counts))
    joined = np.concatenate(columns) if columns else np.empty(0, np.int32)
    if all(isinstance(part, int) for part in weights):
        return write_shard(out / name, shard, indptr, joined, None, n_cols=n_cols)
    full = np.concatenate([np.ones(part) if isinstance(part, int) else part for part in weights])
    return write_shard(out / name, shard, indptr, joined, full, n_cols=n_cols)


def _cut_by_item(work: Workspace, partition: int, edges: Edges, low: int, items: Ranges) -> None:
    """Write the edges of train of a partition in order of ranges of items; within one, in order of users."""
    users = edges.rows + low
    users = users.astype(np.int32 if low + len(edges.indptr) < 2**31 else np.int64)
    cut_items, cut_users, order, bounds = kernels.cut_by_range(
        edges.columns, users, items.part_of_cell, items.shift, len(items), bool(len(edges.weights))
    )
    name = f"by_item-{partition:06d}"
    for key, values in (("bounds", bounds), ("items", cut_items), ("users", cut_users)):
        work.save(f"{name}.{key}", values)
    if len(edges.weights):
        work.save(f"{name}.weights", edges.weights[order])
