"""Bytes of a compressed model, and how many rows a share of the full tables' bytes allows.

Everything that is stored counts: table rows, the map's row numbers, its weights, and the item bias.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scipy.sparse import csr_array

from graphhash.errors import DataError
from graphhash.maps.embedding_spec import EmbeddingSpec
from graphhash.maps.quantization import bias_bytes, row_bytes
from graphhash.models.neumf import layer_numbers
from pipeline.config.run_config import MapConfig, RunConfig
from pipeline.distributed.shards import ShardedCsr
from pipeline.maps.methods import METHODS, ResolvedMethod
from pipeline.maps.sizes import SizeBudget, embedding_spec, small_dim
from pipeline.retrieval.defaults import DEFAULT_BUDGET, planned_precision_of
from pipeline.retrieval.full_soft import trained_embedding
from pipeline.retrieval.presets import default_settings
from pipeline.retrieval.residual_sizes import ResidualSizes, default_sizes, residual_sizes
from pipeline.task import budget_of

FULL_ITEMSIZE = 4
# Kept back from a budget for what a bundle holds beside its tensors, but no more than the share.
GRAPH_BYTES, GRAPH_SHARE = 16_384, 0.004
# Share of the bytes that the map takes where ids have 20 neighbours on average: indices and rows trade against each other, and small
# rows leave more for indices. On Gowalla (21 neighbours), an eighth of the bytes: 8 indices .162, 10 .155, 12 .155 validation recall.
MAP_SHARE = {"float32": 0.35, "float16": 0.45, "int8": 0.55, "int4": 0.68}
# In 4 bits rows cost so little that more of them than this per id gain little, and the rest goes into indices. A row in training takes 32
# times its stored bytes, and an index no more than those: with these a training holds a third of what full tables do. Validation recall on
# Gowalla of a quarter of the bytes, BPR: 20 indices .179, 24 .181, 26 .182; softmax: 24 .206, 26 .204 (with 45 and 33 % of the training
# bytes of full tables). Of an eighth, BPR: 9 .170, 10 .170, 11 .170. On a random split of it 24 indices .184, and 28 .181.
ROWS_PER_ID = 0.28
SPARSE = 20
# The share rises by this with every doubling of neighbours, which few indices do not cover, up to MOST_SHARE. On MovieLens-1M (164
# neighbours), a quarter of the bytes: 28 indices .252, 20 indices .239.
SHARE_PER_DOUBLING = 0.15
MOST_SHARE = 0.9
# From so many interactions an id on, the communities around an id say too little of it alone. Where there are bytes for nearly a row for
# each, an id reads its own row and those of the ids most like it (two hops): on MovieLens-1M validation recall is .273 with 8 and
# with 4 indices, .258 with 28 indices of both hops in 2,000 rows, and .276 with full tables.
DENSE = 50
NEARLY = 0.9
# Rows of the mixture beside full rows, and how many an id reads. They are not stored, and need not follow the budget.
IDS_PER_MIXTURE_ROW, MIXTURE_INDICES = 9, 8
# LightGCN makes do with fewer, as it propagates what the rows say: MovieLens-1M's test recall is .306 with 8,000 rows for 9,746 ids and 4
# indices, and .278 with 994 rows and 30 indices of both hops, both in 8 bits. MF at such a share has .245 and .253.
NEARLY_PROPAGATED = 0.8
DENSE_INDICES = (8, 4)
# A bound on training time; 60 indices instead of 28 raise MovieLens-1M's validation recall from .249 to .251.
MOST_INDICES = 32


@dataclass(frozen=True)
class GraphSize:
    """Size of the training graph."""

    n_users: int
    n_items: int
    n_edges: int

    @classmethod
    def of(cls, graph: csr_array) -> GraphSize:
        n_users, n_items = graph.shape
        return cls(n_users, n_items, graph.nnz)

    @classmethod
    def of_shards(cls, graph: ShardedCsr) -> GraphSize:
        return cls(graph.n_rows, graph.n_cols, graph.n_edges)

    @property
    def n_ids(self) -> int:
        return self.n_users + self.n_items

    @property
    def neighbours(self) -> float:
        """Of an id, on average."""
        return 2 * self.n_edges / max(self.n_ids, 1)

    @property
    def is_dense(self) -> bool:
        return self.neighbours >= DENSE


@dataclass(frozen=True)
class BudgetSettings:
    """The settings that decide how many bytes a method takes.

    Args:
        ratio: budget, a share of the bytes of full float32 tables; None: the budget is none of bytes.
        dim: length of an embedding.
        layer_bytes: of the model's own layers.
        enough_rows: rows per id of a dense graph from which an id's own row is what it reads first.
        indices_per_id, hops, item_bias: as in ``pipeline.config.sections.MapConfig``.
        loss: name of the training loss.
        map: sizes of method `residual`.
    """

    ratio: float | None
    dim: int
    layer_bytes: int
    enough_rows: float
    indices_per_id: int | None
    hops: str
    item_bias: bool | None
    loss: str
    map: MapConfig = field(default_factory=MapConfig)

    @classmethod
    def of(cls, config: RunConfig) -> BudgetSettings:
        kind, value = budget_of(config, DEFAULT_BUDGET)
        train = config.train
        return cls(
            ratio=value if kind == "ratio" else None,
            dim=train.dim,
            layer_bytes=FULL_ITEMSIZE * layer_numbers(train.dim) if train.model == "neumf" else 0,
            enough_rows=NEARLY_PROPAGATED if train.model == "lightgcn" else NEARLY,
            indices_per_id=config.map.indices_per_id,
            hops=config.map.hops,
            item_bias=config.map.item_bias,
            loss=train.loss,
            map=config.map,
        )

    def spendable(self, ratio: float, size: GraphSize) -> float:
        """:func:`spendable`, without what the model's layers take."""
        return spendable(ratio, size.n_users, size.n_items, self.dim) - self.layer_bytes


