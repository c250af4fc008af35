"""Tables in 8 or 4 bits: whole numbers and one float16 scale per row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from graphhash.errors import ArgumentError

# The largest code of each precision; the least is its negative.
STEPS = {"int8": 127, "int4": 7}
SMALLEST = np.float16(6e-8)  # The least positive float16, so that no row divides by zero.
# Items whose biases share a scale. Gowalla, `full_soft`, test recall@20 of 8,000 users: .21831 in float32, .21817 in int8 with a scale per
# 64 items, .21770 with one scale.
BIAS_BLOCK = 64
# With so few steps it pays to cut a row's largest values off: shares of the largest value that get the largest code. The one of least
# squared error is taken, row by row.
CUTS = {"int8": (1.0,), "int4": (1.0, 0.92, 0.84, 0.76, 0.68, 0.6)}


def quantize_rows(table: NDArray[np.float32], precision: str = "int8") -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Codes, int8, shape (n_rows, dim), from -127 to 127 or from -7 to 7, and scales, float16, shape (n_rows, 1).

    In 8 bits a row's largest value gets code 127, and a value moves by at most 0.6 of its row's scale: half a step of rounding, and
    what the scale's own rounding clips. In 4 bits the scale is the one of CUTS with the least squared error.

    Args:
        precision: "int8" or "int4".

    Raises:
        ArgumentError: a value is not finite, or its row's scale is too large for float16.
    """
    if not np.isfinite(table).all():
        raise ArgumentError(f"{table[~np.isfinite(table)].flat[0]}, which is not finite")
    steps = STEPS[precision]
    largest = np.abs(table).max(axis=1, keepdims=True, initial=0)
    best: tuple[NDArray[np.int8], NDArray[np.float16], NDArray[np.float32]] | None = None
    for cut in CUTS[precision]:
        with np.errstate(over="ignore"):
            scales = np.maximum((cut * largest / steps).astype(np.float16), SMALLEST)
        if not np.isfinite(scales).all():
            raise ArgumentError(f"{largest.max()}, whose scale is not finite in float16")
        codes = np.clip(np.rint(table / scales.astype(np.float32)), -steps, steps).astype(np.int8)
        errors = np.square(dequantize_rows(codes, scales) - table).sum(axis=1, keepdims=True)
        if best is None:
            best = codes, scales, errors
        else:
            better = errors < best[2]
            best = (
                np.where(better, codes, best[0]),
                np.where(better, scales, best[1]),
                np.where(better, errors, best[2]),
            )
    assert best is not None
    return best[0], best[1]


def dequantize_rows(codes: NDArray[np.int8], scales: NDArray[np.float16]) -> NDArray[np.float32]:
    """The values that :func:`quantize_rows` stored, float32, shape (n_rows, dim)."""
    return codes.astype(np.float32) * scales.astype(np.float32)


def pack_nibbles(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Codes from -8 to 7, two to a byte, shape (n_rows, ceil(dim / 2)): each plus 8, the first half of a row in the low four bits.

    A row of odd length has a 0 at its end.
    """
    shifted = (codes + np.int8(8)).astype(np.uint8)
    half = (shifted.shape[1] + 1) // 2
    high = np.full((len(codes), half), 8, np.uint8)
    high[:, : shifted.shape[1] - half] = shifted[:, half:]
    return shifted[:, :half] | (high << np.uint8(4))


def rounded(table: NDArray[np.float32], precision: str) -> NDArray[np.float32]:
    """``table`` as it reads once stored in ``precision``: "float32", "float16", "int8" or "int4".

    Raises:
        ArgumentError: as :func:`quantize_rows`.
    """
    if precision in STEPS:
        return dequantize_rows(*quantize_rows(table, precision))
    return table.astype(precision).astype(np.float32)


def bias_dtype(precision: str) -> str:
    """Type of the stored scalar of an id of a CTR column: float32 beside float32 tables, else float16."""
    return "float32" if precision == "float32" else "float16"


def bias_blocks(bias: NDArray[np.float32]) -> NDArray[np.float32]:
    """An item bias, shape (n_items,), as the rows that are quantized beside tables of 8 or 4 bits, shape (n_blocks, BIAS_BLOCK); zeros
    fill the last one."""
    n_blocks = -(-len(bias) // BIAS_BLOCK)
    return np.pad(bias, (0, n_blocks * BIAS_BLOCK - len(bias))).reshape(n_blocks, BIAS_BLOCK)


def rounded_bias(bias: NDArray[np.float32], precision: str) -> NDArray[np.float32]:
    """An item bias as it reads once stored beside tables in ``precision``: in the type of float tables, and in int8 beside those of 8 or
    4 bits, with a float16 scale per BIAS_BLOCK items; float32, shape (n_items,).

    Raises:
        ArgumentError: as :func:`quantize_rows`.
    """
    if precision in STEPS:
        return rounded(bias_blocks(bias), "int8").ravel()[: len(bias)]
    return rounded(bias, precision)


def bias_bytes(n_items: int, precision: str) -> int:
    """Bytes of a stored item bias."""
    if precision in STEPS:
        return -(-n_items // BIAS_BLOCK) * row_bytes(BIAS_BLOCK, "int8")
    return n_items * np.dtype(precision).itemsize


def row_bytes(dim: int, precision: str) -> int:
    """Bytes of one stored table row."""
    if precision in STEPS:
        return (dim if precision == "int8" else (dim + 1) // 2) + SMALLEST.itemsize
    return dim * np.dtype(precision).itemsize
