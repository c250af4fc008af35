"""Bytes of a compressed model, and how many rows a share of the full tables' bytes allows.

Everything that is stored counts: table rows, the map's row numbers, its weights, and the item bias.
"""

from __future__ import annotations

import math

import numpy as np

from graphhash.errors import DataError
from graphhash.maps.quantization import bias_dtype, row_bytes
from graphhash.models.neumf import layer_numbers
from pipeline.config.run_config import RunConfig
from pipeline.maps.methods import METHODS
from pipeline.retrieval.defaults import DEFAULT_BUDGET
from pipeline.task import budget_of

FULL_ITEMSIZE = 4
# Kept back from a budget for what a bundle holds beside its tensors, but no more than the share.
GRAPH_BYTES, GRAPH_SHARE = 16_384, 0.004
# Share of the bytes that the map takes where ids have 20 neighbours on average: lookups and rows trade against each other, and small
# rows leave more for lookups. On Gowalla (21 neighbours), an eighth of the bytes: 8 lookups .162, 10 .155, 12 .155 validation recall.
MAP_SHARE = {"float32": 0.35, "float16": 0.45, "int8": 0.55, "int4": 0.68}
# In 4 bits rows cost so little that more of them than this per id gain nothing, and the rest goes into lookups. On Gowalla, validation
# recall of a quarter of the bytes: 20 lookups .179, 24 .181, 26 .182; of an eighth: 9 .170, 10 .170, 11 .170. On a random split of it 24
# lookups .184, and 28 .181.
ROWS_PER_ID = 0.4
SPARSE = 20
# The share rises by this with every doubling of neighbours, which few lookups do not cover, up to MOST_SHARE. On MovieLens-1M (164
# neighbours), a quarter of the bytes: 28 lookups .252, 20 lookups .239.
SHARE_PER_DOUBLING = 0.15
MOST_SHARE = 0.9
# From so many interactions an id on, the communities around an id say too little of it alone. Where there are bytes for nearly a row for
# each, an id reads its own row and those of the ids most like it (two hops): on MovieLens-1M validation recall is .273 with 8 and
# with 4 lookups, .258 with 28 lookups of both hops in 2,000 rows, and .276 with full tables.
DENSE = 50
NEARLY = 0.9
# LightGCN makes do with fewer, as it propagates what the rows say: MovieLens-1M's test recall is .306 with 8,000 rows for 9,746 ids and 4
# lookups, and .278 with 994 rows and 30 lookups of both hops, both in 8 bits. MF at such a share has .245 and .253.
NEARLY_PROPAGATED = 0.8
DENSE_LOOKUPS = (8, 4)
# A bound on training time; 60 lookups instead of 28 raise MovieLens-1M's validation recall from .249 to .251.
MOST_LOOKUPS = 32


def full_bytes(n_users: int, n_items: int, dim: int) -> int:
    """Bytes of float32 tables with a row for every id and one per side for unknown ids."""
    return FULL_ITEMSIZE * dim * (n_users + n_items + 2)


def spendable(ratio: float, n_users: int, n_items: int, dim: int) -> float:
    """Bytes that a share of the full ones leaves to tables, maps and biases: the bundle's graph and manifest take some 17 KB as well."""
    whole = ratio * full_bytes(n_users, n_items, dim)
    return whole - min(GRAPH_BYTES, GRAPH_SHARE * whole)


def _spendable(config: RunConfig, ratio: float, n_users: int, n_items: int) -> float:
    """:func:`spendable`, without what the model's layers take."""
    return spendable(ratio, n_users, n_items, config.train.dim) - _layer_bytes(config)


def _layer_bytes(config: RunConfig) -> int:
    return FULL_ITEMSIZE * layer_numbers(config.train.dim) if config.train.model == "neumf" else 0


def hops_of(config: RunConfig, n_rows: int, n_users: int, n_items: int, n_edges: int) -> str:
    """The steps that soft maps mix over: ``map.hops``, or what suits the graph.

    Args:
        n_rows: of the clustering, both sides together.
        n_users, n_items, n_edges: of the training graph.
    """
    if config.map.hops != "auto":
        return config.map.hops
    return "2" if _is_dense(n_users, n_items, n_edges) and n_rows >= _enough(config) * (n_users + n_items) else "1+2"


