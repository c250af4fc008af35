"""The graph in this process's memory, moved over by numba threads, and the pieces of it that other machines hold."""

from __future__ import annotations

import copy
import math

import numba
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graphhash.errors import ArgumentError
from graphhash.graph import _kernels, _level_kernels, _refine_kernels
from graphhash.graph.bipartite import balanced_chunks, label_dtype

# Pieces of parallel work: many more than cores, so that threads end together, and few enough to cost nothing.
N_CHUNKS = 64


def exact_weights(weights: NDArray[np.floating], total: float) -> NDArray[np.float32]:
    """Weights rounded to multiples of a power of two so small in number that float64 sums of them are exact.

    The unit is at least ``total / 2^52``. Exact sums do not depend on the order of their terms, so shards and threads agree bit for
    bit; the rounding moves a weight by less than ``total * 2^-51``.

    Args:
        weights: above 0, shape (n_edges,).
        total: their sum over the whole graph.

    Returns: float32, same shape, still above 0; an empty array when all are 1.
    """
    if total == len(weights) and (weights == 1).all():
        return np.empty(0, np.float32)
    unit = 2.0 ** (math.ceil(math.log2(total)) - 52)
    rounded = np.maximum(np.rint(np.asarray(weights, np.float64) / unit), 1) * unit
    return rounded.astype(np.float32)


class Rows:
    """Rows of one side of the graph, all of them or a shard, and what clustering does with them.

    Args:
        indptr: int64, shape (n_rows + 1,), from 0.
        indices: columns, ascending and distinct in each row.
        weights: float32, as :func:`exact_weights` returns them.
        degrees: weighted degrees, float64, shape (n_rows,), where they are not the sums of these weights.
    """

    def __init__(
        self,
        indptr: NDArray[np.int64],
        indices: NDArray[np.integer],
        weights: NDArray[np.float32],
        degrees: NDArray[np.float64] | None = None,
    ):
        self.indptr, self.indices, self.weights = indptr, indices, weights
        self.degrees = row_sums(indptr, weights) if degrees is None else degrees
        self.chunks = balanced_chunks(indptr, N_CHUNKS)

    def move(self, labels, other_labels, totals, scale, fresh, active):
        """See :meth:`Graph.move`; ``labels`` and ``active`` are these rows' own, ``fresh`` belongs to the first of them."""
        moved = np.empty_like(labels)
        _kernels.move_rows(
            self.indptr, self.indices, self.weights, self.degrees, labels, active, other_labels, totals, scale, fresh,
            self.chunks, scratch(len(totals)), moved,
        )  # fmt: skip
        awake = np.zeros(len(other_labels), np.bool_)
        _kernels.wake_columns(self.indptr, self.indices, labels, moved, self.chunks, awake)
        return moved, awake

    def contract(self, labels, other_labels, n_groups):
        """What these rows contribute to :meth:`Graph.contract`; ``labels`` are their own."""
        return contract_rows(
            self.indptr[:-1], self.indptr[1:], self.indices, self.weights, labels, other_labels, n_groups
        )

    def weight_inside(self, labels, other_labels):
        """See :meth:`Graph.weight_inside`."""
        return float(
            _kernels.weight_inside(self.indptr, self.indices, self.weights, labels, other_labels, self.chunks).sum()
        )

    def inside(self, labels, other_labels):
        """These rows with the edges alone whose ends share a label that is not negative, and with the same degrees."""
        kept = _refine_kernels.keep_inside(self.indptr, self.indices, self.weights, labels, other_labels, self.chunks)
        kept_indptr, kept_indices, kept_weights = kept
        return Rows(kept_indptr, kept_indices, kept_weights, self.degrees)

    def joined(self, labels, other_labels):
        """See :meth:`Graph.joined`; ``labels`` are these rows' own."""
        chunks = balanced_chunks(self.indptr, numba.get_num_threads())
        parents = np.tile(np.arange(len(other_labels), dtype=label_dtype(len(other_labels))), (len(chunks) - 1, 1))
        anchors = np.empty(len(labels), np.int64)
        _refine_kernels.join_columns(self.indptr, self.indices, labels, other_labels, chunks, parents, anchors)
        return parents, anchors

    def row_weights(self):
        """See :meth:`Graph.row_weights`."""
        return row_sums(self.indptr, self.weights)

    def bucket_weights(self, labels, other_labels, n_labels, wanted):
        """See :meth:`Graph.bucket_weights`."""
        rows = np.flatnonzero(wanted[labels])
        lengths = np.diff(self.indptr)[rows]
        ends = np.cumsum(lengths)
        edges = np.repeat(self.indptr[rows] - ends + lengths, lengths) + np.arange(lengths.sum())
        own, other = np.repeat(labels[rows].astype(np.int64), lengths), other_labels[self.indices[edges]]
        outside = own != other
        weights = self.weights[edges][outside].astype(np.float64) if len(self.weights) else np.ones(outside.sum())
        return sum_pairs((own * n_labels + other)[outside], weights)


