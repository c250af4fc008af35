"""Numba kernels of soft maps and of additive codes.

What a thread does is a function of its own: array expressions inside a parallel loop become parallel loops themselves, which take
two to three times as long to compile.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange


@njit(cache=True, parallel=True)
def top_affinities(
    indptr, indices, values, source_indptr, source_buckets, source_values, n_buckets, split, power, chunks, rows, weights
):  # fmt: skip
    """Largest entries of every row of ``graph @ sources``.

    Args:
        indptr, indices, values: the graph's rows.
        source_indptr, source_buckets, source_values: a CSR matrix with a row per column of the graph; float64 values above 0.
        chunks: int64 row boundaries, one unit of parallel work each.
        rows: int32, shape (n_rows, indices_per_id), written: buckets by falling affinity, ties to the lowest bucket.
        split: buckets below it and the others are two groups, each of which is scaled to unit length before the largest are taken.
        power: of the affinities, before they are scaled.
        weights: float32, same shape, written: affinities to that power, scaled to unit length. Unused entries of both are left.
    """
    for chunk in prange(len(chunks) - 1):
        _top_of_rows(
            indptr, indices, values, source_indptr, source_buckets, source_values, n_buckets, split, power,
            chunks[chunk], chunks[chunk + 1], rows, weights,
        )  # fmt: skip


@njit(cache=True)
def _top_of_rows(
    indptr, indices, values, source_indptr, source_buckets, source_values, n_buckets, split, power, low, high, rows, weights
):  # fmt: skip
    indices_per_id = rows.shape[1]
    sums = np.zeros(n_buckets, np.float64)
    used = np.empty(n_buckets, np.int64)
    best = np.empty(indices_per_id, np.int64)
    for row in range(low, high):
        n_used = 0
        for edge in range(indptr[row], indptr[row + 1]):
            column = indices[edge]
            for entry in range(source_indptr[column], source_indptr[column + 1]):
                bucket = source_buckets[entry]
                if sums[bucket] == 0.0:
                    used[n_used] = bucket
                    n_used += 1
                sums[bucket] += values[edge] * source_values[entry]
        below, above = 0.0, 0.0
        for j in range(n_used):
            if used[j] < split:
                below += sums[used[j]] ** 2
            else:
                above += sums[used[j]] ** 2
        n_best = 0
        for j in range(n_used):
            bucket = used[j]
            sums[bucket] /= np.sqrt(below if bucket < split else above)
            place = n_best
            while place > 0 and (
                sums[bucket] > sums[best[place - 1]]
                or (sums[bucket] == sums[best[place - 1]] and bucket < best[place - 1])
            ):
                place -= 1
            if place < indices_per_id:
                n_best = min(n_best + 1, indices_per_id)
                for k in range(n_best - 1, place, -1):
                    best[k] = best[k - 1]
                best[place] = bucket
        square = 0.0
        for k in range(n_best):
            # Of the largest, so that no power of a small number vanishes.
            weights[row, k] = (sums[best[k]] / sums[best[0]]) ** power
            square += weights[row, k] ** 2
        for k in range(n_best):
            rows[row, k] = best[k]
            weights[row, k] /= np.sqrt(square)
        for j in range(n_used):
            sums[used[j]] = 0.0


@njit(cache=True, parallel=True)
def smallest(values, places):
    """Places of the smallest values of every row, smallest first; of equal values the lower place is first.

    Args:
        values: float32, shape (n, m).
        places: int64, shape (n, k) with k <= m; written.
    """
    for row in prange(len(values)):
        _smallest_of_row(values[row], places[row])


@njit(cache=True)
def _smallest_of_row(values, found):
    k = len(found)
    best = np.full(k, np.inf, values.dtype)
    found[:] = 0
    for place in range(len(values)):
        value = values[place]
        if value < best[k - 1]:
            slot = k - 1
            while slot > 0 and value < best[slot - 1]:
                best[slot], found[slot] = best[slot - 1], found[slot - 1]
                slot -= 1
            best[slot], found[slot] = value, place


@njit(cache=True, parallel=True)
def nearest_rows(vectors, centres, codes):
    """The nearest of ``centres`` to every vector, by Euclidean distance; of several the first.

    Args:
        vectors: float32, shape (n, dim).
        centres: float64, shape (dim, n_centres): all distances of a vector grow side by side.
        codes: uint8, shape (n,); written.
    """
    block = 1024
    for start in prange((len(vectors) + block - 1) // block):
        _nearest_of_rows(
            vectors[start * block : (start + 1) * block], centres, codes[start * block : (start + 1) * block]
        )


@njit(cache=True)
def _nearest_of_rows(vectors, centres, codes):
    dim, n_centres = centres.shape
    distances = np.empty(n_centres, np.float64)
    for row in range(len(vectors)):
        distances[:] = 0
        for d in range(dim):
            x, own = np.float64(vectors[row, d]), centres[d]
            for centre in range(n_centres):
                difference = x - own[centre]
                distances[centre] += difference * difference
        code = 0
        for centre in range(1, n_centres):
            if distances[centre] < distances[code]:
                code = centre
        codes[row] = code
