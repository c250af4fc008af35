"""Arrays on disk, mapped into memory, and rows of them that are read without a map."""

from __future__ import annotations

import mmap
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Smaller files are read: a map takes a page of 4096 bytes at least, and an empty array cannot be mapped.
LEAST_MAPPED_BYTES = 4096

# np.load evaluates the header of a file as a Python literal. Up to Python 3.11.7 and 3.12.1, two threads that do so at once may raise
# "SystemError: AST constructor recursion depth mismatch", where the garbage collector lets the other one run (python/cpython#106905).
_one_header = threading.Lock()


def load_array(path: Path) -> NDArray:
    """An array of an npy file, memory-mapped read-only if the file has more than 4096 bytes. Safe in several threads at once.

    Raises:
        OSError, ValueError, EOFError: as `numpy.load`, without pickles.
    """
    with _one_header:
        return np.load(path, mmap_mode="r" if path.stat().st_size > LEAST_MAPPED_BYTES else None, allow_pickle=False)


def read_slice(array: NDArray, start: int, stop: int) -> NDArray:
    """A copy of the rows start, ..., stop - 1 of an array: what was read does not stay in the memory of the process.

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
