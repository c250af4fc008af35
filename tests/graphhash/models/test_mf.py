"""NeuMF and LightGCN against dense algebra and one pair at a time; every model with every kind of map and every loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from torch import nn

import graphhash
from graphhash.maps.bucket_map import BucketMap, full_map
from graphhash.maps.hashes import modulo_map
from graphhash.metrics.ranking import recall_at_k
from graphhash.models import lightgcn
from graphhash.models.lightgcn import LightGCN
from graphhash.models.mf import unit_vectors
from graphhash.models.neumf import NeuMF
from graphhash.models.samplers import Shared
from pipeline.config.choices import SHARED_LOSSES
from pipeline.config.run_config import TrainConfig
from pipeline.distributed.shards import ShardedCsr
from pipeline.maps.methods import METHODS
from pipeline.retrieval.budget import GraphSize
from pipeline.retrieval.evaluate import rank_users
from pipeline.retrieval.models import MODELS, ModelSpec
from pipeline.retrieval.objective import LossSettings, objective, shared_loss
from pipeline.retrieval.presets import GAMMA_THERE, LEAST_GAMMA, PRESETS, SPARSE_NEIGHBOURS, default_gamma
from pipeline.retrieval.stored import count_bytes, tables
from pipeline.retrieval.train import fit_settings
from pipeline.retrieval.weights import load_method, save_model
from tests.helpers import graphs
from tests.helpers.negatives import GivenNegatives

GRAPH = graphs.planted(0, 3, 12, 0.4, 0.05)[0]
# Weights other than one, and a user and an item without any interaction.
UNEVEN = csr_array(np.array([[2.0, 0, 1, 0], [0, 0.5, 1, 0], [3, 1, 0, 0], [0, 0, 0, 0]], np.float32))


def maps_of(graph, kind):
    if kind == "full":
        return full_map(graph.shape[0]), full_map(graph.shape[1])
    if kind == "modulo":
        return modulo_map(graph.shape[0], 3), modulo_map(graph.shape[1], 3)
    return graphhash.soft_maps(graph, graphhash.cluster(graph, resolution=1.0), indices_per_id=2)


def dense(bucket_map: BucketMap, table: torch.Tensor) -> np.ndarray:
    """Vectors of the known ids, one lookup at a time."""
    values = table.detach().numpy().astype(np.float64)
    return np.array(
        [
            sum(weight * values[row] for row, weight in zip(rows, weights, strict=True))
            for rows, weights in zip(bucket_map.rows[:-1], bucket_map.weights[:-1].astype(np.float64), strict=True)
        ]
    )


def with_random_bias(model):
    with torch.no_grad():
        nn.init.normal_(model.item_bias)
        for table, _ in tables(model, "float32"):
            table.mul_(30)
    return model


@pytest.mark.parametrize("n_layers", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["full", "modulo", "soft"])
@pytest.mark.parametrize("graph", [GRAPH, UNEVEN], ids=["planted", "uneven"])
def test_lightgcn_is_the_mean_of_dense_propagations(graph, kind, n_layers):
    maps = maps_of(graph, kind)
    model = with_random_bias(LightGCN(*maps, 8, graph=graph, n_layers=n_layers, item_bias=True, seed=0))
    biadjacency = graph.toarray().astype(np.float64)
    degrees = biadjacency.sum(1), biadjacency.sum(0)
    normalised = np.zeros_like(biadjacency)
    for u, i in zip(*biadjacency.nonzero(), strict=True):
        normalised[u, i] = biadjacency[u, i] / np.sqrt(degrees[0][u] * degrees[1][i])
    # The whole graph as one symmetric matrix, as the paper writes it.
    n_users, n_items = graph.shape
    symmetric = np.block([[np.zeros((n_users, n_users)), normalised], [normalised.T, np.zeros((n_items, n_items))]])
    layer = np.concatenate([dense(maps[0], model.user_embedding.table), dense(maps[1], model.item_embedding.table)])
    total = layer
    for _ in range(n_layers):
        layer = symmetric @ layer
        total = total + layer
    users, items = np.split(total / (n_layers + 1), [n_users])
    expected = users @ items.T + model.item_bias.detach().numpy()
    scores = model.score_all_items()(torch.arange(n_users)).detach().numpy()
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    rows, columns = np.indices(graph.shape)
    pairs = torch.from_numpy(rows.ravel()), torch.from_numpy(columns.ravel())
    np.testing.assert_allclose(model(*pairs).detach().numpy(), expected.ravel(), atol=1e-5)


def test_the_gradient_of_propagation_is_that_of_dense_algebra():
    maps = maps_of(GRAPH, "full")
    model = LightGCN(*maps, 4, graph=GRAPH, n_layers=2, item_bias=False, seed=0)
    users, items = model.vectors()
    ((users**2).sum() + (items**3).sum()).backward()
    matrix = torch.from_numpy(
        csr_array((model.values_of_users.numpy(), GRAPH.indices, GRAPH.indptr), shape=GRAPH.shape).toarray()
    )
    tables = [e.table.detach()[:-1].clone().requires_grad_() for e in (model.user_embedding, model.item_embedding)]
    p, q = tables
    p1, q1 = matrix @ q, matrix.T @ p
    p2, q2 = matrix @ q1, matrix.T @ p1
    ((((p + p1 + p2) / 3) ** 2).sum() + (((q + q1 + q2) / 3) ** 3).sum()).backward()
    for embedding, table in zip((model.user_embedding, model.item_embedding), tables, strict=True):
        torch.testing.assert_close(embedding.table.grad[:-1], table.grad, rtol=1e-4, atol=1e-7)


def test_propagation_off_the_cpu_is_the_same_also_in_autocast(monkeypatch):
    """Backward passes are not in autocast: a forward pass in bfloat16 left gradients that did not fit the graph's values."""

    def trained(with_autocast: bool) -> list[torch.Tensor]:
        model = LightGCN(*maps_of(GRAPH, "full"), 4, graph=GRAPH, n_layers=2, item_bias=False, seed=0)
        with torch.autocast("cpu", torch.bfloat16, enabled=with_autocast):
            users, items = model.vectors()
            loss = users.square().sum() + items.square().sum()
        loss.backward()
        return [users.detach(), items.detach(), *(parameter.grad for parameter in model.parameters())]

    expected = trained(False)
    monkeypatch.setattr(lightgcn, "_multiply", lightgcn._sparse_product)
    for with_autocast in (False, True):
        for one, other in zip(expected, trained(with_autocast), strict=True):
            torch.testing.assert_close(other, one)


