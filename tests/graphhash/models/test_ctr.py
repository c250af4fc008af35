"""Click-through models: layers against einsum and loops, columns against one lookup at a time, every model with every kind of map."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import graphhash
from graphhash.maps.bucket_map import BucketMap, full_map
from graphhash.maps.hashes import double_map, modulo_map
from graphhash.maps.quantization import rounded
from graphhash.models import ctr_fields
from graphhash.models.ctr import HEADS, CtrSpec, FeatureBatch
from graphhash.models.ctr_bytes import column_bytes, layer_bytes, store_rounded
from graphhash.models.ctr_fields import FieldEmbeddings, multi_valued_mean
from graphhash.models.ctr_layers import CrossNetwork, DotInteraction, Dropout, binary_loss, fm_interaction
from graphhash.nn.row_adam import RowAdam
from tests.helpers import graphs

GRAPH = graphs.planted(0, 3, 12, 0.4, 0.05)[0]
N_USERS, N_ITEMS = GRAPH.shape
N_SMALL = (2, 7)
N_GENRES = 5
KINDS = ("full", "modulo", "double", "graph", "soft", "double_soft")


def pair_maps(kind: str) -> tuple[BucketMap, BucketMap]:
    labels = graphhash.cluster(GRAPH, resolution=1.0)
    return {
        "full": lambda: (full_map(N_USERS), full_map(N_ITEMS)),
        "modulo": lambda: (modulo_map(N_USERS, 4), modulo_map(N_ITEMS, 4)),
        "double": lambda: (double_map(N_USERS, 5, seed=0), double_map(N_ITEMS, 5, seed=1)),
        "graph": lambda: graphhash.graph_maps(labels),
        "soft": lambda: graphhash.soft_maps(GRAPH, labels, indices_per_id=3),
        "double_soft": lambda: graphhash.double_soft_maps(GRAPH, labels, indices_per_id=3, seed=0),
    }[kind]()


def all_maps(kind: str) -> list[BucketMap]:
    """User, a small column, item, another small one, and a bag: what belongs together does not stand together."""
    users, items = pair_maps(kind)
    return [users, full_map(N_SMALL[0]), items, full_map(N_SMALL[1]), full_map(N_GENRES)]


def random_batch(n: int, seed: int = 0, n_dense: int = 2) -> FeatureBatch:
    rng = np.random.default_rng(seed)
    sizes = (N_USERS, N_SMALL[0], N_ITEMS, N_SMALL[1])
    categorical = np.stack([rng.integers(0, size + 1, n) for size in sizes], 1)
    bag = rng.integers(-1, N_GENRES + 1, (n, 3))
    bag[0] = -1
    dense = rng.normal(size=(n, n_dense)).astype(np.float32)
    return FeatureBatch(torch.from_numpy(categorical), torch.from_numpy(dense), (torch.from_numpy(bag),))


def naive_vector(bucket_map: BucketMap, table: Tensor, entry: int) -> np.ndarray:
    total = np.zeros(table.shape[1])
    for row, weight in zip(bucket_map.rows[entry], bucket_map.weights[entry], strict=True):
        total += float(weight) * table[row].detach().numpy().astype(np.float64)
    return total


def naive_fields(fields: FieldEmbeddings, maps: list[BucketMap], batch: FeatureBatch) -> np.ndarray:
    """Vectors in the order of the maps, one lookup at a time."""
    result = np.zeros((len(batch), len(maps), fields.dim))
    n_categorical = batch.categorical.shape[1]
    for row in range(len(batch)):
        for column, bucket_map in enumerate(maps):
            table = fields.columns[column].table
            if column < n_categorical:
                result[row, column] = naive_vector(bucket_map, table, int(batch.categorical[row, column]))
                continue
            values = [v for v in batch.multi_valued[column - n_categorical][row].tolist() if v >= 0]
            if values:
                result[row, column] = np.mean([naive_vector(bucket_map, table, v) for v in values], axis=0)
    return result


def noisy(model):
    """Every parameter drawn anew, so that no part is silent."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


# --- the batch


