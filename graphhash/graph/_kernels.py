"""Numba kernels of clustering and bucket maps: flat arrays in, flat arrays out.

Weights reach these kernels as multiples of one power of two whose total stays below 2^53 (see
``local_graph.exact_weights``), so every float64 sum here is exact and independent of the order of its terms. That, and ties going to
the lowest label, makes the results the same for any number of threads or shards. An empty weight array means all ones.
"""

from __future__ import annotations

import numpy as np
from numba import get_thread_id, njit, prange


@njit(cache=True)
def longest_row(indptr, low, high):
    """Most entries in a row of low..high-1."""
    longest = 0
    for row in range(low, high):
        longest = max(longest, indptr[row + 1] - indptr[row])
    return longest


@njit(cache=True, parallel=True)
def move_rows(
    indptr, indices, weights, degrees, labels, active, other_labels, totals, scale, fresh, chunks, scratch, moved_labels
):  # fmt: skip
    """One half-sweep: move every active row to the community of largest gain, the other side's labels fixed.

    The gain of row r in community c is ``w(r, c) - scale * degrees[r] * totals[c]``; label ``fresh + r``, where no node of the
    other side is, has gain 0. Rows move only for a larger gain; ties go to the lowest label.

    Args:
        indptr: int64, shape (n_rows + 1,).  indices: columns, shape (n_edges,).  weights: float32 (n_edges,) or (0,).
        degrees: float64, shape (n_rows,).  labels: int32 or int64, shape (n_rows,).  active: bool, shape (n_rows,).
        other_labels: like labels, shape (n_columns,).  totals: float64 degree of the other side in each label, as far as its
            highest label.
        scale: resolution over total weight.  fresh: first label kept for rows that leave every community.
        chunks: int64 row boundaries, shape (n_chunks + 1,), one unit of parallel work each.
        scratch: float64 zeros, shape (n_threads, len(totals)); left as zeros.
        moved_labels: like labels, shape (n_rows,), written: the new labels.
    """
    unit = len(weights) == 0
    for chunk in prange(len(chunks) - 1):
        low, high = chunks[chunk], chunks[chunk + 1]
        sums = scratch[get_thread_id()]
        used = np.empty(longest_row(indptr, low, high) + 1, other_labels.dtype)
        for row in range(low, high):
            current = labels[row]
            moved_labels[row] = current
            if not active[row]:
                continue
            n_used = 0
            for edge in range(indptr[row], indptr[row + 1]):
                label = other_labels[indices[edge]]
                total = sums[label]
                # Written each time and kept only when new: a branch here would be guessed wrong too often.
                used[n_used] = label
                n_used += total == 0.0
                sums[label] = total + (1.0 if unit else np.float64(weights[edge]))
            price = degrees[row] * scale
            current_gain = -price * (totals[current] if current < len(totals) else 0.0)
            best, best_gain = current, -np.inf
            if fresh + row >= len(totals) or totals[fresh + row] == 0.0:
                best, best_gain = other_labels.dtype.type(fresh + row), 0.0
            for j in range(n_used):
                label = used[j]
                gain = sums[label] - price * totals[label]
                sums[label] = 0.0
                if label == current:
                    current_gain = gain
                if gain > best_gain or (gain == best_gain and label < best):
                    best, best_gain = label, gain
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
    renumbered = np.full(n_labels, -1, user_labels.dtype)
    n_communities = 0
    for side in (user_labels, item_labels):
        for row in range(len(side)):
            if renumbered[side[row]] < 0:
                renumbered[side[row]] = n_communities
                n_communities += 1
            side[row] = renumbered[side[row]]
    return n_communities


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
