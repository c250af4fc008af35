"""Numba kernels of contracted levels: communities become nodes, and nodes move between groups.

As in ``graphhash.graph._kernels``: flat arrays in, flat arrays out, exact sums in any order; an empty weight array means all ones.
"""

from __future__ import annotations

import numpy as np
from numba import get_thread_id, njit, prange


@njit(cache=True)
def group_rows(labels, n_groups):
    """Counting sort of rows by label: boundaries int64 (n_groups + 1,) and rows, of the labels' type, ascending in each group."""
    starts = np.zeros(n_groups + 1, np.int64)
    for label in labels:
        starts[label + 1] += 1
    for group in range(n_groups):
        starts[group + 1] += starts[group]
    rows = np.empty(len(labels), labels.dtype)
    cursor = starts[:-1].copy()
    for row in range(len(labels)):
        rows[cursor[labels[row]]] = row
        cursor[labels[row]] += 1
    return starts, rows


@njit(cache=True, inline="always")
def _add_rows(rows, starts, ends, indices, weights, labels, sums, columns, end):
    """Add the edges of ``rows`` to ``sums`` by the label of their column; labels met first are appended to ``columns``."""
    unit = len(weights) == 0
    for row in rows:
        for edge in range(starts[row], ends[row]):
            label = labels[indices[edge]]
            total = sums[label]
            # Written each time and kept only when new: a branch here would be guessed wrong too often.
            columns[end] = label
            end += total == 0.0
            sums[label] = total + (1.0 if unit else np.float64(weights[edge]))
    return end


@njit(cache=True, inline="always")
def _take_sums(group, sums, columns, values, start, end):
    """Move the sums of columns[start:end] to ``values`` without the group's own, and clear them; returns the new end."""
    kept = start
    for entry in range(start, end):
        label = columns[entry]
        columns[kept] = label
        values[kept] = sums[label]
        kept += label != group
        sums[label] = 0.0
    return kept


@njit(cache=True, parallel=True)
def contract_bipartite(
    user_starts, user_rows, user_indptr, user_indices, user_weights, user_labels,
    item_starts, item_rows, item_indptr, item_indices, item_weights, item_labels,
    chunks, scratch, starts, ends, columns, values,
):  # fmt: skip
    """Contract communities to nodes: symmetric weights between communities, without the diagonal.

    The entry (c, d) is the weight of edges between users of c and items of d plus that between items of c and users of d.

    Args:
        user_starts, user_rows: users grouped by label (:func:`group_rows`); item_starts, item_rows likewise.
        *_indptr, *_indices, *_weights, *_labels: the graph by users and by items, and the labels of each side.
        chunks: int64 boundaries over communities, shape (n_chunks + 1,), one unit of parallel work each.
        scratch: float64 zeros, shape (n_threads, n_communities); left as zeros.
        starts: int64, shape (n_communities + 1,): where the row of each community begins; it may have as many entries as it has
            edges, or as there are communities, and one more is written.
        ends: int64, shape (n_communities,), written: where it ends.
        columns, values: the labels' type and float64, shape (starts[-1],), written from starts to ends; a row's columns are in no order.
    """
    for chunk in prange(len(chunks) - 1):
        sums = scratch[get_thread_id()]
        for group in range(chunks[chunk], chunks[chunk + 1]):
            users = user_rows[user_starts[group] : user_starts[group + 1]]
            items = item_rows[item_starts[group] : item_starts[group + 1]]
            start = starts[group]
            end = _add_rows(
                users,
                user_indptr[:-1],
                user_indptr[1:],
                user_indices,
                user_weights,
                item_labels,
                sums,
                columns,
                start,
            )
            end = _add_rows(
                items,
                item_indptr[:-1],
                item_indptr[1:],
                item_indices,
                item_weights,
                user_labels,
                sums,
                columns,
                end,
            )
            ends[group] = _take_sums(group, sums, columns, values, start, end)


@njit(cache=True, parallel=True)
def contract_rows(
    group_starts, rows, row_starts, row_ends, row_columns, row_weights, labels, first, chunks, scratch, starts, ends, columns, values
):  # fmt: skip
    """Sum the weights of grouped rows by the label of their columns, each group's own label left out.

    Of all nodes of a symmetric graph this is its contraction; of a shard's rows it is the shard's part of it.

    Args:
        group_starts, rows: rows grouped (:func:`group_rows`).  first: label of the first group.
        row_starts, row_ends, row_columns, row_weights: the rows.  labels: label of each column.
        chunks, scratch, starts, ends, columns, values: as in :func:`contract_bipartite`.
    """
    for chunk in prange(len(chunks) - 1):
        sums = scratch[get_thread_id()]
        for group in range(chunks[chunk], chunks[chunk + 1]):
            members = rows[group_starts[group] : group_starts[group + 1]]
            end = _add_rows(
                members, row_starts, row_ends, row_columns, row_weights, labels, sums, columns, starts[group]
            )
            ends[group] = _take_sums(first + group, sums, columns, values, starts[group], end)


