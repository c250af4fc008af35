"""Bytes of a CTR model, column by column, and how many rows of compressed columns a share of them allows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphhash.errors import DataError
from graphhash.maps.bucket_map import BucketMap, full_map
from graphhash.maps.embedding_spec import EmbeddingSpec
from graphhash.maps.quantization import bias_dtype, row_bytes
from graphhash.models.ctr import CtrSpec
from graphhash.models.ctr_bytes import column_bytes, layer_bytes
from pipeline.config.run_config import RunConfig
from pipeline.ctr.data import Features
from pipeline.ctr.defaults import (
    DEFAULT_BUDGET,
    compresses_pairs,
    keeps_every_row,
    kept_precision_of,
    planned_kept_precision_of,
    planned_precision_of,
    precision_of,
)
from pipeline.ctr.maps import CTR_HOPS, find_pairs, resolve_indices
from pipeline.ctr.models import CTR_PRESETS
from pipeline.ctr.settings import spec_of
from pipeline.maps.methods import METHODS, ResolvedMethod
from pipeline.task import budget_of

# Under a byte budget maps of soft methods take at most this share of what is left to compressed columns, by fewer indices per id.
MAP_SHARE = 0.6
LEAST_INDICES = 4
# Most rows of a column whose numbers take 2 bytes.
SHORT_ROWS = 2**16
Embeddings = Sequence[tuple[int, EmbeddingSpec]]


def precisions_of(config: RunConfig, method: str, maps: Sequence[BucketMap], embeddings: Embeddings = ()) -> list[str]:
    """Type of every column's stored table: with "auto" float32 for tables of method `full`, else mostly int8.

    Args:
        embeddings: of columns that are no bucket map, as in :class:`graphhash.models.ctr.CtrSpec`.
    """
    others = dict(embeddings)
    own, kept = precision_of(config, method), kept_precision_of(config)
    if not compresses_pairs(method) or METHODS[method].embedding == "residual":
        return [own] * len(maps)
    return [kept if m.identity and column not in others else own for column, m in enumerate(maps)]


def full_bytes(spec: CtrSpec, features: Features, precision: str = "float32") -> int:
    """Bytes of the model with full tables, of float32 unless told otherwise: columns and layers."""
    maps = [full_map(column.n_ids) for column in features.all_columns]
    columns = column_bytes(spec, maps, [precision] * len(maps), len(features.multi_valued))
    return sum(column.total for column in columns) + _layers(spec, features)


def resolve_method(config: RunConfig, features: Features, name: str) -> ResolvedMethod:
    """A method with every number of it decided by the configuration and the columns."""
    preset = CTR_PRESETS[config.train.model]
    return ResolvedMethod(
        name=name,
        indices_per_id=indices_per_id(config, features, name),
        hops=CTR_HOPS if config.map.hops == "auto" else config.map.hops,
        precision=planned_precision_of(config, name),
        lr=preset.lr if config.train.lr is None else config.train.lr,
        l2_total=preset.l2_total if config.train.l2_total is None else config.train.l2_total,
    )


def indices_per_id(config: RunConfig, features: Features, name: str) -> int:
    """Rows that a method reads per id.

    ``map.indices_per_id`` where it is set. Else the number of `pipeline.ctr.models` for soft methods, and fewer under a byte budget
    where the maps would take more than a share of it. Else the method's own number.
    """
    # What is not stored takes no bytes.
    if config.map.indices_per_id is not None or not METHODS[name].free_indices or keeps_every_row(name):
        return resolve_indices(name, config.map.indices_per_id)
    most = resolve_indices(name, None)
    kind, ratio = budget_of(config, DEFAULT_BUDGET)
    if kind != "ratio":
        return most
    space = Space.of(config, features)
    fitting = [
        n
        for n in range(LEAST_INDICES, most)
        if _maps(config, name, n, features, space.compressed) <= MAP_SHARE * space.free(ratio)
    ]
    return max(fitting, default=LEAST_INDICES)


def rows_of_columns(config: RunConfig, features: Features, kind: str, value: Any) -> int:
    """Table rows that all compressed columns have together, OOV rows among them.

    Args:
        kind, value: "rows", or "ratio" of the bytes of the whole model with full float32 tables. All methods of a run get the same rows,
            so the one with the largest maps decides.

    Raises:
        DataError: what is not compressed takes more than the ratio already.
    """
    if kind == "rows":
        return int(value)
    names = [name for name in config.run.methods if METHODS[name].reads_communities] or ["soft"]
    space = Space.of(config, features)
    if not space.compressed:
        return 0
    plain = spec_of(config, "full")
    indices = {name: indices_per_id(config, features, name) for name in names}
    table_precision = planned_precision_of(config, names[0])
    first_order = np.dtype(bias_dtype(table_precision)).itemsize if plain.first_order else 0
    row = row_bytes(plain.dim, table_precision) + first_order
    n_ids = {column: features.columns[column].n_ids for column in space.compressed}

    def fitting(long: frozenset[int]) -> tuple[int, int]:
        """Rows that fit, and bytes of the maps, where row numbers of some columns take 4 bytes."""
        maps = max(_maps(config, name, n, features, space.compressed, long) for name, n in indices.items())
        return int((space.free(value) - maps) // row), maps

    rows, most = fitting(frozenset())
    # Columns get about as large a share of the rows as they have of the ids.
    short_rows = SHORT_ROWS * sum(n_ids.values()) // max(n_ids.values())
    if rows > short_rows:
        long: frozenset[int] = frozenset()
        while grown := {c for c, n in n_ids.items() if rows * n > SHORT_ROWS * sum(n_ids.values())} - long:
            long |= grown
            rows, most = fitting(long)
        rows = max(rows, short_rows)
    if rows < 4:
        narrower = " lower train.cross_rank (such as to 8)," if plain.kind == "dcnv2" else ""
        raise DataError(
            f"a ratio of {value:g} leaves no rows: layers and full columns take {space.fixed / space.whole:.1%} of the full "
            f"model's bytes, and maps "
            f"{most / space.whole:.1%};{narrower} raise the ratio, or give --rows or --resolution"
        )
    return rows


@dataclass(frozen=True)
class Space:
    """Bytes of the full model, those that are not compressed, and which columns are."""

    whole: int
    fixed: int
    compressed: frozenset[int]

    @classmethod
    def of(cls, config: RunConfig, features: Features) -> Space:
        pairs, plain, n_multi_valued = find_pairs(features), spec_of(config, "full"), len(features.multi_valued)
        compressed = frozenset(c for pair in pairs for c, on in zip(pair.columns, pair.compressed, strict=True) if on)
        kept = [full_map(column.n_ids) for c, column in enumerate(features.all_columns) if c not in compressed]
        columns = (
            column_bytes(plain, kept, [planned_kept_precision_of(config)] * len(kept), n_multi_valued) if kept else []
        )
        return cls(
            full_bytes(plain, features), _layers(plain, features) + sum(column.total for column in columns), compressed
        )

    def free(self, ratio: float) -> float:
        """What a share of the full bytes leaves to compressed columns."""
        return ratio * self.whole - self.fixed


def _layers(spec: CtrSpec, features: Features) -> int:
    maps = [full_map(1) for _ in features.all_columns]
    return layer_bytes(spec.build(maps, len(features.dense), len(features.multi_valued)))


def _maps(
    config: RunConfig,
    name: str,
    n_indices: int,
    features: Features,
    compressed: Iterable[int],
    long: frozenset[int] = frozenset(),
) -> int:
    """Most bytes of a method's maps and id biases.

    Args:
        long: columns whose row numbers take 4 bytes instead of 2.
    """
    total = 0
    for column in sorted(compressed):
        n_ids = features.columns[column].n_ids
        # Both sides of a map of users and items are counted alike; half of it is a column's.
        total += METHODS[name].map_bytes(n_indices, 4 if column in long else 2, n_ids, n_ids) // 2
        if spec_of(config, name).id_bias:
            total += np.dtype(bias_dtype(planned_precision_of(config, name))).itemsize * (n_ids + 1)
    return total
