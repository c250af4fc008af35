"""The user-item graph: building it from columns, cutting its rows into pieces of equal work, and what clustering asks of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array

from graphhash.errors import DataError

SIDES = ("users", "items")


def biadjacency(
    users: NDArray[np.integer],
    items: NDArray[np.integer],
    weights: NDArray[np.floating] | None = None,
    *,
    n_users: int | None = None,
    n_items: int | None = None,
) -> csr_array:
    """CSR matrix users x items; duplicate pairs are merged and their weights add.

    Args:
        users, items: row numbers, shape (n_interactions,).
        weights: greater than 0, same shape; all ones when None.
        n_users, n_items: shape of the matrix; the largest row number plus one when None.

    Returns: float32 weights, indices ascending in each row.

    Raises:
        DataError: columns of different length, empty, or with a negative row number or a weight that is not above 0.
    """
    users, items = np.asarray(users), np.asarray(items)
    weights = np.ones(len(users), np.float32) if weights is None else np.asarray(weights)
    if not len(users) == len(items) == len(weights):
        raise DataError(f"columns differ in length: {len(users)} users, {len(items)} items, {len(weights)} weights")
    if len(users) == 0:
        raise DataError("no interactions: the graph would be empty")
    if users.min() < 0 or items.min() < 0:
        raise DataError(f"row numbers must not be negative, got user {users.min()} and item {items.min()}")
    if not (weights > 0).all() or not np.isfinite(weights).all():
        raise DataError("weights must be finite and above 0; drop the others first")
    shape = (
        int(users.max()) + 1 if n_users is None else n_users,
        int(items.max()) + 1 if n_items is None else n_items,
    )
    if users.max() >= shape[0] or items.max() >= shape[1]:
        raise DataError(
            f"row numbers reach user {users.max()} and item {items.max()}, the graph is {shape[0]} x {shape[1]}"
        )
    matrix = csr_array(coo_array((weights.astype(np.float64), (users, items)), shape=shape))
    matrix.sum_duplicates()
    return matrix.astype(np.float32)


def balanced_chunks(indptr: NDArray[np.integer], n_chunks: int) -> NDArray[np.int64]:
    """Row boundaries, shape (at most n_chunks + 1,), that give every chunk about the same number of edges and rows together."""
    work = np.asarray(indptr, np.int64) + np.arange(len(indptr))
    cuts = np.searchsorted(work, np.linspace(0, work[-1], n_chunks + 1))
    return np.unique(np.clip(cuts, 0, len(indptr) - 1)).astype(np.int64)


@dataclass(eq=False)
class Grouping:
    """Groups of communities while they are being moved.

    Args:
        labels: group of each node, int32 or int64, shape (n_nodes,), in 0..n_nodes-1.
        user_degrees, item_degrees: float64 weight of each node's users and items, shape (n_nodes,).
        group_users, group_items: the same of each group.
    """

    labels: NDArray[np.integer]
    user_degrees: NDArray[np.float64]
    item_degrees: NDArray[np.float64]
    group_users: NDArray[np.float64]
    group_items: NDArray[np.float64]


class Communities(Protocol):
    """A graph of communities, with the weight between every two of them, both ways together, and no loops.

    Like :class:`Graph`, it gives the same bits however its rows are spread over workers.
    """

    n_nodes: int

    def propose(
        self, grouping: Grouping, scale: float, active: NDArray[np.bool_], moved: NDArray[np.bool_]
    ) -> tuple[NDArray[np.integer], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """The best other group of every node that is active or has a neighbour that moved away, where moving there gains.

        Returns: the group, or -1; the gain; the weight between node and group; and that between the node and the rest of its own.
        """
        ...

    def contract(self, labels: NDArray[np.integer], n_groups: int) -> Communities:
        """The graph whose nodes are the groups 0..n_groups-1 of this graph's nodes."""
        ...


class Graph(Protocol):
    """What clustering asks of a graph; every operation returns the same bits however it is spread over workers."""

    n_users: int
    n_items: int
    total_weight: float
    user_degrees: NDArray[np.float64]
    item_degrees: NDArray[np.float64]

    def move(
        self,
        side: str,
        labels: NDArray,
        other_labels: NDArray,
        totals: NDArray,
        scale: float,
        fresh: int,
        active: NDArray,
    ) -> tuple[NDArray[np.integer], NDArray[np.bool_]]:
        """Half-sweep of one side ("users" or "items"): its new labels, and which nodes of the other side have a moved neighbour.

        ``totals`` is the other side's degree in each label, as far as its highest; ``fresh + row`` is a label kept for each row.
        """
        ...

    def contract(
        self, user_labels: NDArray[np.integer], item_labels: NDArray[np.integer], n_groups: int
    ) -> Communities:
        """The graph whose nodes are the communities 0..n_groups-1."""
        ...

    def weight_inside(self, user_labels: NDArray, item_labels: NDArray) -> float:
        """Weight of the edges whose ends share a label."""
        ...

    def inside(self, user_labels: NDArray, item_labels: NDArray) -> Graph:
        """The graph of the edges whose ends share a label that is not negative; degrees and total weight stay the whole graph's."""
        ...

    def joined(
        self, user_labels: NDArray[np.integer], item_labels: NDArray[np.integer]
    ) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
        """What the edges whose ends share a label connect: forests of the items, and an item of each user or -1.

        Returns: parents, shape (n_forests, n_items), each forest of a part of the users, and items, shape (n_users,).
        """
        ...

    def row_weights(self, side: str) -> NDArray[np.float64]:
        """Weight of every node's edges in this graph, which :meth:`inside` lessens and degrees do not."""
        ...

    def bucket_weights(
        self, side: str, labels: NDArray, other_labels: NDArray, n_labels: int, wanted: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Weight between the ``wanted`` labels of one side and the other side's other labels, as ``label * n_labels + other``."""
        ...


def label_dtype(n_labels: int) -> type[np.signedinteger]:
    """The smallest type that holds the labels 0..n_labels-1: int32 while it can, else int64."""
    return np.int32 if n_labels < 2**31 else np.int64
