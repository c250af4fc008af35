"""Product quantization: codes are the nearest codewords, and more of them are nearer."""

from __future__ import annotations

import numpy as np
import pytest

from graphhash.errors import ArgumentError
from graphhash.maps.product import encode, kmeans, product_quantize

faiss = pytest.importorskip("faiss")


def some_vectors(n=2000, dim=16):
    rng = np.random.default_rng(0)
    # Correlated numbers, from which a rotation has something to gain.
    return (rng.standard_normal((n, 5)) @ rng.standard_normal((5, dim))).astype(np.float32)


def error_of(vectors, codes):
    return float(np.square(vectors - codes.decoded()).sum() / np.square(vectors).sum())


def test_every_chunk_gets_its_nearest_codeword():
    vectors = some_vectors(300)
    codes = product_quantize(vectors, 4, seed=0)
    assert codes.codes.dtype == np.uint8
    assert codes.shape == vectors.shape
    for chunk in range(4):
        part = vectors[:, 4 * chunk : 4 * chunk + 4]
        distances = np.square(part[:, None] - codes.codebooks[chunk][None]).sum(-1)
        chosen = distances[np.arange(300), codes.codes[:, chunk]]
        np.testing.assert_allclose(chosen, distances.min(1), rtol=1e-3, atol=1e-3)


def test_more_codes_and_a_rotation_lose_less():
    vectors = some_vectors()
    errors = [error_of(vectors, product_quantize(vectors, n, seed=0)) for n in (2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    rotated = product_quantize(vectors, 4, rotated=True, seed=0)
    assert error_of(vectors, rotated) < errors[1]
    np.testing.assert_allclose(rotated.rotation @ rotated.rotation.T, np.eye(16), atol=2e-2)


def test_the_same_seed_makes_the_same_codes_and_few_vectors_have_few_codewords():
    vectors = some_vectors(20)
    one, two = (product_quantize(vectors, 2, seed=5) for _ in range(2))
    assert np.array_equal(one.codes, two.codes)
    assert one.codebooks.shape == (2, 16, 8)


def test_codebooks_read_the_same_from_float16():
    books = product_quantize(some_vectors(), 4, seed=0).codebooks
    assert np.array_equal(books.astype(np.float16).astype(np.float32), books)


def test_ties_go_to_the_lower_codeword():
    assert encode(np.zeros((1, 2), np.float32), np.array([[[1, 0], [0, 1]]], np.float32)).tolist() == [[0]]


def test_kmeans_finds_blocks_and_leaves_few_vectors_alone():
    rng = np.random.default_rng(1)
    centers = np.array([[0, 0], [10, 0], [0, 10]], np.float32)
    labels = rng.integers(0, 3, 90)
    centroids, found = kmeans(centers[labels] + rng.normal(0, 0.1, (90, 2)).astype(np.float32), 3, seed=0)
    assert all(len(np.unique(found[labels == c])) == 1 for c in range(3))
    assert np.abs(centroids[found] - centers[labels]).max() < 0.2
    centroids, found = kmeans(centers, 5, seed=0)
    assert found.tolist() == [0, 1, 2]
    assert np.array_equal(centroids[:3], centers)


def test_codes_that_do_not_divide_the_dim_are_refused():
    with pytest.raises(ArgumentError, match="3 codes per vector do not divide its 16 numbers"):
        product_quantize(some_vectors(), 3, seed=0)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ArgumentError, match=r"pip install 'graphhash\[bench\]'"):
        product_quantize(some_vectors(), 4, seed=0)
