"""Weight codebook: the weights of all ids as one byte per id, its code, and a small table of rows of weights.

An id's weights fall from its first index to its last, and ids differ mostly in how fast they fall. A codebook of 256 rows, found by
k-means (Lloyd, IEEE Trans. Inf. Theory 1982), therefore represents them as well as a number per index does, in a fraction of the bytes.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from graphhash.maps import _kernels
from graphhash.maps.bucket_map import MAX_CODES

# k-means sees at most so many rows, evenly spaced: more do not improve the codebook.
SAMPLE = 16_384
ROUNDS = 10


def weight_codebook(
    weights: NDArray[np.float32], sample: NDArray[np.integer] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """A codebook for the rows of ``weights``, and the code of every row.

    At most 256 distinct rows are the codebook themselves, and nothing is lost. The last row of ``weights``, the OOV entry's, is the last
    row of the codebook, which no other row shares.

    Args:
        weights: float32, shape (n, indices_per_id), all but the last of unit length.
        sample: the rows that k-means sees; None: those of :func:`spaced`, without the last.

    Returns: codebook, float32, shape (n_codes, indices_per_id), all but the last of unit length; codes, uint8, shape (n,).
    """
    known, oov = weights[:-1], weights[-1:]
    # Sorting all rows would take longer than the rest, and is useless where the sample already holds too many distinct rows.
    seen = known[spaced(len(known)) if sample is None else sample]
    few = len(np.unique(seen, axis=0)) < MAX_CODES
    codes: NDArray[np.integer]
    distinct, codes = np.unique(known, axis=0, return_inverse=True) if few else _nearest(known, seen)
    if len(distinct) > MAX_CODES - 1:
        distinct, codes = _nearest(known, seen)
    codebook = np.concatenate([distinct, oov]).astype(np.float32)
    return codebook, np.append(codes.ravel(), len(distinct)).astype(np.uint8)


def _nearest(known: NDArray[np.float32], seen: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Codebook by k-means over the rows ``seen``, float32, and the code of every row of ``known``, uint8."""
    from scipy.cluster.vq import kmeans2  # Of many modules, for few of the codebooks.

    sample = seen.astype(np.float64)
    # Initial centres are rows evenly spaced by their first weight, so that nothing is random.
    ordered = sample[np.argsort(sample[:, 0], kind="stable")]
    start = ordered[np.linspace(0, len(ordered) - 1, MAX_CODES - 1).astype(np.int64)]
    with warnings.catch_warnings():
        # An empty cluster keeps its centre, which does no harm.
        warnings.filterwarnings("ignore", message="One of the clusters is empty")
        centres, _ = kmeans2(sample, start, iter=ROUNDS, minit="matrix", missing="warn")
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    return centres.astype(np.float32), _codes(known, centres)


def nearest_codes(weights: NDArray[np.float32], codebook: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The nearest codebook row of every row of ``weights``, by Euclidean distance.

    Args:
        weights: float32, shape (n, indices_per_id).
        codebook: float32, shape (n_codes, indices_per_id), n_codes at most 256.

    Returns: codes, uint8, shape (n,).
    """
    return _codes(weights, codebook.astype(np.float64))


def _codes(weights: NDArray[np.float32], centres: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The number of the nearest of at most 256 centres, shape (n,)."""
    codes = np.empty(len(weights), np.uint8)
    _kernels.nearest_rows(np.ascontiguousarray(weights, np.float32), np.ascontiguousarray(centres.T), codes)
    return codes


def spaced(n: int) -> NDArray[np.int64]:
    """At most SAMPLE of the numbers 0, ..., n - 1, evenly spaced."""
    return np.linspace(0, n - 1, min(SAMPLE, n)).astype(np.int64)
