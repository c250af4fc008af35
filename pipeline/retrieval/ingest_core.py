"""The core of train (Seidman, Social Networks 1983, for two sides): the most users and items that all have enough of each other.

A user of fewer than the least number of items is removed, and so is an item of fewer users than its own least number, until none is left
to remove. The result does not depend on the order. Edges are distinct pairs here, and all edges of a user are in one partition; so a
partition needs to know of the others' only which items are left.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from graphhash.graph.vocabulary import Vocabulary
from pipeline.distributed.session import run_tasks
from pipeline.retrieval.ingest_files import Workspace
from pipeline.retrieval.ingest_tasks import unique_ids


class CoreFacts(TypedDict):
    """What the core leaves of train, and what was removed: distinct users, items and pairs."""

    n_kept: int
    users: int
    items: int
    interactions: int


def keep_core(work: Workspace, least_users: int, least_items: int) -> CoreFacts:
    """Remove from the merged edges of all partitions what is outside of the core.

    Args:
        least_users: users of an item at least.
        least_items: items of a user at least.
    """
    partitions = range(work.n_partitions)
    vocabulary = Vocabulary.from_ids(unique_ids(work, "item"))
    vocabulary.save(work.vocabulary("item"))
    found = run_tasks(_number_items, [(work, p) for p in partitions], label="core")
    left = np.ones(len(vocabulary), bool)
    while True:
        np.save(_items_left(work), left)
        counts = np.zeros(len(vocabulary), np.int64)
        for file in run_tasks(_count_users, [(work, p, least_items) for p in partitions], label="core"):
            rows, n_users = np.load(file)
            counts[rows] += n_users
        still = left & (counts >= least_users)
        if still.sum() == left.sum():
            break
        left = still
    kept = run_tasks(_keep_edges, [(work, p, least_items) for p in partitions], label="core")
    n_users, n_edges = (sum(column) for column in zip(*found, strict=True))
    users_kept, n_kept = (sum(column) for column in zip(*kept, strict=True))
    return {
        "n_kept": n_kept,
        "users": n_users - users_kept,
        "items": len(vocabulary) - int(left.sum()),
        "interactions": n_edges - n_kept,
    }


def _number_items(work: Workspace, partition: int) -> tuple[int, int]:
    """Write the rows of a partition's items among all. Returns its numbers of users and of edges."""
    work.save_rows("item", partition, Vocabulary.load(work.vocabulary("item")).rows(work.read_ids("item", partition)))
    return len(work.read_ids("user", partition)), len(work.load_edges("edges", partition)[0])


def _count_users(work: Workspace, partition: int, least_items: int) -> Path:
    """Write the items of a partition and how many of its users with enough items each has, int64, shape (2, n_items)."""
    rows = work.load_rows("item", partition)
    items = work.load_edges("edges", partition)[1][_edges_left(work, partition, least_items)]
    file = work.folder / f"core-{partition:06d}.npy"
    np.save(file, np.array([rows, np.bincount(items, minlength=len(rows))], np.int64))
    return file


def _keep_edges(work: Workspace, partition: int, least_items: int) -> tuple[int, int]:
    """Write the edges and ids that are left anew. Returns the numbers of users and of edges."""
    left = _edges_left(work, partition, least_items)
    users, items, weights = (array[left] for array in work.load_edges("edges", partition))
    codes, n_ids = {}, {}
    for side, column in (("user", users), ("item", items)):
        used, codes[side] = np.unique(column, return_inverse=True)
        work.write_ids(side, partition, work.read_ids(side, partition).take(pa.array(used)))
        codes[side], n_ids[side] = codes[side].astype(column.dtype), len(used)
    work.save_edges("edges", partition, codes["user"], codes["item"], weights)
    return n_ids["user"], len(users)


def _edges_left(work: Workspace, partition: int, least_items: int) -> NDArray[np.bool_]:
    """Which edges of a partition join an item that is left to a user who has enough of them, shape (n_edges,)."""
    users, items, _ = work.load_edges("edges", partition)
    left = np.load(_items_left(work))[work.load_rows("item", partition)][items]
    n_items = np.bincount(users[left], minlength=len(work.read_ids("user", partition)))
    return left & (n_items >= least_items)[users]


def _items_left(work: Workspace) -> Path:
    return work.folder / "core_items.npy"
