"""Numba kernels of compressed tables on a CPU: reading rows through a map, inner products, and their gradients."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

# The kernels below read a map as it is stored: `rows`, uint16 or int32, shape (n_entries, indices_per_entry), without entries where an
# entry reads the table row of its own number, once; and where `weighted`, the codebook row `codes[entry]` of `codebook`, float32.


@njit(cache=True, inline="always")
def _read_row(rows, codebook, codes, weighted, id_, table, vector):
    """Four rows at a time: their cache misses overlap, and the sum is stored once for them."""
    indices_per_id, dim = rows.shape[1], table.shape[1]
    vector[:] = 0
    if not len(rows):
        source = table[id_]
        for d in range(dim):
            vector[d] += source[d]
        return
    n_fours = indices_per_id // 4 if weighted else 0
    weights = codebook[codes[id_] if weighted else 0]
    for four in range(n_fours):
        j = 4 * four
        a, b, c, e = weights[j], weights[j + 1], weights[j + 2], weights[j + 3]
        p, q = table[rows[id_, j]], table[rows[id_, j + 1]]
        r, s = table[rows[id_, j + 2]], table[rows[id_, j + 3]]
        for d in range(dim):
            vector[d] += (a * p[d] + b * q[d]) + (c * r[d] + e * s[d])
    for j in range(4 * n_fours, indices_per_id):
        weight = weights[j] if weighted else np.float32(1)
        if weight != 0:
            source = table[rows[id_, j]]
            for d in range(dim):
                vector[d] += weight * source[d]


@njit(cache=True, inline="always")
def _add_to_row(rows, codebook, codes, weighted, id_, source, low, high, table_gradient):
    indices_per_id = rows.shape[1]
    if not len(rows):
        target = table_gradient[id_, low:high]
        for d in range(high - low):
            target[d] += source[d]
        return
    n_fours = indices_per_id // 4 if weighted else 0
    weights = codebook[codes[id_] if weighted else 0]
    for four in range(n_fours):
        j = 4 * four
        a, b, c, e = weights[j], weights[j + 1], weights[j + 2], weights[j + 3]
        p, q = table_gradient[rows[id_, j], low:high], table_gradient[rows[id_, j + 1], low:high]
        r, s = table_gradient[rows[id_, j + 2], low:high], table_gradient[rows[id_, j + 3], low:high]
        for d in range(high - low):
            g = source[d]
            p[d] += a * g
            q[d] += b * g
            r[d] += c * g
            s[d] += e * g
    for j in range(4 * n_fours, indices_per_id):
        row = rows[id_, j]
        weight = weights[j] if weighted else np.float32(1)
        if weight != 0:
            target = table_gradient[row, low:high]
            for d in range(high - low):
                target[d] += weight * source[d]


@njit(cache=True, parallel=True)
def read_rows(rows, codebook, codes, weighted, ids, table, vectors):
    """Write ``sum_j codebook[codes[id], j] * table[rows[id, j]]`` for every id into ``vectors`` (float32, shape (n, dim))."""
    for i in prange(len(ids)):
        _read_row(rows, codebook, codes, weighted, ids[i], table, vectors[i])


@njit(cache=True, parallel=True)
def read_rows_twice(
    rows, codebook, codes, ids, vectors, rows_2, codebook_2, codes_2, ids_2, vectors_2, weighted, table
):
    """:func:`read_rows` through two maps of one table."""
    n = len(ids)
    for i in prange(n + len(ids_2)):
        if i < n:
            _read_row(rows, codebook, codes, weighted, ids[i], table, vectors[i])
        else:
            _read_row(rows_2, codebook_2, codes_2, weighted, ids_2[i - n], table, vectors_2[i - n])


@njit(cache=True, parallel=True)
def add_to_rows(rows, codebook, codes, weighted, ids, gradients, n_slices, table_gradient):
    """Transpose of :func:`read_rows`: add each id's gradient to the table rows that it reads.

    Each slice of the vectors is summed by one thread in the order of ``ids``, so the sums do not depend on the number of threads.

    Args:
        gradients: float32, shape (n, dim).  n_slices: pieces of parallel work, at most dim.
        table_gradient: float32, shape (n_buckets, dim), added to.
    """
    dim = table_gradient.shape[1]
    for piece in prange(n_slices):
        low, high = piece * dim // n_slices, (piece + 1) * dim // n_slices
        for i in range(len(ids)):
            _add_to_row(rows, codebook, codes, weighted, ids[i], gradients[i, low:high], low, high, table_gradient)


@njit(cache=True, parallel=True)
def add_to_rows_twice(
    rows, codebook, codes, ids, gradients, rows_2, codebook_2, codes_2, ids_2, gradients_2, weighted, n_slices,
    table_gradient,
):  # fmt: skip
    """Transpose of :func:`read_rows_twice`, with the arguments of :func:`add_to_rows`."""
    dim = table_gradient.shape[1]
    for piece in prange(n_slices):
        low, high = piece * dim // n_slices, (piece + 1) * dim // n_slices
        for i in range(len(ids)):
            _add_to_row(rows, codebook, codes, weighted, ids[i], gradients[i, low:high], low, high, table_gradient)
        for i in range(len(ids_2)):
            source = gradients_2[i, low:high]
            _add_to_row(rows_2, codebook_2, codes_2, weighted, ids_2[i], source, low, high, table_gradient)


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


@njit(cache=True, parallel=True, fastmath={"reassoc"})
def dot_differences(left, right, left_rows, positive_rows, negative_rows, differences):
    """``differences[e] = <left[left_rows[e]], right[positive_rows[e]] - right[negative_rows[e]]>``; types as in :func:`dot_pairs`."""
    for triple in prange(len(differences)):
        a, b, c = left[left_rows[triple]], right[positive_rows[triple]], right[negative_rows[triple]]
        total = np.float32(0)
        for d in range(len(a)):
            total += a[d] * (b[d] - c[d])
        differences[triple] = total


@njit(cache=True, parallel=True)
def add_dot_difference_gradients(
    left, right, left_rows, positive_rows, negative_rows, gradients, n_slices, left_gradient, right_gradient
):
    """Gradient of :func:`dot_differences` for both matrices, added up as in :func:`add_dot_gradients`."""
    dim = left.shape[1]
    for piece in prange(n_slices):
        low, high = piece * dim // n_slices, (piece + 1) * dim // n_slices
        for triple in range(len(gradients)):
            a, b, c, gradient = left_rows[triple], positive_rows[triple], negative_rows[triple], gradients[triple]
            source, positive, negative = left[a, low:high], right[b, low:high], right[c, low:high]
            target, up, down = left_gradient[a, low:high], right_gradient[b, low:high], right_gradient[c, low:high]
            for d in range(high - low):
                target[d] += gradient * (positive[d] - negative[d])
            for d in range(high - low):
                up[d] += gradient * source[d]
            for d in range(high - low):
                down[d] -= gradient * source[d]


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


@njit(cache=True, parallel=True, fastmath={"reassoc"})
def unit_rows(vectors, least, units, lengths):
    """``units[i] = vectors[i] / lengths[i]`` with ``lengths[i] = max(|vectors[i]|, least)``; float32, shapes (n, dim) and (n,)."""
    for i in prange(len(vectors)):
        source, target = vectors[i], units[i]
        total = np.float32(0)
        for d in range(len(source)):
            total += source[d] * source[d]
        length = max(np.sqrt(total), np.float32(least))
        lengths[i] = length
        factor = np.float32(1) / length
        for d in range(len(source)):
            target[d] = source[d] * factor


@njit(cache=True, parallel=True, fastmath={"reassoc"})
def unit_row_gradients(units, lengths, gradients, vector_gradients):
    """Gradient of :func:`unit_rows`: ``(g_i - <g_i, u_i> u_i) / lengths[i]``."""
    for i in prange(len(units)):
        unit, gradient, target = units[i], gradients[i], vector_gradients[i]
        along = np.float32(0)
        for d in range(len(unit)):
            along += unit[d] * gradient[d]
        factor = np.float32(1) / lengths[i]
        for d in range(len(unit)):
            target[d] = (gradient[d] - along * unit[d]) * factor
