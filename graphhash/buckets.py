"""Bucket maps: which rows of a small table an id reads, and with which weights.

One representation serves every method. A map holds, for each of ``n_ids`` ids and one more entry for unknown ids, the
same number of lookups; the embedding of an id is ``sum_j weights[id, j] * table[rows[id, j]]``. A plain hash is one lookup
of weight 1. Models read the map and never learn how it was made.

Methods here: ``full`` (one row an id), ``modulo``, ``frequency`` and ``double_frequency`` (the hashing baselines of Wu et al.,
GraphHash, WWW 2025, arXiv 2412.17245, section 4), ``graph`` (GraphHash: ids of one community share a row) and ``soft`` (every id
reads the buckets of its neighbours, one hop of the normalised graph).

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
from scipy.sparse import csr_array

from graphhash import _kernels
from graphhash.clustering import Labels
from graphhash.errors import DataError
from graphhash.graph import balanced_chunks

FORMAT_VERSION = 1
# Multiplier of the Mersenne-prime universal hash; 2^31 - 1 keeps a * x + b below 2^63.
_PRIME = np.int64(2**31 - 1)


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
            raise ValueError(f"the entry for unknown ids must read the last table row {self.n_buckets - 1} with weight 1")
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
        return self.rows.size * self.rows_dtype.itemsize + (0 if self.weight_codes is None else self.weight_codes.size)

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
                    raise DataError(f"{path}: bucket map format {version} is newer than {FORMAT_VERSION}; update graphhash")
                shape = tuple(arrays["shape"])
                identity = "rows" not in arrays
                rows = np.arange(shape[0], dtype=np.int32)[:, None] if identity else arrays["rows"].astype(np.int32)
                codes = arrays["weight_codes"] if "weight_codes" in arrays else None
                scale = float(arrays["weight_scale"])
                weights = np.ones(shape, np.float32) if codes is None else codes * np.float32(scale)
                return cls(rows, weights, int(arrays["n_buckets"]), str(arrays["method"]), identity, codes, scale)
        except (OSError, KeyError, ValueError, BadZipFile, EOFError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: not a readable bucket map ({error}); make it again with 'graphhash train'") from error


def full_map(n_ids: int) -> BucketMap:
    """One row an id and one for unknown ids: the uncompressed table."""
    rows = np.arange(n_ids + 1, dtype=np.int32)[:, None]
    return BucketMap(rows, np.ones_like(rows, np.float32), n_ids + 1, "full", identity=True)


def modulo_map(n_ids: int, n_buckets: int) -> BucketMap:
    """``id mod (n_buckets - 1)``: the plain hashing trick (Weinberger et al., ICML 2009)."""
    _check_budget(n_ids, n_buckets, least=2)
    return _plain((np.arange(n_ids) % (n_buckets - 1))[:, None], n_buckets, "modulo")


def frequency_map(degrees: NDArray[np.integer], n_buckets: int, *, seed: int) -> BucketMap:
    """The most frequent ids keep a row each, in half of the table; the others hash into the other half.

    Args:
        degrees: interactions of every id in the training data, shape (n_ids,).
        n_buckets: rows of the table, the unknown ids' row among them.
        seed: draws the hash function.
    """
    return _frequency(degrees, n_buckets, n_hashes=1, method="frequency", seed=seed)


def double_frequency_map(degrees: NDArray[np.integer], n_buckets: int, *, seed: int) -> BucketMap:
    """As :func:`frequency_map`, with the sum of two hashed rows for the less frequent ids (Zhang et al., RecSys 2020).

    An id with a row of its own reads it twice at weight one half, so all ids have two lookups.
    """
    return _frequency(degrees, n_buckets, n_hashes=2, method="double_frequency", seed=seed)


def graph_maps(labels: Labels) -> tuple[BucketMap, BucketMap]:
    """GraphHash: ids of one community share a row (Wu et al., WWW 2025, eq. 6).

    Returns:
        User map and item map; each table has a row per community that holds ids of that side, and the unknown ids' row.
    """
    sides = []
    for side in (labels.users, labels.items):
        buckets, n_buckets = _compact(side)
        sides.append(_plain(buckets[:, None], n_buckets + 1, "graph"))
    return sides[0], sides[1]


def soft_maps(biadjacency: csr_array, labels: Labels, *, n_lookups: int = 12) -> tuple[BucketMap, BucketMap]:
    """Every id reads the buckets of its neighbours: ``S_user = A_n C_item`` and ``S_item = A_n^T C_user``.

    ``A_n = K^-1/2 A D^-1/2`` is the normalised biadjacency and C the one-hot community assignment, so row u of ``S_user`` says
    how much of user u's normalised interactions falls on each item community: one step of graph convolution, taken once, at
    the size of the table. The largest ``n_lookups`` entries are kept (ties to the lowest bucket), scaled to unit length and
    rounded to 8 bits. The user table has a row per *item* community and the item table a row per *user* community; together they
    have as many rows as ``graph_maps``.

    Args:
        biadjacency: training interactions, shape (n_users, n_items), weights > 0.
        labels: one community per user and item.
        n_lookups: rows read per id.

    Raises:
        ValueError: shapes of graph and labels differ, or n_lookups is below 1.
    """
    if n_lookups < 1:
        raise ValueError(f"n_lookups must be at least 1, got {n_lookups}")
    if biadjacency.shape != (len(labels.users), len(labels.items)):
        raise ValueError(
            f"biadjacency is {biadjacency.shape[0]} x {biadjacency.shape[1]}, labels hold "
            f"{len(labels.users)} users and {len(labels.items)} items"
        )
    transposed = biadjacency.T.tocsr()
    user_degrees = np.asarray(biadjacency.sum(axis=1), np.float64).ravel()
    item_degrees = np.asarray(transposed.sum(axis=1), np.float64).ravel()
    users = _one_hop(biadjacency, item_degrees, labels.items, n_lookups)
    items = _one_hop(transposed, user_degrees, labels.users, n_lookups)
    return users, items


def _one_hop(graph: csr_array, neighbour_degrees: NDArray, neighbour_labels: NDArray, n_lookups: int) -> BucketMap:
    """Largest ``n_lookups`` bucket affinities of each row of ``graph``, as a map with 8-bit weights."""
    buckets, n_buckets = _compact(neighbour_labels)
    n_rows = graph.shape[0]
    rows = np.full((n_rows + 1, n_lookups), n_buckets, np.int32)
    affinities = np.zeros((n_rows + 1, n_lookups), np.float32)
    # The row's own degree is a common factor of its affinities: unit length removes it.
    scale = 1.0 / np.sqrt(np.maximum(neighbour_degrees, 1e-300))
    _kernels.top_affinities(
        graph.indptr.astype(np.int64), graph.indices, graph.data, scale, buckets, n_buckets,
        balanced_chunks(graph.indptr, 32), rows, affinities,
    )  # fmt: skip
    codes = np.rint(affinities * 255).astype(np.uint8)
    # Affinities too small for 8 bits point at the row's best bucket with weight 0.
    rows = np.where(codes > 0, rows, rows[:, :1])
    # Ids without interactions, and unknown ids, read the last row.
    codes[codes[:, 0] == 0, 0] = 255
    weight_scale = 1 / 255
    return BucketMap(
        rows, codes * np.float32(weight_scale), n_buckets + 1, "soft", weight_codes=codes, weight_scale=weight_scale
    )


def _frequency(degrees: NDArray, n_buckets: int, *, n_hashes: int, method: str, seed: int) -> BucketMap:
    n_ids = len(degrees)
    _check_budget(n_ids, n_buckets, least=3)
    n_own = min((n_buckets - 1) // 2, n_ids)
    n_shared = n_buckets - 1 - n_own
    ranked = np.argsort(-np.asarray(degrees, np.float64), kind="stable")  # Ties go to the lowest id.
    rng = np.random.default_rng(seed)
    hashed = np.stack([_universal_hash(np.arange(n_ids), n_shared, rng) for _ in range(n_hashes)], axis=1)
    rows = n_own + hashed
    rows[ranked[:n_own]] = np.arange(n_own)[:, None]
    if n_hashes == 1:
        return _plain(rows, n_buckets, method)
    codes = np.full((n_ids + 1, n_hashes), 2, np.uint8)
    codes[ranked[:n_own]] = 1
    codes[-1] = [2, 0]
    rows = np.concatenate([rows, np.full((1, n_hashes), n_buckets - 1)]).astype(np.int32)
    return BucketMap(rows, codes * np.float32(0.5), n_buckets, method, weight_codes=codes, weight_scale=0.5)


def _universal_hash(ids: NDArray, n_buckets: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Carter and Wegman's ``((a x + b) mod p) mod n`` with p = 2^31 - 1; exact in int64 for ids below p."""
    a, b = rng.integers(1, _PRIME), rng.integers(0, _PRIME)
    return (ids.astype(np.int64) * a + b) % _PRIME % n_buckets


def _plain(buckets: NDArray, n_buckets: int, method: str) -> BucketMap:
    """Map of lookups of weight 1; the unknown ids' entry is appended."""
    rows = np.concatenate([buckets, np.full((1, buckets.shape[1]), n_buckets - 1)]).astype(np.int32)
    return BucketMap(rows, np.ones(rows.shape, np.float32), n_buckets, method)


def _compact(side: NDArray) -> tuple[NDArray[np.int32], int]:
    """Labels of one side renumbered 0..n-1 in ascending order, and n."""
    present, buckets = np.unique(side, return_inverse=True)
    return buckets.astype(np.int32).ravel(), len(present)


def _check_budget(n_ids: int, n_buckets: int, *, least: int) -> None:
    if n_ids < 1:
        raise ValueError("a bucket map needs at least one id")
    if n_buckets < least:
        raise ValueError(f"a table of {n_buckets} rows is too small: this method needs {least} or more")
