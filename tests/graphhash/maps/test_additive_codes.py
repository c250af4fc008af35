"""Additive codes: codes, codewords, and the maps that read them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from graphhash.errors import ArgumentError
from graphhash.maps import _kernels
from graphhash.maps.additive_codes import (
    N_CODEWORDS,
    additive_codes,
    code_maps,
    codeword_table,
    encode,
    fit_codewords,
)
from graphhash.maps.bucket_map import BLOCK_ROWS, BucketMap
from graphhash.nn.embedding import BucketEmbedding


def test_sums_of_codewords_are_found_again():
    rng = np.random.default_rng(0)
    # Books of so different lengths that the nearest codeword of each in turn is the right one.
    codewords = (rng.normal(size=(3, N_CODEWORDS, 8)) * np.array([100, 1, 0.01])[:, None, None]).astype(np.float32)
    codes = rng.integers(0, N_CODEWORDS, (500, 3)).astype(np.uint8)
    vectors = codewords[np.arange(3), codes].sum(1)
    found = encode(vectors, codewords)
    assert_allclose(codewords[np.arange(3), found].sum(1), vectors, atol=1e-3)
    assert np.mean(found[:, :2] == codes[:, :2]) > 0.99


def test_a_wide_beam_is_exhaustive():
    rng = np.random.default_rng(1)
    words = rng.normal(size=(2, N_CODEWORDS, 3)).astype(np.float32)
    vectors = rng.normal(size=(4, 3)).astype(np.float32)
    codes = encode(vectors, words, beam=N_CODEWORDS)
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
    # Nobody reads the others.
    assert not words[:, 4:].any()


def test_more_codes_and_rounds_leave_smaller_errors():
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(2000, 16)).astype(np.float32)

    def error(n_codes: int, rounds: int) -> float:
        return float(((additive_codes(vectors, n_codes, rounds=rounds).decode() - vectors) ** 2).sum(1).mean())

    errors = [error(1, 0), error(2, 0), error(4, 0)]
    assert errors == sorted(errors, reverse=True)
    assert error(4, 2) < errors[2]


def test_the_same_seed_gives_the_same_codes():
    vectors = np.random.default_rng(4).normal(size=(300, 4)).astype(np.float32)
    first, second = (additive_codes(vectors, 2, seed=7) for _ in range(2))
    assert_array_equal(first.codes, second.codes)
    assert_array_equal(first.codewords, second.codewords)


def test_maps_read_the_sums_of_codewords(tmp_path):
    rng = np.random.default_rng(5)
    codewords = rng.normal(size=(3, N_CODEWORDS, 6)).astype(np.float32)
    codes = [rng.integers(0, N_CODEWORDS, (n, 3)).astype(np.uint8) for n in (11, 7)]
    maps = code_maps(*codes)
    users = BucketEmbedding(maps[0], 6)
    items = BucketEmbedding(maps[1], 6, table=users.table)
    with torch.no_grad():
        users.table.copy_(torch.from_numpy(codeword_table(codewords)))
    for embedding, of_side, frequencies in zip((users, items), codes, (torch.ones(11), torch.ones(7)), strict=True):
        sums = codewords[np.arange(3), of_side].sum(1)
        assert_allclose(embedding.all().detach().numpy(), sums, rtol=1e-5, atol=1e-6)
        embedding.fill_oov(frequencies)
        oov = embedding(torch.tensor([embedding.n_ids])).detach().numpy()[0]
        assert_allclose(oov, sums.mean(0), rtol=1e-4, atol=1e-5)
    # A byte per code, and neither weights nor codebook rows.
    assert [m.nbytes for m in maps] == [12 * 3, 8 * 3]
    maps[0].save(tmp_path / "users.npz")
    loaded = BucketMap.load(tmp_path / "users.npz")
    assert_array_equal(loaded.rows, maps[0].rows)
    assert loaded.content_hash == maps[0].content_hash


@pytest.mark.parametrize("wrong", [{"n_codes": 0}, {"n_codes": 1, "beam": 0}, {"n_codes": 1, "rounds": -1}])
def test_wrong_sizes_are_refused(wrong):
    with pytest.raises(ArgumentError, match="at least"):
        additive_codes(np.zeros((3, 2), np.float32), **wrong)


def test_what_is_not_finite_is_refused():
    with pytest.raises(ArgumentError, match="finite"):
        additive_codes(np.full((3, 2), np.nan, np.float32), 1)


def test_rows_outside_of_their_blocks_are_refused():
    good = code_maps(*[np.zeros((2, 2), np.uint8)] * 2)[0].rows
    for place, value in itertools.chain([((0, 1), 0)], [((0, 0), N_CODEWORDS)], [((-1, 1), BLOCK_ROWS)]):
        rows = good.copy()
        rows[place] = value
        with pytest.raises(ArgumentError, match="block"):
            BucketMap(rows, 2 * BLOCK_ROWS, "additive", shared=True)
