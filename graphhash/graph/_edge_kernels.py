"""Numba kernels of edges in columns: cutting them by range of rows, sorting and merging them, their hashes and their split.

The numbers are those of `graphhash.graph.interactions`, bit for bit. An empty weight array means all ones.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_STEP = np.uint64(0x9E3779B97F4A7C15)
_SECOND_MIX = np.uint64(0x5851F42D4C957F2D)
_TWO_64 = 2.0**64
# Columns of a row that are sorted by insertion.
_RUN = 24


@njit(cache=True, nogil=True)
def cut_by_range(rows, others, part_of_cell, shift, n_parts, with_order):
    """Rows and others in order of parts, stable, shape (n,) each; the order (empty without ``with_order``); and the bounds of the parts.

    Args:
        rows, others: int32 or int64, shape (n,).  part_of_cell: int32, part of each row >> shift.
    """
    bounds = np.zeros(n_parts + 1, np.int64)
    for i in range(len(rows)):
        bounds[part_of_cell[rows[i] >> shift] + 1] += 1
    bounds = np.cumsum(bounds)
    free = bounds[:-1].copy()
    cut_rows, cut_others = np.empty_like(rows), np.empty_like(others)
    order = np.empty(len(rows) if with_order else 0, np.int64)
    for i in range(len(rows)):
        part = part_of_cell[rows[i] >> shift]
        place = free[part]
        free[part] = place + 1
        cut_rows[place], cut_others[place] = rows[i], others[i]
        if with_order:
            order[place] = i
    return cut_rows, cut_others, order, bounds


@njit(cache=True, nogil=True)
def group_rows(rows, columns, weights, low, n_rows):
    """indptr, columns and weights of edges grouped by row, stable.

    Args:
        rows: int32 or int64, shape (n,), in low..low + n_rows - 1.  columns: shape (n,).  weights: float64, shape (n,) or (0,).
    """
    indptr = np.zeros(n_rows + 1, np.int64)
    for i in range(len(rows)):
        indptr[rows[i] - low + 1] += 1
    indptr = np.cumsum(indptr)
    free = indptr[:-1].copy()
    grouped, grouped_weights = np.empty_like(columns), np.empty_like(weights)
    for i in range(len(rows)):
        place = free[rows[i] - low]
        free[rows[i] - low] = place + 1
        grouped[place] = columns[i]
        if len(weights):
            grouped_weights[place] = weights[i]
    return indptr, grouped, grouped_weights


@njit(cache=True, nogil=True)
def merge_rows(indptr, columns, weights):
    """Sort the columns of each row and merge equal ones, in place; equal ones' weights add up in float64, in their order.

    Args:
        indptr: int64, shape (n_rows + 1,), rewritten.  columns, weights: as of :func:`group_rows`; their first indptr[-1] are the result.

    Returns: the merged weights; shape (0,) if all are one.
    """
    unit, n_kept, start = len(weights) == 0, 0, 0
    totals = weights if not unit else np.ones(len(columns))
    is_unit = unit
    room, weight_room = columns[:0].copy(), weights[:0].copy()
    for row in range(len(indptr) - 1):
        stop = indptr[row + 1]
        if stop - start > len(room):
            room = np.empty(2 * (stop - start), columns.dtype)
            weight_room = np.empty(0 if unit else len(room), np.float64)
        _sort_row(columns, weights, start, stop, room, weight_room)
        first = n_kept
        for i in range(start, stop):
            column, weight = columns[i], 1.0 if unit else weights[i]
            if n_kept > first and columns[n_kept - 1] == column:
                totals[n_kept - 1] += weight
                is_unit = False
            else:
                columns[n_kept], totals[n_kept] = column, weight
                n_kept += 1
        start = stop
        indptr[row + 1] = n_kept
    return totals[:0] if is_unit else totals[:n_kept]


@njit(cache=True, nogil=True)
def _sort_row(columns, weights, start, stop, room, weight_room):
    """Sort columns[start:stop] and their weights, stable: runs by insertion, then merged.

    Args:
        room, weight_room: at least stop - start long, the second empty like the weights.
    """
    unit = len(weights) == 0
    for low in range(start, stop, _RUN):
        for i in range(low + 1, min(low + _RUN, stop)):
            column, weight, j = columns[i], 1.0 if unit else weights[i], i
            while j > low and columns[j - 1] > column:
                columns[j] = columns[j - 1]
                if not unit:
                    weights[j] = weights[j - 1]
                j -= 1
            columns[j] = column
            if not unit:
                weights[j] = weight
    width = _RUN
    while width < stop - start:
        for low in range(start, stop - width, 2 * width):
            middle, high = low + width, min(low + 2 * width, stop)
            # The first run moves out of the way; what is merged never overtakes the second.
            for i in range(width):
                room[i] = columns[low + i]
                if not unit:
                    weight_room[i] = weights[low + i]
            i, j, place = 0, middle, low
            while i < width and j < high:
                if columns[j] < room[i]:
                    columns[place] = columns[j]
                    if not unit:
                        weights[place] = weights[j]
                    j += 1
                else:
                    columns[place] = room[i]
                    if not unit:
                        weights[place] = weight_room[i]
                    i += 1
                place += 1
            while i < width:
                columns[place] = room[i]
                if not unit:
                    weights[place] = weight_room[i]
                i += 1
                place += 1
        width *= 2


@njit(cache=True, nogil=True)
def _mix(state):
    state = state + _STEP
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@njit(cache=True, nogil=True)
def lowest_of_columns(indptr, columns, low, state, n_columns):
    """The lowest edge hash of each column, uint64, and the number of its edges, int64, shape (n_columns,) each.

    Args:
        low: number of the first row.  state: that of the seed, uint64.
    """
    lowest = np.full(n_columns, ~np.uint64(0), np.uint64)
    counts = np.zeros(n_columns, np.int64)
    for row in range(len(indptr) - 1):
        of_row = _mix(state + np.uint64(low + row))
        for i in range(indptr[row], indptr[row + 1]):
            column = columns[i]
            lowest[column] = min(lowest[column], _mix(of_row + np.uint64(column)))
            counts[column] += 1
    return lowest, counts


@njit(cache=True, nogil=True)
def draw_parts(indptr, columns, low, state, column_lowest, validation, test, parts):
    """Write 0, 1 or 2 for train, validation and test of each edge.

    Args:
        column_lowest: lowest edge hash of each column over all edges.  validation, test: shares.  parts: uint8, shape (n,).
    """
    hashes = np.empty(0, np.uint64)
    for row in range(len(indptr) - 1):
        start, stop = indptr[row], indptr[row + 1]
        if stop - start > len(hashes):
            hashes = np.empty(2 * (stop - start), np.uint64)
        of_row, row_lowest = _mix(state + np.uint64(low + row)), ~np.uint64(0)
        for i in range(start, stop):
            hashed = _mix(of_row + np.uint64(columns[i]))
            hashes[i - start] = hashed
            row_lowest = min(row_lowest, hashed)
        for i in range(start, stop):
            hashed = hashes[i - start]
            share = np.float64(_mix(hashed ^ _SECOND_MIX)) / _TWO_64
            part = 2 if share < test else 1 if share < test + validation else 0
            parts[i] = 0 if hashed == row_lowest or hashed == column_lowest[columns[i]] else part


@njit(cache=True, nogil=True)
def pick_edges(indptr, columns, weights, parts, part):
    """indptr, columns and weights of the edges of a part."""
    n_picked = 0
    for i in range(len(parts)):
        n_picked += parts[i] == part
    picked = np.empty(n_picked, columns.dtype)
    picked_weights = np.empty(n_picked if len(weights) else 0, weights.dtype)
    bounds = np.zeros(len(indptr), np.int64)
    n_picked = 0
    for row in range(len(indptr) - 1):
        for i in range(indptr[row], indptr[row + 1]):
            if parts[i] == part:
                picked[n_picked] = columns[i]
                if len(weights):
                    picked_weights[n_picked] = weights[i]
                n_picked += 1
        bounds[row + 1] = n_picked
    return bounds, picked, picked_weights
