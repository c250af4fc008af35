"""Several workers against one: their gradient is the one of the whole batch, whatever the shares, models and losses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import graphhash
from graphhash.maps.bucket_map import full_map
from graphhash.maps.embedding_spec import BUCKET, EmbeddingSpec
from graphhash.models.ctr import CtrSpec
from graphhash.models.lightgcn import LightGCN
from graphhash.models.samplers import SHARED_SAMPLERS, NegativeSampler
from graphhash.nn.workers import Workers
from pipeline.config.choices import SHARED_LOSSES
from pipeline.ctr.train import ctr_loss
from pipeline.maps.methods import METHODS, Inputs
from pipeline.retrieval.models import ModelSpec
from pipeline.retrieval.objective import (
    LossSettings,
    RetrievalSettings,
    TrainingPairs,
    fit_retrieval,
    objective,
    seldom_read,
)
from pipeline.retrieval.train import _validation, shards_graph
from pipeline.training.loop import CONTINUE, SAVE, STOP, Callbacks, Objective, batch_statistics, fit
from tests.helpers import graphs
from tests.helpers.gang import gang
from tests.helpers.negatives import GivenNegatives

SETTINGS = RetrievalSettings(lr=0.05, weight_decay=1e-6, epochs=6, eval_every=2, patience=100, batch_size=100, seed=0)
MODELS_AND_LOSSES = [
    ("mf", "bpr"),
    ("mf", "directau"),
    ("mf", "ials"),
    ("mf", "softmax"),
    ("mf", "bsl"),
    ("mf", "ccl"),
    ("mf, residual", "bpr"),
    ("mf, residual", "softmax"),
    ("mf, cafe", "bpr"),
    ("mf, cafe", "softmax"),
    ("neumf", "bpr"),
    ("lightgcn", "bpr"),
    ("lightgcn", "ials"),
    ("lightgcn", "softmax"),
]


# Of embeddings that are no bucket map alone.
SIZES = {
    "residual": {"own_dim": 3, "own_bits": 8},
    "cafe": {"user_hot_rows": 30, "user_shared_rows": 9, "item_hot_rows": 30, "item_shared_rows": 9, "steps": 4},
}


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    with gang(3, str(tmp_path_factory.mktemp("gang") / "rendezvous")) as workers:
        yield workers


def graph_of():
    return graphs.planted(0, 6, 30, 0.3, 0.02)[0]


def made(kind: str, method: str, workers: Workers = Workers(), sharded: bool = False, loss: str = "bpr"):
    graph = graph_of()
    spec = METHODS[method]
    maps = spec.make(Inputs(graph, graphhash.cluster(graph, resolution=3), spec.indices_per_id, "1+2", 0))
    item_bias, cosine = loss not in ("directau", "ccl"), loss in SHARED_LOSSES
    embedding = EmbeddingSpec(method, SIZES[method]) if method in SIZES else BUCKET
    model = ModelSpec(kind, 8, item_bias, n_layers=2, seed=0, embedding=embedding, cosine=cosine).build(*maps, graph)
    if sharded:
        model.shard(workers)
    users, items = graph.nonzero()
    return model, torch.from_numpy(users.astype(np.int64)), torch.from_numpy(items.astype(np.int64))


def gradients(kind: str, loss: str, n: int, sharded: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss and its gradient over the first n interactions, negatives given by the interaction alone."""
    workers = Workers.from_process_group()
    kind, *method = kind.split(", ")
    model, users, items = made(kind, method[0] if method else "soft", workers, sharded, loss)
    users, items = (tensor[:n][workers.share(n)] for tensor in (users, items))
    settings = LossSettings(loss, gamma=0.7, unobserved_weight=0.3, margin=0.1, negative_weight=1.3)
    sample = GivenNegatives(lambda users: (users * 7 + items * 3) % model.item_embedding.n_ids)
    loss_of = objective(settings, sample, whole=True, workers=workers)
    mean = loss_of(model, users, items, torch.Generator())
    ((own, of_all),) = workers.steps(n, None)
    (mean * (own / of_all)).backward()
    workers.sum_gradients(model.parameters())
    total = float(workers.sum(mean.detach() * (own / of_all)))
    return total, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def check_gradients(together, kind, loss, n, sharded=False):
    expected_loss, expected = gradients(kind, loss, n, False)
    results = together(gradients, kind, loss, n, sharded)
    for mean, found in results:
        assert mean == pytest.approx(expected_loss, rel=1e-5)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=4e-6 * max(scale, 1e-3), msg=name)
            assert torch.equal(found[name], results[0][1][name])


