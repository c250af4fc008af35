"""Bucket maps: which rows of a compressed embedding table an id reads, and with which weights.

One representation serves every method. A map holds the same number of row indices for each of ``n_ids`` ids and for one more entry, which
stands for out-of-vocabulary (OOV) ids. The embedding of an id is ``sum_j weights[id, j] * table[rows[id, j]]``; a plain hash has one index
per id, of weight 1. Models read the map and do not depend on how it was made.

Weights are stored as one byte per id: its code in a weight codebook of at most 256 rows (``graphhash.maps.codebook``).

Maps are made in ``graphhash.maps.hashes`` (hashing baselines), ``graphhash.maps.community_maps`` and ``graphhash.maps.soft_maps``.

The last row of every table is the OOV row. It is not trained; the trainer sets it to the interaction-weighted mean vector, so an OOV id is
scored like the average one. Users and items may read one table (``shared``); its last two rows are then the OOV rows of users and items.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from graphhash.errors import ArgumentError, DataError

FORMAT_VERSION = 2
MAX_CODES = 256


@dataclass(frozen=True, eq=False)
class BucketMap:
    """Table rows and weights of every id of one side, users or items.

    Args:
        rows: table rows, int32, shape (n_ids + 1, indices_per_id), in [0, n_buckets); the last entry is for OOV ids.
        n_buckets: rows of the table (``num_embeddings``), the last of which is the OOV row (of a shared table, one of the last two).
        method: name of the method, for reports.
        identity: the map is ``rows[id] = id`` with one index per id, of weight 1, and need not be stored.
        codebook: rows of weights, float32, shape (n_codes, indices_per_id), n_codes at most 256; None: every weight is 1, none is stored.
        codes: codebook row of every id, uint8, shape (n_ids + 1,); given with ``codebook``.
        shared: the maps of users and items were made together, and read the same table.

    Raises:
        ArgumentError: shapes differ, a row leaves the table, or the OOV entry does not read the OOV row.
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
            raise ArgumentError("a bucket map needs at least one id besides the OOV entry")
        low, high = int(self.rows.min()), int(self.rows.max())
        if low < 0 or high >= self.n_buckets:
            raise ArgumentError(f"buckets span {low}..{high}, table has {self.n_buckets} rows")
        if (self.codebook is None) != (self.codes is None):
            raise ArgumentError("codebook and codes are given together, or neither")
        if self.codebook is not None:
            self._check_codebook(self.codebook, self.codes)
        elif self.indices_per_id > 1:
            raise ArgumentError(f"a map of {self.indices_per_id} indices per id needs a codebook: OOV ids read one row")
        first_oov, of_oov = self.n_buckets - (2 if self.shared else 1), self.oov_weights
        if self.oov_row < first_oov or of_oov[0] != 1 or of_oov[1:].any():
            raise ArgumentError(
                f"the OOV entry must read the last table row {self.n_buckets - 1} with weight 1"
                + (f", or the one before it, as the table is shared; it reads {self.oov_row}" if self.shared else "")
            )
        if self.identity and not np.array_equal(self.rows[:, 0], np.arange(len(self.rows))):
            raise ArgumentError("an identity map must have rows 0..n_ids")

    def _check_codebook(self, codebook: NDArray, codes: NDArray | None) -> None:
        assert codes is not None
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
                f"codes go up to {codes.max()}, the codebook has {len(codebook)} rows (of at most {MAX_CODES})"
            )
        if not np.isfinite(codebook).all():
            raise ArgumentError("the codebook must hold finite numbers")

    @property
    def weights(self) -> NDArray[np.float32]:
        """Weight of every index, float32, of the shape of ``rows``; computed at every call."""
        if self.codebook is None:
            return np.ones(self.rows.shape, np.float32)
        assert self.codes is not None
        return self.codebook[self.codes]

    @property
    def oov_weights(self) -> NDArray[np.float32]:
        """Weights of the OOV entry, shape (indices_per_id,)."""
        if self.codebook is None or self.codes is None:
            return np.ones(self.indices_per_id, np.float32)
        return self.codebook[self.codes[-1]]

    @property
    def n_ids(self) -> int:
        """Ids of the vocabulary; the OOV entry is not counted."""
        return len(self.rows) - 1

    @property
    def oov_row(self) -> int:
        """The table row of out-of-vocabulary ids."""
        return int(self.rows[-1, 0])

    @property
    def indices_per_id(self) -> int:
        """Table rows read per id: the number of hash functions of a hashing method."""
        return self.rows.shape[1]

    @property
    def rows_dtype(self) -> np.dtype:
        """Type in which rows are stored: uint16 for tables of at most 65,536 rows, else int32."""
        return np.dtype(np.uint16 if self.n_buckets <= 2**16 else np.int32)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored map: rows, codebook and codes; 0 for an identity map."""
        if self.identity:
            return 0
        weights = sum(array.nbytes for array in (self.codebook, self.codes) if array is not None)
        return self.rows.size * self.rows_dtype.itemsize + weights

    @property
    def content_hash(self) -> str:
        """Hexadecimal sha256 of shape, rows, weights and table size."""
        table = f"{self.n_buckets} shared" if self.shared else f"{self.n_buckets}"
        digest = hashlib.sha256(f"{self.rows.shape} {table}".encode())
        for array in (self.rows, self.codebook, self.codes):
            digest.update(b"none" if array is None else np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write the map to one ``.npz`` file: rows in :attr:`rows_dtype`, none of an identity map."""
        arrays: dict[str, Any] = {
            "format_version": np.int64(FORMAT_VERSION),
            "shape": np.array(self.rows.shape, np.int64),
            "n_buckets": np.int64(self.n_buckets),
            "method": np.array(self.method),
            "shared": np.bool_(self.shared),
        }
        if not self.identity:
            arrays["rows"] = self.rows.astype(self.rows_dtype)
        if self.codebook is not None and self.codes is not None:
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
                codebook, codes = (arrays.get(name) for name in ("codebook", "codes"))
                n_buckets, method, shared = int(arrays["n_buckets"]), str(arrays["method"]), bool(arrays["shared"])
                return cls(rows, n_buckets, method, identity, codebook, codes, shared)
        except (OSError, KeyError, ValueError, BadZipFile, EOFError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{path}: not a readable bucket map ({error}); make it again with 'graphhash train'"
            ) from error


