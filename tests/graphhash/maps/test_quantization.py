"""8-bit and 4-bit tables: exact where they can be, within the stated error elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from graphhash.maps.quantization import (
    bias_bytes,
    dequantize_rows,
    pack_nibbles,
    quantize_rows,
    rounded,
    rounded_bias,
    row_bytes,
)


@pytest.mark.parametrize(("precision", "steps"), [("int8", 127), ("int4", 7)])
def test_multiples_of_a_power_of_two_come_back_exactly(precision, steps):
    table = np.array([[steps, -3, 0], [-2 * steps, 2, 6], [0, 0, 0]], np.float32) / 8
    codes, scales = quantize_rows(table, precision)
    assert codes.tolist() == [[steps, -3, 0], [-steps, 1, 3], [0, 0, 0]]
    np.testing.assert_array_equal(dequantize_rows(codes, scales), table)


@pytest.fixture
def table():
    scales = np.logspace(-3, 3, 300, dtype=np.float32)[:, None]
    return np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32) * scales


def test_the_error_is_within_a_step(table):
    codes, scales = quantize_rows(table)
    assert (np.abs(dequantize_rows(codes, scales) - table) <= 0.6 * scales.astype(np.float32)).all()
    np.testing.assert_array_equal(rounded(table, "int8"), dequantize_rows(codes, scales))
    assert codes.nbytes + scales.nbytes == 300 * row_bytes(16, "int8")


def test_four_bits_cut_off_what_costs_more_than_it_saves(table):
    read = rounded(table, "int4")
    scale = np.abs(table).max(axis=1, keepdims=True) / 7
    uncut = np.clip(np.rint(table / scale), -7, 7) * scale
    errors = [np.square(values - table).sum(axis=1) for values in (read, uncut)]
    # The scale is rounded to float16, which the other one is not.
    assert (errors[0] <= errors[1] + 1e-4 * np.square(table).sum(axis=1)).all()
    assert errors[0].sum() < 0.95 * errors[1].sum()


@pytest.mark.parametrize("dim", [1, 2, 7, 16])
def test_nibbles_hold_the_codes_in_two_halves(dim):
    codes = np.random.default_rng(dim).integers(-8, 8, (20, dim)).astype(np.int8)
    packed = pack_nibbles(codes)
    assert packed.dtype == np.uint8
    assert packed.nbytes + 2 * 20 == 20 * row_bytes(dim, "int4")
    halves = np.concatenate([packed % 16, packed // 16], axis=1).astype(np.int8) - 8
    np.testing.assert_array_equal(halves[:, :dim], codes)
    assert not halves[:, dim:].any()


def test_bytes_of_a_row():
    assert [row_bytes(64, p) for p in ("float32", "float16", "int8", "int4")] == [256, 128, 66, 34]


def test_a_bias_has_a_scale_per_64_items():
    bias = np.concatenate([np.full(64, 0.5), np.linspace(-2e-3, 1e-3, 40)]).astype(np.float32)
    np.testing.assert_array_equal(rounded_bias(bias, "float32"), bias)
    np.testing.assert_array_equal(rounded_bias(bias, "float16"), bias.astype(np.float16))
    for precision in ("int8", "int4"):
        read = rounded_bias(bias, precision)
        assert read.shape == bias.shape
        # Those of one block do not make those of another coarser.
        assert np.abs(read - bias)[64:].max() <= 0.6 * 2e-3 / 127
        np.testing.assert_array_equal(rounded_bias(read, precision), read)
        assert bias_bytes(len(bias), precision) == 2 * (64 + 2)
    assert [bias_bytes(104, p) for p in ("float32", "float16")] == [416, 208]


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e9])
def test_what_does_not_fit_is_refused(value, precision):
    with pytest.raises(ValueError, match="not finite"):
        quantize_rows(np.full((1, 2), value, np.float32), precision)
