"""Numba kernels of what happens inside communities: edges kept inside, connected pieces, sequential label
propagation.

As in ``graphhash.graph._kernels``: flat arrays in, flat arrays out; an empty weight array means all ones; ties go
to the lowest label.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange


@njit(cache=True, parallel=True)
def keep_inside(indptr, indices, weights, labels, other_labels, chunks):
    """The edges whose two ends share a label that is not negative.

    Args:
        indptr: int64, shape (n_rows + 1,).  indices: columns, shape (n_edges,).  weights: float32 (n_edges,) or (0,).
        labels, other_labels: int32, shapes (n_rows,) and (n_columns,).
        chunks: int64 row boundaries, shape (n_chunks + 1,), one unit of parallel work each.

    Returns: indptr, indices and weights of the edges kept, in the same types and order.
    """
    n_rows = len(indptr) - 1
    kept = np.zeros(n_rows + 1, np.int64)
    for chunk in prange(len(chunks) - 1):
        for row in range(chunks[chunk], chunks[chunk + 1]):
            if labels[row] < 0:
                continue
            for edge in range(indptr[row], indptr[row + 1]):
                if other_labels[indices[edge]] == labels[row]:
                    kept[row + 1] += 1
    for row in range(n_rows):
        kept[row + 1] += kept[row]
    unit = len(weights) == 0
    columns = np.empty(kept[n_rows], indices.dtype)
    values = np.empty(0 if unit else kept[n_rows], weights.dtype)
    for chunk in prange(len(chunks) - 1):
        for row in range(chunks[chunk], chunks[chunk + 1]):
            end = kept[row]
            if end == kept[row + 1]:
                continue
            for edge in range(indptr[row], indptr[row + 1]):
                if other_labels[indices[edge]] == labels[row]:
                    columns[end] = indices[edge]
                    if not unit:
                        values[end] = weights[edge]
                    end += 1
    return kept, columns, values


@njit(cache=True)
def find(parents, node):
    """Root of a node; the paths to it become shorter (path halving)."""
    while parents[node] != node:
        parents[node] = parents[parents[node]]
        node = parents[node]
    return node


@njit(cache=True)
def join(parents, a, b):
    """Put two nodes into one tree, whose root is the lower of their roots."""
    a, b = find(parents, a), find(parents, b)
    if a < b:
        parents[b] = a
    else:
        parents[a] = b


@njit(cache=True, parallel=True)
def join_columns(indptr, indices, labels, other_labels, chunks, parents, anchors):
    """Join the columns that a row connects by edges whose two ends share a label.

    Args:
        indptr, indices, labels, other_labels: as in :func:`keep_inside`.
        chunks: int64 row boundaries, shape (n_chunks + 1,): one forest each.
        parents: shape (n_chunks, n_columns), each row 0..n_columns-1; the forests, written.
        anchors: int64, shape (n_rows,), written: a column that the row is connected with; -1 where there is none.
    """
    for chunk in prange(len(chunks) - 1):
        forest = parents[chunk]
        for row in range(chunks[chunk], chunks[chunk + 1]):
            anchors[row] = -1
            for edge in range(indptr[row], indptr[row + 1]):
                column = indices[edge]
                if other_labels[column] == labels[row]:
                    if anchors[row] < 0:
                        anchors[row] = column
                    else:
                        join(forest, anchors[row], column)


@njit(cache=True)
def join_forests(forests, anchors, user_roots, item_roots):
    """Lowest node number of every user's and item's piece (users are nodes 0..n_users-1, items follow).

    Args:
        forests: parents of the items, shape (n_forests, n_items); the first one is changed.
        anchors: an item of each user, or -1, int64, shape (n_users,).
        user_roots, item_roots: int64, shapes (n_users,) and (n_items,), written.
    """
    n_users, n_items = len(anchors), forests.shape[1]
    parents = forests[0]
    for forest in forests[1:]:
        for item in range(n_items):
            if forest[item] != item:
                join(parents, item, forest[item])
    lowest = np.full(n_items, -1, np.int64)
    for user in range(n_users):
        user_roots[user] = user
        if anchors[user] >= 0:
            root = find(parents, anchors[user])
            if lowest[root] < 0:
                lowest[root] = user
            user_roots[user] = lowest[root]
    for item in range(n_items):
        root = lowest[find(parents, item)]
        item_roots[item] = root if root >= 0 else n_users + item


@njit(cache=True)
def propagate(
    turns, indptr, indices, weights, labels, volumes, totals, other_sides, counts, resolution, n_rows, least_rows
):  # fmt: skip
    """One sequential pass of label propagation over users and items, stopped as soon as few enough rows are left.

    Users are nodes 0..n_users-1 and items follow; the graph is symmetric, so the neighbours of a user are items alone and the reverse.
    The gain of node v in community c is ``w(v, c) - resolution * volumes[v] * (volume of the other side in c)``. A node moves only
    for a larger gain, to a neighbour's community; ties go to the lowest label.

    Args:
        turns: nodes, in order.  indptr, indices, weights: of all nodes; weights float32 (n_edges,) or (0,).
        labels: int32, shape (n_nodes,), updated in place.  volumes: float64, shape (n_nodes,).
        totals: float64, shape (2, n_labels): volume of users and of items in each label, updated.  other_sides: where in ``totals``
            a node's neighbours stand, int8, shape (n_nodes,): 1 for users, 0 for items.
        counts: int64, shape (2, n_labels): users and items in each label, updated.
        n_rows: buckets of both sides before the pass.  least_rows: stop at so many.

    Returns: number of moves and number of rows.
    """
    unit = len(weights) == 0
    sums = np.zeros(totals.shape[1], np.float64)
    used = np.empty(len(labels), np.int64)
    n_moves = 0
    for node in turns:
        if n_rows <= least_rows:
            break
        other = other_sides[node]
        own = 1 - other
        n_used = 0
        for edge in range(indptr[node], indptr[node + 1]):
            label = labels[indices[edge]]
            if sums[label] == 0.0:
                used[n_used] = label
                n_used += 1
            sums[label] += 1.0 if unit else np.float64(weights[edge])
        current = labels[node]
        price = resolution * volumes[node]
        current_gain = sums[current] - price * totals[other, current]
        best, best_gain = np.int64(-1), current_gain + 1e-12 * (abs(current_gain) + price)
        for j in range(n_used):
            label = used[j]
            gain = sums[label] - price * totals[other, label]
            if label != current and (gain > best_gain or (gain == best_gain and best >= 0 and label < best)):
                best, best_gain = label, gain
            sums[label] = 0.0
        if best >= 0:
            labels[node] = best
            totals[own, current] -= volumes[node]
            totals[own, best] += volumes[node]
            counts[own, current] -= 1
            counts[own, best] += 1
            n_rows += (counts[own, best] == 1) - (counts[own, current] == 0)
            n_moves += 1
    return n_moves, n_rows


@njit(cache=True, parallel=True)
def next_best(indptr, indices, weights, labels, other_labels, volumes, totals, holds, resolution, chunks, second):
    """The community of largest gain of every row, its own left out, among its neighbours' communities.

    Args:
        indptr, indices, weights, labels, other_labels, chunks: as in :func:`keep_inside`.
        volumes: float64, shape (n_rows,).  totals: float64 volume of the other side in each label, shape (n_labels,).
        holds: bool, shape (n_labels,): communities that may be chosen.
        second: int32, shape (n_rows,), written: ties to the lowest label; -1 where there is none.
    """
    unit = len(weights) == 0
    for chunk in prange(len(chunks) - 1):
        sums = np.zeros(len(totals), np.float64)
        used = np.empty(len(totals), np.int64)
        for row in range(chunks[chunk], chunks[chunk + 1]):
            n_used = 0
            for edge in range(indptr[row], indptr[row + 1]):
                label = other_labels[indices[edge]]
                if sums[label] == 0.0:
                    used[n_used] = label
                    n_used += 1
                sums[label] += 1.0 if unit else np.float64(weights[edge])
            best, best_gain = np.int64(-1), -np.inf
            for j in range(n_used):
                label = used[j]
                gain = sums[label] - resolution * volumes[row] * totals[label]
                sums[label] = 0.0
                if holds[label] and label != labels[row] and (gain > best_gain or (gain == best_gain and label < best)):
                    best, best_gain = label, gain
            second[row] = best