@pytest.mark.parametrize("n", [400, 401])
@pytest.mark.parametrize(("kind", "loss"), MODELS_AND_LOSSES)
def test_two_workers_have_the_gradient_of_one(pair, kind, loss, n):
    check_gradients(pair, kind, loss, n)


@pytest.mark.parametrize(("kind", "loss"), [("mf", "directau"), ("neumf", "bpr"), ("lightgcn", "ials")])
def test_three_workers_with_shares_of_two_sizes_have_the_gradient_of_one(trio, kind, loss):
    check_gradients(trio, kind, loss, 401)


@pytest.mark.parametrize("loss", ["bpr", "directau", "ials", "bsl"])
def test_a_sharded_graph_has_the_gradient_of_a_whole_one(trio, loss):
    check_gradients(trio, "lightgcn", loss, 401, sharded=True)


def shared_negatives(kind: str) -> tuple[list[int], list[int]]:
    """Negatives that a worker gets for its part of a batch, and that one worker gets for the whole batch."""
    workers, graph = Workers.from_process_group(), graph_of()
    sampler = NegativeSampler(graph, kind)
    batch = torch.from_numpy(graph.indices[:101].astype(np.int64))
    own = batch[workers.share(101)]
    items, _ = sampler.shared(own, 50, torch.Generator().manual_seed(workers.seed(0)), workers)
    alone, _ = sampler.shared(batch, 50, torch.Generator().manual_seed(0))
    return items.tolist(), alone.tolist()


@pytest.mark.parametrize("kind", SHARED_SAMPLERS)
def test_workers_share_the_negatives_of_one(pair, kind):
    results = pair(shared_negatives, kind)
    assert len({tuple(items) for items, _ in results}) == 1
    for items, alone in results:
        assert sorted(items) == sorted(alone)


def vectors_of_shards() -> tuple[torch.Tensor, torch.Tensor, int]:
    model, *_ = made("lightgcn", "soft", Workers.from_process_group(), True)
    with torch.no_grad():
        return *model.vectors(), len(model.indices_of_users)


def test_a_sharded_graph_is_held_once_and_propagates_to_the_same_bits(trio):
    model, users, _ = made("lightgcn", "soft")
    expected = model.vectors()
    results = trio(vectors_of_shards)
    assert sum(n_edges for *_, n_edges in results) == len(users)
    assert max(n_edges for *_, n_edges in results) < 0.4 * len(users)
    for found_users, found_items, _ in results:
        assert torch.equal(found_users, expected[0])
        assert torch.equal(found_items, expected[1])


def test_the_rule_for_sharding():
    assert shards_graph("auto", 2**24, 2)
    assert not shards_graph("auto", 2**24 - 1, 2)
    assert shards_graph("sharded", 1, 2)
    assert not shards_graph("replicated", 2**30, 2)
    assert not shards_graph("sharded", 2**30, 1)
    assert isinstance(made("lightgcn", "soft")[0], LightGCN)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("n", "batch"), [(100, 10), (101, 10), (103, 10), (7, 7), (8, 7), (9, 100), (50, None), (1000, 333)]
)
def test_steps_share_out_every_batch_and_none_is_empty(size, n, batch):
    plans = [Workers(rank, size).steps(n, batch) for rank in range(size)]
    assert len({len(plan) for plan in plans}) == 1
    for parts in zip(*plans, strict=True):
        assert sum(own for own, _ in parts) == parts[0][1]
        assert min(own for own, _ in parts) > 0
        assert len({of_all for _, of_all in parts}) == 1
    sizes = [of_all for _, of_all in plans[0]]
    assert sum(sizes) == n
    assert all(s == (batch or n) for s in sizes[:-1])
    assert sizes[-1] < (batch or n) + size
    everyone = np.concatenate([np.arange(n)[Workers(rank, size).share(n)] for rank in range(size)])
    assert sorted(everyone) == list(range(n))