def test_lightgcn_refuses_a_graph_of_other_ids():
    with pytest.raises(ValueError, match=r"the graph is 4 x 4, the maps have 36 x 36 ids"):
        LightGCN(*maps_of(GRAPH, "full"), 4, graph=UNEVEN, item_bias=False, seed=0)


@pytest.mark.parametrize("kind", ["full", "modulo", "soft"])
def test_neumf_is_its_formula_for_one_pair_at_a_time(kind):
    maps = maps_of(GRAPH, kind)
    model = with_random_bias(NeuMF(*maps, 8, item_bias=True, seed=0))
    weights = {name: value.detach().numpy().astype(np.float64) for name, value in model.named_parameters()}
    users, items = dense(maps[0], model.user_embedding.table), dense(maps[1], model.item_embedding.table)
    first = np.concatenate([weights["of_user.weight"], weights["of_item.weight"]], axis=1)
    expected = np.empty(GRAPH.shape)
    for u, i in np.ndindex(*GRAPH.shape):
        hidden = np.maximum(0, first @ np.concatenate([users[u, 4:], items[i, 4:]]) + weights["of_item.bias"])
        hidden = np.maximum(0, weights["hidden.weight"] @ hidden + weights["hidden.bias"])
        expected[u, i] = weights["out.weight"][0] @ np.concatenate([users[u, :4] * items[i, :4], hidden])
        expected[u, i] += weights["item_bias"][i]
    np.testing.assert_allclose(
        model.score_all_items()(torch.arange(GRAPH.shape[0])).detach().numpy(), expected, atol=1e-5
    )
    rows, columns = np.indices(GRAPH.shape)
    pairs = torch.from_numpy(rows.ravel()), torch.from_numpy(columns.ravel())
    for score in (model, model.all_pairs()):
        np.testing.assert_allclose(score(*pairs).detach().numpy(), expected.ravel(), atol=1e-5)


def test_neumf_refuses_a_dim_that_it_cannot_halve_twice():
    with pytest.raises(ValueError, match="multiple of 4, got 10"):
        NeuMF(*maps_of(GRAPH, "full"), 10, item_bias=False, seed=0)


def pairs_of(graph):
    users, items = graph.nonzero()
    return torch.from_numpy(users.astype(np.int64)), torch.from_numpy(items.astype(np.int64))


