"""Folded maps: the bucket map of every fold of a cross-fitted training, in few bytes.

A training row reads an id as it looks in the row's fold (``folds`` of :func:`graphhash.soft_maps`). An id that occurs in one row is read in
one fold, so a map of a long-tailed column needs few more entries than ids: a :class:`FoldIndex` says which there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from graphhash.errors import ArgumentError
from graphhash.maps.bucket_map import BucketMap
from graphhash.maps.codebook import spaced

# Folds that a mask of one byte has room for.
MAX_FOLDS = 8
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
# Of every mask: the folds in it, and how many of them are below each fold.
N_SET = _BITS.sum(1).astype(np.uint8)
RANKS = (np.cumsum(_BITS, axis=1) - _BITS).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class FoldIndex:
    """Which ids a folded map has an entry for, in which folds: ids ascending, and folds ascending within an id.

    Args:
        masks: uint8, shape (n_ids,); bit ``f`` is set where the id has an entry in fold ``f``.
        n_folds: 1 to 8.

    Raises:
        ArgumentError: ``n_folds`` is out of range, or a mask has a fold beyond it.
    """

    masks: NDArray[np.uint8]
    n_folds: int

    def __post_init__(self) -> None:
        if not 1 <= self.n_folds <= MAX_FOLDS:
            raise ArgumentError(f"n_folds must be 1 to {MAX_FOLDS}, got {self.n_folds}")
        if len(self.masks) and int(self.masks.max()) >= 1 << self.n_folds:
            raise ArgumentError(f"a mask has a fold beyond the last of {self.n_folds}")

    @classmethod
    def of(cls, masks: NDArray[np.uint8], n_folds: int) -> FoldIndex:
        """The index of what training rows read, and of the evenly spaced entries that the weight codebook is found from.

        With these, the codebook and every entry are those of a map of all ids in all folds.
        """
        places = spaced(n_folds * len(masks))
        masks = masks.copy()
        np.bitwise_or.at(masks, places % len(masks), (1 << places // len(masks)).astype(np.uint8))
        return cls(masks, n_folds)

    @property
    def n_ids(self) -> int:
        return len(self.masks)

    @property
    def n_entries(self) -> int:
        return int(self.starts[-1]) + int(N_SET[self.masks[-1]]) if self.n_ids else 0

    @cached_property
    def starts(self) -> NDArray[np.integer]:
        """The first entry of every id, int32 (int64 beyond 2^31 entries), shape (n_ids,)."""
        counts = N_SET[self.masks]
        fits = int(counts.sum(dtype=np.int64)) < 2**31
        return np.cumsum(counts, dtype=np.int32 if fits else np.int64) - counts

    def entries(self, ids: NDArray[np.integer], folds: NDArray[np.integer]) -> NDArray[np.integer]:
        """Entries of ids in folds that have one, shape of ``ids``."""
        return self.starts[ids] + RANKS[self.masks[ids], folds]

    def of_fold(self, fold: int) -> tuple[NDArray[np.int64], NDArray[np.integer]]:
        """The ids that have an entry in a fold, ascending, and these entries."""
        ids = np.flatnonzero(self.masks & np.uint8(1 << fold))
        return ids, self.entries(ids, np.full(len(ids), fold))

    def ids(self) -> NDArray[np.int64]:
        """The id of every entry, shape (n_entries,)."""
        return np.repeat(np.arange(self.n_ids), N_SET[self.masks])

    @property
    def sample(self) -> NDArray[np.integer]:
        """The evenly spaced entries of :meth:`of`, in the order of a map of all ids in all folds."""
        places = spaced(self.n_folds * self.n_ids)
        return self.entries(places % self.n_ids, places // self.n_ids)


@dataclass(frozen=True, eq=False)
class FoldedMap:
    """Table rows and weights of the entries of a :class:`FoldIndex`, and of the OOV entry behind them, in small types.

    Args:
        rows: uint16 where they fit, else int32, shape (n_entries + 1, indices_per_id).
        codebook: rows of weights, float32, shape (n_codes, indices_per_id).
        codes: codebook row of every entry, uint8, shape (n_entries + 1,).
        n_buckets: rows of the table.
        index: None: there is an entry for every id in every fold, and number ``fold * n_ids + id`` is ``id`` in ``fold``.
    """

    rows: NDArray[np.uint16] | NDArray[np.int32]
    codebook: NDArray[np.float32]
    codes: NDArray[np.uint8]
    n_buckets: int
    index: FoldIndex | None = None

    @classmethod
    def of(cls, bucket_map: BucketMap, index: FoldIndex | None = None) -> FoldedMap:
        """The map of entries that :func:`graphhash.soft_maps` made, with their index where it got one.

        Raises:
            ArgumentError: the map has another number of entries than the index.
        """
        if index is not None and index.n_entries != bucket_map.n_ids:
            raise ArgumentError(f"the map has {bucket_map.n_ids} entries, the index {index.n_entries}")
        rows, codebook, codes = bucket_map.rows, bucket_map.codebook, bucket_map.codes
        if codebook is None or codes is None:
            codebook, codes = np.ones((1, rows.shape[1]), np.float32), np.zeros(len(rows), np.uint8)
        small = rows.astype(np.uint16) if bucket_map.n_buckets <= 2**16 else rows
        return cls(small, codebook, codes, bucket_map.n_buckets, index)

    @property
    def n_entries(self) -> int:
        """Entries but for the OOV entry."""
        return len(self.rows) - 1

    @property
    def indices_per_id(self) -> int:
        return self.rows.shape[1]

    @property
    def oov_row(self) -> int:
        """The table row of out-of-vocabulary ids."""
        return int(self.rows[-1, 0])
