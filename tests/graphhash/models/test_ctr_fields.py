"""Embeddings of the columns of a CTR model against one lookup at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import graphhash
from graphhash.maps.bucket_map import full_map
from graphhash.models import ctr_fields
from graphhash.models.ctr_fields import FieldEmbeddings, multi_valued_mean
from tests.helpers.ctr_batches import (
    GRAPH,
    KINDS,
    N_GENRES,
    N_SMALL,
    all_maps,
    naive_fields,
    noisy,
    pair_maps,
    random_batch,
)


@pytest.mark.parametrize("joint_rows", [10_000, 0], ids=["joint", "apart"])
@pytest.mark.parametrize("kind", KINDS)
def test_fields_are_what_one_lookup_at_a_time_reads(kind, joint_rows, monkeypatch):
    monkeypatch.setattr(ctr_fields, "JOINT_ROWS", joint_rows)
    maps, batch = all_maps(kind), random_batch(40)
    fields = noisy(FieldEmbeddings(maps, 6, n_multi_valued=1, std=0.1))
    assert (fields.joint is None) == (joint_rows == 0)
    assert sorted(fields.order) == list(range(5))
    found = fields(batch.categorical, batch.multi_valued).detach().numpy()
    np.testing.assert_allclose(found, naive_fields(fields, maps, batch)[:, fields.order], atol=1e-5)
    assert not found[0, fields.order.index(4)].any()


def test_shared_maps_read_one_table_wherever_they_stand():
    fields = FieldEmbeddings(all_maps("soft"), 4, n_multi_valued=1, std=0.1)
    assert fields.columns[0].table is fields.columns[2].table
    assert fields.columns[0].oov_row != fields.columns[2].oov_row
    with pytest.raises(ValueError, match="column 0 shares its table with another one, which is not here"):
        FieldEmbeddings([pair_maps("soft")[0], full_map(3)], 4, std=0.1)


def test_two_pairs_of_shared_maps_keep_their_own_tables():
    users, items = pair_maps("soft")
    labels = graphhash.cluster(GRAPH, resolution=4.0)
    others = graphhash.soft_maps(GRAPH, labels, indices_per_id=2)
    assert others[0].n_buckets != users.n_buckets
    fields = FieldEmbeddings([others[1], users, items, others[0]], 4, std=0.1)
    tables = [column.table for column in fields.columns]
    assert tables[0] is tables[3]
    assert tables[1] is tables[2]
    assert tables[0] is not tables[1]


def test_unknown_entries_start_at_zero_in_every_column():
    maps = all_maps("double")
    fields = FieldEmbeddings(maps, 4, n_multi_valued=1, std=0.1)
    unknown = torch.tensor([[m.n_ids for m in maps[:4]]])
    assert not fields(unknown, (torch.tensor([[N_GENRES, -1]]),)).any()
    known = fields(torch.zeros_like(unknown), (torch.zeros(1, 1, dtype=torch.int64),))
    assert (known.abs().sum(2) > 0).all()


@pytest.mark.parametrize("entry", [-1, N_SMALL[0] + 1])
def test_entries_out_of_range_are_refused_in_joint_tables_too(entry):
    fields = FieldEmbeddings(all_maps("full"), 4, n_multi_valued=1, std=0.1)
    batch = random_batch(3)
    batch.categorical[2, 1] = entry
    with pytest.raises(IndexError, match=f"column 1 has entries 0..2, the last for OOV ids; row 2 has {entry}"):
        fields(batch.categorical, batch.multi_valued)


def test_multi_valued_entries_out_of_range_and_missing_columns_are_refused():
    fields = FieldEmbeddings(all_maps("full"), 4, n_multi_valued=1, std=0.1)
    batch = random_batch(3)
    with pytest.raises(
        IndexError, match=r"multi-valued column 0 has entries 0..5 and -1 for an empty slot; it spans 6..6"
    ):
        fields(batch.categorical, (torch.full((3, 2), 6),))
    with pytest.raises(
        ValueError, match="the model has 4 categorical columns and 1 multi-valued ones, the batch 3 and 1"
    ):
        fields(batch.categorical[:, :3], batch.multi_valued)


def test_a_bag_is_the_mean_of_its_values():
    vectors = torch.tensor([[[1.0, 2], [3, 6], [9, 9]], [[1, 1], [1, 1], [1, 1]]])
    values = torch.tensor([[0, 4, -1], [-1, -1, -1]])
    assert multi_valued_mean(vectors, values).tolist() == [[[2, 4]], [[0, 0]]]


def test_the_oov_row_stays_where_known_ids_without_a_click_read_it():
    graph = GRAPH.tolil()
    graph[3] = 0
    graph = graph.tocsr()
    users, items = graphhash.soft_maps(graph, graphhash.cluster(graph, resolution=1.0), indices_per_id=2)
    assert users.rows[3, 0] == users.oov_row
    fields = noisy(FieldEmbeddings([users, items], 4, std=0.1))
    counts = [torch.tensor([1] * users.n_ids + [0]), torch.tensor([1] * items.n_ids + [0])]
    before = fields.columns[0].table[users.oov_row].detach().clone()
    fields.fill_oov(counts)
    assert torch.equal(fields.columns[0].table[users.oov_row], before)
    counts[0][3] = 0
    fields.fill_oov(counts)
    assert not torch.equal(fields.columns[0].table[users.oov_row], before)