@pytest.mark.parametrize("read_all", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_score_differences_are_differences_of_scores(model, read_all):
    built = with_random_bias(ModelSpec(model, 8, True, 2, seed=0).build(*maps_of(GRAPH, "soft"), GRAPH))
    users, items = pairs_of(GRAPH)
    others = items.flip(0)
    expected = built(users, items) - built(users, others)
    torch.testing.assert_close(
        built.score_differences(users, items, others, read_all=read_all), expected, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("read_all", [True, False])
@pytest.mark.parametrize("kind", ["full", "modulo", "soft"])
@pytest.mark.parametrize(("model", "loss"), PRESETS)
def test_one_step_lowers_the_loss_of_every_model_loss_and_map(model, loss, kind, read_all):
    spec = ModelSpec(model, 8, loss not in ("directau", "ccl"), 2, seed=0, cosine=loss in SHARED_LOSSES)
    built = spec.build(*maps_of(GRAPH, kind), GRAPH)
    users, items = pairs_of(GRAPH)
    negatives = torch.randint(GRAPH.shape[1], items.shape, generator=torch.Generator().manual_seed(0))
    settings = LossSettings(loss, margin=0.2, negative_weight=2.0, dropout=0.3 if loss == "ccl" else 0.0)
    of = objective(settings, GivenNegatives(lambda _: negatives, Shared(negatives[:9], None)), whole=read_all)

    def value():
        return of(built, users, items, torch.Generator().manual_seed(0))

    before = value()
    before.backward()
    size = sum(float(p.grad.square().sum()) for p in built.parameters() if p.grad is not None) ** 0.5
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.grad is not None:
                parameter -= 1e-2 * parameter.grad / size
    assert value() < before


@pytest.mark.parametrize("kind", ["full", "modulo", "soft"])
@pytest.mark.parametrize("model", ["mf", "lightgcn"])
def test_cosine_models_score_by_the_cosines_of_their_vectors(model, kind):
    maps = maps_of(UNEVEN, kind)
    plain, cosine = (ModelSpec(model, 8, False, 2, seed=0, cosine=c).build(*maps, UNEVEN) for c in (False, True))
    expected = torch.nn.functional.cosine_similarity(
        *(v[:, None] if n == 0 else v[None] for n, v in enumerate(plain.vectors())), -1
    )
    everyone = torch.arange(UNEVEN.shape[0])
    torch.testing.assert_close(cosine.score_all_items()(everyone), expected)
    users, items = (torch.from_numpy(side.ravel()) for side in np.indices(UNEVEN.shape))
    differences = expected[users, 0] - cosine.score_differences(users, items * 0, items)
    for scores in (cosine(users, items), cosine.all_pairs()(users, items), differences):
        torch.testing.assert_close(scores, expected[users, items])
    # The OOV user, whose row is zero before it is filled.
    assert not cosine.score_all_items()(torch.tensor([UNEVEN.shape[0]])).any()


def test_unit_vectors_and_their_gradient_are_those_of_torch():
    vectors = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    results = []
    for scale in (unit_vectors, lambda v: torch.nn.functional.normalize(v, dim=-1)):
        leaf = vectors.clone().requires_grad_()
        (scale(leaf) * weights).sum().backward()
        results.append((scale(leaf).detach(), leaf.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
    assert not unit_vectors(torch.zeros(2, 3)).any()


def test_dropout_keeps_the_length_of_cosine_vectors_and_masks_by_rows():
    maps = maps_of(GRAPH, "modulo")
    model = ModelSpec("mf", 8, False, 2, seed=0, cosine=True).build(*maps, GRAPH)
    users, items = (torch.arange(4) for _ in range(2))
    negatives = torch.arange(4, 8)

    def loss(**settings):
        one = LossSettings("softmax", **settings)
        return shared_loss(one, model, users, items, negatives, None, torch.Generator().manual_seed(1)).item()

    user_vectors, item_vectors = (v.detach().numpy().astype(float) for v in model.pair_vectors(users, torch.arange(8)))
    scores = np.exp(user_vectors @ item_vectors.T / 0.1)
    rows = maps[1].rows[:8, 0]

    def expected(counts):
        return np.mean(
            [
                -np.log(scores[i, i] / (scores[i, i] + sum(scores[i, j] for j in range(4, 8) if counts(i, j))))
                for i in range(4)
            ]
        )

    assert loss() == pytest.approx(expected(lambda i, j: True), rel=1e-5)
    assert loss(mask_same_row=True) == pytest.approx(expected(lambda i, j: rows[i] != rows[j]), rel=1e-5)
    assert any(rows[i] == rows[j] for i in range(4) for j in range(4, 8))
    assert loss(dropout=0.5) == loss(dropout=0.5) != loss()


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_a_stored_model_scores_as_before_and_counts_its_bytes(kind, cosine, tmp_path):
    spec = ModelSpec(kind, 8, True, 1, seed=0, cosine=cosine)
    maps = maps_of(GRAPH, "soft")
    model = with_random_bias(spec.build(*maps, GRAPH))
    for side, bucket_map in zip(("users", "items"), maps, strict=True):
        bucket_map.save(tmp_path / f"{side}.npz")
    ShardedCsr.write(tmp_path / "ingest" / "train", GRAPH, n_shards=1)
    save_model(model, spec, tmp_path)
    loaded, *_ = load_method(tmp_path, tmp_path / "ingest")
    everyone = torch.arange(GRAPH.shape[0] + 1)
    assert torch.equal(loaded.score_all_items()(everyone), model.score_all_items()(everyone))
    parts = count_bytes(model, "float32")
    assert parts["tables"] + parts["bias"] + parts.get("layers", 0) == sum(4 * p.numel() for p in model.parameters())
    assert ("graph" in parts) == (kind == "lightgcn")


@pytest.mark.parametrize("kind", MODELS)
def test_evaluation_ranks_by_the_models_scores(kind):
    model = with_random_bias(ModelSpec(kind, 8, True, 2, seed=0).build(*maps_of(GRAPH, "soft"), GRAPH))
    relevant = csr_array(np.random.default_rng(0).random(GRAPH.shape) < 0.1)
    relevant = csr_array(relevant.astype(np.float32) - relevant.multiply(GRAPH > 0))
    relevant.eliminate_zeros()
    users = np.flatnonzero(np.diff(relevant.indptr))
    recall = recall_at_k(rank_users(model, users, GRAPH, 5), relevant[users])
    for user, value in zip(users, recall, strict=True):
        scores = model(torch.full((GRAPH.shape[1],), user), torch.arange(GRAPH.shape[1])).tolist()
        seen, wanted = set(GRAPH[[user]].indices.tolist()), set(relevant[[user]].indices.tolist())
        best = sorted(
            (item for item in range(len(scores)) if item not in seen), key=lambda i: (-round(scores[i], 5), i)
        )
        assert value == pytest.approx(len(wanted & set(best[:5])) / len(wanted))


def test_dense_graphs_get_less_uniformity_but_never_so_little_that_vectors_collapse():
    assert default_gamma(2) == default_gamma(SPARSE_NEIGHBOURS) == GAMMA_THERE
    assert (
        default_gamma(16 * SPARSE_NEIGHBOURS)
        == LEAST_GAMMA
        < default_gamma(4 * SPARSE_NEIGHBOURS)
        == pytest.approx(GAMMA_THERE / 8**0.5)
    )
    degree = 2 * GRAPH.nnz / sum(GRAPH.shape)
    settings = [
        fit_settings(TrainConfig(loss="directau", gamma=gamma), METHODS["soft"], 50, GraphSize.of(GRAPH))
        for gamma in (None, 1.5)
    ]
    assert [one.loss.gamma for one in settings] == [default_gamma(degree), 1.5]


def test_small_logs_get_smaller_batches_and_more_epochs():
    preset = PRESETS["mf", "softmax"]
    assert preset.fitted(800_000, is_dense=False) == preset
    small = preset.fitted(80_000, is_dense=False)
    assert (small.batch_size, small.negatives, small.epochs) == (506, 506, 30)
    tiny = preset.fitted(100, is_dense=False)
    assert (tiny.batch_size, tiny.epochs) == (256, 100)
    assert PRESETS["mf", "bpr"].fitted(100, is_dense=False) == PRESETS["mf", "bpr"]


def test_dense_graphs_get_a_higher_temperature():
    for loss in ("softmax", "bsl"):
        sparse, dense = (PRESETS["mf", loss].fitted(800_000, is_dense=is_dense) for is_dense in (False, True))
        assert sparse.temperature < dense.temperature
        size = GraphSize(6000, 3700, 800_000)
        assert fit_settings(TrainConfig(loss=loss), METHODS["full"], 9700, size).loss.temperature == dense.temperature
        asked = TrainConfig(loss=loss, temperature=0.05)
        assert fit_settings(asked, METHODS["full"], 9700, size).loss.temperature == 0.05
