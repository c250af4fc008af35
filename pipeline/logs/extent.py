"""How large a log is, by a part of it: rows of a text file by its bytes, distinct ids by how their number grows."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.logs.csv import CODECS

# Of a text file, to count the bytes of its lines.
HEAD_BYTES = 2**22


@functools.cache
def bytes_per_line(file: str) -> float:
    """Bytes of a line of text on disk, on average over the first ones; the file may be compressed."""
    with open(file, "rb") as stream:
        codec = CODECS.get(Path(file).suffix)
        text = stream if codec is None else pa.CompressedInputStream(stream, codec)
        return max(1, text.read(HEAD_BYTES).count(b"\n")) ** -1 * stream.tell()


def grown(growth: NDArray[np.integer], n_rows: int) -> int:
    """Distinct ids of a log of so many rows, by Heaps' law: their number grows as a power of the rows, which the last half of the sample
    tells. Users that come one behind the other grow as the rows do, and items that all have come by then grow no more.

    Args:
        growth: rows that were read and distinct ids in them, ascending, shape (n, 2).
    """
    n_read, n_found = (int(number) for number in growth[-1])
    half = np.interp(n_read / 2, growth[:, 0], growth[:, 1])
    power = min(1.0, max(0.0, math.log2(n_found / max(half, 1.0))))
    return max(n_found, round(n_found * (n_rows / n_read) ** power))
