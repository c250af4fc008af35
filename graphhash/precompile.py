"""Compile the kernels that a first clustering and training use: ``python -m graphhash.precompile``.

Numba compiles a kernel when it is first called, and keeps the result on disk: some 25 seconds of CPU on a new machine. A second process
does a part of them while the first one reads the log (``graphhash run`` starts it), or an image does it when it is built.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from numba import config, types

from graphhash.graph import _level_kernels, _refine_kernels
from graphhash.maps import _kernels as map_kernels
from graphhash.metrics import ranking
from graphhash.nn import _kernels as table_kernels

_BOOL, _I4, _I8, _F4, _F8 = (
    types.Array(t, 1, "C") for t in (types.bool_, types.int32, types.int64, types.float32, types.float64)
)
_I4_2, _F4_2, _F8_2 = (types.Array(t, 2, "C") for t in (types.int32, types.float32, types.float64))
_FIXED_I8, _FIXED_F4, _FIXED_F8 = (types.Array(a.dtype, 1, "C", readonly=True) for a in (_I8, _F4, _F8))
_U1 = types.Array(types.uint8, 1, "C")
_MAP = (types.Array(types.uint16, 2, "C"), _F4_2, _U1)
_INT, _FLOAT = types.int64, types.float64

# In the order in which a run calls them, which is that of a process beside it. What comes before is compiled by the run itself.
KERNELS: list[tuple[Any, tuple[types.Type, ...]]] = [
    (
        _level_kernels.contract_bipartite,
        (*2 * (_I8, _I4, _I8, _I8, _F4, _I4), _I8, _F8_2, _I8, _I8, _I4, _F8),
    ),
    (
        _level_kernels.propose_moves,
        (_I8, _I8, _I4, _F8, _INT, _I4, _F8, _F8, _F8, _F8, _FLOAT, _BOOL, _BOOL, _I8, _F8_2, _I4, _F8, _F8, _F8),
    ),
    (_level_kernels.accept_moves, (_I8, _I4, _F8, _F8, _F8, _F8, _FLOAT, _I4, _F8, _F8, _BOOL, _BOOL)),
    (_level_kernels.contract_rows, (_I8, _I4, _I8, _I8, _I4, _F8, _I4, _INT, _I8, _F8_2, _I8, _I8, _I4, _F8)),
    (_refine_kernels.join_columns, (_I8, _I8, _I4, _I4, _I8, _I4_2, _I8)),
    (_refine_kernels.join_forests, (_I4_2, _I8, _I8, _I8)),
    (
        map_kernels.top_affinities,
        (
            *(_FIXED_I8, _FIXED_I8, _FIXED_F4, _FIXED_I8, _FIXED_I8, _FIXED_F8, _INT, _INT, _FLOAT),
            *(_I8, _I4_2, _F4_2),
        ),
    ),
    (map_kernels.nearest_rows, (_F4_2, _F8_2, _U1)),
    # Of tables with at most 65,536 rows, and of full ones.
    (table_kernels.read_rows, (*_MAP, types.boolean, _I8, _F4_2, _F4_2)),
    (table_kernels.dot_differences, (_F4_2, _F4_2, _I8, _I8, _I8, _F4)),
    (table_kernels.add_dot_difference_gradients, (_F4_2, _F4_2, _I8, _I8, _I8, _F4, _INT, _F4_2, _F4_2)),
    (table_kernels.add_to_rows, (*_MAP, types.boolean, _I8, _F4_2, _INT, _F4_2)),
    (ranking._top_k, (_F4_2, _I8, _I8, _I4_2)),
]


def is_compiled() -> bool:
    """Whether the last of the kernels is on disk, as far as the name of a file tells, or nothing is compiled (``NUMBA_DISABLE_JIT=1``)."""
    if config.DISABLE_JIT:
        return True
    kernel = KERNELS[-1][0]
    folder = Path(kernel._cache.cache_path)
    return any(folder.glob(f"*.{kernel.py_func.__name__}-*.nbc"))


def compile_beside() -> threading.Thread | None:
    """Compile in a process of its own, unless that is done already; returns the thread that waits for it, or None.

    Nobody else has to wait: a kernel that is called before it is on disk is compiled by its caller.
    """
    if is_compiled():
        return None
    words, nothing = [sys.executable, "-m", __name__], subprocess.DEVNULL
    waiting = threading.Thread(
        target=lambda: subprocess.run(words, stdin=nothing, stdout=nothing, stderr=nothing), daemon=True
    )
    waiting.start()
    return waiting


def main() -> None:
    """Compile all of them, or read from disk what is there."""
    for kernel, signature in KERNELS if not config.DISABLE_JIT else []:
        kernel.compile(signature)


if __name__ == "__main__":
    main()
