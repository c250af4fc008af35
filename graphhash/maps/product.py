"""Product quantization of trained vectors (Jegou, Douze and Schmid, TPAMI 2011), with a rotation if asked for (OPQ: Ge et al., CVPR 2013).

A vector is cut into chunks of equal length. Each chunk is stored as the number, in one byte, of one of at most 256 codewords, which all
vectors share. The k-means is that of FAISS, the package ``faiss-cpu``.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from graphhash.errors import ArgumentError
from graphhash.maps.vector_codes import MAX_CODEWORDS, VectorCodes

# Distances to all codewords of so many vectors are in memory at a time: 64 MiB.
_BLOCK = 2**16


def product_quantize(
    vectors: NDArray[np.float32],
    n_chunks: int,
    *,
    n_codewords: int = MAX_CODEWORDS,
    rotated: bool = False,
    n_trained: int | None = None,
    seed: int,
) -> VectorCodes:
    """Product-quantize vectors; codebooks and rotation are rounded to float16 before vectors get their codes.

    Args:
        vectors: shape (n, dim).
        n_chunks: codes per vector; divides ``dim``.
        n_codewords: of every codebook, a power of two of at most 256.
        rotated: learn a rotation as well.
        n_trained: codebooks are made from the first so many vectors; None: from all.
        seed: of the k-means.

    Raises:
        ArgumentError: ``n_chunks`` does not divide ``dim``, or FAISS is not installed.
    """
    dim = vectors.shape[1]
    if n_chunks < 1 or dim % n_chunks:
        raise ArgumentError(f"{n_chunks} codes per vector do not divide its {dim} numbers; use a divisor of the dim")
    faiss = import_faiss()
    trained = np.ascontiguousarray(vectors[:n_trained], np.float32)
    # Fewer vectors than codewords have fewer codewords; FAISS takes powers of two.
    n_bits = min(int(np.log2(n_codewords)), max(1, int(np.log2(len(trained)))))
    rotation: NDArray[np.float32] | None = None
    if rotated:
        transform = faiss.OPQMatrix(dim, n_chunks)
        transform.pq = quantizer = faiss.ProductQuantizer(dim, n_chunks, n_bits)
        quantizer.cp.seed, quantizer.cp.min_points_per_centroid = seed, 1
        transform.train(trained)
        matrix = faiss.vector_to_array(transform.A).reshape(dim, dim)
        rotation = matrix.astype(np.float16).astype(np.float32)
        vectors, trained = vectors @ rotation.T, np.ascontiguousarray(trained @ rotation.T)
    quantizer = faiss.ProductQuantizer(dim, n_chunks, n_bits)
    quantizer.cp.seed, quantizer.cp.min_points_per_centroid = seed, 1
    quantizer.train(trained)
    books = faiss.vector_to_array(quantizer.centroids).reshape(n_chunks, 2**n_bits, dim // n_chunks)
    books = books.astype(np.float16).astype(np.float32)
    return VectorCodes(encode(vectors, books), books, n_chunks, rotation)


def encode(vectors: NDArray[np.float32], codebooks: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The nearest codeword of every chunk, uint8, shape (n, n_chunks); ties go to the lower number."""
    n_chunks, _, length = codebooks.shape
    codes = np.empty((len(vectors), n_chunks), np.uint8)
    for chunk, book in enumerate(codebooks):
        # |v - c|^2 without the |v|^2 that all codewords have in common.
        own = np.square(book).sum(axis=1)
        for start in range(0, len(vectors), _BLOCK):
            part = vectors[start : start + _BLOCK, chunk * length : (chunk + 1) * length]
            codes[start : start + _BLOCK, chunk] = (own - 2 * part @ book.T).argmin(axis=1)
    return codes


def kmeans(
    vectors: NDArray[np.float32], n_clusters: int, *, seed: int, n_iterations: int = 10
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Centroids, float32, shape (n_clusters, dim), and the cluster of every vector, int32, shape (n,).

    With no more vectors than clusters, each has its own and the other centroids are zeros.

    Raises:
        ArgumentError: FAISS is not installed.
    """
    vectors = np.ascontiguousarray(vectors, np.float32)
    if len(vectors) <= n_clusters:
        centroids = np.zeros((n_clusters, vectors.shape[1]), np.float32)
        centroids[: len(vectors)] = vectors
        return centroids, np.arange(len(vectors), dtype=np.int32)
    clusters = import_faiss().Kmeans(
        vectors.shape[1], n_clusters, niter=n_iterations, seed=seed, min_points_per_centroid=1
    )
    clusters.train(vectors)
    labels = clusters.index.search(vectors, 1)[1][:, 0]
    return np.asarray(clusters.centroids, np.float32), labels.astype(np.int32)


def import_faiss() -> ModuleType:
    """The package ``faiss-cpu``.

    Raises:
        ArgumentError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ArgumentError("k-means needs FAISS; install it with: pip install 'graphhash[bench]'") from error
    return faiss
