"""How large a log is, by a part of it: rows of a text file by its bytes, distinct ids by how their number grows."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
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
    """Distinct ids of a log of so many rows: their number grows as a power of the rows (Heaps' law). The last half of the sample tells the
    power, and the quarter before it how much the power falls with every doubling. Users that come one behind the other grow as the rows
    do, and a catalogue of which most is known grows little.

    Args:
        growth: rows that were read and distinct ids in them, ascending, shape (n, 2).
    """
    known = growth[growth[:, 0] > 0]
    n_read, n_found = (int(number) for number in known[-1])
    middle = min(int(np.searchsorted(known[:, 0], n_read / 2)), len(known) - 2)
    if middle < 1:
        half, fall = (n_read / 2, np.interp(n_read / 2, growth[:, 0], growth[:, 1])), 0.0
        power = _power(half, known[-1])
    else:
        early, half = known[min(int(np.searchsorted(known[:, 0], n_read / 4)), middle - 1)], known[middle]
        power = _power(half, known[-1])
        # From the middle of one part to that of the other, in doublings, as are those to come.
        fall = max(0.0, _power(early, half) - power) / (math.log2(n_read / early[0]) / 2)
        power = max(0.0, power - fall * math.log2(n_read / half[0]) / 2)
    doublings = math.log2(n_rows / n_read)
    if fall:
        doublings = min(doublings, power / fall)
    return max(n_found, round(n_found * 2 ** (doublings * (power - fall * doublings / 2))))


def _power(first: Sequence[float], last: Sequence[float]) -> float:
    """The power by which distinct ids grew between two points of rows and ids."""
    (rows, ids), (more_rows, more_ids) = first, last
    return min(1.0, max(0.0, math.log(more_ids / max(ids, 1.0)) / math.log(more_rows / rows)))
