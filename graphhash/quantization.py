"""Tables in 8 bits: whole numbers -127..127 and one float16 scale per row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

STEPS = 127
SMALLEST = np.float16(6e-8)  # The least positive float16, so that no row divides by zero.


def quantize_rows(table: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Codes, int8, shape (n_rows, dim), and scales, float16, shape (n_rows, 1): a row's largest value gets code 127.

    A value moves by at most 0.6 of its row's scale: half a step of rounding, and what the scale's own rounding clips.

    Raises:
        ValueError: a value is not finite, or its row's scale is too large for float16.
    """
    if not np.isfinite(table).all():
        raise ValueError(f"{table[~np.isfinite(table)].flat[0]}, which is not finite")
    largest = np.abs(table).max(axis=1, keepdims=True, initial=0)
    with np.errstate(over="ignore"):
        scales = np.maximum((largest / STEPS).astype(np.float16), SMALLEST)
    if not np.isfinite(scales).all():
        raise ValueError(f"{largest.max()}, whose scale is not finite in float16")
    codes = np.clip(np.rint(table / scales.astype(np.float32)), -STEPS, STEPS)
    return codes.astype(np.int8), scales


def dequantize_rows(codes: NDArray[np.int8], scales: NDArray[np.float16]) -> NDArray[np.float32]:
    """The values that :func:`quantize_rows` stored, float32, shape (n_rows, dim)."""
    return codes.astype(np.float32) * scales.astype(np.float32)


def rounded(table: NDArray[np.float32], precision: str) -> NDArray[np.float32]:
    """``table`` as it reads once stored in ``precision``: "float32", "float16" or "int8".

    Raises:
        ValueError: as :func:`quantize_rows`, for "int8".
    """
    if precision == "int8":
        return dequantize_rows(*quantize_rows(table))
    return table.astype(precision).astype(np.float32)


def bias_dtype(precision: str) -> str:
    """Type of the stored item bias: float32 beside float32 tables, else float16."""
    return "float32" if precision == "float32" else "float16"


def row_bytes(dim: int, precision: str) -> int:
    """Bytes of one stored table row."""
    return dim + SMALLEST.itemsize if precision == "int8" else dim * np.dtype(precision).itemsize
