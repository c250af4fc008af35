"""Bucket maps: which rows of a small table an id reads, and with which weights.

One representation serves every method. A map holds, for each of ``n_ids`` ids and one more entry for unknown ids, the
same number of lookups; the embedding of an id is ``sum_j weights[id, j] * table[rows[id, j]]``. A plain hash is one lookup
of weight 1. Models read the map and never learn how it was made.

The maps are made in ``graphhash.hashes`` (hashing baselines) and ``graphhash.graph_maps`` (what follows from communities).

The last table row of every map belongs to unknown ids alone. It is not trained; the trainer fills it with the
interaction-weighted mean vector, so an unknown id is answered like the average one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from graphhash.errors import DataError

FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class BucketMap:
    """Rows and weights of every id of one side, users or items.

    Args:
        rows: table rows, int32, shape (n_ids + 1, n_lookups), in [0, n_buckets); the last entry is for unknown ids.
        weights: float32, same shape; equal to ``weight_codes * weight_scale`` where those are given, else all ones.
        n_buckets: rows of the table, the last of which is the unknown ids' own.
        method: name of the method, for reports.
        identity: the map is ``rows[id] = id`` with one lookup of weight 1, and need not be stored.
        weight_codes: uint8, same shape, or None when every weight is 1 and none is stored.
        weight_scale: value of one step of ``weight_codes``.

    Raises:
        ValueError: shapes differ, a row leaves the table, or the unknown ids' entry is not the last row.
    """

    rows: NDArray[np.int32]
    weights: NDArray[np.float32]
    n_buckets: int
    method: str
    identity: bool = False
    weight_codes: NDArray[np.uint8] | None = None
    weight_scale: float = 1.0

    def __post_init__(self):
        if self.rows.ndim != 2 or self.rows.dtype != np.int32:
            raise ValueError(f"bucket rows must be 2-D int32, got {self.rows.ndim}-D {self.rows.dtype}")
        if self.weights.shape != self.rows.shape or self.weights.dtype != np.float32:
            raise ValueError(
                f"bucket weights must be float32 of shape {self.rows.shape}, "
                f"got {self.weights.dtype} of shape {self.weights.shape}"
            )
        if len(self.rows) < 2:
            raise ValueError("a bucket map needs at least one id besides the entry for unknown ids")
        low, high = int(self.rows.min()), int(self.rows.max())
        if low < 0 or high >= self.n_buckets:
            raise ValueError(f"buckets span {low}..{high}, table has {self.n_buckets} rows")
        if self.rows[-1, 0] != self.n_buckets - 1 or self.weights[-1, 0] != 1 or self.weights[-1, 1:].any():
            raise ValueError(
                f"the entry for unknown ids must read the last table row {self.n_buckets - 1} with weight 1"
            )
        if self.weight_codes is None:
            if not (self.weights == 1).all():
                raise ValueError("weights other than 1 need weight_codes")
        elif not np.array_equal(self.weight_codes * np.float32(self.weight_scale), self.weights):
            raise ValueError("weights differ from weight_codes * weight_scale")
        if self.identity and not np.array_equal(self.rows[:, 0], np.arange(len(self.rows))):
            raise ValueError("an identity map must have rows 0..n_ids")

    @property
    def n_ids(self) -> int:
        """Known ids; the entry for unknown ids is not counted."""
        return len(self.rows) - 1

    @property
    def n_lookups(self) -> int:
        """Table rows read for one id."""
        return self.rows.shape[1]

    @property
    def rows_dtype(self) -> np.dtype:
        """Smallest type that stores the rows: uint16 while the table allows, else int32."""
        return np.dtype(np.uint16 if self.n_buckets <= 2**16 else np.int32)

    @property
    def nbytes(self) -> int:
        """Bytes the stored map takes: rows and weight codes; none for an identity map."""
        if self.identity:
            return 0
        return self.rows.size * self.rows_dtype.itemsize + (
            0 if self.weight_codes is None else self.weight_codes.size
        )

    @property
    def content_hash(self) -> str:
        """Hex sha256 of shape, rows, weights and table size."""
        digest = hashlib.sha256(f"{self.rows.shape} {self.n_buckets} {self.weight_scale!r}".encode())
        digest.update(np.ascontiguousarray(self.rows))
        digest.update(np.ascontiguousarray(self.weights))
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write the map to one ``.npz`` file in its small types."""
        arrays = {
            "format_version": np.int64(FORMAT_VERSION),
            "shape": np.array(self.rows.shape, np.int64),
            "n_buckets": np.int64(self.n_buckets),
            "method": np.array(self.method),
            "weight_scale": np.float64(self.weight_scale),
        }
        if not self.identity:
            arrays["rows"] = self.rows.astype(self.rows_dtype)
        if self.weight_codes is not None:
            arrays["weight_codes"] = self.weight_codes
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
                if version > FORMAT_VERSION:
                    raise DataError(
                        f"{path}: bucket map format {version} is newer than {FORMAT_VERSION}; update graphhash"
                    )
                shape = tuple(arrays["shape"])
                identity = "rows" not in arrays
                rows = (
                    np.arange(shape[0], dtype=np.int32)[:, None]
                    if identity
                    else arrays["rows"].astype(np.int32)
                )
                codes = arrays["weight_codes"] if "weight_codes" in arrays else None
                scale = float(arrays["weight_scale"])
                weights = np.ones(shape, np.float32) if codes is None else codes * np.float32(scale)
                return cls(
                    rows, weights, int(arrays["n_buckets"]), str(arrays["method"]), identity, codes, scale
                )
        except (OSError, KeyError, ValueError, BadZipFile, EOFError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{path}: not a readable bucket map ({error}); make it again with 'graphhash train'"
            ) from error


def full_map(n_ids: int) -> BucketMap:
    """One row an id and one for unknown ids: the uncompressed table."""
    rows = np.arange(n_ids + 1, dtype=np.int32)[:, None]
    return BucketMap(rows, np.ones_like(rows, np.float32), n_ids + 1, "full", identity=True)


def plain_map(buckets: NDArray, n_buckets: int, method: str) -> BucketMap:
    """Map of lookups of weight 1 each; the unknown ids' entry is appended.

    Args:
        buckets: table rows of every id, shape (n_ids, n_lookups), in [0, n_buckets - 1).
        n_buckets: rows of the table, the unknown ids' row among them.
    """
    rows = np.concatenate([buckets, np.full((1, buckets.shape[1]), n_buckets - 1)]).astype(np.int32)
    if buckets.shape[1] == 1:
        return BucketMap(rows, np.ones(rows.shape, np.float32), n_buckets, method)
    codes = np.ones(rows.shape, np.uint8)
    codes[-1, 1:] = 0
    return BucketMap(rows, codes.astype(np.float32), n_buckets, method, weight_codes=codes)