def resolve_method(config: RunConfig, name: str, size: GraphSize, n_rows: int) -> ResolvedMethod:
    """A method with every number of it decided by the configuration, the graph and the clustering.

    Args:
        n_rows: of the clustering, both sides together.
    """
    settings, precision = BudgetSettings.of(config), planned_precision_of(config, name)
    defaults, sizes = default_settings(config.train, METHODS[name]), _sizes(config, name, size, n_rows, precision)
    # The rows of `full_soft` are those of communities of its own.
    rows = sizes["n_rows"] if METHODS[name].trains_full_soft else min(n_rows, sizes.get("n_rows") or n_rows)
    return ResolvedMethod(
        name=name,
        indices_per_id=indices_per_id(settings, name, precision, size),
        hops=hops(settings, rows, size),
        precision=precision,
        lr=defaults["train.lr"] if config.train.lr is None else config.train.lr,
        l2_total=defaults["train.l2_total"] if config.train.l2_total is None else config.train.l2_total,
        item_bias=METHODS[name].with_bias(config.map.item_bias, config.train.loss, size.neighbours),
        **sizes,
    )


def check_sizes(config: RunConfig, size: GraphSize) -> None:
    """See that a ratio of the bytes affords the methods whose sizes follow from it, before anything is trained.

    Raises:
        DataError: it does not; the message says how many bytes are needed.
    """
    for name in config.run.methods:
        if METHODS[name].sized and BudgetSettings.of(config).ratio is not None:
            _sizes(config, name, size, 0, planned_precision_of(config, name))


def _sizes(config: RunConfig, name: str, size: GraphSize, n_rows: int, precision: str) -> dict[str, Any]:
    """Dim and embedding of a method whose sizes follow from the budget."""
    method, settings = METHODS[name], BudgetSettings.of(config)
    if method.trains_full_soft:
        return {"embedding": trained_embedding(settings.dim), "n_rows": mixture_rows(size)}
    if not method.sized:
        return {}
    if method.embedding == "residual":
        sizes = _residual(settings, precision, size)
        numbers = {"own_dim": sizes.own_dim, "own_bits": sizes.own_bits}
        spec = EmbeddingSpec("residual", numbers, config.map.seed)
        return {"dim": sizes.dim, "embedding": spec, "n_rows": sizes.n_rows or None}
    # Rows, or a resolution, allow the bytes of as many rows of int8, which is what hashes are stored in.
    if settings.ratio is None:
        n_bytes = float(n_rows * row_bytes(settings.dim, "int8"))
    else:
        n_bytes = settings.spendable(settings.ratio, size) - _bias_bytes(settings, name, precision, size)
    budget = SizeBudget(int(n_bytes), size.n_users, size.n_items, settings.dim, precision)
    if method.embedding == "bucket":
        return {"dim": small_dim(budget)}
    return {"embedding": embedding_spec(name, method.embedding, budget, config.map)}


