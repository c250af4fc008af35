"""Rows of arrays on disk, read without mapping them: what was read does not stay in the memory of the process."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray


def read_slice(array: NDArray, start: int, stop: int) -> NDArray:
    """A copy of the rows start, ..., stop - 1 of an array.

    Of a whole memory map, the rows are read from its file. Pages of a map that were touched count as memory of the process until it
    closes the map; rows that were read do not.

    Args:
        array: of any shape, (n, ...), C-contiguous.
        start, stop: 0 <= start; rows beyond the end are left out.

    Returns: shape (stop - start, ...), writable.
    """
    stop = min(stop, len(array))
    if not isinstance(array, np.memmap) or not isinstance(array.base, mmap.mmap) or not array.size:
        return np.array(array[start:stop])
    width = array.size // len(array)
    n = max(0, stop - start) * width
    offset = array.offset + start * width * array.itemsize
    return np.fromfile(array.filename, array.dtype, n, offset=offset).reshape(-1, *array.shape[1:])