def _enough(config: RunConfig) -> float:
    """Rows per id of a dense graph from which an id's own row is what it reads first."""
    return NEARLY_PROPAGATED if config.train.model == "lightgcn" else NEARLY


def _is_dense(n_users: int, n_items: int, n_edges: int) -> bool:
    return 2 * n_edges >= DENSE * (n_users + n_items)


def asked_lookups(config: RunConfig, name: str, n_users: int, n_items: int, n_edges: int) -> int | None:
    """Lookups per id to ask of a method: ``map.indices_per_id`` where it is set; under a byte budget as many as a share of it affords
    that grows with the density of the graph, and at most MOST_LOOKUPS; else None, the method's own number.

    Args:
        n_users, n_items, n_edges: of the training graph.
    """
    kind, ratio = budget_of(config, DEFAULT_BUDGET)
    method = METHODS[name]
    if config.map.indices_per_id is not None or kind != "ratio" or not method.free_lookups:
        return config.map.indices_per_id
    n_ids, precision = n_users + n_items, config.planned_precision_of(name)
    whole, row = _spendable(config, ratio, n_users, n_items), row_bytes(config.train.dim, precision)
    if config.map.hops == "auto" and _is_dense(n_users, n_items, n_edges):
        for indices_per_id in DENSE_LOOKUPS:
            if _affordable(config, name, indices_per_id, whole, n_users, n_items) >= _enough(config) * n_ids + 2:
                return indices_per_id
    denser, share = max(0.0, math.log2(max(2 * n_edges / n_ids, 1) / SPARSE)), MAP_SHARE[precision]
    if precision == "int4":
        denser = denser if _is_dense(n_users, n_items, n_edges) else 0.0
        share = max(share, 1 - ROWS_PER_ID * n_ids * row / whole)
    allowed = min(share + SHARE_PER_DOUBLING * denser, MOST_SHARE) * whole
    fitting = [n for n in range(1, MOST_LOOKUPS + 1) if method.map_bytes(n, 2, n_users, n_items) <= allowed]
    return max([method.least_lookups, *fitting])


def rows_for_ratio(config: RunConfig, ratio: float, n_users: int, n_items: int, n_edges: int) -> int:
    """Most rows, of both sides together, that keep every compressed method of the run within ``ratio`` of the full bytes.

    All methods of a run get the same rows, so the one that affords the fewest decides.

    Raises:
        DataError: the maps alone take more bytes than the ratio allows.
    """
    full, allowed = full_bytes(n_users, n_items, config.train.dim), _spendable(config, ratio, n_users, n_items)
    # With a row for every id it would be method 'full'.
    rows, heaviest = n_users + n_items + 1, None
    for name in config.run.methods:
        if name == "full":
            continue
        indices_per_id = asked_lookups(config, name, n_users, n_items, n_edges)
        if (fitting := _affordable(config, name, indices_per_id, allowed, n_users, n_items)) < rows:
            rows, heaviest = fitting, name
    if rows < 4 and heaviest is not None:
        maps = METHODS[heaviest].map_bytes(
            asked_lookups(config, heaviest, n_users, n_items, n_edges), 2, n_users, n_items
        )
        layers = _layer_bytes(config)
        beside = f", and the network's layers {layers / full:.1%}" if layers else ""
        raise DataError(
            f"a ratio of {ratio:g} leaves no rows: the maps of method {heaviest!r} alone take {maps / full:.1%} of the full tables' "
            f"bytes{beside}; raise the ratio or the dim, or lower map.indices_per_id"
        )
    return rows


def _affordable(
    config: RunConfig, name: str, indices_per_id: int | None, n_bytes: float, n_users: int, n_items: int
) -> int:
    """Table rows of a method within ``n_bytes``, of both sides together; less than 0 where its maps take more."""
    method, precision = METHODS[name], config.planned_precision_of(name)
    bias = np.dtype(bias_dtype(precision)).itemsize if method.with_bias(config.map.item_bias, config.train.loss) else 0

    def rows(itemsize: int) -> int:
        """Where a row number takes ``itemsize`` bytes."""
        beside = method.map_bytes(indices_per_id, itemsize, n_users, n_items) + bias * n_items
        return int((n_bytes - beside) // row_bytes(config.train.dim, precision))

    # 16-bit row numbers do where no table outgrows them.
    fitting = rows(2)
    return fitting if fitting <= 2**16 else max(2**16, rows(4))