def mixture_rows(size: GraphSize) -> int:
    """Table rows of the mixture that method `full_soft` trains with, of both sides together."""
    return max(4, size.n_ids // IDS_PER_MIXTURE_ROW)


def _residual(settings: BudgetSettings, precision: str, size: GraphSize) -> ResidualSizes:
    """Sizes of method `residual` at the budget."""
    if settings.ratio is None:
        return default_sizes(settings.dim, settings.map)
    n_bytes = settings.spendable(settings.ratio, size) - _bias_bytes(settings, "residual", precision, size)
    return residual_sizes(SizeBudget(int(n_bytes), size.n_users, size.n_items, settings.dim, precision), settings.map)


def _bias_bytes(settings: BudgetSettings, name: str, precision: str, size: GraphSize) -> int:
    has_bias = METHODS[name].with_bias(settings.item_bias, settings.loss, size.neighbours)
    return bias_bytes(size.n_items, precision) if has_bias else 0


def planned_precisions(config: RunConfig) -> dict[str, str]:
    """The precision in which a byte budget counts rows, by method of the run."""
    return {name: planned_precision_of(config, name) for name in config.run.methods}


def full_bytes(n_users: int, n_items: int, dim: int) -> int:
    """Bytes of float32 tables with a row for every id and an OOV row per side."""
    return FULL_ITEMSIZE * dim * (n_users + n_items + 2)


def spendable(ratio: float, n_users: int, n_items: int, dim: int) -> float:
    """Bytes that a share of the full ones leaves to tables, maps and biases: the bundle's graph and manifest take some 17 KB as well."""
    whole = ratio * full_bytes(n_users, n_items, dim)
    return whole - min(GRAPH_BYTES, GRAPH_SHARE * whole)


def hops(settings: BudgetSettings, n_rows: int, size: GraphSize) -> str:
    """The steps that soft maps mix over: those that are set, or what suits the graph.

    Args:
        n_rows: of the clustering, both sides together.
    """
    if settings.hops != "auto":
        return settings.hops
    return "2" if size.is_dense and n_rows >= settings.enough_rows * size.n_ids else "1+2"


def indices_per_id(settings: BudgetSettings, name: str, precision: str, size: GraphSize) -> int:
    """Rows that a method reads per id: as set; under a byte budget as many as a share of it affords that grows with the density of the
    graph, and at most MOST_INDICES; else the method's own number.

    Args:
        precision: in which the budget counts rows.
    """
    method = METHODS[name]
    if method.trains_full_soft:
        return settings.indices_per_id or MIXTURE_INDICES
    if method.embedding == "residual":
        return _residual(settings, precision, size).indices_per_id
    if settings.indices_per_id is not None or settings.ratio is None or not method.free_indices:
        return method.resolve_indices(settings.indices_per_id)
    whole, row = settings.spendable(settings.ratio, size), row_bytes(settings.dim, precision)
    if settings.hops == "auto" and size.is_dense:
        for number in DENSE_INDICES:
            if _affordable(settings, name, precision, number, whole, size) >= settings.enough_rows * size.n_ids + 2:
                return number
    denser = max(0.0, math.log2(max(size.neighbours, 1) / SPARSE))
    share = MAP_SHARE[precision]
    if precision == "int4":
        denser = denser if size.is_dense else 0.0
        share = max(share, 1 - ROWS_PER_ID * size.n_ids * row / whole)
    allowed = min(share + SHARE_PER_DOUBLING * denser, MOST_SHARE) * whole
    fitting = [n for n in range(1, MOST_INDICES + 1) if method.map_bytes(n, 2, size.n_users, size.n_items) <= allowed]
    return max([method.least_indices, *fitting])


def rows_for_ratio(settings: BudgetSettings, ratio: float, precisions: Mapping[str, str], size: GraphSize) -> int:
    """Most rows, of both sides together, that keep every compressed method of the run within ``ratio`` of the full bytes.

    All methods of a run get the same rows, so the one that affords the fewest decides.

    Args:
        precisions: in which rows are counted, by method.

    Raises:
        DataError: the maps alone take more bytes than the ratio allows.
    """
    full, allowed = full_bytes(size.n_users, size.n_items, settings.dim), settings.spendable(ratio, size)
    # With a row for every id it would be method 'full'.
    rows, heaviest = size.n_ids + 1, None
    readers = [name for name in precisions if METHODS[name].reads_communities]
    # The others merge the communities of these where they want fewer.
    plain = [name for name in readers if METHODS[name].embedding == "bucket"]
    for name in plain or readers:
        precision = precisions[name]
        number = indices_per_id(settings, name, precision, size)
        if (fitting := _affordable(settings, name, precision, number, allowed, size)) < rows:
            rows, heaviest = fitting, name
    if rows < 4 and heaviest is not None:
        number = indices_per_id(settings, heaviest, precisions[heaviest], size)
        maps = METHODS[heaviest].map_bytes(number, 2, size.n_users, size.n_items)
        layers = f", and the network's layers {settings.layer_bytes / full:.1%}" if settings.layer_bytes else ""
        raise DataError(
            f"a ratio of {ratio:g} leaves bytes for fewer than 4 table rows: the maps of method {heaviest!r} alone take {maps / full:.1%} "
            f"of the full tables' bytes{layers}; raise the ratio or the dim, lower map.indices_per_id, or use --method full"
        )
    return rows


def _affordable(
    settings: BudgetSettings, name: str, precision: str, n_indices: int, n_bytes: float, size: GraphSize
) -> int:
    """Table rows of a method within ``n_bytes``, of both sides together; less than 0 where its maps take more."""
    method = METHODS[name]
    if method.embedding == "residual":
        return _residual(settings, precision, size).n_rows
    bias = _bias_bytes(settings, name, precision, size)

    def rows(itemsize: int) -> int:
        """Where a row number takes ``itemsize`` bytes."""
        others = method.map_bytes(n_indices, itemsize, size.n_users, size.n_items) + bias
        return int((n_bytes - others) // row_bytes(settings.dim, precision))

    # 16-bit row numbers do where no table outgrows them.
    fitting = rows(2)
    return fitting if fitting <= 2**16 else max(2**16, rows(4))
