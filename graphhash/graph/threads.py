"""Numba threads of a block of kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numba


@contextmanager
def numba_threads(n_threads: int | None) -> Iterator[None]:
    """Run kernels in the block on ``n_threads`` threads, at most on all that numba has; None: on all of them."""
    before = numba.get_num_threads()
    most: int = numba.config.NUMBA_NUM_THREADS
    numba.set_num_threads(min(n_threads or most, most))
    try:
        yield
    finally:
        numba.set_num_threads(before)
