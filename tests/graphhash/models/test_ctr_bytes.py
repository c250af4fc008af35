"""Bytes of CTR models, and their rounding to what is stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphhash.maps.quantization import rounded
from graphhash.models.ctr import CtrSpec
from graphhash.models.ctr_bytes import column_bytes, layer_bytes, store_rounded
from tests.helpers.ctr_batches import N_GENRES, N_ITEMS, N_SMALL, N_USERS, all_maps, noisy


def test_bytes_are_those_of_every_stored_array():
    maps = all_maps("double_soft")
    spec = CtrSpec("deepfm", dim=8, hidden=(16,), id_bias=True)
    model = spec.build(maps, 2, 1)
    columns = column_bytes(spec, maps, ["int8", "float32", "int8", "float16", "float32"], n_multi_valued=1)
    n_buckets = maps[0].n_buckets
    assert columns[0].table == n_buckets * (8 + 2)
    assert columns[2].table == 0
    assert (columns[0].wide, columns[2].wide, columns[1].wide) == (2 * n_buckets, 0, 4 * (N_SMALL[0] + 1))
    assert (columns[0].bias, columns[2].bias, columns[3].bias) == (2 * (N_USERS + 1), 2 * (N_ITEMS + 1), 0)
    assert columns[3].table == (N_SMALL[1] + 1) * 8 * 2
    assert columns[4].table == (N_GENRES + 1) * 8 * 4
    assert [c.map for c in columns] == [m.nbytes for m in maps]
    in_float32 = column_bytes(spec, maps, ["float32"] * 5, n_multi_valued=1)
    of_ids = sum(c.total - c.map for c in in_float32)
    # The calibration is two numbers.
    assert of_ids + layer_bytes(model) == 4 * sum(p.numel() for p in model.parameters()) + 8


def test_models_without_wide_parts_or_biases_have_no_bytes_for_them():
    columns = column_bytes(CtrSpec("dlrm", dim=8), all_maps("modulo"), ["int8"] * 5, n_multi_valued=1)
    assert not any(c.wide or c.bias for c in columns)


@pytest.mark.parametrize("kind", ["modulo", "soft"])
def test_rounding_touches_each_column_once_and_in_its_precision(kind):
    maps = all_maps(kind)
    model = noisy(CtrSpec("widedeep", dim=8, id_bias=True).build(maps, 2, 1))
    precisions = ["int8", "float32", "int8", "float16", "float32"]
    before = [c.table.detach().clone() for c in model.embeddings]
    wide = [c.table.detach().clone() for c in model.wide.columns]
    bias = [c.table.detach().clone() for c in model.bias.columns]
    layers = model.head.out.weight.detach().clone()
    store_rounded(model, precisions)
    for column, table, precision in zip(model.embeddings, before, precisions, strict=True):
        np.testing.assert_array_equal(column.table.detach().numpy(), rounded(table.numpy(), precision))
    for column, table, precision in zip(
        model.wide.columns, wide, ["float16", "float32", "float16", "float16", "float32"], strict=True
    ):
        expected = table.numpy() if precision == "float32" else rounded(table.numpy(), "float16")
        np.testing.assert_array_equal(column.table.detach().numpy(), expected)
    for column, table in zip(model.bias.columns, bias, strict=True):
        np.testing.assert_array_equal(column.table.detach().numpy(), rounded(table.numpy(), "float16"))
    assert torch.equal(model.head.out.weight, layers)
