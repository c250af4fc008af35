"""The model of a method: the kind and sizes of every column's embedding, and the dim, at the budget of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from graphhash.clustering.labels import Labels
from graphhash.errors import DataError
from graphhash.maps.embedding_spec import EmbeddingSpec
from graphhash.maps.quantization import bias_dtype, row_bytes
from graphhash.models.ctr import CtrSpec
from pipeline.config.run_config import RunConfig
from pipeline.ctr.budget import Space, full_bytes
from pipeline.ctr.data import Features
from pipeline.ctr.defaults import DEFAULT_BUDGET, keeps_every_row, planned_precision_of
from pipeline.ctr.maps import SEEDS_PER_PAIR, find_pairs, own_columns
from pipeline.ctr.settings import spec_of
from pipeline.maps.methods import METHODS
from pipeline.maps.sizes import SizeBudget, embedding_spec
from pipeline.task import budget_of

# What rows, or a resolution, allow to a method without rows: the bytes of as many rows of this, in which hashes are stored.
ROWS_STORED_IN = "int8"


def method_spec(config: RunConfig, features: Features, method: str, labels: Sequence[Labels]) -> CtrSpec:
    """The model of a method, before it is made.

    Args:
        labels: of the pairs, by the clustering of the run; where the budget is a ratio of the bytes they are not read.

    Raises:
        DataError: the budget is too small; the message says how large it must be.
    """
    own = METHODS[method]
    spec = spec_of(config, "full" if keeps_every_row(method) else method)
    if own.sized and own.embedding in ("bucket", "residual"):
        spec = replace(spec, dim=_small_dim(config, features, spec, method, labels))
    if own.embedding == "bucket":
        return spec
    columns = own_columns(features, method)
    if own.embedding == "residual":
        numbers = {"own_dim": spec.dim, "own_bits": 8, "projected": 0}
        embeddings = {c: EmbeddingSpec("residual", numbers, _seed(config, c)) for c in columns}
    else:
        embeddings = _sized(config, features, spec, method, columns, labels)
    return replace(spec, embeddings=tuple(sorted(embeddings.items())))


def _sized(
    config: RunConfig, features: Features, spec: CtrSpec, method: str, columns: Sequence[int], labels: Sequence[Labels]
) -> dict[int, EmbeddingSpec]:
    """Kind and sizes of the columns of a method whose bytes follow from the budget, in proportion to their ids."""
    kind, precision = METHODS[method].embedding, planned_precision_of(config, method)
    n_ids = {c: features.columns[c].n_ids for c in columns}
    total, n_bytes = sum(n_ids.values()), _budget_bytes(config, features, spec, method, columns, labels)
    if kind == "robe":
        # One array for all columns, each of which has an OOV vector.
        budget = SizeBudget(n_bytes - 4 * spec.dim * (len(columns) - 1), total, None, spec.dim, precision)
        sizes = dict.fromkeys(columns, embedding_spec(method, kind, budget, config.map))
    else:
        budgets = {c: SizeBudget(n_bytes * n // total, n, None, spec.dim, precision) for c, n in n_ids.items()}
        sizes = {c: embedding_spec(method, kind, budget, config.map) for c, budget in budgets.items()}
    return {c: replace(size, seed=_seed(config, c)) for c, size in sizes.items()}


def _budget_bytes(
    config: RunConfig, features: Features, spec: CtrSpec, method: str, columns: Sequence[int], labels: Sequence[Labels]
) -> int:
    """Bytes that the budget leaves to the embeddings of some columns, without their scalars per id."""
    kind, value = budget_of(config, DEFAULT_BUDGET)
    if kind != "ratio":
        return _n_rows(features, labels) * row_bytes(spec.dim, ROWS_STORED_IN)
    space = Space.of(config, features)
    scalar = np.dtype(bias_dtype(planned_precision_of(config, method))).itemsize
    per_id = scalar * (int(spec.id_bias) + int(spec.first_order))
    scalars = sum(per_id * (features.columns[c].n_ids + 1) for c in columns)
    others = [c for c in space.compressed if c not in columns]
    if others:
        names = ", ".join(repr(features.columns[c].name) for c in others)
        raise DataError(
            f"a ratio of the bytes cannot be shared between these columns and {names}, which the schema hashes; give --rows or --resolution"
        )
    return max(0, int(space.free(value)) - scalars)


def _small_dim(config: RunConfig, features: Features, spec: CtrSpec, method: str, labels: Sequence[Labels]) -> int:
    """The largest dim at which the whole model fits, its layers included.

    Raises:
        DataError: it does not even fit with a dim of 1.
    """
    kind, value = budget_of(config, DEFAULT_BUDGET)
    space = Space.of(config, features)
    rows = 0 if kind == "ratio" else _n_rows(features, labels) * row_bytes(spec.dim, ROWS_STORED_IN)
    allowed = value * space.whole if kind == "ratio" else space.fixed + rows
    precision = planned_precision_of(config, method)
    low, high = 0, spec.dim
    while low < high:
        middle = (low + high + 1) // 2
        fits = full_bytes(replace(spec, dim=middle), features, precision) <= allowed
        low, high = (middle, high) if fits else (low, middle - 1)
    if not low:
        least = full_bytes(replace(spec, dim=1), features, precision)
        raise DataError(
            f"method {method!r} needs {least:,} bytes, {least / space.whole:.2%} of the full model's, and the budget leaves it "
            f"{int(allowed):,}; raise the ratio"
        )
    return low


def _n_rows(features: Features, labels: Sequence[Labels]) -> int:
    """Table rows of the communities of all compressed columns, OOV rows among them."""
    sides = [
        rows + 1
        for pair, found in zip(find_pairs(features), labels, strict=True)
        for rows, on in zip((found.user_rows, found.item_rows), pair.compressed, strict=True)
        if on
    ]
    return sum(sides)


def _seed(config: RunConfig, column: int) -> int:
    """Of a column's hash functions."""
    return config.map.seed + SEEDS_PER_PAIR * column
