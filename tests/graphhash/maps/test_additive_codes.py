"""Additive codes: codes, codewords, and the embeddings that read them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from graphhash.errors import ArgumentError
from graphhash.maps import _kernels
from graphhash.maps.additive_codes import additive_codes, balancing_rotation, encode, fit_codewords
from graphhash.maps.quantization import rounded
from graphhash.maps.vector_codes import MAX_CODEWORDS, VectorCodes
from graphhash.nn.codes import CodeEmbedding


def test_sums_of_codewords_are_found_again():
    rng = np.random.default_rng(0)
    # Books of so different lengths that the nearest codeword of each in turn is the right one.
    codewords = (rng.normal(size=(3, MAX_CODEWORDS, 8)) * np.array([100, 1, 0.01])[:, None, None]).astype(np.float32)
    codes = rng.integers(0, MAX_CODEWORDS, (500, 3)).astype(np.uint8)
    vectors = codewords[np.arange(3), codes].sum(1)
    found = encode(vectors, codewords)
    assert_allclose(codewords[np.arange(3), found].sum(1), vectors, atol=1e-3)
    assert np.mean(found[:, :2] == codes[:, :2]) > 0.99


def test_a_wide_beam_is_exhaustive():
    rng = np.random.default_rng(1)
    words = rng.normal(size=(2, MAX_CODEWORDS, 3)).astype(np.float32)
    vectors = rng.normal(size=(4, 3)).astype(np.float32)
    codes = encode(vectors, words, beam=MAX_CODEWORDS)
    sums = words[0][:, None] + words[1][None]
    for vector, (first, second) in zip(vectors, codes, strict=True):
        errors = ((sums - vector) ** 2).sum(2)
        assert errors[first, second] == pytest.approx(errors.min(), rel=1e-4, abs=1e-6)


def test_the_smallest_values_are_found_in_order_with_ties_to_the_lower_place():
    values = np.random.default_rng(6).integers(0, 5, (20, 30)).astype(np.float32)
    places = np.empty((20, 7), np.int64)
    _kernels.smallest(values, places)
    assert_array_equal(places, np.argsort(values, axis=1, kind="stable")[:, :7])


def test_codewords_solve_least_squares():
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(400, 5)).astype(np.float32)
    codes = rng.integers(0, 4, (400, 2)).astype(np.uint8)
    words = fit_codewords(vectors, codes)
    reads = np.zeros((400, 8))
    reads[np.arange(400), codes[:, 0]] = reads[np.arange(400), 4 + codes[:, 1]] = 1
    fitted = reads @ np.linalg.lstsq(reads, vectors, rcond=None)[0]
    assert_allclose(words[0][codes[:, 0]] + words[1][codes[:, 1]], fitted, atol=1e-3)
    weights = rng.uniform(0.1, 5, 400)
    roots = np.sqrt(weights)[:, None]
    fitted = reads @ np.linalg.lstsq(roots * reads, roots * vectors, rcond=None)[0]
    weighted = fit_codewords(vectors, codes, weights)
    assert_allclose(weighted[0][codes[:, 0]] + weighted[1][codes[:, 1]], fitted, atol=2e-3)
    # A million vectors that nearly all have the same codes leave the equations solvable: sums of float32 do not.
    many = np.zeros((1_000_000, 2), np.uint8)
    many[:1000] = rng.integers(0, 4, (1000, 2))
    targets = rng.normal(1, 0.1, (1_000_000, 1)).astype(np.float32)
    means = fit_codewords(targets, many, rng.pareto(1.2, 1_000_000) + 0.3)
    assert_allclose(means[0][0] + means[1][0], 1, atol=0.01)
    # Nobody reads the others.
    assert not words[:, 4:].any()


def test_more_codes_and_rounds_leave_smaller_errors():
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(2000, 16)).astype(np.float32)

    def error(n_codes: int, rounds: int) -> float:
        return float(((additive_codes(vectors, n_codes, rounds=rounds).decoded() - vectors) ** 2).sum(1).mean())

    errors = [error(1, 0), error(2, 0), error(4, 0)]
    assert errors == sorted(errors, reverse=True)
    assert error(4, 2) < errors[2]


def test_the_same_seed_gives_the_same_codes():
    vectors = np.random.default_rng(4).normal(size=(300, 4)).astype(np.float32)
    first, second = (additive_codes(vectors, 2, seed=7) for _ in range(2))
    assert_array_equal(first.codes, second.codes)
    assert_array_equal(first.codebooks, second.codebooks)


def test_vectors_of_more_weight_have_smaller_errors():
    vectors = np.random.default_rng(9).normal(size=(3000, 8)).astype(np.float32)
    heavy = np.arange(3000) < 500

    def errors(weights):
        squares = np.square(additive_codes(vectors, 2, weights=weights).decoded() - vectors).sum(1)
        return squares[heavy].mean(), squares[~heavy].mean()

    equal, weighted = errors(np.full(3000, 7.0)), errors(np.where(heavy, 20.0, 1.0))
    assert equal == errors(None)
    assert weighted[0] < 0.8 * equal[0]
    assert weighted[1] > equal[1]


def test_groups_are_codes_of_their_own_dimensions():
    vectors = np.random.default_rng(5).normal(size=(600, 12)).astype(np.float32)
    found = additive_codes(vectors, 6, n_groups=3)
    assert found.shape == vectors.shape
    assert found.codebooks.shape == (6, MAX_CODEWORDS, 4)
    rotated, decoded = vectors @ found.rotation.T, replace(found, rotation=None).decoded()
    assert_allclose(found.decoded(), decoded @ found.rotation, rtol=1e-6)
    for group in range(3):
        books, dims = slice(2 * group, 2 * group + 2), slice(4 * group, 4 * group + 4)
        sums = found.codebooks[books][np.arange(2), found.codes[:, books]].sum(1)
        assert_allclose(decoded[:, dims], sums, rtol=1e-6)
        assert_array_equal(encode(rotated[:, dims], found.codebooks[books]), found.codes[:, books])
    # Groups of one code have their nearest codewords, as in product quantization.
    single = additive_codes(vectors, 4, n_groups=4)
    distances = (((vectors @ single.rotation.T)[:, None, :3] - single.codebooks[0][None]) ** 2).sum(2)
    assert_array_equal(distances.argmin(1), single.codes[:, 0])


def test_the_rotation_gives_all_groups_as_much_to_describe():
    rng = np.random.default_rng(8)
    spread = np.diag(0.5 ** np.arange(12)).astype(np.float32)
    hidden = np.linalg.qr(rng.normal(size=(12, 12)))[0].astype(np.float32)
    vectors = rng.normal(size=(5000, 12)).astype(np.float32) @ spread @ hidden
    rotation = balancing_rotation(vectors, 3)
    assert_allclose(rotation @ rotation.T, np.eye(12), atol=2e-3)
    rotated = vectors @ rotation.T
    # The dimensions are the hidden ones, uncorrelated, and the twelve are dealt so that the groups' volumes differ by little.
    assert_allclose(np.corrcoef(rotated.T), np.eye(12), atol=0.15)
    logs = np.log2(np.square(rotated).mean(0)).reshape(3, 4).sum(1)
    assert (
        np.ptp(logs) < 5
    )  # Without a rotation: the first four dimensions have 2^64 times the volume of the last four.
    # Correlated vectors lose less with it than without it.
    alone = [additive_codes(np.ascontiguousarray(part), 2) for part in np.split(vectors, 3, axis=1)]
    loss = np.square(np.concatenate([codes.decoded() for codes in alone], axis=1) - vectors).sum()
    assert np.square(additive_codes(vectors, 6, n_groups=3).decoded() - vectors).sum() < 0.8 * loss
    # Vectors that are all zeros have a rotation, too.
    assert np.isfinite(balancing_rotation(np.zeros((3, 4), np.float32), 2)).all()


def test_more_groups_of_as_many_codes_leave_smaller_errors_and_codewords_are_rounded_first():
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(3000, 16)).astype(np.float32)
    errors = [float(((additive_codes(vectors, n, n_groups=n // 2).decoded() - vectors) ** 2).sum()) for n in (2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    for precision in ("int8", "int4"):
        books = additive_codes(vectors, 2, precision=precision).codebooks.reshape(-1, 16)
        assert_allclose(rounded(books, precision), books, rtol=1e-6, atol=1e-7)


def test_embeddings_read_the_sums_of_codewords_that_both_sides_share():
    rng = np.random.default_rng(5)
    books = rng.normal(size=(4, MAX_CODEWORDS, 3)).astype(np.float32)
    codes = [rng.integers(0, MAX_CODEWORDS, (n, 4)).astype(np.uint8) for n in (12, 8)]
    sizes = {"n_codes": 4, "n_codewords": MAX_CODEWORDS, "n_groups": 2, "precision": "int8"}
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0].astype(np.float32)
    users = CodeEmbedding(11, 6, **sizes, rotated=True)
    items = CodeEmbedding(7, 6, **sizes, shared_with=users)
    for embedding, of_side in ((users, codes[0]), (items, codes[1])):
        embedding.set_codes(VectorCodes(of_side, books, 2, rotation, shared=True))
        first, second = (books[part][np.arange(2), of_side[:, part]].sum(1) for part in (slice(0, 2), slice(2, 4)))
        sums = np.concatenate([first, second], axis=1) @ rotation
        assert_allclose(embedding(torch.arange(len(of_side))).detach().numpy(), sums, rtol=1e-5, atol=1e-6)
        assert_allclose(embedding.vector_codes().decoded(), sums, rtol=1e-5, atol=1e-6)
        frequencies = torch.zeros(embedding.n_ids)
        frequencies[3] = 2.0
        embedding.fill_oov(frequencies)
        oov = embedding(torch.tensor([embedding.n_ids])).detach().numpy()[0]
        # The mean of a single id is its vector, whose codes are found again where the beam finds them.
        assert ((oov - sums[3]) ** 2).sum() < 0.5 * (sums[3] ** 2).sum()
    # A byte per code; codebooks and rotation count once.
    assert [e.map_bytes for e in (users, items)] == [12 * 4, 8 * 4]
    for of_users, of_items in zip(users.stored_tables("float32"), items.stored_tables("float32"), strict=True):
        assert of_users.table is of_items.table
    assert users.stored_tables("float32")[0].n_bytes == 4 * MAX_CODEWORDS * (3 + 2)


def test_embeddings_refuse_codes_that_they_cannot_read():
    sizes = {"n_codes": 4, "n_codewords": MAX_CODEWORDS, "n_groups": 2}
    users = CodeEmbedding(3, 6, **sizes, rotated=True)
    books, codes = np.zeros((4, MAX_CODEWORDS, 3), np.float32), np.zeros((4, 4), np.uint8)
    with pytest.raises(ArgumentError, match="rotated=True"):
        users.set_codes(VectorCodes(codes, books, 2))
    with pytest.raises(ArgumentError, match="a code is a byte"):
        CodeEmbedding(3, 6, **sizes | {"n_codewords": 257})
    with pytest.raises(ArgumentError, match="of what is shared"):
        CodeEmbedding(3, 8, **sizes, shared_with=users)


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_codes": 0},
        {"n_codes": 1, "beam": 0},
        {"n_codes": 1, "rounds": -1},
        {"n_codes": 3, "n_groups": 2},
        {"n_codes": 1, "weights": np.zeros(3)},
        {"n_codes": 1, "weights": np.ones(2)},
    ],
)
def test_wrong_sizes_are_refused(wrong):
    with pytest.raises(ArgumentError, match=r"at least|must divide|must be positive"):
        additive_codes(np.zeros((3, 2), np.float32), **wrong)


def test_what_is_not_finite_is_refused():
    with pytest.raises(ArgumentError, match="finite"):
        additive_codes(np.full((3, 2), np.nan, np.float32), 1)