def test_more_workers_than_examples_are_refused():
    with pytest.raises(graphhash.DataError, match="3 examples have no part for each of 4 workers; use fewer workers"):
        Workers(0, 4).steps(3, None)
    with pytest.raises(graphhash.DataError, match="batches of 3 have no part"):
        Workers(0, 4).steps(30, 3)
    # A worker alone takes whatever there is.
    assert Workers().steps(3, 2) == [(2, 2), (1, 1)]


def test_seeds_differ_between_workers_and_the_first_one_has_that_of_one_worker():
    assert Workers(0, 3).seed(5) == 5
    seeds = {Workers(rank, 3).seed(seed, epoch) for rank in range(3) for seed in range(3) for epoch in range(3)}
    assert len(seeds) == 27


def trained(method: str, settings: RetrievalSettings):
    """The state after a whole training, and every weight."""
    workers = Workers.from_process_group()
    model, users, items = made("mf", method)
    graph = graph_of()
    validate = _validation(graph, graph_of(), 50, 0, workers)
    silent = Callbacks(warn=lambda line: None)
    state = fit_retrieval(
        model, TrainingPairs(users, items, NegativeSampler(graph)), settings, validate, callbacks=silent
    )
    return {key: state[key] for key in ("history", "best_epoch", "epoch")}, dict(state["model"])


@pytest.mark.parametrize("batch_size", [None, 100])
def test_workers_keep_the_same_weights_and_learn_as_well_as_one(pair, batch_size):
    settings = dataclasses.replace(SETTINGS, batch_size=batch_size, epochs=10, eval_every=2)
    (first, weights), (second, others) = pair(trained, "soft", settings)
    assert [{**entry, "seconds": 0} for entry in first["history"]] == [
        {**entry, "seconds": 0} for entry in second["history"]
    ]
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    (again, _), _ = pair(trained, "soft", settings)
    assert [entry["loss"] for entry in again["history"]] == [entry["loss"] for entry in first["history"]]
    alone, _ = trained("soft", settings)
    assert first["history"][-1]["loss"] == pytest.approx(alone["history"][-1]["loss"], rel=0.1)
    assert first["history"][-1]["loss"] < 0.9 * first["history"][0]["loss"]


@pytest.mark.parametrize("method", ["full", "residual"])
def test_sparse_gradients_of_two_workers_are_the_dense_ones(pair, monkeypatch, method):
    settings = dataclasses.replace(SETTINGS, batch_size=20, epochs=2)
    (_, dense), _ = pair(trained, method, settings)
    model, *_ = made("mf", method)
    assert seldom_read(model, LossSettings("bpr"), 20), "the case is one in which rows wait"
    (_first, sparse), (_, others) = pair(trained, method, dataclasses.replace(settings, sparse_gradients=True))
    for name, weight in dense.items():
        assert torch.equal(sparse[name], others[name]), name
        torch.testing.assert_close(sparse[name], weight, rtol=1e-3, atol=1e-4)


def metrics_of(n_users: int) -> dict[str, float]:
    graph = graph_of()
    nothing = graph.copy()
    nothing.data[:] = 0
    nothing.eliminate_zeros()
    model, *_ = made("mf", "soft")
    return _validation(nothing, graph, n_users, 0, Workers.from_process_group())(model)


@pytest.mark.parametrize("n_users", [0, 7, 1])
def test_a_shared_evaluation_has_the_metrics_of_one_worker(trio, n_users):
    # With one user two workers rank nobody.
    assert trio(metrics_of, n_users) == [metrics_of(n_users)] * 3


def stopped_and_resumed(steps_before: int, batch_size: int | None, method: str, sparse: bool):
    """The state of a training that is stopped after some steps and gone on with, and that of one that is not."""
    epochs = 2 if method == "full" else SETTINGS.epochs
    settings = dataclasses.replace(SETTINGS, batch_size=batch_size, sparse_gradients=sparse, epochs=epochs)
    whole = _fit(method, settings)
    asked = iter([CONTINUE] * (steps_before - 1))
    saved = []
    state = _fit(method, settings, every_step=True, poll=lambda: next(asked, STOP), on_save=saved.append)
    assert state["stopped"]
    assert len(saved) == 1
    assert not whole["stopped"]
    return whole, _fit(method, settings, state=saved[0]), saved[0]["epoch"], saved[0]["step"]


