"""Stored bytes of a CTR model, and its tables as they read once stored in their precisions.

Tables of vectors are stored in a column's precision. First-order weights and id biases are one number per row, for which 8 bits with
a scale would take more than float16: with float32 tables they are float32, else float16. Layers are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from graphhash.maps.bucket_map import BucketMap, full_map
from graphhash.maps.quantization import bias_dtype, rounded, row_bytes
from graphhash.models.ctr import CtrModel, CtrSpec, compressed_columns
from graphhash.models.ctr_fields import FieldEmbeddings, TableSlice, shared_tables


@dataclass(frozen=True)
class ColumnBytes:
    """Bytes of one column: its ``table`` of vectors, bucket ``map``, first-order weights ``wide`` and id ``bias``."""

    table: int
    map: int
    wide: int
    bias: int

    @property
    def total(self) -> int:
        return self.table + self.map + self.wide + self.bias


def column_bytes(
    spec: CtrSpec, maps: Sequence[BucketMap], precisions: Sequence[str], n_multi_valued: int = 0
) -> list[ColumnBytes]:
    """Stored bytes of every column; a table that two columns share is the first one's.

    Args:
        maps: as for :meth:`CtrSpec.build`.
        precisions: of every column's table: "float32", "float16", "int8" or "int4".
        n_multi_valued: how many of the maps are of multi-valued columns.
    """
    second, biased = shared_tables(maps), compressed_columns(spec, maps, n_multi_valued) if spec.id_bias else []
    columns = []
    for number, (bucket_map, precision) in enumerate(zip(maps, precisions, strict=True)):
        n_rows = 0 if number in second else bucket_map.n_buckets
        scalar = np.dtype(bias_dtype(precision)).itemsize
        columns.append(
            ColumnBytes(
                table=n_rows * row_bytes(spec.dim, precision),
                map=bucket_map.nbytes,
                wide=n_rows * scalar if spec.first_order else 0,
                bias=(bucket_map.n_ids + 1) * scalar if number in biased else 0,
            )
        )
    return columns


def stored_bytes(model: CtrModel, maps: Sequence[BucketMap], precisions: Sequence[str]) -> list[ColumnBytes]:
    """Stored bytes of every column of a model: :func:`column_bytes`, and of columns of other kinds what their embeddings store.

    An array or a projection that several columns share is the first one's.
    """
    n_multi_valued = len(maps) - model.fields.n_categorical
    others, counted = dict(model.spec.embeddings), set[int]()
    # First-order weights of what is no bucket map are a scalar per id.
    tables_of = [full_map(m.n_ids) if number in others else m for number, m in enumerate(maps)]
    columns = column_bytes(model.spec, tables_of, precisions, n_multi_valued)
    for number in others:
        embedding = model.fields.columns[number]
        assert not isinstance(embedding, TableSlice)
        tables = {id(stored.table): stored.n_bytes for stored in embedding.stored_tables(precisions[number])}
        sizes = {id(weight): tables.get(id(weight), 4 * weight.numel()) for weight in embedding.parameters()}
        own = sum(size for weight, size in sizes.items() if weight not in counted)
        counted |= set(sizes)
        columns[number] = replace(columns[number], table=own, map=embedding.map_bytes)
    return columns


def layer_bytes(model: CtrModel) -> int:
    """Bytes of all that is not a column's: perceptrons, cross layers, weights of dense columns and the calibration, float32.

    The two statistics of a batch normalization are stored in its factor and its offset.
    """
    parts = [part for part in (model.fields, model.wide, model.bias) if part is not None]
    held = {id(weight) for part in parts for weight in part.parameters()}
    layers = sum(weight.numel() for weight in model.parameters() if id(weight) not in held)
    return 4 * (layers + model.calibration.numel())


@torch.no_grad()
def store_rounded(model: CtrModel, precisions: Sequence[str]) -> None:
    """Put into every column of ``model``, on any device, what is left of it once stored in its precision.

    Raises:
        ArgumentError: int8 cannot hold a value.
    """
    _round(model.fields, precisions)
    scalars = [bias_dtype(precision) for precision in precisions]
    if model.wide is not None:
        _round(model.wide, scalars)
    if model.bias is not None:
        _round(model.bias, [scalars[c] for c in model.bias_columns.tolist()])


def _round(fields: FieldEmbeddings, precisions: Sequence[str]) -> None:
    done = set()
    for column, precision in zip(fields.columns, precisions, strict=True):
        if isinstance(column, TableSlice):
            column.table.copy_(torch.from_numpy(rounded(column.table.cpu().numpy(), precision)))
            continue
        for table, stored_in in column.stored_tables(precision):
            if id(table) not in done:
                table.copy_(torch.from_numpy(rounded(table.cpu().numpy(), stored_in)))
            done.add(id(table))
