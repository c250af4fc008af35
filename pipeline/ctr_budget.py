"""Bytes of a click-through model, column by column, and how many rows of compressed columns a share of them allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from graphhash.buckets import BucketMap, full_map
from graphhash.ctr import CtrSpec
from graphhash.ctr_bytes import column_bytes, layer_bytes
from graphhash.errors import DataError
from graphhash.quantization import bias_dtype, row_bytes
from pipeline.config import RunConfig
from pipeline.ctr_data import Features
from pipeline.ctr_maps import find_pairs, lookups_of
from pipeline.ctr_spec import spec_of
from pipeline.methods import METHODS


def precisions_of(config: RunConfig, method: str, maps: Sequence[BucketMap]) -> list[str]:
    """Type of every column's stored table: with "auto" int8 for a compressed column, float32 for a full one."""
    if config.export.precision != "auto":
        return [config.export.precision] * len(maps)
    return ["float32" if bucket_map.identity else config.precision_of(method) for bucket_map in maps]


def full_bytes(spec: CtrSpec, features: Features) -> int:
    """Bytes of the model with full float32 tables: columns and layers."""
    maps = [full_map(column.n_ids) for column in features.all_columns]
    columns = column_bytes(spec, maps, ["float32"] * len(maps), len(features.bags))
    return sum(column.total for column in columns) + _layers(spec, features)


def rows_of_columns(config: RunConfig, features: Features, kind: str, value: Any) -> int:
    """Table rows that all compressed columns have together, those of unknown ids among them.

    Args:
        kind, value: "rows", or "ratio" of the bytes of the whole model with full float32 tables. All methods of a run get the same rows,
            so the one with the largest maps decides.

    Raises:
        DataError: what is not compressed takes more than the ratio already.
    """
    if kind == "rows":
        return int(value)
    names = [name for name in config.run.methods if name != "full"] or ["soft"]
    pairs = find_pairs(features)
    compressed = {c for pair in pairs for c, on in zip(pair.columns, pair.compressed, strict=True) if on}
    if not compressed:
        return 0
    plain = spec_of(config, "full")
    kept = [full_map(column.n_ids) for c, column in enumerate(features.all_columns) if c not in compressed]
    n_bags = len(features.bags)
    precision = "float32" if config.export.precision == "auto" else config.export.precision
    fixed = _layers(plain, features)
    if kept:
        fixed += sum(column.total for column in column_bytes(plain, kept, [precision] * len(kept), n_bags))
    whole = full_bytes(plain, features)
    most = max(_maps(config, name, features, compressed) for name in names)
    table_precision = config.precision_of(names[0])
    wide = np.dtype(bias_dtype(table_precision)).itemsize if plain.first_order else 0
    rows = int((value * whole - fixed - most) // (row_bytes(plain.dim, table_precision) + wide))
    if rows < 4:
        raise DataError(
            f"a ratio of {value:g} leaves no rows: layers and full columns take {fixed / whole:.1%} of the full model's bytes, and maps "
            f"{most / whole:.1%}; raise the ratio, or give --rows or --resolution"
        )
    return rows


def _layers(spec: CtrSpec, features: Features) -> int:
    maps = [full_map(1) for _ in features.all_columns]
    return layer_bytes(spec.build(maps, len(features.dense), len(features.bags)))


def _maps(config: RunConfig, name: str, features: Features, compressed: set[int]) -> int:
    """Most bytes of a method's maps and id biases."""
    total = 0
    for column in sorted(compressed):
        n_ids = features.columns[column].n_ids
        # Both sides of a map of users and items are counted alike; half of it is a column's.
        total += METHODS[name].map_bytes(lookups_of(name, config.map.n_lookups), 2, n_ids, n_ids) // 2
        if spec_of(config, name).id_bias:
            total += np.dtype(bias_dtype(config.precision_of(name))).itemsize * (n_ids + 1)
    return total
