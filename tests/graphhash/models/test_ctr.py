"""CTR models: batches, logits against the formulas, and every model with every kind of map."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

import graphhash
from graphhash.maps.bucket_map import full_map
from graphhash.models.ctr import HEADS, CtrSpec
from graphhash.models.ctr_layers import BatchNorm, FactorizedLayer, binary_loss
from graphhash.nn.row_adam import RowAdam
from tests.helpers.ctr_batches import GRAPH, KINDS, N_USERS, all_maps, naive_fields, naive_vector, noisy, random_batch


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


def naive_perceptron(network, x):
    for layer in network:
        if isinstance(layer, torch.nn.Linear):
            x = np.maximum(x @ layer.weight.detach().numpy().T.astype(np.float64) + layer.bias.detach().numpy(), 0)
    return x


def naive_factorized(network, x):
    for layer in network:
        if isinstance(layer, FactorizedLayer):
            weight, offset = (p.detach().numpy().astype(np.float64) for p in (layer.linear.weight, layer.linear.bias))
            n_linear = len(offset) // 2
            linear = x @ weight[:n_linear].T + offset[:n_linear]
            factor = x @ weight[n_linear:].T + offset[n_linear:]
            x = np.concatenate([linear, linear * factor], 1)
        elif isinstance(layer, BatchNorm):
            mean, variance, scale, shift = (
                v.detach().numpy().astype(np.float64) for v in (layer.mean, layer.variance, layer.scale, layer.offset)
            )
            x = np.maximum((x - mean) / np.sqrt(variance + 1e-5) * scale + shift, 0)
    return x


def naive_streams(head, vectors, dense):
    weight, offset = head.gate.gates.weight.detach().numpy(), head.gate.gates.bias.detach().numpy()
    gates = np.einsum("fg,bgd->bfd", weight, vectors) + offset[:, None]
    gated = np.concatenate([vectors, vectors * gates], 1)
    inputs = [np.concatenate([fields.reshape(len(dense), -1), dense], 1) for fields in (gated, vectors)]
    units = [naive_factorized(network, x) for network, x in zip((head.network, head.second), inputs, strict=True)]
    return [
        u @ out.weight.detach().numpy()[0] + out.bias.item()
        for u, out in zip(units, (head.out, head.out_second), strict=True)
    ]


@pytest.mark.parametrize("n_dense", [0, 2])
@pytest.mark.parametrize(("kind", "structure"), [*((kind, "parallel") for kind in HEADS), ("dcnv2", "stacked")])
def test_logits_are_those_of_the_formulas(kind, structure, n_dense):
    maps, batch = all_maps("double_soft"), random_batch(6, n_dense=n_dense)
    spec = CtrSpec(kind, dim=4, hidden=(8, 6), dense_hidden=(6,), structure=structure, id_bias=True)
    model = noisy(spec.build(maps, n_dense, n_multi_valued=1)).eval()
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
        units = None if kind == "finalnet" else naive_perceptron(head.network, first)
    if units is None:
        expected = sum(naive_streams(head, vectors, dense)) / 2
    else:
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


@pytest.mark.parametrize("kind", HEADS)
def test_the_loss_is_the_cross_entropy_and_streams_of_finalnet_learn_from_both(kind):
    batch, labels = random_batch(40), (torch.arange(40) % 2).to(torch.uint8)
    model = noisy(CtrSpec(kind, dim=4, hidden=(8, 6), id_bias=True).build(all_maps("soft"), 2, n_multi_valued=1))
    logits = model(batch)
    loss = model.loss(batch, labels)
    if kind != "finalnet":
        assert torch.equal(loss, binary_loss(logits, labels))
        return
    first, second = model.head.streams(model.fields(batch.categorical, batch.multi_valued), batch.dense)
    rest, taught = (
        logits - model.head(model.fields(batch.categorical, batch.multi_valued), batch.dense),
        logits.sigmoid(),
    )
    expected = binary_loss(logits, labels)
    for stream in (first + rest, second + rest):
        probability = stream.sigmoid()
        expected = expected - (taught * probability.log() + (1 - taught) * (1 - probability).log()).mean()
    torch.testing.assert_close(loss, expected)
    # What a stream is taught has no gradient: the bias of the first stream's logit gets half of the model's error, and its own.
    loss.backward()
    error = (0.5 * (taught - labels) + (first + rest).sigmoid() - taught).mean()
    torch.testing.assert_close(model.head.out.bias.grad[0], error.detach(), rtol=1e-4, atol=1e-6)


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
        ({"cross_rank": 0}, "cross_rank is 0; use 1 or more, or None"),
        ({"kind": "fm"}, "kind is 'fm'; use one of widedeep, deepfm, dcnv2, dlrm, finalnet"),
        ({"kind": "finalnet", "hidden": (8, 5)}, "layers of finalnet have an even number of units"),
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
    weights = {n: v for n, v in model.state_dict().items() if not n.endswith((".held_rows", ".codebook", ".codes"))}
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


@pytest.mark.parametrize("kind", HEADS)
def test_a_calibration_moves_the_logits_and_not_the_loss(kind):
    model = noisy(CtrSpec(kind, dim=8, hidden=(8, 8), id_bias=True).build(all_maps("soft"), 2, 1)).eval()
    batch, labels = random_batch(30), torch.arange(30) % 2
    before, loss = model(batch), model.loss(batch, labels)
    model.calibrate(0.5, -1.0)
    torch.testing.assert_close(model(batch), 0.5 * before - 1.0)
    assert torch.equal(model.loss(batch, labels), loss)


@pytest.mark.parametrize("line", [(0.0, 0.0), (-1.0, 0.0), (float("nan"), 0.0), (1.0, float("inf"))], ids=str)
def test_a_calibration_keeps_the_ranking(line):
    model = CtrSpec("dlrm", dim=8, hidden=(8,)).build(all_maps("full"), 2, 1)
    with pytest.raises(ValueError, match="positive slope and a finite offset"):
        model.calibrate(*line)
