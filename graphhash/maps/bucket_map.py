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

from graphhash.errors import DataError

FORMAT_VERSION = 2
MAX_PROFILES = 256


@dataclass(frozen=True, eq=False)
class BucketMap:
    """Rows and weights of every id of one side, users or items.

    Args:
        rows: table rows, int32, shape (n_ids + 1, n_lookups), in [0, n_buckets); the last entry is for unknown ids.
        n_buckets: rows of the table, the last of which is the unknown ids' own (of a shared table, one of the last two).
        method: name of the method, for reports.
        identity: the map is ``rows[id] = id`` with one lookup of weight 1, and need not be stored.
        profiles: weights of the lookups, float32, shape (n_profiles, n_lookups), at most 256; None: every weight is 1, none is stored.
        profile_of: profile of every id, uint8, shape (n_ids + 1,); given with ``profiles``.
        shared: the maps of users and items were made together, and read the same table.

    Raises:
        ValueError: shapes differ, a row leaves the table, or the unknown ids' entry does not read their row.
    """

    rows: NDArray[np.int32]
    n_buckets: int
    method: str
    identity: bool = False
    profiles: NDArray[np.float32] | None = None
    profile_of: NDArray[np.uint8] | None = None
    shared: bool = False

    def __post_init__(self):
        if self.rows.ndim != 2 or self.rows.dtype != np.int32:
            raise ValueError(f"bucket rows must be 2-D int32, got {self.rows.ndim}-D {self.rows.dtype}")
        if len(self.rows) < 2:
            raise ValueError("a bucket map needs at least one id besides the entry for unknown ids")
        low, high = int(self.rows.min()), int(self.rows.max())
        if low < 0 or high >= self.n_buckets:
            raise ValueError(f"buckets span {low}..{high}, table has {self.n_buckets} rows")
        if (self.profiles is None) != (self.profile_of is None):
            raise ValueError("profiles and profile_of are given together, or neither")
        if self.profiles is not None:
            self._check_profiles(self.profiles, self.profile_of)
        elif self.n_lookups > 1:
            raise ValueError(f"a map of {self.n_lookups} lookups needs profiles: unknown ids read one row")
        least = self.n_buckets - (2 if self.shared else 1)
        if self.unknown_row < least or self.weights[-1, 0] != 1 or self.weights[-1, 1:].any():
            raise ValueError(
                f"the entry for unknown ids must read the last table row {self.n_buckets - 1} with weight 1"
                + (
                    f", or the one before it, as the table is shared; it reads {self.unknown_row}"
                    if self.shared
                    else ""
                )
            )
        if self.identity and not np.array_equal(self.rows[:, 0], np.arange(len(self.rows))):
            raise ValueError("an identity map must have rows 0..n_ids")

    def _check_profiles(self, profiles: NDArray, profile_of: NDArray) -> None:
        if profiles.ndim != 2 or profiles.dtype != np.float32 or profiles.shape[1] != self.n_lookups:
            raise ValueError(
                f"profiles must be float32 of shape (n_profiles, {self.n_lookups}), got {profiles.dtype} of shape {profiles.shape}"
            )
        if profile_of.shape != (len(self.rows),) or profile_of.dtype != np.uint8:
            raise ValueError(
                f"profile_of must be uint8 of shape ({len(self.rows)},), got {profile_of.dtype} of shape {profile_of.shape}"
            )
        if not 1 <= len(profiles) <= MAX_PROFILES or profile_of.max() >= len(profiles):
            raise ValueError(
                f"ids have profiles up to {profile_of.max()}, there are {len(profiles)} (of at most {MAX_PROFILES})"
            )
        if not np.isfinite(profiles).all():
            raise ValueError("profiles must be finite numbers")

    @property
    def weights(self) -> NDArray[np.float32]:
        """Weight of every lookup, float32, of the shape of ``rows``; made anew at every call."""
        if self.profiles is None:
            return np.ones(self.rows.shape, np.float32)
        return self.profiles[self.profile_of]

    @property
    def n_ids(self) -> int:
        """Known ids; the entry for unknown ids is not counted."""
        return len(self.rows) - 1

    @property
    def unknown_row(self) -> int:
        """The table row of unknown ids."""
        return int(self.rows[-1, 0])

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
        """Bytes the stored map takes: rows, profiles and their numbers; none for an identity map."""
        if self.identity:
            return 0
        weights = 0 if self.profiles is None else self.profiles.nbytes + self.profile_of.nbytes
        return self.rows.size * self.rows_dtype.itemsize + weights

    @property
    def content_hash(self) -> str:
        """Hex sha256 of shape, rows, weights and table size."""
        table = f"{self.n_buckets} shared" if self.shared else f"{self.n_buckets}"
        digest = hashlib.sha256(f"{self.rows.shape} {table}".encode())
        for array in (self.rows, self.profiles, self.profile_of):
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
        if self.profiles is not None:
            arrays |= {"profiles": self.profiles, "profile_of": self.profile_of}
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
                profiles = (arrays["profiles"], arrays["profile_of"]) if "profiles" in arrays else (None, None)
                n_buckets, method, shared = int(arrays["n_buckets"]), str(arrays["method"]), bool(arrays["shared"])
                return cls(rows, n_buckets, method, identity, *profiles, shared)
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
        buckets: table rows of every id, shape (n_ids, n_lookups), in [0, n_buckets - 1).
        n_buckets: rows of the table, the unknown ids' row among them.
    """
    rows = np.concatenate([buckets, np.full((1, buckets.shape[1]), n_buckets - 1)]).astype(np.int32)
    if buckets.shape[1] == 1:
        return BucketMap(rows, n_buckets, method)
    profiles = np.ones((2, buckets.shape[1]), np.float32)
    profiles[1, 1:] = 0
    profile_of = np.zeros(len(rows), np.uint8)
    profile_of[-1] = 1
    return BucketMap(rows, n_buckets, method, profiles=profiles, profile_of=profile_of)