def test_a_batch_takes_rows_of_all_its_parts():
    batch = random_batch(9)
    rows = torch.tensor([4, 0, 4])
    taken = batch.take(rows)
    assert len(taken) == 3
    assert torch.equal(taken.categorical, batch.categorical[rows])
    assert torch.equal(taken.dense, batch.dense[rows])
    assert torch.equal(taken.multi_valued[0], batch.multi_valued[0][rows])
    assert torch.equal(batch.to("cpu").multi_valued[0], batch.multi_valued[0])


def test_a_batch_of_wrong_types_or_lengths_is_refused():
    batch = random_batch(4)
    with pytest.raises(ValueError, match=r"categorical must be torch.int64 of shape \(4, .\), got torch.int32"):
        replace(batch, categorical=batch.categorical.int())
    with pytest.raises(ValueError, match=r"dense must be torch.float32"):
        replace(batch, dense=batch.dense.double())
    with pytest.raises(ValueError, match="dense must be"):
        replace(batch, dense=batch.dense[:3])
    with pytest.raises(ValueError, match="multi-valued column 0 must be"):
        replace(batch, multi_valued=(batch.multi_valued[0][:, 0],))


# --- columns


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


# --- interactions


def test_fm_is_the_sum_over_pairs():
    vectors = torch.randn(5, 6, 4, dtype=torch.float64)
    pairs = sum((vectors[:, i] * vectors[:, j]).sum(1) for i in range(6) for j in range(i))
    torch.testing.assert_close(fm_interaction(vectors), pairs)


def test_dot_interaction_is_einsum_below_the_diagonal():
    vectors = torch.randn(5, 4, 3, dtype=torch.float64)
    products = torch.einsum("bid,bjd->bij", vectors, vectors)
    expected = torch.stack([products[:, i, j] for i in range(4) for j in range(i)], 1)
    torch.testing.assert_close(DotInteraction(4)(vectors), expected)


def test_cross_layers_follow_the_recurrence():
    network = noisy(CrossNetwork(3, 4))
    first = torch.randn(2, 3)
    for row in range(2):
        x = first[row].numpy().astype(np.float64)
        crossed = x
        for layer in network.layers:
            w, b = layer.weight.detach().numpy(), layer.bias.detach().numpy()
            crossed = np.array(
                [x[i] * (sum(w[i, j] * crossed[j] for j in range(3)) + b[i]) + crossed[i] for i in range(3)]
            )
        np.testing.assert_allclose(network(first)[row].detach().numpy(), crossed, rtol=1e-4)


def naive_perceptron(network, x):
    for layer in network:
        if isinstance(layer, torch.nn.Linear):
            x = np.maximum(x @ layer.weight.detach().numpy().T.astype(np.float64) + layer.bias.detach().numpy(), 0)
    return x


@pytest.mark.parametrize("n_dense", [0, 2])
@pytest.mark.parametrize(("kind", "structure"), [*((kind, "parallel") for kind in HEADS), ("dcnv2", "stacked")])
def test_logits_are_those_of_the_formulas(kind, structure, n_dense):
    maps, batch = all_maps("double_soft"), random_batch(6, n_dense=n_dense)
    spec = CtrSpec(kind, dim=4, hidden=(7, 5), dense_hidden=(6,), structure=structure, id_bias=True)
    model = noisy(spec.build(maps, n_dense, n_multi_valued=1))
    dense, head = batch.dense.numpy().astype(np.float64), model.head
    vectors = naive_fields(model.fields, maps, batch)[:, model.fields.order]
    first = np.concatenate([vectors.reshape(6, -1), dense], 1)
    if kind == "dcnv2":
        crossed = head.cross(torch.from_numpy(first).float()).detach().numpy()
        units = (
            naive_perceptron(head.network, crossed)
            if structure == "stacked"
            else np.concatenate([crossed, naive_perceptron(head.network, first)], 1)
        )
    elif kind == "dlrm":
        of_dense = naive_perceptron(head.dense, dense) if n_dense else np.zeros((6, 0))
        stack = np.concatenate([of_dense[:, None], vectors], 1) if n_dense else vectors
        dots = [(stack[:, i] * stack[:, j]).sum(1) for i in range(stack.shape[1]) for j in range(i)]
        units = naive_perceptron(head.network, np.concatenate([of_dense, np.stack(dots, 1)], 1))
    else:
        units = naive_perceptron(head.network, first)
    expected = units @ head.out.weight.detach().numpy()[0] + head.out.bias.item()
    if kind == "deepfm":
        expected += sum((vectors[:, i] * vectors[:, j]).sum(1) for i in range(5) for j in range(i))
    if kind in ("widedeep", "deepfm"):
        expected += naive_fields(model.wide, maps, batch).sum((1, 2))
        if n_dense:
            expected += dense @ model.wide_dense.weight.detach().numpy()[0]
    for column, number in ((0, 0), (2, 1)):
        bias = model.bias.columns[number].table.detach().numpy()[:, 0]
        expected += bias[batch.categorical[:, column].numpy()]
    np.testing.assert_allclose(model(batch).detach().numpy(), expected, rtol=1e-3, atol=1e-3)


