"""A share of the full bytes allows exactly as many rows as fit, in every precision."""

from __future__ import annotations

import pytest

from graphhash.errors import DataError
from graphhash.quantization import row_bytes
from pipeline.budget import full_bytes, rows_for_ratio
from pipeline.config import RunConfig

USERS, ITEMS, DIM = 29_858, 40_981, 64


def config(precision, n_lookups):
    return RunConfig.load(None, [f"export.precision={precision}", f"map.n_lookups={n_lookups}", f"train.dim={DIM}"])


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
@pytest.mark.parametrize("n_lookups", [4, 8])
def test_one_row_more_would_not_fit(precision, n_lookups):
    rows = rows_for_ratio(config(precision, n_lookups), 0.25, USERS, ITEMS)
    # Soft: a 16-bit row and an 8-bit weight per lookup, for every id and the unknown one of each side; a float32 bias per item.
    beside = 3 * n_lookups * (USERS + ITEMS + 2) + 4 * ITEMS
    allowed = 0.25 * full_bytes(USERS, ITEMS, DIM)
    assert rows <= 2**16
    assert beside + rows * row_bytes(DIM, precision) <= allowed < beside + (rows + 1) * row_bytes(DIM, precision)


def test_more_rows_than_16_bits_count_take_32_bits():
    users, items = 10 * USERS, 10 * ITEMS
    rows = rows_for_ratio(config("int8", 8), 0.25, users, items)
    assert rows > 2**16
    beside = 5 * 8 * (users + items + 2) + 4 * items
    allowed = 0.25 * full_bytes(users, items, DIM)
    assert beside + rows * row_bytes(DIM, "int8") <= allowed < beside + (rows + 1) * row_bytes(DIM, "int8")


def test_a_ratio_that_the_maps_alone_exceed_is_refused():
    with pytest.raises(DataError, match="maps of method 'soft' alone take 15.0%"):
        rows_for_ratio(config("int8", 12), 0.1, USERS, ITEMS)
