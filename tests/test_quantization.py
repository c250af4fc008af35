"""8-bit tables: exact where they can be, within the stated error elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from graphhash.quantization import dequantize_rows, quantize_rows, rounded, row_bytes


def test_multiples_of_a_power_of_two_come_back_exactly():
    table = np.array([[127, -3, 0], [-254, 2, 128], [0, 0, 0]], np.float32) / 8
    codes, scales = quantize_rows(table)
    assert codes.tolist() == [[127, -3, 0], [-127, 1, 64], [0, 0, 0]]
    np.testing.assert_array_equal(dequantize_rows(codes, scales), table)


def test_the_error_is_within_a_step():
    table = (
        np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
        * np.logspace(-3, 3, 300, dtype=np.float32)[:, None]
    )
    codes, scales = quantize_rows(table)
    assert (np.abs(dequantize_rows(codes, scales) - table) <= 0.6 * scales.astype(np.float32)).all()
    np.testing.assert_array_equal(rounded(table, "int8"), dequantize_rows(codes, scales))
    assert codes.nbytes + scales.nbytes == 300 * row_bytes(16, "int8")


def test_bytes_of_a_row():
    assert [row_bytes(64, p) for p in ("float32", "float16", "int8")] == [256, 128, 66]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e9])
def test_what_does_not_fit_is_refused(value):
    with pytest.raises(ValueError, match="not finite"):
        quantize_rows(np.full((1, 2), value, np.float32))
