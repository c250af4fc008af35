"""Weight codebook: the weights of all ids as one byte an id and a small table of rows of weights.

An id's weights fall from its first lookup to its last, and how fast is nearly all that tells two ids apart. 256 rows of weights, found
by k-means (Lloyd, IEEE Trans. Inf. Theory 1982), therefore say it as well as a number per lookup does, at a fraction of the bytes.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2, vq

from graphhash.maps.bucket_map import MAX_CODES

# More rows than this are drawn from, evenly: codebook do not get better by more.
SAMPLE = 16_384
ROUNDS = 10
# Rows whose nearest profile is looked up at a time: their distances to all codebook are 16 MB.
BLOCK = 1 << 13


def weight_codebook(weights: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Profiles near the rows of ``weights``, and the profile of every row.

    Where there are at most 256 different rows they are the codebook, and nothing is lost. The last row of ``weights``, which is that
    of unknown ids, keeps a profile to itself in any case.

    Args:
        weights: shape (n, indices_per_id), the known rows of unit length.

    Returns: codebook, float32, shape (n_codes, indices_per_id), all but the last of unit length; the number of each row's, uint8, shape (n,).
    """
    known, unknown = weights[:-1], weights[-1:]
    # To sort all rows takes longer than all the rest, and where a few thousand already differ too much it is for nothing.
    few = len(np.unique(_spaced(known), axis=0)) < MAX_CODES
    distinct, codes = np.unique(known, axis=0, return_inverse=True) if few else (known, None)
    if len(distinct) > MAX_CODES - 1:
        distinct, codes = _nearest(known)
    codebook = np.concatenate([distinct, unknown]).astype(np.float32)
    return codebook, np.append(codes.ravel(), len(distinct)).astype(np.uint8)


def _nearest(known: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    sample = _spaced(known).astype(np.float64)
    # Started from rows evenly spaced by their first weight, so that nothing is drawn.
    ordered = sample[np.argsort(sample[:, 0], kind="stable")]
    start = ordered[np.linspace(0, len(ordered) - 1, MAX_CODES - 1).astype(np.int64)]
    with warnings.catch_warnings():
        # A profile that no id is near stays where it is, and does no harm.
        warnings.filterwarnings("ignore", message="One of the clusters is empty")
        centres, _ = kmeans2(sample, start, iter=ROUNDS, minit="matrix", missing="warn")
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    parts = [vq(known[i : i + BLOCK].astype(np.float64), centres)[0] for i in range(0, len(known), BLOCK)]
    return centres.astype(np.float32), np.concatenate(parts)


def nearest_codes(weights: NDArray[np.float32], codebook: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The nearest of given codebook of every row, by Euclidean distance.

    Args:
        weights: shape (n, indices_per_id).
        codebook: shape (n_codes, indices_per_id), at most 256.

    Returns: numbers of codebook, uint8, shape (n,).
    """
    centres = codebook.astype(np.float64)
    parts = [vq(weights[i : i + BLOCK].astype(np.float64), centres)[0] for i in range(0, len(weights), BLOCK)]
    return np.concatenate([*parts, np.empty(0, np.int64)]).astype(np.uint8)


def _spaced(known: NDArray[np.float32]) -> NDArray[np.float32]:
    """At most SAMPLE of the rows, evenly spaced."""
    return known[np.linspace(0, len(known) - 1, min(SAMPLE, len(known))).astype(np.int64)]
