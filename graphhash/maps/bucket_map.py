"""Bucket maps: which rows of a small table an id reads, and with which weights.

One representation serves every method. A map holds, for each of ``n_ids`` ids and one more entry for unknown ids, the
same number of lookups; the embedding of an id is ``sum_j weights[id, j] * table[rows[id, j]]``. A plain hash is one lookup
of weight 1. Models read the map and never learn how it was made.

Weights are stored as a byte per id: the number of its profile, one of at most 256 rows of weights (``graphhash.maps.codebook``).

The maps are made in ``graphhash.maps.hashes`` (hashing baselines) and ``graphhash.maps.community_maps`` (what follows from communities).

One table row of every map belongs to unknown ids alone: the last one. It is not trained; the trainer fills it with the
interaction-weighted mean vector, so an unknown id is answered like the average one. Users and items may read one table between
them (``shared``); its last two rows are then the unknown user's and the unknown item's.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from graphhash.errors import ArgumentError, DataError

FORMAT_VERSION = 2
MAX_CODES = 256


@dataclass(frozen=True, eq=False)
class BucketMap:
    """Rows and weights of every id of one side, users or items.

    Args:
        rows: table rows, int32, shape (n_ids + 1, indices_per_id), in [0, n_buckets); the last entry is for unknown ids.
        n_buckets: rows of the table, the last of which is the unknown ids' own (of a shared table, one of the last two).
        method: name of the method, for reports.
        identity: the map is ``rows[id] = id`` with one lookup of weight 1, and need not be stored.
        codebook: weights of the lookups, float32, shape (n_codes, indices_per_id), at most 256; None: every weight is 1, none is stored.
        codes: profile of every id, uint8, shape (n_ids + 1,); given with ``codebook``.
        shared: the maps of users and items were made together, and read the same table.

    Raises:
        ArgumentError: shapes differ, a row leaves the table, or the unknown ids' entry does not read their row.
    """

    rows: NDArray[np.int32]
    n_buckets: int
    method: str
    identity: bool = False
    codebook: NDArray[np.float32] | None = None
    codes: NDArray[np.uint8] | None = None
    shared: bool = False

    def __post_init__(self):
        if self.rows.ndim != 2 or self.rows.dtype != np.int32:
            raise ArgumentError(f"bucket rows must be 2-D int32, got {self.rows.ndim}-D {self.rows.dtype}")
        if len(self.rows) < 2:
            raise ArgumentError("a bucket map needs at least one id besides the entry for unknown ids")
        low, high = int(self.rows.min()), int(self.rows.max())
        if low < 0 or high >= self.n_buckets:
            raise ArgumentError(f"buckets span {low}..{high}, table has {self.n_buckets} rows")
        if (self.codebook is None) != (self.codes is None):
            raise ArgumentError("codebook and codes are given together, or neither")
        if self.codebook is not None:
            self._check_codebook(self.codebook, self.codes)
        elif self.indices_per_id > 1:
            raise ArgumentError(f"a map of {self.indices_per_id} lookups needs codebook: unknown ids read one row")
        least = self.n_buckets - (2 if self.shared else 1)
        if self.unknown_row < least or self.weights[-1, 0] != 1 or self.weights[-1, 1:].any():
            raise ArgumentError(
                f"the entry for unknown ids must read the last table row {self.n_buckets - 1} with weight 1"
                + (
                    f", or the one before it, as the table is shared; it reads {self.unknown_row}"
                    if self.shared
                    else ""
                )
            )
        if self.identity and not np.array_equal(self.rows[:, 0], np.arange(len(self.rows))):
            raise ArgumentError("an identity map must have rows 0..n_ids")

    def _check_codebook(self, codebook: NDArray, codes: NDArray) -> None:
        if codebook.ndim != 2 or codebook.dtype != np.float32 or codebook.shape[1] != self.indices_per_id:
            raise ArgumentError(
                f"codebook must be float32 of shape (n_codes, {self.indices_per_id}), got {codebook.dtype} of shape {codebook.shape}"
            )
        if codes.shape != (len(self.rows),) or codes.dtype != np.uint8:
            raise ArgumentError(
                f"codes must be uint8 of shape ({len(self.rows)},), got {codes.dtype} of shape {codes.shape}"
            )
        if not 1 <= len(codebook) <= MAX_CODES or codes.max() >= len(codebook):
            raise ArgumentError(
                f"ids have codebook up to {codes.max()}, there are {len(codebook)} (of at most {MAX_CODES})"
            )
        if not np.isfinite(codebook).all():
            raise ArgumentError("codebook must be finite numbers")

    @property
    def weights(self) -> NDArray[np.float32]:
        """Weight of every lookup, float32, of the shape of ``rows``; made anew at every call."""
        if self.codebook is None:
            return np.ones(self.rows.shape, np.float32)
        return self.codebook[self.codes]

    @property
    def n_ids(self) -> int:
        """Known ids; the entry for unknown ids is not counted."""
        return len(self.rows) - 1

    @property
    def unknown_row(self) -> int:
        """The table row of unknown ids."""
        return int(self.rows[-1, 0])

    @property
    def indices_per_id(self) -> int:
        """Table rows read for one id."""
        return self.rows.shape[1]

    @property
    def rows_dtype(self) -> np.dtype:
        """Smallest type that stores the rows: uint16 while the table allows, else int32."""
        return np.dtype(np.uint16 if self.n_buckets <= 2**16 else np.int32)

    @property
    def nbytes(self) -> int:
        """Bytes the stored map takes: rows, codebook and their numbers; none for an identity map."""
        if self.identity:
            return 0
        weights = 0 if self.codebook is None else self.codebook.nbytes + self.codes.nbytes
        return self.rows.size * self.rows_dtype.itemsize + weights

    @property
    def content_hash(self) -> str:
        """Hex sha256 of shape, rows, weights and table size."""
        table = f"{self.n_buckets} shared" if self.shared else f"{self.n_buckets}"
        digest = hashlib.sha256(f"{self.rows.shape} {table}".encode())
        for array in (self.rows, self.codebook, self.codes):
            digest.update(b"none" if array is None else np.ascontiguousarray(array))
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write the map to one ``.npz`` file in its small types."""
        arrays = {
            "format_version": np.int64(FORMAT_VERSION),
            "shape": np.array(self.rows.shape, np.int64),
            "n_buckets": np.int64(self.n_buckets),
            "method": np.array(self.method),
            "shared": np.bool_(self.shared),
        }
        if not self.identity:
            arrays["rows"] = self.rows.astype(self.rows_dtype)
        if self.codebook is not None:
            arrays |= {"codebook": self.codebook, "codes": self.codes}
        with open(path, "wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> BucketMap:
        """Read a map written by :meth:`save`.

        Raises:
            DataError: the file is missing, cut short, not a bucket map, or from a newer format.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                version = int(arrays["format_version"])
                if version != FORMAT_VERSION:
                    remedy = "update graphhash" if version > FORMAT_VERSION else "make it again with 'graphhash train'"
                    raise DataError(
                        f"{path}: bucket map format {version}, this program reads {FORMAT_VERSION}; {remedy}"
                    )
                shape = tuple(arrays["shape"])
                identity = "rows" not in arrays
                rows = np.arange(shape[0], dtype=np.int32)[:, None] if identity else arrays["rows"].astype(np.int32)
                codebook = (arrays["codebook"], arrays["codes"]) if "codebook" in arrays else (None, None)
                n_buckets, method, shared = int(arrays["n_buckets"]), str(arrays["method"]), bool(arrays["shared"])
                return cls(rows, n_buckets, method, identity, *codebook, shared)
        except (OSError, KeyError, ValueError, BadZipFile, EOFError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{path}: not a readable bucket map ({error}); make it again with 'graphhash train'"
            ) from error


def table_rows(users: BucketMap, items: BucketMap) -> int:
    """Rows of the tables that two maps read, those of unknown ids among them; a shared table counts once."""
    return users.n_buckets if users.shared else users.n_buckets + items.n_buckets


def full_map(n_ids: int) -> BucketMap:
    """One row an id and one for unknown ids: the uncompressed table."""
    rows = np.arange(n_ids + 1, dtype=np.int32)[:, None]
    return BucketMap(rows, n_ids + 1, "full", identity=True)


def plain_map(buckets: NDArray, n_buckets: int, method: str) -> BucketMap:
    """Map of lookups of weight 1 each; the unknown ids' entry is appended.

    Args:
        buckets: table rows of every id, shape (n_ids, indices_per_id), in [0, n_buckets - 1).
        n_buckets: rows of the table, the unknown ids' row among them.
    """
    rows = np.concatenate([buckets, np.full((1, buckets.shape[1]), n_buckets - 1)]).astype(np.int32)
    if buckets.shape[1] == 1:
        return BucketMap(rows, n_buckets, method)
    codebook = np.ones((2, buckets.shape[1]), np.float32)
    codebook[1, 1:] = 0
    codes = np.zeros(len(rows), np.uint8)
    codes[-1] = 1
    return BucketMap(rows, n_buckets, method, codebook=codebook, codes=codes)