class LocalCommunities:
    """:class:`graphhash.graph.bipartite.Communities` in this process's memory: all rows, or some of them from ``first`` on.

    Args:
        starts, ends: int64, shape (n_rows,): where each row's entries lie.
        columns: int32 or int64, in any order.  values: float64.
        first: node of the first row.  n_nodes: nodes of the whole graph; as many as rows when None.
    """

    def __init__(
        self,
        starts: NDArray[np.int64],
        ends: NDArray[np.int64],
        columns: NDArray[np.int32],
        values: NDArray[np.float64],
        first: int = 0,
        n_nodes: int | None = None,
    ):
        self.starts, self.ends, self.columns, self.values = starts, ends, columns, values
        self.first, self.n_nodes = first, len(starts) if n_nodes is None else n_nodes
        self.chunks = balanced_chunks(np.concatenate([[0], np.cumsum(ends - starts)]), N_CHUNKS)

    def compact(self) -> tuple[NDArray[np.int64], NDArray[np.integer], NDArray[np.float64]]:
        """Row boundaries from 0 (int64, shape (n_rows + 1,)), and columns and values without gaps."""
        indptr = np.concatenate([[0], np.cumsum(self.ends - self.starts)])
        columns, values = np.empty(indptr[-1], self.columns.dtype), np.empty(indptr[-1])
        _level_kernels.close_gaps(
            self.starts, self.ends, self.columns, self.values, indptr, self.chunks, columns, values
        )
        return indptr, columns, values

    def propose(self, grouping, scale, active, moved):
        n_rows = len(self.starts)
        targets = np.empty(n_rows, grouping.labels.dtype)
        gains, to_target, to_own = np.empty((3, n_rows), np.float64)
        _level_kernels.propose_moves(
            self.starts, self.ends, self.columns, self.values, self.first, grouping.labels, grouping.user_degrees,
            grouping.item_degrees, grouping.group_users, grouping.group_items, scale, active, moved, self.chunks,
            scratch(self.n_nodes), targets, gains, to_target, to_own,
        )  # fmt: skip
        return targets, gains, to_target, to_own

    def contract(self, labels, n_groups):
        own = labels[self.first : self.first + len(self.starts)]
        return contract_rows(self.starts, self.ends, self.columns, self.values, own, labels, n_groups)


def contract_rows(
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    columns: NDArray[np.integer],
    weights: NDArray[np.floating],
    labels: NDArray[np.integer],
    column_labels: NDArray[np.integer],
    n_groups: int,
) -> LocalCommunities:
    """What rows contribute to the graph of the groups 0..n_groups-1.

    Args:
        starts, ends, columns, weights: the rows; no weights mean all ones.
        labels: group of each row.  column_labels: group of each column.
    """
    group_starts, rows = _level_kernels.group_rows(labels, n_groups)
    room = _room(np.bincount(labels, ends - starts, n_groups).astype(np.int64), labels.dtype, n_groups)
    _level_kernels.contract_rows(group_starts, rows, starts, ends, columns, weights, column_labels, 0, *room)
    return LocalCommunities(*room[2:])


def sum_parts(
    parts: list[tuple[NDArray[np.int64], NDArray[np.integer], NDArray]], first: int, n_groups: int
) -> LocalCommunities:
    """Rows ``first``, ``first + 1``, ... of a contracted graph, from what every shard contributes to them.

    Args:
        parts: of each shard, row boundaries (int64, shape (n_rows + 1,)), columns and values.
        n_groups: nodes of the contracted graph.
    """
    n_rows = len(parts[0][0]) - 1
    offsets = np.cumsum([0, *(len(columns) for _, columns, _ in parts[:-1])])
    starts, ends = (
        np.concatenate([indptr[cut] + offset for (indptr, _, _), offset in zip(parts, offsets, strict=True)])
        for cut in (slice(None, -1), slice(1, None))
    )
    columns, values = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
    own = np.tile(np.arange(n_rows, dtype=columns.dtype), len(parts))
    group_starts, rows = _level_kernels.group_rows(own, n_rows)
    room = _room(np.bincount(own, ends - starts, n_rows).astype(np.int64), columns.dtype, n_groups)
    identity = np.arange(n_groups, dtype=columns.dtype)
    _level_kernels.contract_rows(group_starts, rows, starts, ends, columns, values, identity, first, *room)
    starts, ends, columns, values = room[2:]
    return LocalCommunities(starts, ends, columns, values, first, n_groups)