def _fit(method, settings, every_step=False, state=None, **callbacks):
    import pipeline.training.loop

    model, users, items = made("mf", method)
    interval, pipeline.training.loop.POLL_S = (
        pipeline.training.loop.POLL_S,
        0.0 if every_step else pipeline.training.loop.POLL_S,
    )
    try:
        chosen = Callbacks(warn=lambda line: None, **callbacks)
        return fit_retrieval(model, TrainingPairs(users, items), settings, None, callbacks=chosen, state=state)
    finally:
        pipeline.training.loop.POLL_S = interval


@pytest.mark.parametrize(
    ("batch_size", "steps_before", "method", "sparse"),
    [
        (None, 3, "soft", False),
        (100, 5, "soft", False),
        (300, 10, "soft", False),
        (100, 10, "cafe", False),
        (20, 30, "full", True),
    ],
)
def test_a_training_stopped_between_steps_ends_with_the_weights_of_one_that_was_not(
    pair, batch_size, steps_before, method, sparse
):
    alone = stopped_and_resumed(steps_before, batch_size, method, sparse)
    for whole, resumed, epoch, step in [alone, *pair(stopped_and_resumed, steps_before, batch_size, method, sparse)]:
        assert whole["epoch"] == resumed["epoch"]
        assert resumed["resumed"] == [epoch]
        n_steps = 1 if batch_size is None else -(-graph_of().nnz // batch_size)
        assert epoch * n_steps + step == steps_before
        assert all(torch.equal(resumed["model"][name], weight) for name, weight in whole["model"].items())
        assert [e["loss"] for e in resumed["history"]] == [e["loss"] for e in whole["history"]]


def test_a_state_between_steps_changes_nothing():
    plain = _fit("full", dataclasses.replace(SETTINGS, batch_size=100, epochs=2))
    saved = _fit("full", dataclasses.replace(SETTINGS, batch_size=100, epochs=2), every_step=True, poll=lambda: SAVE)
    assert all(torch.equal(saved["model"][name], weight) for name, weight in plain["model"].items())


def resumed_by(saved) -> tuple[int, list[str]]:
    model, users, items = made("mf", "soft")
    notes = []
    state = fit_retrieval(
        model, TrainingPairs(users, items), SETTINGS, None, state=saved, callbacks=Callbacks(warn=notes.append)
    )
    return state["epoch"], notes


def test_other_numbers_of_workers_go_on_with_a_training_and_say_so(pair):
    saved = []
    _fit("soft", SETTINGS, poll=lambda: STOP, on_save=saved.append)
    for epoch, notes in pair(resumed_by, saved[0]):
        assert epoch == SETTINGS.epochs
        assert notes == ["this training was begun by 1 and goes on with 2 workers: other draws from here on"]


def batch_statistics_after_an_epoch(settings: RetrievalSettings) -> list[torch.Tensor]:
    workers, rng = Workers.from_process_group(), np.random.default_rng(0)
    model = CtrSpec("finalnet", dim=4, hidden=(6,), std=1.0).build([full_map(9), full_map(7)], 0)
    ids = torch.from_numpy(rng.integers(0, 7, (400, 2)))
    examples = [torch.from_numpy(rng.integers(0, 2, 400)).float(), ids, torch.zeros(400, 0)]
    loss_of = ctr_loss(0)
    fit(model, examples, settings, Objective(loss_of, ""), workers=workers)
    return [statistic.clone() for statistic in batch_statistics(model)]


def test_two_workers_have_the_mean_batch_statistics_of_one(pair):
    """Weights stand still, so that the mean over the whole batch is that of the means over its halves."""
    settings = dataclasses.replace(SETTINGS, lr=0.0, epochs=1, eval_every=1, batch_size=None)
    expected = batch_statistics_after_an_epoch(settings)
    assert len(expected) == 4
    first, second = pair(batch_statistics_after_an_epoch, settings)
    for of_first, of_second, of_one in zip(first, second, expected, strict=True):
        assert torch.equal(of_first, of_second)
        # Variances of halves lack the variance of the halves' means.
        torch.testing.assert_close(of_first, of_one, rtol=0.02, atol=1e-3)
    for number in (0, 2):
        torch.testing.assert_close(first[number], expected[number])
