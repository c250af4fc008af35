"""Sizes of method `residual` at a number of bytes: rows, indices per id, dim, and numbers of an id's own.

The rules follow measurements on Gowalla (softmax, random split, share of the bytes of full tables of dim 64, recall@20 in float32):
10 indices, 16,000 rows, dim 128, 16 own numbers at 21.6 % .2124; 10, 19,639, 64, 16 at 20 % .2088; 4, 8,000, 128, 16 at 14.3 % .1964;
4, 6,000, 64, 8 at 8 % .1767.

1. Own numbers are the most of OWN_NUMBERS that take no more than OWN_SHARE of the bytes.
2. The dim is twice ``train.dim`` with the most own numbers, else ``train.dim``.
3. Indices take MAP_SHARE of the rest, and what rows beyond ROWS_PER_ID would take.
4. Rows take what is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from graphhash.maps.quantization import row_bytes
from graphhash.nn.residual import own_precision, projection_precision
from pipeline.config.run_config import MapConfig
from pipeline.maps.methods import METHODS
from pipeline.maps.sizes import SizeBudget, too_small

# Numbers of an id's own and their bits, from the most bytes to the fewest.
OWN_NUMBERS = ((16, 8), (16, 4), (8, 4), (4, 4), (2, 4))
OWN_SHARE = 0.45
# Share of the map in what own numbers leave, for a table of twice the dim and of the dim.
MAP_SHARE = {2: 0.6, 1: 0.8}
ROWS_PER_ID = 0.4
MOST_INDICES = 32
# A row per side, and one row for OOV ids each.
LEAST_ROWS, OOV_ROWS = 2, 2


@dataclass(frozen=True)
class ResidualSizes:
    """What method `residual` is made with.

    Args:
        indices_per_id: table rows read per id.
        dim: length of a vector.
        own_dim, own_bits: numbers of an id's own, and the bits of each.
        n_rows: of the table that fit, without those of OOV ids.
    """

    indices_per_id: int
    dim: int
    own_dim: int
    own_bits: int
    n_rows: int


def default_sizes(dim: int, settings: MapConfig) -> ResidualSizes:
    """Where the budget is none of bytes."""
    own_dim, own_bits = OWN_NUMBERS[0]
    return ResidualSizes(
        indices_per_id=METHODS["residual"].resolve_indices(settings.indices_per_id),
        dim=settings.residual_dim or dim,
        own_dim=settings.own_dim or own_dim,
        own_bits=settings.own_bits or own_bits,
        n_rows=0,
    )


def residual_sizes(budget: SizeBudget, settings: MapConfig) -> ResidualSizes:
    """The sizes within a budget, by the rules at the head of this module; those that are set stay.

    Raises:
        DataError: no sizes fit; the message says how large the budget must be.
    """
    least = 0
    for own_dim, own_bits, factor in _own_numbers(budget, settings):
        dim = settings.residual_dim or factor * budget.dim
        row = row_bytes(dim, budget.precision)
        rest = budget.n_bytes - _own_bytes(budget, own_dim, own_bits) - own_dim * dim * _projection_itemsize(budget)
        n_indices = settings.indices_per_id or _n_indices(budget, rest, MAP_SHARE[factor], row)
        n_rows = _n_rows(budget, rest, n_indices, row)
        if n_rows >= LEAST_ROWS:
            return ResidualSizes(n_indices, dim, own_dim, own_bits, n_rows)
        least = budget.n_bytes - rest + _map_bytes(budget, n_indices) + (LEAST_ROWS + OOV_ROWS) * row
    raise too_small("residual", budget, least)


def _own_numbers(budget: SizeBudget, settings: MapConfig) -> Iterator[tuple[int, int, int]]:
    """Own numbers to try, their bits, and the dim's factor, from the most bytes to the fewest."""
    for own_dim, own_bits in OWN_NUMBERS:
        chosen = settings.own_dim or own_dim, settings.own_bits or own_bits
        is_last = (own_dim, own_bits) == OWN_NUMBERS[-1]
        if is_last or _own_bytes(budget, *chosen) <= OWN_SHARE * budget.n_bytes:
            yield *chosen, 2 if chosen[0] >= OWN_NUMBERS[0][0] else 1


def _own_bytes(budget: SizeBudget, own_dim: int, own_bits: int) -> int:
    return budget.n_ids * row_bytes(own_dim, own_precision(budget.precision, own_bits))


def _projection_itemsize(budget: SizeBudget) -> int:
    return np.dtype(projection_precision(budget.precision)).itemsize


def _map_bytes(budget: SizeBudget, n_indices: int, itemsize: int = 2) -> int:
    return METHODS["residual"].map_bytes(n_indices, itemsize, *budget.sides)


def _n_rows(budget: SizeBudget, rest: int, n_indices: int, row: int) -> int:
    """Rows that fit beside the map; 16-bit row numbers do where the table does not outgrow them."""
    fitting = (rest - _map_bytes(budget, n_indices)) // row - OOV_ROWS
    if fitting + OOV_ROWS <= 2**16:
        return fitting
    return max(2**16 - OOV_ROWS, (rest - _map_bytes(budget, n_indices, 4)) // row - OOV_ROWS)


def _n_indices(budget: SizeBudget, rest: int, share: float, row: int) -> int:
    most = range(1, MOST_INDICES + 1)
    fitting = [1, *(n for n in most if _map_bytes(budget, n) <= share * rest)][-1]
    # Rows beyond these gain little, and the bytes go into indices.
    enough = [n for n in most if _n_rows(budget, rest, n, row) >= ROWS_PER_ID * budget.n_ids]
    return max([fitting, *enough[-1:]])
