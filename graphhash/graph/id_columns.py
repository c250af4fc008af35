"""Columns of raw ids as numbers: ranks of integers within a narrow range, and codes of any ids in order of first appearance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from graphhash.graph import _id_kernels as kernels
from graphhash.graph.vocabulary import string_bytes

# A bitmap of so many bits per value takes less memory and time than a hash table.
BITS_PER_VALUE = 64
# 512 MiB of bits, and as much for the ranks.
MAX_BITS = 2**32
# Ids that are encoded at once: the hash table has room for as many new ones, and should fit the cache.
STEP = 2**15


@dataclass(frozen=True, eq=False)
class IntegerRanks:
    """Distinct integers of a range, and the rank of each.

    Args:
        low: the least integer that can be marked.
        words: uint64, shape (n_words, 2): the bits of 64 integers, and the number of marked ones before them (see `finish`).
    """

    low: int
    words: NDArray[np.uint64]

    @staticmethod
    def fits(low: int, high: int, n_values: int) -> bool:
        """Whether the range is narrow enough for this many values."""
        return high - low < min(BITS_PER_VALUE * n_values, MAX_BITS)

    @classmethod
    def empty(cls, low: int, high: int) -> IntegerRanks:
        """No integer of low..high is marked."""
        return cls(low, np.zeros(((high - low) // 64 + 1, 2), np.uint64))

    def mark(self, values: NDArray[np.int64]) -> None:
        """Mark integers, shape (n,)."""
        kernels.mark_values(values, self.low, self.words)

    def add(self, bits: NDArray[np.uint64]) -> None:
        """Mark what another bitmap of the same range marks, shape (n_words,)."""
        self.words[:, 0] |= bits

    def finish(self) -> NDArray[np.int64]:
        """Count the ranks, after the last mark. Returns the marked integers, ascending."""
        found = np.empty(int(kernels.rank_words(self.words)), np.int64)
        kernels.marked_values(self.words, self.low, found)
        return found

    def ranks(self, values: NDArray[np.int64], dtype: type[np.signedinteger]) -> NDArray[np.signedinteger]:
        """The rank of each marked integer, shape (n,), after `finish`."""
        rows = np.empty(len(values), dtype)
        kernels.ranks_of(values, self.low, self.words, rows)
        return rows


class IdCodes:
    """Codes of ids in order of first appearance, from 0, batch by batch.

    Args:
        kind: "int64" or "string".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._n = 0
        self._table = np.zeros(2**10, np.uint64)
        # The ids, or the bounds of their bytes.
        self._ids = np.zeros(2**8, np.int64)
        self._text = np.empty(2**12, np.uint8)

    def __len__(self) -> int:
        return self._n

    @property
    def ids(self) -> pa.Array:
        """The ids by code, int64 or large_string."""
        if self.kind == "int64":
            return pa.array(self._ids[: self._n].copy())
        bounds = self._ids[: self._n + 1].copy()
        text = self._text[: bounds[-1]].copy()
        return pa.LargeStringArray.from_buffers(self._n, pa.py_buffer(bounds), pa.py_buffer(text))

    def encode(self, ids: pa.Array) -> NDArray[np.int32]:
        """The code of each id, shape (n,).

        Args:
            ids: of this kind, no nulls; fewer than 2^31 distinct ones in all.
        """
        codes = np.empty(len(ids), np.int32)
        bounds, text = (ids.to_numpy(), None) if self.kind == "int64" else string_bytes(ids)
        for start in range(0, len(ids), STEP):
            part = codes[start : start + STEP]
            if text is None:
                self._make_room(len(part), 0)
                values = bounds[start : start + STEP]
                self._n = kernels.number_integers(values, self._table, self._ids, self._n, part)
            else:
                places = bounds[start : start + len(part) + 1]
                self._make_room(len(part), int(places[-1] - places[0]))
                self._n = kernels.number_strings(places, text, self._table, self._ids, self._text, self._n, part)
        return codes

    def _make_room(self, n_more: int, n_bytes: int) -> None:
        most = self._n + n_more
        self._ids = _longer(self._ids, most + 1)
        if self.kind == "string":
            self._text = _longer(self._text, int(self._ids[self._n]) + n_bytes)
        # At most three quarters of the slots are taken.
        if 4 * most <= 3 * len(self._table):
            return
        self._table = np.zeros(2 ** int(np.ceil(np.log2(most / 0.75 + 1))), np.uint64)
        if self.kind == "int64":
            kernels.fill_integer_table(self._ids, self._n, self._table)
        else:
            kernels.fill_string_table(self._ids, self._text, self._n, self._table)


def read_integers(texts: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The integers of texts, shape (n,), and which texts are plain ones: at most 18 digits without leading zeros, perhaps behind a minus.

    Args:
        texts: string or large_string; what is null is not read.
    """
    values, is_read = np.empty(len(texts), np.int64), np.empty(len(texts), bool)
    kernels.read_integers(*string_bytes(texts), values, is_read)
    if texts.null_count:
        is_read &= texts.is_valid().to_numpy(zero_copy_only=False)
    return values, is_read


def order_ids(ids: pa.Array) -> NDArray[np.int64]:
    """Places of distinct ids in ascending order (strings by UTF-8 bytes), shape (n,)."""
    if pa.types.is_int64(ids.type):
        return np.argsort(ids.to_numpy(), kind="stable")
    return kernels.order_of_strings(*string_bytes(ids))


def _longer(array: NDArray, length: int) -> NDArray:
    """The array, twice as long or longer where it is shorter than `length`."""
    if len(array) >= length:
        return array
    longer = np.zeros(max(length, 2 * len(array)), array.dtype)
    longer[: len(array)] = array
    return longer
