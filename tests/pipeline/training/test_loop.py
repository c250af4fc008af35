"""The training loop: it learns, stops, resumes to the same weights, and says when it diverges."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

import graphhash
from graphhash.metrics.ranking import recall_at_k
from graphhash.models.losses import bpr_loss
from graphhash.models.mf import MatrixFactorization
from graphhash.nn.workers import Workers
from pipeline.maps.methods import METHODS, Inputs
from pipeline.retrieval.evaluate import rank_users
from pipeline.retrieval.objective import LossSettings, RetrievalSettings, TrainingPairs, fit_retrieval, seldom_read
from pipeline.training.loop import CONTINUE, POLL_S, Callbacks, _Poll
from tests.helpers import graphs

SETTINGS = RetrievalSettings(lr=0.05, weight_decay=1e-6, epochs=30, eval_every=5, patience=100, batch_size=None, seed=0)


@pytest.fixture(scope="module")
def graph():
    return graphs.planted(0, 6, 30, 0.3, 0.02)[0]


@pytest.fixture(scope="module")
def labels(graph):
    return graphhash.cluster(graph, resolution=3)


@pytest.fixture(scope="module")
def many_labels(graph):
    """Enough rows for quotients and remainders."""
    return graphhash.cluster(graph, rows=90)


def model_of(graph, labels, method="soft", item_bias=True):
    spec = METHODS[method]
    maps = spec.make(Inputs(graph, labels, spec.indices_per_id, "1+2", 0, graphs.features(graph)))
    return MatrixFactorization(*maps, 16, item_bias=item_bias, seed=0)


def pairs_of(graph):
    users, items = graph.nonzero()
    return torch.from_numpy(users.astype(np.int64)), torch.from_numpy(items.astype(np.int64))


@pytest.mark.parametrize("item_bias", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_one_step_lowers_the_loss_of_every_method(graph, many_labels, method, item_bias):
    model = model_of(graph, many_labels, method, item_bias)
    users, items = pairs_of(graph)
    negatives = torch.randint(graph.shape[1], items.shape, generator=torch.Generator().manual_seed(0))

    def loss():
        return bpr_loss(model(users, items), model(users, negatives))

    before = loss()
    before.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 10 * parameter.grad
    assert loss() < before


@pytest.mark.parametrize("method", METHODS)
def test_all_methods_get_the_same_number_of_rows(graph, many_labels, method):
    users, items = METHODS[method].make(
        Inputs(graph, many_labels, METHODS[method].indices_per_id, "1+2", 0, graphs.features(graph))
    )
    if METHODS[method].reads_communities:
        assert users.n_buckets + (0 if users.shared else items.n_buckets) == many_labels.rows + 2
    assert users.indices_per_id == METHODS[method].indices_per_id
    n_codes = 0 if users.codebook is None else len(users.codebook)
    assert bool(n_codes) == bool(METHODS[method].n_codes)
    assert n_codes <= METHODS[method].n_codes


def test_training_puts_a_users_own_items_on_top(graph, labels):
    # Soft maps rank them high before any training.
    model = model_of(graph, labels, "graph")
    nothing = graph.copy()
    nothing.data[:] = 0
    nothing.eliminate_zeros()
    before = recall_at_k(rank_users(model, np.arange(graph.shape[0]), nothing, 20), graph)
    state = fit_retrieval(model, TrainingPairs(*pairs_of(graph)), SETTINGS, None)
    after = recall_at_k(rank_users(model, np.arange(graph.shape[0]), nothing, 20), graph)
    assert after.mean() > 3 * before.mean()
    losses = [entry["loss"] for entry in state["history"]]
    assert losses[-1] < 0.7 * losses[0]
    assert [entry["epoch"] for entry in state["history"]] == [5, 10, 15, 20, 25, 30]


@pytest.mark.parametrize("batch_size", [None, 100])
def test_a_resumed_training_ends_with_the_weights_of_an_uninterrupted_one(graph, labels, batch_size):
    settings = dataclasses.replace(SETTINGS, epochs=20, batch_size=batch_size)
    pairs = TrainingPairs(*pairs_of(graph))
    whole = fit_retrieval(model_of(graph, labels), pairs, settings, None)
    saved = {}
    fit_retrieval(
        model_of(graph, labels),
        pairs,
        settings,
        None,
        callbacks=Callbacks(on_evaluation=lambda s: saved.setdefault(s["epoch"], copy.deepcopy(s))),
    )
    resumed = fit_retrieval(model_of(graph, labels), pairs, settings, None, state=saved[10])
    assert resumed["epoch"] == whole["epoch"] == 20
    for name, weight in whole["model"].items():
        assert torch.equal(resumed["model"][name], weight), name
    assert [e["loss"] for e in resumed["history"]] == [e["loss"] for e in whole["history"]]


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_that_wait_end_where_adam_takes_them_and_resume_to_the_same_bits(graph, labels, threads, monkeypatch):
    settings = dataclasses.replace(SETTINGS, epochs=20, batch_size=100)
    pairs = TrainingPairs(*pairs_of(graph))
    adam = fit_retrieval(model_of(graph, labels, "full"), pairs, settings, None)
    monkeypatch.setattr("pipeline.training.seldom.SELDOM", 0)
    saved = {}
    keep = Callbacks(on_evaluation=lambda s: saved.setdefault(s["epoch"], copy.deepcopy(s)))
    whole = fit_retrieval(model_of(graph, labels, "full"), pairs, settings, None, callbacks=keep)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        resumed = fit_retrieval(model_of(graph, labels, "full"), pairs, settings, None, state=saved[10])
    finally:
        torch.set_num_threads(before)
    for name, weight in whole["model"].items():
        assert torch.equal(resumed["model"][name], weight), name
    losses, expected = ([e["loss"] for e in state["history"]] for state in (whole, adam))
    assert losses == pytest.approx(expected, rel=1e-3)
    assert resumed["optimizer"]["state"].keys() == adam["optimizer"]["state"].keys()


def test_which_rows_wait(graph, labels):
    full, soft = (model_of(graph, labels, method) for method in ("full", "soft"))
    assert seldom_read(full, LossSettings("bpr"), 5) == [full.user_embedding, full.item_embedding]
    # Fifteen items and fifteen more are read for fifteen users.
    assert seldom_read(full, LossSettings("bpr"), 15) == [full.user_embedding]
    assert (
        seldom_read(full, LossSettings("bpr"), None)
        == seldom_read(full, LossSettings("ials"), 5)
        == seldom_read(soft, LossSettings("bpr"), 100)
        == []
    )


def test_phases_are_told_in_the_order_of_a_step(graph, labels):
    phases = []
    settings = dataclasses.replace(SETTINGS, epochs=1, batch_size=len(pairs_of(graph)[0]))
    fit_retrieval(
        model_of(graph, labels),
        TrainingPairs(*pairs_of(graph)),
        settings,
        None,
        callbacks=Callbacks(on_phase=phases.append),
    )
    assert phases == ["batches", "negatives", "forward", "backward", "step", "step"]


def test_patience_counts_evaluations_and_the_best_weights_are_kept(graph, labels):
    recalls = iter([0.1, 0.3, 0.2, 0.25, 0.9])
    seen = []

    def validate(model):
        seen.append(model.user_embedding.table.detach().clone())
        return {"capped_recall@20": next(recalls)}

    settings = dataclasses.replace(SETTINGS, epochs=100, patience=2)
    state = fit_retrieval(model_of(graph, labels), TrainingPairs(*pairs_of(graph)), settings, validate)
    assert (state["epoch"], state["best_epoch"], state["best_score"]) == (20, 10, 0.3)
    assert torch.equal(state["best"]["user_embedding.table"], seen[1])
    assert not torch.equal(state["model"]["user_embedding.table"], seen[1])


def test_the_seed_decides_everything(graph, labels):
    a, b, c = (
        fit_retrieval(
            model_of(graph, labels),
            TrainingPairs(*pairs_of(graph)),
            dataclasses.replace(SETTINGS, seed=s, epochs=5),
            None,
        )
        for s in (0, 0, 1)
    )
    assert torch.equal(a["model"]["item_embedding.table"], b["model"]["item_embedding.table"])
    assert not torch.equal(a["model"]["item_embedding.table"], c["model"]["item_embedding.table"])


def test_polls_come_in_time_where_the_first_steps_look_short(monkeypatch):
    """A GPU has only been given them. A second's steps waited for 200 of them."""
    now, polled = [0.0], []
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    poll = _Poll(lambda: polled.append(now[0]) or CONTINUE, Workers())
    for step in range(40):
        now[0] += POLL_S / 200 if step < 2 else 1.0
        poll()
    gaps = np.diff([0.0, *polled])
    assert max(gaps) <= 4
    assert list(gaps[-5:]) == [1.0] * 5


def test_divergence_is_an_error_that_names_the_learning_rate(graph, labels):
    model = model_of(graph, labels)
    with torch.no_grad():
        model.user_embedding.table.fill_(math.inf)
    with pytest.raises(graphhash.DataError, match=r"training diverged; lower train.lr \(0.05\)"):
        fit_retrieval(model, TrainingPairs(*pairs_of(graph)), SETTINGS, None)
