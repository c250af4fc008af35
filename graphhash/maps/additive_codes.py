"""Additive codes: every vector is the sum of one codeword out of each of several codebooks (Babenko and Lempitsky, CVPR 2014).

A code takes one byte, and vectors of users and items share the codebooks. In product quantization a codebook covers a part of the
dimensions alone. Here a codeword has more of them, up to all, so that fewer codes describe a vector as well. Many codes of a vector are in
groups: each group has its part of the dimensions. The beam search then has few codes to choose together, and the codewords are short.
Where there are several groups the vectors are rotated first, so that all groups have as much to describe (Ge et al., "Optimized product
quantization", TPAMI 2014).

Codewords start from residual quantization: the k-means of what the codebooks before leave. Then codes and codewords are found in turns:
codes by a beam search, codewords by least squares (Babenko and Lempitsky, section 3).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.sparse import csr_array

from graphhash.errors import ArgumentError
from graphhash.maps import _kernels
from graphhash.maps.quantization import rounded
from graphhash.maps.vector_codes import MAX_CODEWORDS, VectorCodes

# Codes of Gowalla's vectors, 8 of them: a beam of 8 leaves a squared error of 0.180, and more of them hardly less.
BEAM = 8
# Vectors that the first codewords are made from.
SAMPLE = 30_000
KMEANS_ROUNDS = 8
# Directions of a smaller share of the widest one's spread count as of this share.
LEAST_EIGENVALUE = 1e-6
# Least squares have one solution even where a codeword is read by nobody.
RIDGE = 1e-2
# Squared distances of one block of vectors: float32, 64 MiB.
BLOCK_DISTANCES = 2**24


def additive_codes(
    vectors: NDArray[np.float32],
    n_codes: int,
    *,
    n_groups: int = 1,
    weights: NDArray[np.floating] | None = None,
    rounds: int = 2,
    beam: int = BEAM,
    precision: str = "int8",
    seed: int = 0,
) -> VectorCodes:
    """Find codes and codewords with a small weighted sum of squared errors, and a rotation where there are several groups.

    Args:
        vectors: float32, shape (n, dim).
        n_codes: codes, of one byte, per vector.
        n_groups: groups of dimensions, each with as many of the codes; divides ``dim`` and ``n_codes``.
        weights: of the vectors' squared errors, positive, shape (n,); only their proportions count. None: equal.
        rounds: turns of codes and codewords after the start.
        beam: partial codes that the search keeps.
        precision: in which codewords will be stored; they are rounded to it before vectors get their last codes. The rotation is in
            float16.
        seed: draws the sample and the first codewords.

    Raises:
        ArgumentError: ``n_codes``, ``n_groups`` or ``beam`` is below 1 or does not fit, ``rounds`` is negative, a vector is not finite,
            or a weight is not positive.
    """
    dim = vectors.shape[1]
    if n_codes < 1 or beam < 1 or rounds < 0:
        raise ArgumentError(f"n_codes={n_codes} and beam={beam} must be at least 1, and rounds={rounds} at least 0")
    if n_groups < 1 or n_codes % n_groups or dim % n_groups:
        raise ArgumentError(f"n_groups={n_groups} must divide n_codes={n_codes} and the dim {dim}")
    if not np.isfinite(vectors).all():
        raise ArgumentError("vectors must be finite")
    weights = np.ones(len(vectors)) if weights is None else weights
    if weights.shape != (len(vectors),) or not ((weights > 0) & np.isfinite(weights)).all():
        raise ArgumentError(f"weights must be positive numbers, one for each of the {len(vectors)} vectors")
    weights = weights / weights.mean()
    rotation = balancing_rotation(vectors, n_groups) if n_groups > 1 else None
    if rotation is not None:
        vectors = vectors @ rotation.T
    rng = np.random.default_rng(seed)
    sample = rng.permutation(len(vectors))[:SAMPLE]
    parts = []
    for group in np.split(vectors, n_groups, axis=1):
        group = np.ascontiguousarray(group)
        codewords = _residual_codewords(group[sample], weights[sample], n_codes // n_groups, rng)
        for _ in range(rounds):
            codewords = fit_codewords(group, _encode(group, codewords, beam), weights)
        words = rounded(codewords.reshape(-1, dim // n_groups), precision).reshape(codewords.shape)
        parts.append((_encode(group, words, beam), words))
    codes, books = (
        np.concatenate(arrays, axis=axis) for arrays, axis in zip(zip(*parts, strict=True), (1, 0), strict=True)
    )
    return VectorCodes(codes, books, n_groups, rotation, precision=precision, shared=True)


def balancing_rotation(vectors: NDArray[np.float32], n_groups: int) -> NDArray[np.float32]:
    """What decoded vectors are multiplied with, where groups of dimensions were given directions of equal spread.

    The directions are the eigenvectors of the mean outer product of the vectors. The widest goes first, each to the group whose
    product of eigenvalues is the smallest so far and that has a place left (eigenvalue allocation, Ge et al.). Then groups of as many
    codes leave errors of one size.

    Args:
        vectors: float32, shape (n, dim).
        n_groups: divides ``dim``.

    Returns: float32, shape (dim, dim), rows orthonormal but for the rounding to float16: ``vectors @ rotation.T`` is what gets codes.
    """
    dim = vectors.shape[1]
    values, directions = np.linalg.eigh((vectors.T @ vectors).astype(np.float64))
    least = max(float(values[-1]) * LEAST_EIGENVALUE, np.finfo(np.float64).tiny)
    logs = np.log(np.maximum(values, least) / least)
    groups: list[list[int]] = [[] for _ in range(n_groups)]
    for direction in np.argsort(-logs, kind="stable"):
        open_groups = [group for group in groups if len(group) < dim // n_groups]
        min(open_groups, key=lambda group: logs[group].sum()).append(int(direction))
    return directions[:, np.concatenate(groups)].T.astype(np.float16).astype(np.float32)


def encode(
    vectors: NDArray[np.float32], codebooks: NDArray[np.float32], n_groups: int = 1, *, beam: int = BEAM
) -> NDArray[np.uint8]:
    """Codes with a small squared error, group by group, by a beam search over the group's codebooks in their order.

    Args:
        vectors: float32, shape (n, dim), rotated already where there is a rotation.
        codebooks: as in ``graphhash.maps.vector_codes.VectorCodes``.
        beam: partial codes that are kept of every vector; 1 takes the best codeword of every codebook in turn.

    Returns: uint8, shape (n, n_codes).
    """
    groups = zip(np.split(vectors, n_groups, axis=1), np.split(codebooks, n_groups), strict=True)
    return np.concatenate([_encode(np.ascontiguousarray(part), words, beam) for part, words in groups], axis=1)


def _encode(vectors: NDArray[np.float32], codewords: NDArray[np.float32], beam: int) -> NDArray[np.uint8]:
    """Codes of one group, uint8, shape (n, n_codes); codewords of shape (n_codes, n_codewords, dim)."""
    codes = np.empty((len(vectors), len(codewords)), np.uint8)
    block = max(1, BLOCK_DISTANCES // (beam * codewords.shape[1]))
    for start in range(0, len(vectors), block):
        codes[start : start + block] = _encode_block(vectors[start : start + block], codewords, beam)
    return codes


def _encode_block(vectors: NDArray, codewords: NDArray, beam: int) -> NDArray[np.uint8]:
    n, (n_codes, n_words, dim) = len(vectors), codewords.shape
    # What is left of every vector after every partial code in its beam, (n, kept, dim), and these codes.
    left, codes = vectors[:, None], np.empty((n, 1, 0), np.uint8)
    rows = np.arange(n)[:, None]
    for book, words in enumerate(codewords):
        kept = left.shape[1]
        errors = (words**2).sum(1) - 2 * (left.reshape(-1, dim) @ words.T).reshape(n, kept, n_words)
        errors += (left**2).sum(2)[:, :, None]
        errors = errors.reshape(n, -1)
        wanted = min(beam, errors.shape[1]) if book + 1 < n_codes else 1
        best = np.empty((n, wanted), np.int64)
        _kernels.smallest(errors, best)
        parents, words_of = best // n_words, best % n_words
        codes = np.concatenate([codes[rows, parents], words_of[:, :, None].astype(np.uint8)], axis=2)
        left = left[rows, parents] - words[words_of]
    return codes[:, 0]


def fit_codewords(
    vectors: NDArray[np.float32], codes: NDArray[np.uint8], weights: NDArray[np.floating] | None = None
) -> NDArray[np.float32]:
    """The codewords of least squared error for given codes.

    Args:
        vectors: float32, shape (n, dim).
        codes: uint8, shape (n, n_codes).
        weights: of the squared errors of the vectors, shape (n,); None: equal.

    Returns: float32, shape (n_codes, MAX_CODEWORDS, dim).
    """
    n, n_codes = codes.shape
    weights = np.ones(n) if weights is None else weights
    columns = (codes + MAX_CODEWORDS * np.arange(n_codes)).ravel()
    starts, shape = np.arange(0, n * n_codes + 1, n_codes), (n, n_codes * MAX_CODEWORDS)
    # Sums of float32 would be off by more than the ridge where hundreds of thousands of vectors have one code.
    reads = csr_array((np.ones(n * n_codes), columns, starts), shape=shape)
    weighted = csr_array((np.repeat(np.asarray(weights, np.float64), n_codes), columns, starts), shape=shape)
    products = (weighted.T @ reads).toarray()
    products[np.diag_indices_from(products)] += RIDGE
    words = cho_solve(cho_factor(products), weighted.T @ vectors)
    return words.astype(np.float32).reshape(n_codes, MAX_CODEWORDS, -1)


def _residual_codewords(
    sample: NDArray[np.float32], weights: NDArray, n_codes: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    left, books = sample.copy(), []
    for _ in range(n_codes):
        words = _kmeans(left, weights, rng)
        left -= words[_nearest(left, words)]
        books.append(words)
    return np.stack(books)


def _kmeans(vectors: NDArray[np.float32], weights: NDArray, rng: np.random.Generator) -> NDArray[np.float32]:
    """MAX_CODEWORDS centres of vectors; some of fewer vectors than that repeat."""
    centres = vectors[rng.choice(len(vectors), MAX_CODEWORDS, replace=len(vectors) < MAX_CODEWORDS)]
    for _ in range(KMEANS_ROUNDS):
        nearest = _nearest(vectors, centres)
        counts = np.bincount(nearest, weights, minlength=MAX_CODEWORDS)
        sums = csr_array(
            (weights.astype(np.float32), (nearest, np.arange(len(vectors)))), shape=(MAX_CODEWORDS, len(vectors))
        )
        means = (sums @ vectors) / np.where(counts > 0, counts, 1)[:, None]
        # A centre that is nobody's nearest starts again somewhere else.
        centres = np.where(counts[:, None] > 0, means, vectors[rng.integers(len(vectors), size=MAX_CODEWORDS)])
        centres = centres.astype(np.float32)
    return centres


def _nearest(vectors: NDArray[np.float32], centres: NDArray[np.float32]) -> NDArray[np.int64]:
    nearest = np.empty(len(vectors), np.int64)
    half_squares = (centres**2).sum(1) / 2
    block = BLOCK_DISTANCES // len(centres)
    for start in range(0, len(vectors), block):
        nearest[start : start + block] = (half_squares - vectors[start : start + block] @ centres.T).argmin(1)
    return nearest
