"""Hashing baselines: maps that know an id's number, its frequency or its features, but not its community.

Every map has exactly the rows asked for, the last of them the OOV row. Hash functions are Carter and Wegman's universal ones,
drawn by a seed; their arithmetic stays below 2^63.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graphhash.errors import ArgumentError
from graphhash.maps.bucket_map import BucketMap, plain_map

# The Mersenne prime 2^31 - 1 keeps a * x + b below 2^63.
_PRIME = np.int64(2**31 - 1)
# Rows of a graph that are projected at a time.
_BLOCK = 1 << 18


def modulo_map(n_ids: int, n_buckets: int) -> BucketMap:
    """``id mod (n_buckets - 1)``: the plain hashing trick (Weinberger et al., ICML 2009)."""
    _check_budget(n_ids, n_buckets, least=2)
    return plain_map((np.arange(n_ids) % (n_buckets - 1))[:, None], n_buckets, "modulo")


def double_map(n_ids: int, n_buckets: int, *, seed: int) -> BucketMap:
    """The sum of two rows, hashed independently of each other: ids that share one row rarely share both.

    Args:
        n_buckets: rows of the table, the OOV row among them.
        seed: draws the hash functions.
    """
    _check_budget(n_ids, n_buckets, least=3)
    rng = np.random.default_rng(seed)
    ids = np.arange(n_ids)
    return plain_map(np.stack([universal_hash(ids, n_buckets - 1, rng) for _ in range(2)], axis=1), n_buckets, "double")


def quotient_remainder_map(n_ids: int, n_buckets: int) -> BucketMap:
    """The sum of a row for ``id // r`` and a row for ``id mod r``: no two ids share both (Shi et al., KDD 2020, with addition).

    ``r`` is the largest for which both parts fit into the table: as many remainders as possible.

    Raises:
        ArgumentError: fewer rows than both parts need, about twice the square root of ``n_ids``.
    """
    _n_quotients, n_remainders = quotient_remainder_split(n_ids, n_buckets)
    ids = np.arange(n_ids)
    rows = np.stack([ids % n_remainders, n_remainders + ids // n_remainders], axis=1)
    return plain_map(rows, n_buckets, "quotient_remainder")


def quotient_remainder_split(n_ids: int, n_buckets: int) -> tuple[int, int]:
    """Rows for quotients and rows for remainders, ``r`` above, whose product is the number of ids there is room for.

    Raises:
        ArgumentError: as :func:`quotient_remainder_map`.
    """
    _check_budget(n_ids, n_buckets, least=3)
    # q quotients leave r = n_buckets - 1 - q remainders, and tell q * r ids apart.
    for n_quotients in range(1, n_buckets - 1):
        n_remainders = n_buckets - 1 - n_quotients
        if n_quotients * n_remainders >= n_ids:
            return n_quotients, n_remainders
        if n_remainders < n_quotients:
            break
    raise ArgumentError(
        f"a table of {n_buckets} rows cannot tell {n_ids} ids apart by quotient and remainder: it needs at least "
        f"{2 * math.isqrt(n_ids) + 2} rows"
    )


def frequency_map(degrees: NDArray[np.integer], n_buckets: int, *, seed: int) -> BucketMap:
    """The most frequent ids keep a row each, in half of the table; the others hash into the other half.

    Args:
        degrees: interactions of every id in the training data, shape (n_ids,).
        n_buckets: rows of the table, the OOV row among them.
        seed: draws the hash function.
    """
    return _frequency(degrees, n_buckets, n_hashes=1, method="frequency", seed=seed)


def double_frequency_map(degrees: NDArray[np.integer], n_buckets: int, *, seed: int) -> BucketMap:
    """As :func:`frequency_map`, with the sum of two hashed rows for the less frequent ids (Zhang et al., RecSys 2020).

    An id with a row of its own reads it twice at weight one half, so all ids have two indices.
    """
    return _frequency(degrees, n_buckets, n_hashes=2, method="double_frequency", seed=seed)


def lsh_map(features: NDArray[np.floating] | csr_array, n_buckets: int, *, seed: int) -> BucketMap:
    """Ids with similar features share a row: signs of random projections, hashed into the table (Charikar, STOC 2002).

    Args:
        features: shape (n_ids, n_features), dense or CSR.
        n_buckets: rows of the table, the OOV row among them.
        seed: draws the projections and the hash function.

    Raises:
        ArgumentError: a feature is not finite, or the table is too small.
    """
    values = features.data if isinstance(features, csr_array) else features
    if not np.isfinite(values).all():
        raise ArgumentError("features must be finite numbers; fill what is missing first")
    return _signs_map(features, n_buckets, "lsh", seed)


def lsh_structure_map(
    graph: csr_array, neighbour_degrees: NDArray[np.floating], n_buckets: int, *, seed: int
) -> BucketMap:
    """Ids with similar neighbours share a row: :func:`lsh_map` of the rows of the graph, popular neighbours weighing less.

    Args:
        graph: rows of the ids, shape (n_ids, n_neighbours).
        neighbour_degrees: weighted degree of every column, shape (n_neighbours,); a column weighs one over its root.
    """
    scale = 1 / np.sqrt(np.maximum(neighbour_degrees, 1e-300))
    weighted = csr_array((graph.data * scale[graph.indices], graph.indices, graph.indptr), shape=graph.shape)
    return _signs_map(weighted, n_buckets, "lsh_structure", seed)


def _signs_map(features: NDArray | csr_array, n_buckets: int, method: str, seed: int) -> BucketMap:
    n_ids, n_features = features.shape
    _check_budget(n_ids, n_buckets, least=2)
    rng = np.random.default_rng(seed)
    n_bits = max(1, math.ceil(math.log2(n_buckets - 1)))
    # One in three entries, +1 or -1 (Achlioptas, JCSS 2003): as good as normal ones, and small.
    signs = rng.choice(np.array([-1, 0, 0, 0, 0, 1], np.int8), size=(n_features, n_bits)).astype(np.float32)
    codes = np.zeros(n_ids, np.int64)
    for start in range(0, n_ids, _BLOCK):
        codes[start : start + _BLOCK] = (features[start : start + _BLOCK] @ signs > 0) @ (1 << np.arange(n_bits))
    return plain_map(universal_hash(codes, n_buckets - 1, rng)[:, None], n_buckets, method)


def _frequency(degrees: NDArray, n_buckets: int, *, n_hashes: int, method: str, seed: int) -> BucketMap:
    n_ids = len(degrees)
    _check_budget(n_ids, n_buckets, least=3)
    n_own = min((n_buckets - 1) // 2, n_ids)
    n_shared = n_buckets - 1 - n_own
    ranked = np.argsort(-np.asarray(degrees, np.float64), kind="stable")  # Ties go to the lowest id.
    rng = np.random.default_rng(seed)
    hashed = np.stack([universal_hash(np.arange(n_ids), n_shared, rng) for _ in range(n_hashes)], axis=1)
    rows = n_own + hashed
    rows[ranked[:n_own]] = np.arange(n_own)[:, None]
    if n_hashes == 1:
        return plain_map(rows, n_buckets, method)
    with_oov = np.concatenate([rows, np.full((1, n_hashes), n_buckets - 1)]).astype(np.int32)
    codebook = np.array([[1, 1], [0.5, 0.5], [1, 0]], np.float32)
    codes = np.zeros(n_ids + 1, np.uint8)
    codes[ranked[:n_own]] = 1
    codes[-1] = 2
    return BucketMap(with_oov, n_buckets, method, codebook=codebook, codes=codes)


def frequency_rows(
    degrees: NDArray[np.integer], n_rows: int, n_own: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Rows of ids: 0 .. n_own - 1 for the most frequent, one each, and hashed into the others for the rest; int64, shape (n_ids,).

    Args:
        degrees: of every id, shape (n_ids,); ties go to the lowest id.
        n_rows: of the table, more than ``n_own``.
    """
    ranked = np.argsort(-np.asarray(degrees, np.float64), kind="stable")[:n_own]
    rows = n_own + universal_hash(np.arange(len(degrees)), n_rows - n_own, rng)
    rows[ranked] = np.arange(len(ranked))
    return rows


def universal_hash(ids: NDArray, n_buckets: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Hash values, int64: Carter and Wegman's ``((a x + b) mod p) mod n`` with p = 2^31 - 1; exact in int64 for ids below p."""
    a, b = rng.integers(1, _PRIME), rng.integers(0, _PRIME)
    return (ids.astype(np.int64) * a + b) % _PRIME % n_buckets


def _check_budget(n_ids: int, n_buckets: int, *, least: int) -> None:
    if n_ids < 1:
        raise ArgumentError("a bucket map needs at least one id")
    if n_buckets < least:
        raise ArgumentError(f"a table of {n_buckets} rows is too small: this method needs {least} or more")