# --- models


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("maps", KINDS)
def test_every_model_learns_with_every_map_and_moves_every_parameter(kind, maps):
    batch = random_batch(256)
    labels = ((batch.categorical[:, 0] + batch.categorical[:, 2]) % 2).float()
    model = CtrSpec(kind, dim=8, hidden=(16,), id_bias=True).build(all_maps(maps), 2, n_multi_valued=1)
    assert (model.bias is None) == (maps == "full")
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    before = binary_loss(model(batch), labels)
    # Two steps: behind first-order weights and a zero nothing is silent for longer.
    for _ in range(2):
        optimizer.zero_grad()
        binary_loss(model(batch), labels).backward()
        assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())
        optimizer.step()
    assert binary_loss(model(batch), labels) < before


@pytest.mark.parametrize("kind", HEADS)
def test_a_seed_makes_a_model_and_another_seed_another(kind):
    spec, batch = CtrSpec(kind, dim=4, dropout=0.5), random_batch(20)
    torch.manual_seed(1)
    first = spec.build(all_maps("soft"), 2, 1)
    torch.manual_seed(2)
    again = spec.build(all_maps("soft"), 2, 1)
    logits = []
    for model in (first, again):
        model.use_generator(torch.Generator().manual_seed(5))
        logits.append(model(batch))
    assert torch.equal(*logits)
    assert not torch.equal(first.eval()(batch), replace(spec, seed=1).build(all_maps("soft"), 2, 1).eval()(batch))


def test_dropout_is_for_training_and_keeps_the_mean():
    layer = Dropout(0.25)
    layer.generator = torch.Generator().manual_seed(0)
    units = torch.ones(200, 200)
    dropped = layer(units)
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert dropped.mean().item() == pytest.approx(1, abs=0.01)
    assert torch.equal(layer.eval()(units), units)


def test_seldom_read_tables_may_wait_for_their_steps():
    """RowAdam finds all tables through their embeddings, and does what Adam does."""
    spec = CtrSpec("deepfm", dim=4, hidden=(8,), id_bias=True)
    labels = (torch.arange(30) % 2).float()
    logits = []
    for waits in (True, False):
        model = spec.build(all_maps("double_soft"), 2, 1)
        optimizer = RowAdam(model.parameters(), model.bucket_embeddings() if waits else [], lr=1e-2, weight_decay=1e-3)
        for seed in range(4):
            optimizer.zero_grad()
            binary_loss(model(random_batch(30, seed)), labels).backward()
            optimizer.step()
        optimizer.close()
        logits.append(model(random_batch(50, 9)).detach())
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


