"""Sizes of embeddings that are no bucket map, and of a smaller dim, at a number of bytes.

Retrieval sizes both embeddings of a model together, CTR every column by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from graphhash.errors import DataError
from graphhash.maps.embedding_spec import EmbeddingSpec
from graphhash.maps.quantization import row_bytes
from graphhash.maps.vector_codes import MAX_CODEWORDS
from pipeline.config.run_config import MapConfig

# CCE: chunks of a vector, as in the paper, while the assignments take at most this share of the bytes; clusterings of a training.
CCE_CHUNKS, CCE_MAP_SHARE, CCE_CLUSTERINGS = (4, 2, 1), 0.5, 4
# CAFE: the share of the bytes that exclusive rows and the numbers of their ids take, as in the paper; steps between migrations.
CAFE_HOT_SHARE, CAFE_STEPS = 0.7, 64
# Additive codes: at most so many together in a group. Gowalla, 16 codes: 2 groups of 8 leave a squared error of .058, 1 of 16 .060, because
# the beam search does not find the best of so many.
CODES_PER_GROUP = 8
# More codes are better than more precise codewords. Gowalla, vectors of `full_soft`, validation recall: 14 codes in int8 .1913, 15 in int4
# .1933 (in one group), 16 in int4 .1964. MovieLens-1M, vectors of full tables, squared error at 12.5 % of the bytes: 24 codes with int4
# codewords .007, 20 with int8 .009, 16 .014; at 7 % 12 codes .038, 10 .048, 8 .054.
CODEWORD_BITS = (8, 4)
# ROBE: numbers read in one piece.
ROBE_BLOCK = 16
# Product codes: codewords of a codebook, of which as many as fit are taken where not even one code per id fits beside the most.
CODEWORDS = (MAX_CODEWORDS, 128, 64, 32, 16)
# DHE: hidden layers. There are as many hashes as units of a layer.
DHE_LAYERS = 2


@dataclass(frozen=True)
class SizeBudget:
    """Bytes that both embeddings of a model may take together, or that one may take.

    Args:
        n_bytes: of everything that they store.
        n_users, n_items: ids of each; ``n_items`` is None for one embedding alone, whose sizes are named as those of users.
        dim: length of a full vector.
        precision: of the stored tables.
    """

    n_bytes: int
    n_users: int
    n_items: int | None
    dim: int
    precision: str

    @property
    def sides(self) -> tuple[int, ...]:
        """Ids of every embedding."""
        return (self.n_users,) if self.n_items is None else (self.n_users, self.n_items)

    @property
    def n_ids(self) -> int:
        """Of all embeddings, OOV ids among them."""
        return sum(self.sides) + len(self.sides)


Sizes = dict[str, int]


def small_dim(budget: SizeBudget) -> int:
    """The largest dim at which a row for every id fits.

    Raises:
        DataError: not even a single number does.
    """
    fitting = [
        dim for dim in range(1, budget.dim + 1) if budget.n_ids * row_bytes(dim, budget.precision) <= budget.n_bytes
    ]
    if not fitting:
        raise too_small("full_small_dim", budget, budget.n_ids * row_bytes(1, budget.precision))
    return fitting[-1]


def embedding_spec(method: str, kind: str, budget: SizeBudget, settings: MapConfig) -> EmbeddingSpec:
    """Kind and sizes of a method's embeddings.

    Raises:
        DataError: the budget is too small for them, and the message says how large it must be.
    """
    return EmbeddingSpec(kind, SIZES[kind](method, budget, settings), settings.seed)


def _product(method: str, budget: SizeBudget, settings: MapConfig) -> Sizes:
    """As many codes as fit, of the divisors of the dim, or those that are set."""
    rotated, n_codes = method == "full_opq", settings.codes_per_id
    if n_codes is not None and budget.dim % n_codes:
        raise DataError(f"map.codes_per_id={n_codes} does not divide train.dim={budget.dim}; use a divisor of it")
    most, least = CODEWORDS[0], 0
    for most in CODEWORDS if n_codes is None else ():
        least = _codebook_bytes(budget, most, rotated)
        divisors = [n for n in range(1, budget.dim + 1) if budget.dim % n == 0]
        fitting = [n for n in divisors if least + n * budget.n_ids <= budget.n_bytes]
        if fitting:
            n_codes = fitting[-1]
            break
    if n_codes is None:
        raise too_small(method, budget, least + budget.n_ids)
    words = {
        f"{side}_codewords": _n_codewords(n, most) for side, n in zip(("users", "items"), budget.sides, strict=False)
    }
    return {"codes_per_id": n_codes, **words, "rotated": int(rotated)}


def _codebook_bytes(budget: SizeBudget, most: int, rotated: bool) -> int:
    """Bytes of float16 codebooks of at most so many codewords, and of rotations, of every embedding."""
    codebooks = 2 * budget.dim * sum(_n_codewords(n, most) for n in budget.sides)
    return codebooks + (2 * len(budget.sides) * budget.dim**2 if rotated else 0)


def _additive(method: str, budget: SizeBudget, settings: MapConfig) -> Sizes:
    """As many codes as fit, or as many as are set; of these as few groups as fit, and of these the more precise codewords."""
    found = [sizes for n in range(budget.dim, 0, -1) for sizes in _additive_sizes(n, budget.dim)]
    if (n_codes := settings.codes_per_id) is not None:
        found, every = [sizes for sizes in found if sizes["codes_per_id"] == n_codes], found
        if not found:
            possible = ", ".join(map(str, sorted({sizes["codes_per_id"] for sizes in every})))
            raise DataError(
                f"map.codes_per_id={n_codes} cannot be grouped with train.dim={budget.dim}; possible are {possible}"
            )
    for sizes in found:
        if _additive_bytes(sizes, budget) <= budget.n_bytes:
            return sizes
    if n_codes is not None:
        return min(found, key=lambda sizes: _additive_bytes(sizes, budget))
    raise too_small(method, budget, min(_additive_bytes(sizes, budget) for sizes in found))


def _additive_sizes(n_codes: int, dim: int) -> list[Sizes]:
    """Groups and precisions that so many codes can have, the best first."""
    groups = [n for n in range(1, n_codes + 1) if n_codes % n == 0 and dim % n == 0 and n_codes // n <= CODES_PER_GROUP]
    return [{"codes_per_id": n_codes, "n_groups": n, "codeword_bits": bits} for n in groups for bits in CODEWORD_BITS]


def _additive_bytes(sizes: Sizes, budget: SizeBudget) -> int:
    length = budget.dim // sizes["n_groups"]
    codewords = sizes["codes_per_id"] * MAX_CODEWORDS * row_bytes(length, f"int{sizes['codeword_bits']}")
    rotation = 2 * budget.dim**2 if sizes["n_groups"] > 1 else 0
    return codewords + rotation + sizes["codes_per_id"] * budget.n_ids


def _n_codewords(n_ids: int, most: int) -> int:
    """As ``graphhash.maps.product`` makes them: a power of two, no more than ids."""
    return min(most, 2 ** max(1, int(math.log2(n_ids))))


def _cce(method: str, budget: SizeBudget, settings: MapConfig) -> Sizes:
    """Rows of the tables of each side in proportion to its ids."""
    least, n_sides = 0, len(budget.sides)
    for n_chunks in CCE_CHUNKS:
        if budget.dim % n_chunks:
            continue
        length, map_bytes = budget.dim // n_chunks, 2 * n_chunks * budget.n_ids + 4 * n_sides * budget.dim
        least = map_bytes + 2 * n_sides * n_chunks * row_bytes(length, budget.precision)
        rows = (budget.n_bytes - map_bytes) // (2 * n_chunks * row_bytes(length, budget.precision))
        if rows >= n_sides and (map_bytes <= CCE_MAP_SHARE * budget.n_bytes or n_chunks == CCE_CHUNKS[-1]):
            sizes = {"n_chunks": n_chunks, "n_clusterings": CCE_CLUSTERINGS}
            if n_sides == 1:
                return {**sizes, "user_rows": min(rows, 2**16)}
            users = max(1, min(rows - 1, rows * budget.n_users // sum(budget.sides), 2**16))
            return {**sizes, "user_rows": users, "item_rows": min(rows - users, 2**16)}
    raise too_small(method, budget, least)


def _cafe(method: str, budget: SizeBudget, settings: MapConfig) -> Sizes:
    """Rows of each side in proportion to its ids."""
    row, fixed = row_bytes(budget.dim, budget.precision), 4 * len(budget.sides) * budget.dim
    total, n_bytes = sum(budget.sides), budget.n_bytes - fixed
    # An exclusive and a shared row of the smallest side, and the number of an id.
    least = fixed + math.ceil((2 * row + 4) * total / min(budget.sides))
    if budget.n_bytes < least:
        raise too_small(method, budget, least)
    sizes = {"steps": CAFE_STEPS}
    for side, n_ids in zip(("user", "item"), budget.sides, strict=False):
        hot, shared = _cafe_rows(n_bytes * n_ids // total, n_ids, row)
        sizes |= {f"{side}_hot_rows": hot, f"{side}_shared_rows": shared}
    return sizes


def _cafe_rows(n_bytes: int, n_ids: int, row: int) -> tuple[int, int]:
    """Exclusive and shared rows within ``n_bytes``, of ``row`` bytes each; at most a row of either kind for every id."""
    shared = max(1, int((1 - CAFE_HOT_SHARE) * n_bytes) // row)
    hot = min(n_ids, (n_bytes - shared * row) // (row + 4))
    return hot, min(n_ids, (n_bytes - hot * (row + 4)) // row)


def _robe(method: str, budget: SizeBudget, settings: MapConfig) -> Sizes:
    # OOV vectors are stored in float32.
    row, fixed = row_bytes(budget.dim, budget.precision), 4 * len(budget.sides) * budget.dim
    rows = (budget.n_bytes - fixed) // row
    if rows < 1:
        raise too_small(method, budget, fixed + row)
    return {"rows": rows, "block": math.gcd(ROBE_BLOCK, budget.dim)}


def _dhe(method: str, budget: SizeBudget, settings: MapConfig) -> Sizes:
    """The widest network that fits; every embedding has one."""

    def n_bytes(width: int) -> int:
        # Weights row by row; four float32 numbers of normalisation per unit, the last layer's bias, and the OOV vector.
        matrices = DHE_LAYERS * width * row_bytes(width, budget.precision) + budget.dim * row_bytes(
            width, budget.precision
        )
        return len(budget.sides) * (matrices + 16 * DHE_LAYERS * width + 8 * budget.dim)

    width = 0
    while n_bytes(width + 1) <= budget.n_bytes:
        width += 1
    if width < 2:
        raise too_small(method, budget, n_bytes(2))
    return {"n_hashes": width, "width": width, "n_layers": DHE_LAYERS}


SIZES: dict[str, Callable[[str, SizeBudget, MapConfig], Sizes]] = {
    "product": _product,
    "additive": _additive,
    "cce": _cce,
    "cafe": _cafe,
    "robe": _robe,
    "dhe": _dhe,
}


def too_small(method: str, budget: SizeBudget, least: int) -> DataError:
    """The error of a budget below ``least`` bytes."""
    # Rounded up: the ratio that is named is enough for what is named.
    percent = math.ceil(1e4 * least / (4 * budget.dim * budget.n_ids)) / 100
    return DataError(
        f"method {method!r} needs {least:,} bytes, {percent:.2f} % of the full tables', and the budget leaves it {budget.n_bytes:,}; "
        "raise the ratio"
    )
