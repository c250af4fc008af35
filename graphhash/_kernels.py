"""Numba kernels of clustering and bucket maps: flat arrays in, flat arrays out.

Weights reach these kernels as multiples of one power of two whose total stays below 2^53 (see
``clustering.exact_weights``), so every float64 sum here is exact and independent of the order of its terms. That, and ties going to
the lowest label, makes the results the same for any number of threads or shards. An empty weight array means all ones.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

# Multiplier of Fibonacci hashing: 2^64 / golden ratio, as a signed 64-bit number.
_GOLDEN = np.int64(-7046029254386353131)


@njit(cache=True, inline="always")
def _slot(label, mask):
    return ((label * _GOLDEN) >> np.int64(29)) & mask


@njit(cache=True)
def _longest_row(indptr, low, high):
    longest = 0
    for row in range(low, high):
        longest = max(longest, indptr[row + 1] - indptr[row])
    return longest


@njit(cache=True)
def _table_size(n_entries):
    size = 4
    while size < 2 * n_entries:
        size *= 2
    return size


@njit(cache=True, parallel=True)
def move_rows(indptr, indices, weights, degrees, labels, active, other_labels, totals, scale, fresh, chunks, moved_labels):
    """One half-sweep: move every active row to the community of largest gain, the other side's labels fixed.

    The gain of row r in community c is ``w(r, c) - scale * degrees[r] * totals[c]``; label ``fresh + r``, where no node of the
    other side is, has gain 0. Rows move only for a larger gain; ties go to the lowest label.

    Args:
        indptr: int64, shape (n_rows + 1,).  indices: columns, shape (n_edges,).  weights: float32 (n_edges,) or (0,).
        degrees: float64, shape (n_rows,).  labels: int32, shape (n_rows,).  active: bool, shape (n_rows,).
        other_labels: int32, shape (n_columns,).  totals: float64 degree of the other side in each label.
        scale: resolution over total weight.  fresh: first label kept for rows that leave every community.
        chunks: int64 row boundaries, shape (n_chunks + 1,), one unit of parallel work each.
        moved_labels: int32, shape (n_rows,), written: the new labels.
    """
    unit = len(weights) == 0
    for chunk in prange(len(chunks) - 1):
        low, high = chunks[chunk], chunks[chunk + 1]
        longest = _longest_row(indptr, low, high)
        size = _table_size(longest)
        keys = np.full(size, -1, np.int64)
        sums = np.empty(size, np.float64)
        used = np.empty(longest, np.int64)
        for row in range(low, high):
            current = np.int64(labels[row])
            moved_labels[row] = labels[row]
            if not active[row]:
                continue
            start, end = indptr[row], indptr[row + 1]
            mask = _table_size(end - start) - 1
            n_used = 0
            for edge in range(start, end):
                label = np.int64(other_labels[indices[edge]])
                slot = _slot(label, mask)
                while keys[slot] != -1 and keys[slot] != label:
                    slot = (slot + 1) & mask
                weight = 1.0 if unit else np.float64(weights[edge])
                if keys[slot] == -1:
                    keys[slot] = label
                    sums[slot] = weight
                    used[n_used] = slot
                    n_used += 1
                else:
                    sums[slot] += weight
            price = degrees[row] * scale
            current_gain = -price * totals[current]
            best, best_gain = current, -np.inf
            if totals[fresh + row] == 0.0:
                best, best_gain = np.int64(fresh + row), 0.0
            for j in range(n_used):
                slot = used[j]
                label = keys[slot]
                gain = sums[slot] - price * totals[label]
                if label == current:
                    current_gain = gain
                if gain > best_gain or (gain == best_gain and label < best):
                    best, best_gain = label, gain
                keys[slot] = -1
            # The margin keeps rounding of the product from counting as a gain.
            if best != current and best_gain > current_gain + 1e-12 * degrees[row]:
                moved_labels[row] = best


@njit(cache=True, parallel=True)
def wake_columns(indptr, indices, labels, moved_labels, chunks, awake):
    """Set ``awake`` (bool, shape (n_columns,)) at every neighbour of a row whose label changed."""
    for chunk in prange(len(chunks) - 1):
        for row in range(chunks[chunk], chunks[chunk + 1]):
            if labels[row] != moved_labels[row]:
                for edge in range(indptr[row], indptr[row + 1]):
                    # Threads may write one flag twice; they write the same value.
                    awake[indices[edge]] = True


@njit(cache=True)
def compact_labels(user_labels, item_labels, n_labels):
    """Renumber labels 0.. in order of first appearance, users first, in place; returns how many there are."""
    renumbered = np.full(n_labels, -1, np.int32)
    n_communities = 0
    for side in (user_labels, item_labels):
        for row in range(len(side)):
            if renumbered[side[row]] < 0:
                renumbered[side[row]] = n_communities
                n_communities += 1
            side[row] = renumbered[side[row]]
    return n_communities


@njit(cache=True)
def group_rows(labels, n_groups):
    """Counting sort of rows by label: boundaries int64 (n_groups + 1,) and rows int32 (n_rows,), ascending in each group."""
    starts = np.zeros(n_groups + 1, np.int64)
    for label in labels:
        starts[label + 1] += 1
    for group in range(n_groups):
        starts[group + 1] += starts[group]
    rows = np.empty(len(labels), np.int32)
    cursor = starts[:-1].copy()
    for row in range(len(labels)):
        rows[cursor[labels[row]]] = row
        cursor[labels[row]] += 1
    return starts, rows


@njit(cache=True)
def _add_group(members, indptr, indices, weights, column_labels, group, position, columns, values, start, end):
    """Add the edges of ``members`` to the run columns[start:end], one entry a column label; returns the run's new end.

    ``position`` maps a label to its entry in the run; entries below ``start`` or of another label are stale.
    """
    unit = len(weights) == 0
    for row in members:
        for edge in range(indptr[row], indptr[row + 1]):
            label = column_labels[indices[edge]]
            if label == group:
                continue
            weight = 1.0 if unit else np.float64(weights[edge])
            entry = position[label]
            if start <= entry < end and columns[entry] == label:
                values[entry] += weight
            else:
                position[label] = end
                columns[end] = label
                values[end] = weight
                end += 1
    return end


@njit(cache=True)
def _group_bound(members, indptr, n_groups):
    """Most entries that a contracted row can have."""
    n_edges = 0
    for row in members:
        n_edges += indptr[row + 1] - indptr[row]
    return min(n_edges, n_groups - 1)


@njit(cache=True, parallel=True)
def contract_bipartite(
    user_starts, user_rows, user_indptr, user_indices, user_weights, user_labels,
    item_starts, item_rows, item_indptr, item_indices, item_weights, item_labels,
    chunks,
):  # fmt: skip
    """Contract communities to nodes: symmetric weights between communities, without the diagonal.

    The entry (c, d) is the weight of edges between users of c and items of d plus that between items of c and users of d.

    Args:
        user_starts, user_rows: users grouped by label (:func:`group_rows`); item_starts, item_rows likewise.
        *_indptr, *_indices, *_weights, *_labels: the graph by users and by items, and the labels of each side.
        chunks: int64 boundaries over communities, shape (n_chunks + 1,), one unit of parallel work each.

    Returns:
        indptr int64 (n + 1,), columns int32, values float64; the order of columns in a row is not defined.
    """
    n_groups = len(user_starts) - 1
    n_chunks = len(chunks) - 1
    lengths = np.zeros(n_groups, np.int64)
    chunk_columns = [np.empty(0, np.int32) for _ in range(n_chunks)]
    chunk_values = [np.empty(0, np.float64) for _ in range(n_chunks)]
    for chunk in prange(n_chunks):
        low, high = chunks[chunk], chunks[chunk + 1]
        bound = 0
        for group in range(low, high):
            bound += min(
                n_groups - 1,
                _group_bound(user_rows[user_starts[group] : user_starts[group + 1]], user_indptr, n_groups)
                + _group_bound(item_rows[item_starts[group] : item_starts[group + 1]], item_indptr, n_groups),
            )
        columns = np.empty(bound, np.int32)
        values = np.empty(bound, np.float64)
        position = np.full(n_groups, -1, np.int64)
        end = 0
        for group in range(low, high):
            start = end
            end = _add_group(
                user_rows[user_starts[group] : user_starts[group + 1]], user_indptr, user_indices, user_weights,
                item_labels, group, position, columns, values, start, end,
            )  # fmt: skip
            end = _add_group(
                item_rows[item_starts[group] : item_starts[group + 1]], item_indptr, item_indices, item_weights,
                user_labels, group, position, columns, values, start, end,
            )  # fmt: skip
            lengths[group] = end - start
        chunk_columns[chunk] = columns[:end]
        chunk_values[chunk] = values[:end]
    indptr = np.zeros(n_groups + 1, np.int64)
    for group in range(n_groups):
        indptr[group + 1] = indptr[group] + lengths[group]
    columns = np.empty(indptr[n_groups], np.int32)
    values = np.empty(indptr[n_groups], np.float64)
    for chunk in prange(n_chunks):
        start, end = indptr[chunks[chunk]], indptr[chunks[chunk + 1]]
        columns[start:end] = chunk_columns[chunk]
        values[start:end] = chunk_values[chunk]
    return indptr, columns, values


@njit(cache=True)
def contract_graph(indptr, indices, values, labels, n_groups):
    """Contract a symmetric graph without diagonal by ``labels`` (int32, 0..n_groups-1); the diagonal is left out again."""
    starts, rows = group_rows(labels, n_groups)
    position = np.full(n_groups, -1, np.int64)
    columns = np.empty(len(indices), np.int32)
    sums = np.empty(len(indices), np.float64)
    contracted = np.zeros(n_groups + 1, np.int64)
    end = 0
    for group in range(n_groups):
        start = end
        end = _add_group(
            rows[starts[group] : starts[group + 1]], indptr, indices, values, labels, group, position, columns, sums, start, end
        )
        contracted[group + 1] = end
    return contracted, columns[:end].copy(), sums[:end].copy()


@njit(cache=True)
def move_communities(indptr, indices, values, user_degrees, item_degrees, scale, max_passes, labels):
    """Louvain moves on contracted communities, one node after the other in index order, until none gains.

    The gain of node c in group d is ``w(c, d) - scale * (U_c * I_d + I_c * U_d)``, c itself taken out of d first
    (Blondel et al., 2008, with Barber's null model). A node is looked at again only when a neighbour moved.

    Args:
        indptr, indices, values: symmetric weights without diagonal; the order of columns does not matter.
        user_degrees, item_degrees: float64, shape (n_nodes,).
        scale: resolution over total weight.  max_passes: bound on rounds over the nodes.
        labels: int32, shape (n_nodes,), in 0..n_nodes-1; updated in place.

    Returns: number of moves.
    """
    n_nodes = len(labels)
    group_users = np.zeros(n_nodes, np.float64)
    group_items = np.zeros(n_nodes, np.float64)
    for node in range(n_nodes):
        group_users[labels[node]] += user_degrees[node]
        group_items[labels[node]] += item_degrees[node]
    active = np.ones(n_nodes, np.bool_)
    sums = np.zeros(n_nodes, np.float64)
    used = np.empty(n_nodes, np.int64)
    n_moves = 0
    for _ in range(max_passes):
        n_pass_moves = 0
        for node in range(n_nodes):
            if not active[node]:
                continue
            active[node] = False
            n_used = 0
            for edge in range(indptr[node], indptr[node + 1]):
                group = labels[indices[edge]]
                if sums[group] == 0.0:
                    used[n_used] = group
                    n_used += 1
                sums[group] += values[edge]
            current = labels[node]
            users, items = user_degrees[node], item_degrees[node]
            group_users[current] -= users
            group_items[current] -= items
            current_gain = sums[current] - scale * (users * group_items[current] + items * group_users[current])
            best, best_gain = current, current_gain
            for j in range(n_used):
                group = used[j]
                gain = sums[group] - scale * (users * group_items[group] + items * group_users[group])
                if gain > best_gain or (gain == best_gain and group < best and best != current):
                    best, best_gain = group, gain
                sums[group] = 0.0
            if not best_gain > current_gain + 1e-12 * (users + items):
                best = current
            group_users[best] += users
            group_items[best] += items
            if best != current:
                labels[node] = best
                n_pass_moves += 1
                for edge in range(indptr[node], indptr[node + 1]):
                    if labels[indices[edge]] != best:
                        active[indices[edge]] = True
        n_moves += n_pass_moves
        if n_pass_moves == 0:
            break
    return n_moves


@njit(cache=True, parallel=True)
def weight_inside(indptr, indices, weights, labels, other_labels, chunks):
    """Weight of the edges whose two ends share a label, summed per chunk: float64, shape (n_chunks,)."""
    unit = len(weights) == 0
    inside = np.zeros(len(chunks) - 1, np.float64)
    for chunk in prange(len(chunks) - 1):
        total = 0.0
        for row in range(chunks[chunk], chunks[chunk + 1]):
            for edge in range(indptr[row], indptr[row + 1]):
                if other_labels[indices[edge]] == labels[row]:
                    total += 1.0 if unit else np.float64(weights[edge])
        inside[chunk] = total
    return inside


@njit(cache=True, parallel=True)
def top_affinities(indptr, indices, weights, neighbour_scale, buckets, n_buckets, chunks, rows, affinities):
    """Largest bucket affinities of every row: ``sum of weight * neighbour_scale`` over the neighbours in a bucket.

    Args:
        neighbour_scale: float64, shape (n_columns,).  buckets: int32 bucket of each neighbour, shape (n_columns,).
        chunks: int64 row boundaries, one unit of parallel work each.
        rows: int32, shape (>= n_rows, n_lookups), written: buckets by falling affinity, ties to the lowest bucket.
        affinities: float32, same shape, written: affinities scaled to unit length. Unused entries of both are left as they were.
    """
    n_lookups = rows.shape[1]
    unit = len(weights) == 0
    for chunk in prange(len(chunks) - 1):
        sums = np.zeros(n_buckets, np.float64)
        used = np.empty(n_buckets, np.int64)
        best = np.empty(n_lookups, np.int64)
        for row in range(chunks[chunk], chunks[chunk + 1]):
            n_used = 0
            for edge in range(indptr[row], indptr[row + 1]):
                bucket = buckets[indices[edge]]
                if sums[bucket] == 0.0:
                    used[n_used] = bucket
                    n_used += 1
                sums[bucket] += (1.0 if unit else weights[edge]) * neighbour_scale[indices[edge]]
            n_best = 0
            for j in range(n_used):
                bucket = used[j]
                place = n_best
                while place > 0 and (
                    sums[bucket] > sums[best[place - 1]]
                    or (sums[bucket] == sums[best[place - 1]] and bucket < best[place - 1])
                ):
                    place -= 1
                if place < n_lookups:
                    n_best = min(n_best + 1, n_lookups)
                    for k in range(n_best - 1, place, -1):
                        best[k] = best[k - 1]
                    best[place] = bucket
            square = 0.0
            for k in range(n_best):
                square += sums[best[k]] ** 2
            for k in range(n_best):
                rows[row, k] = best[k]
                affinities[row, k] = sums[best[k]] / np.sqrt(square)
            for j in range(n_used):
                sums[used[j]] = 0.0


@njit(cache=True, parallel=True)
def read_rows(rows, weights, weighted, ids, table, vectors):
    """Write ``sum_j weights[id, j] * table[rows[id, j]]`` for every id into ``vectors`` (float32, shape (n, dim))."""
    n_lookups = rows.shape[1]
    dim = table.shape[1]
    for i in prange(len(ids)):
        id_ = ids[i]
        vector = vectors[i]
        vector[:] = 0
        for j in range(n_lookups):
            weight = weights[id_, j] if weighted else np.float32(1)
            if weight != 0:
                source = table[rows[id_, j]]
                for d in range(dim):
                    vector[d] += weight * source[d]


@njit(cache=True, parallel=True)
def add_to_rows(rows, weights, weighted, ids, gradients, n_slices, table_gradient):
    """Transpose of :func:`read_rows`: add each id's gradient to the table rows that it reads.

    Each slice of the vectors is summed by one thread in the order of ``ids``, so the sums do not depend on the number of threads.

    Args:
        gradients: float32, shape (n, dim).  n_slices: pieces of parallel work, at most dim.
        table_gradient: float32, shape (n_buckets, dim), added to.
    """
    n_lookups = rows.shape[1]
    dim = table_gradient.shape[1]
    for piece in prange(n_slices):
        low, high = piece * dim // n_slices, (piece + 1) * dim // n_slices
        for i in range(len(ids)):
            id_ = ids[i]
            for j in range(n_lookups):
                row = rows[id_, j]
                weight = weights[id_, j] if weighted else np.float32(1)
                if weight != 0:
                    target, source = table_gradient[row, low:high], gradients[i, low:high]
                    for d in range(high - low):
                        target[d] += weight * source[d]


@njit(cache=True, parallel=True, fastmath={"reassoc"})
def dot_pairs(left, right, left_rows, right_rows, products):
    """``products[e] = <left[left_rows[e]], right[right_rows[e]]>``; float32, rows int64, shapes (., dim) and (n_pairs,).

    The compiler may reorder a product's sum to use vector instructions; the order is fixed once compiled.
    """
    for pair in prange(len(products)):
        a, b = left[left_rows[pair]], right[right_rows[pair]]
        total = np.float32(0)
        for d in range(len(a)):
            total += a[d] * b[d]
        products[pair] = total


@njit(cache=True, parallel=True)
def add_dot_gradients(left, right, left_rows, right_rows, gradients, n_slices, left_gradient, right_gradient):
    """Gradient of :func:`dot_pairs` for both matrices, added to ``left_gradient`` and ``right_gradient``.

    As in :func:`add_to_rows`, one thread sums a slice of the vectors in pair order: the result does not depend on threads.
    """
    dim = left.shape[1]
    for piece in prange(n_slices):
        low, high = piece * dim // n_slices, (piece + 1) * dim // n_slices
        for pair in range(len(gradients)):
            a, b, gradient = left_rows[pair], right_rows[pair], gradients[pair]
            target, source = left_gradient[a, low:high], right[b, low:high]
            for d in range(high - low):
                target[d] += gradient * source[d]
            target, source = right_gradient[b, low:high], left[a, low:high]
            for d in range(high - low):
                target[d] += gradient * source[d]