@njit(cache=True, parallel=True)
def close_gaps(starts, ends, columns, values, indptr, chunks, close_columns, close_values):
    """Copy every row's entries to where ``indptr`` says, without the gaps between rows."""
    for chunk in prange(len(chunks) - 1):
        for row in range(chunks[chunk], chunks[chunk + 1]):
            for entry in range(ends[row] - starts[row]):
                close_columns[indptr[row] + entry] = columns[starts[row] + entry]
                close_values[indptr[row] + entry] = values[starts[row] + entry]


@njit(cache=True, parallel=True)
def propose_moves(
    starts, ends, columns, values, first, labels, user_degrees, item_degrees, group_users, group_items, scale, active, moved,
    chunks, scratch, targets, gains, to_target, to_own,
):  # fmt: skip
    """The group of largest gain for every node that is active or has a neighbour that moved out of its group.

    The gain of node c in group d is ``w(c, d) - scale * (U_c * I_d + I_c * U_d)``, c itself taken out of d first (Blondel et al.,
    2008, with Barber's null model). Ties go to the lowest group.

    Args:
        starts, ends, columns, values: rows of the symmetric graph without diagonal, all of them or a range.
        first: node of the first row.
        labels, user_degrees, item_degrees, active, moved: of all nodes, shape (n_nodes,).
        group_users, group_items: float64 degrees of each group, shape (n_nodes,).
        scale: resolution over total weight.
        chunks: int64 boundaries over the rows, one unit of parallel work each.
        scratch: float64 zeros, shape (n_threads, n_nodes); left as zeros.
        targets: like labels, shape (n_rows,), written: the group, or -1 where none is better than the node's own.
        gains, to_target, to_own: float64, shape (n_rows,), written where there is a target: what the move gains, and the weight
            between the node and the target and between it and the rest of its own group.
    """
    for chunk in prange(len(chunks) - 1):
        low, high = chunks[chunk], chunks[chunk + 1]
        sums = scratch[get_thread_id()]
        longest = 0
        for row in range(low, high):
            longest = max(longest, ends[row] - starts[row])
        used = np.empty(longest + 1, labels.dtype)
        for row in range(low, high):
            targets[row] = -1
            node = first + row
            own = labels[node]
            start, end = starts[row], ends[row]
            awake = active[node]
            if not awake:
                for edge in range(start, end):
                    if moved[columns[edge]] and labels[columns[edge]] != own:
                        awake = True
                        break
            if not awake:
                continue
            n_used = 0
            for edge in range(start, end):
                group = labels[columns[edge]]
                total = sums[group]
                used[n_used] = group
                n_used += total == 0.0
                sums[group] = total + values[edge]
            users, items = user_degrees[node], item_degrees[node]
            own_weight = sums[own]
            own_gain = own_weight - scale * (users * (group_items[own] - items) + items * (group_users[own] - users))
            best, best_gain, best_weight = own, -np.inf, 0.0
            for j in range(n_used):
                group = used[j]
                gain = sums[group] - scale * (users * group_items[group] + items * group_users[group])
                if group != own and (gain > best_gain or (gain == best_gain and group < best)):
                    best, best_gain, best_weight = group, gain, sums[group]
                sums[group] = 0.0
            if best_gain > own_gain + 1e-12 * (users + items):
                targets[row], gains[row] = best, best_gain - own_gain
                to_target[row], to_own[row] = best_weight, own_weight


@njit(cache=True)
def accept_moves(
    order, targets, to_target, to_own, user_degrees, item_degrees, scale, labels, group_users, group_items, active, moved
):  # fmt: skip
    """Carry out, in ``order``, the proposed moves that surely gain; returns how many.

    A group that a node left takes no other in, and one that a node joined lets none go. So when a move's turn comes, the weight
    to its target can only have grown since it was proposed, that to its own group only shrunk, and the degrees of both are known:
    the gain computed here is never above the true one, and modularity rises by at least that.

    Args:
        order: nodes with a target, int64.  targets, to_target, to_own: as :func:`propose_moves` wrote them.
        labels, group_users, group_items: updated.  active: cleared where a node moved.  moved: set there.
    """
    n_nodes = len(labels)
    left = np.zeros(n_nodes, np.bool_)
    joined = np.zeros(n_nodes, np.bool_)
    n_moves = 0
    for node in order:
        own, target = labels[node], targets[node]
        if left[target] or joined[own]:
            continue
        users, items = user_degrees[node], item_degrees[node]
        own_gain = to_own[node] - scale * (users * (group_items[own] - items) + items * (group_users[own] - users))
        gain = to_target[node] - scale * (users * group_items[target] + items * group_users[target])
        if gain > own_gain + 1e-12 * (users + items):
            labels[node] = target
            group_users[own] -= users
            group_items[own] -= items
            group_users[target] += users
            group_items[target] += items
            left[own], joined[target] = True, True
            active[node], moved[node] = False, True
            n_moves += 1
    return n_moves