def test_sizes_that_make_no_sense_are_refused():
    for wrong, message in (
        ({"kind": "fm"}, "kind is 'fm'; use one of widedeep, deepfm, dcnv2, dlrm"),
        ({"structure": "both"}, "structure is 'both'"),
        ({"hidden": (0,)}, "sizes must be 1 or more"),
        ({"dropout": 1.0}, "dropout must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            CtrSpec(**{"kind": "dlrm", **wrong})
    with pytest.raises(ValueError, match="one column or more"):
        CtrSpec("dlrm").build([], 2)


@pytest.mark.parametrize("kind", ["soft", "double_soft"])
def test_rows_of_a_fold_are_read_through_its_maps(kind):
    labels = graphhash.cluster(GRAPH, resolution=1.0)
    make = graphhash.soft_maps if kind == "soft" else functools.partial(graphhash.double_soft_maps, seed=0)
    folds = [without(0.3, seed) for seed in range(3)]
    maps, batch = all_maps(kind), random_batch(60)
    users, items = make(GRAPH, labels, indices_per_id=maps[0].indices_per_id)
    maps[0], maps[2] = users, items
    model = noisy(CtrSpec("deepfm", dim=4, hidden=(8,), id_bias=True).build(maps, 2, 1))
    before = model(batch).detach()
    folded = make(GRAPH, labels, indices_per_id=maps[0].indices_per_id, folds=folds)
    model.use_folds({0: folded[0], 2: folded[1]})
    assert torch.equal(model(batch), before)
    fold = torch.arange(len(batch)) % 3
    logits = model(replace(batch, fold=fold))
    weights = {n: v for n, v in model.state_dict().items() if not n.endswith((".rows", ".row_weights"))}
    for number, graph in enumerate(folds):
        alone = list(maps)
        alone[0], alone[2] = (
            make(graph, labels, indices_per_id=maps[0].indices_per_id)
            if kind == "soft"
            else one_fold(make, graph, labels, maps)
        )
        other = CtrSpec("deepfm", dim=4, hidden=(8,), id_bias=True).build(alone, 2, 1)
        other.load_state_dict(weights, strict=False)
        rows = torch.nonzero(fold == number).ravel()
        torch.testing.assert_close(logits[rows], other(batch.take(rows)), rtol=1e-5, atol=1e-6)
    assert not torch.equal(logits, before)
    with pytest.raises(ValueError, match="column 1 has no table of its own"):
        model.use_folds({1: folded[0]})
    with pytest.raises(ValueError, match="is none of folds of"):
        model.use_folds({0: full_map(N_USERS * 2)})


def without(share, seed):
    """GRAPH without a share of its pairs."""
    kept = GRAPH.copy()
    kept.data = np.where(np.random.default_rng(seed).random(GRAPH.nnz) < share, 0, kept.data)
    kept.eliminate_zeros()
    return kept


def one_fold(make, graph, labels, maps):
    # Both read the mixtures of the one graph, and the hashed rows are those of the ids.
    return make(GRAPH, labels, indices_per_id=maps[0].indices_per_id, folds=[graph])


# --- unknown ids


@pytest.mark.parametrize("kind", ["full", "double", "soft"])
def test_unknown_ids_get_the_mean_where_training_has_shown_none(kind):
    maps = all_maps(kind)
    model = noisy(CtrSpec("widedeep", dim=4, id_bias=True).build(maps, 2, 1))
    rng = np.random.default_rng(0)
    counts = [torch.from_numpy(np.append(rng.integers(1, 9, m.n_ids), 0)) for m in maps]
    counts[1][-1] = 3
    parts = {"fields": model.fields, "wide": model.wide}
    before = {name: [c.table[c.oov_row].detach().clone() for c in part.columns] for name, part in parts.items()}
    model.fill_oov(counts)
    for name, part in parts.items():
        for column, bucket_map in enumerate(maps):
            embedding = part.columns[column]
            found = embedding.table[embedding.oov_row].detach()
            if column == 1:
                assert torch.equal(found, before[name][1])
                continue
            shares = counts[column][:-1].numpy() / counts[column].sum().item()
            expected = sum(s * naive_vector(bucket_map, embedding.table, i) for i, s in enumerate(shares))
            np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    if model.bias is not None:
        bias = model.bias.columns[1].table.detach().numpy()[:, 0]
        assert bias[-1] == pytest.approx((bias[:-1] * counts[2][:-1].numpy()).sum() / counts[2].sum().item(), rel=1e-4)


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


# --- bytes


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
    assert of_ids + layer_bytes(model) == 4 * sum(p.numel() for p in model.parameters())


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
