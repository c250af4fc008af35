"""The core of train (Seidman, Social Networks 1983, for two sides): the most users and items that all have enough of each other.

A user of fewer than the least number of items is removed, and so is an item of fewer users than its own least number, until none is left
to remove. The result does not depend on the order. Edges are distinct pairs here, and all edges of a user are in one partition; so a
partition needs to know of the others' only which items are left.
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from pipeline.distributed.session import run_tasks
from pipeline.retrieval.ingestion.files import Edges, Workspace


class CoreFacts(TypedDict):
    """What the core leaves of train, and what was removed: distinct users, items and pairs."""

    n_kept: int
    users: int
    items: int
    interactions: int


def keep_core(work: Workspace, n_partitions: int, n_items: int, least: tuple[int, int], threads: int) -> CoreFacts:
    """Remove from the merged edges of all partitions what is outside of the core.

    Args:
        n_items: of the numbering, in rows of which the edges are.
        least: users of an item, and items of a user.
    """
    partitions = range(n_partitions)
    least_users, least_items = least
    present = left = items_of_train(work, n_partitions, n_items)
    while True:
        work.save("core_items", left)
        counts = np.zeros(n_items, np.int64)
        run_tasks(_count_users, [(work, p, least_items) for p in partitions], label="core", threads=threads)
        for partition in partitions:
            items, n_users = work.load(_counts(partition))
            counts[items] += n_users
        still = left & (counts >= least_users)
        if still.sum() == left.sum():
            break
        left = still
    work.save("core_items", left)
    kept = run_tasks(_keep_edges, [(work, p, least_items) for p in partitions], label="core", threads=threads)
    n_users, n_edges, users_kept, n_kept = (sum(column) for column in zip(*kept, strict=True))
    return {
        "n_kept": n_kept,
        "users": n_users - users_kept,
        "items": int(present.sum()) - int(left.sum()),
        "interactions": n_edges - n_kept,
    }


def items_of_train(work: Workspace, n_partitions: int, n_items: int) -> NDArray[np.bool_]:
    """Which items have a merged edge, shape (n_items,): those of held-out rows are in the numbering as well."""
    present = np.zeros(n_items, bool)
    for partition in range(n_partitions):
        present[work.load_edges("edges", partition).columns] = True
    return present


def _count_users(work: Workspace, partition: int, least_items: int) -> None:
    """Write the items of a partition and how many of its users with enough items each has, int64, shape (2, n_items)."""
    edges = work.load_edges("edges", partition)
    items, n_users = np.unique(edges.columns[_edges_left(work, edges, least_items)], return_counts=True)
    work.save(_counts(partition), np.array([items, n_users], np.int64))


def _keep_edges(work: Workspace, partition: int, least_items: int) -> tuple[int, int, int, int]:
    """Write the edges that are left anew. Returns the numbers of users and of edges, before and after."""
    edges = work.load_edges("edges", partition)
    left = _edges_left(work, edges, least_items)
    counts = np.bincount(edges.rows[left], minlength=len(edges.indptr) - 1)
    kept = Edges(
        np.concatenate([[0], np.cumsum(counts)]),
        edges.columns[left],
        edges.weights[left] if len(edges.weights) else edges.weights,
    )
    before = int((np.diff(edges.indptr) > 0).sum()), len(edges.columns)
    work.save_edges("edges", partition, kept)
    return *before, int((counts > 0).sum()), len(kept.columns)


def _edges_left(work: Workspace, edges: Edges, least_items: int) -> NDArray[np.bool_]:
    """Which edges of a partition join an item that is left to a user who has enough of them, shape (n_edges,)."""
    left, rows = work.load("core_items")[edges.columns], edges.rows
    n_items = np.bincount(rows[left], minlength=len(edges.indptr) - 1)
    return left & (n_items >= least_items)[rows]


def _counts(partition: int) -> str:
    return f"core-{partition:06d}"