def table_rows(users: BucketMap, items: BucketMap) -> int:
    """Rows of the tables that two maps read, OOV rows among them; a shared table counts once."""
    return users.n_buckets if users.shared else users.n_buckets + items.n_buckets


def full_map(n_ids: int) -> BucketMap:
    """One row per id and the OOV row: the uncompressed table."""
    rows = np.arange(n_ids + 1, dtype=np.int32)[:, None]
    return BucketMap(rows, n_ids + 1, "full", identity=True)


def plain_map(buckets: NDArray, n_buckets: int, method: str) -> BucketMap:
    """Map whose indices all have weight 1; the OOV entry is appended.

    Args:
        buckets: table rows of every id, shape (n_ids, indices_per_id), in [0, n_buckets - 1).
        n_buckets: rows of the table, the OOV row among them.
        method: name of the method, for reports.
    """
    rows = np.concatenate([buckets, np.full((1, buckets.shape[1]), n_buckets - 1)]).astype(np.int32)
    if buckets.shape[1] == 1:
        return BucketMap(rows, n_buckets, method)
    codebook = np.ones((2, buckets.shape[1]), np.float32)
    codebook[1, 1:] = 0
    codes = np.zeros(len(rows), np.uint8)
    codes[-1] = 1
    return BucketMap(rows, n_buckets, method, codebook=codebook, codes=codes)