def _room(n_edges: NDArray[np.int64], dtype: np.dtype, n_labels: int):
    """Where a contraction of groups with so many edges each writes: chunks, scratch, starts, ends, columns and values."""
    chunks = balanced_chunks(np.concatenate([[0], np.cumsum(n_edges)]), N_CHUNKS)
    # A row gets room for all that it could have. What it does not use is never touched, and so takes no memory.
    starts = np.concatenate([[0], np.cumsum(np.minimum(n_edges, n_labels) + 1)])
    ends = np.empty(len(n_edges), np.int64)
    return chunks, scratch(n_labels), starts[:-1], ends, np.empty(starts[-1], dtype), np.empty(starts[-1])


class LocalGraph:
    """The graph in this process's memory, moved over by numba threads.

    Args:
        biadjacency: weights above 0, shape (n_users, n_items), indices ascending and distinct in each row.
        total: sum of the weights, where the caller knows it.

    Raises:
        ArgumentError: no edges, or a weight that is not finite and above 0.
    """

    def __init__(self, biadjacency: csr_array, total: float | None = None):
        if biadjacency.nnz == 0:
            raise ArgumentError("the graph has no edges: there is nothing to cluster")
        if not np.isfinite(biadjacency.data).all() or not (biadjacency.data > 0).all():
            raise ArgumentError("edge weights must be finite and above 0")
        self.n_users, self.n_items = biadjacency.shape
        total = float(biadjacency.data.sum(dtype=np.float64)) if total is None else total
        self._sides = {
            side: Rows(matrix.indptr.astype(np.int64), matrix.indices, exact_weights(matrix.data, total))
            for side, matrix in (("users", biadjacency), ("items", biadjacency.T.tocsr()))
        }
        self.user_degrees, self.item_degrees = self._sides["users"].degrees, self._sides["items"].degrees
        self.total_weight = float(self.user_degrees.sum())

    def move(self, side, labels, other_labels, totals, scale, fresh, active):
        return self._sides[side].move(labels, other_labels, totals, scale, fresh, active)

    def contract(self, user_labels, item_labels, n_groups):
        arguments = []
        n_edges = np.zeros(n_groups, np.int64)
        for side, labels in (("users", user_labels), ("items", item_labels)):
            rows = self._sides[side]
            arguments += [
                *_level_kernels.group_rows(labels, n_groups),
                rows.indptr,
                rows.indices,
                rows.weights,
                labels,
            ]
            n_edges += np.bincount(labels, np.diff(rows.indptr), n_groups).astype(np.int64)
        room = _room(n_edges, user_labels.dtype, n_groups)
        _level_kernels.contract_bipartite(*arguments, *room)
        return LocalCommunities(*room[2:])

    def weight_inside(self, user_labels, item_labels):
        return self._sides["users"].weight_inside(user_labels, item_labels)

    def inside(self, user_labels, item_labels):
        graph = copy.copy(self)
        graph._sides = {
            "users": self._sides["users"].inside(user_labels, item_labels),
            "items": self._sides["items"].inside(item_labels, user_labels),
        }
        return graph

    def joined(self, user_labels, item_labels):
        return self._sides["users"].joined(user_labels, item_labels)

    def row_weights(self, side):
        return self._sides[side].row_weights()

    def bucket_weights(self, side, labels, other_labels, n_labels, wanted):
        return self._sides[side].bucket_weights(labels, other_labels, n_labels, wanted)


def scratch(n_labels: int) -> NDArray[np.float64]:
    """A row of zeros for every thread: where a kernel sums weights by label."""
    return np.zeros((numba.get_num_threads(), n_labels))


def sum_pairs(pairs: NDArray[np.int64], weights: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The distinct pairs, ascending, and the sum of each one's weights."""
    distinct, place = np.unique(pairs, return_inverse=True)
    return distinct, np.bincount(place.ravel(), weights, len(distinct)).astype(np.float64, copy=False)


def row_sums(indptr: NDArray[np.int64], weights: NDArray[np.float32]) -> NDArray[np.float64]:
    """Weighted degree of every row; an empty ``weights`` means all ones."""
    if len(weights) == 0:
        return np.diff(indptr).astype(np.float64)
    # A plain reduceat gives an empty row its neighbour's first weight.
    running = np.concatenate([[0.0], np.cumsum(weights, dtype=np.float64)])
    return running[indptr[1:]] - running[indptr[:-1]]
