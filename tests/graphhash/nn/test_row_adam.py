"""RowAdam is Adam: step by step against PyTorch's, whatever waits and whoever looks in between."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import graphhash
from graphhash.maps.bucket_map import full_map
from graphhash.nn.embedding import BucketEmbedding
from graphhash.nn.row_adam import RowAdam
from tests.helpers import graphs

MAPS = {
    "full": full_map(200),
    "modulo": graphhash.modulo_map(300, 100),
    "double": graphhash.double_map(300, 100, seed=0),
}


class Pair(nn.Module):
    """Two embeddings and a dense parameter; ``shared``: one table for both."""

    def __init__(self, bucket_map, shared=False):
        super().__init__()
        self.left, self.right = (
            BucketEmbedding(bucket_map, 16, generator=torch.Generator().manual_seed(s)) for s in (1, 2)
        )
        if shared:
            self.right.table = self.left.table
        self.bias = nn.Parameter(torch.zeros(bucket_map.n_ids))

    def loss(self, a, b):
        return ((self.left(a) * self.right(b)).sum(-1) + self.bias[b] - 1).square().mean()


def train(model, optimizer, n_steps, seed=0, look=lambda step: None):
    generator = torch.Generator().manual_seed(seed)
    n_ids = model.left.n_ids
    for step in range(n_steps):
        # Ids of a batch repeat, and most rows are not read for many steps.
        a, b = torch.randint(n_ids // 2, (2, 8), generator=generator)
        loss = model.loss(a, b)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.99
        look(step)


@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
@pytest.mark.parametrize("name", MAPS)
def test_its_weights_and_state_are_adams(name, shared, weight_decay):
    ours, theirs = Pair(MAPS[name], shared), Pair(MAPS[name], shared)
    how = {"lr": 0.05, "weight_decay": weight_decay}
    rows, adam = (
        RowAdam(ours.parameters(), [ours.left, ours.right], **how),
        torch.optim.Adam(theirs.parameters(), **how),
    )
    train(ours, rows, 100)
    train(theirs, adam, 100)
    # A vector is up to date when it is read, though its row may have waited.
    assert torch.allclose(ours.left.all(), theirs.left.all(), rtol=1e-3, atol=1e-5)
    rows.close()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    state, expected = rows.state_dict(), adam.state_dict()
    assert state["state"].keys() == expected["state"].keys()
    for key in expected["state"]:
        for part in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state["state"][key][part], expected["state"][key][part], rtol=1e-3, atol=1e-7)


def test_tables_with_a_weight_decay_of_their_own_are_adams():
    models = [Pair(MAPS["full"]) for _ in range(2)]
    groups = [[{"params": [m.bias]}, {"params": [m.left.table, m.right.table], "weight_decay": 0.1}] for m in models]
    how = {"lr": 0.05, "weight_decay": 1e-3}
    rows, adam = RowAdam(groups[0], [models[0].left, models[0].right], **how), torch.optim.Adam(groups[1], **how)
    for model, optimizer in zip(models, (rows, adam), strict=True):
        # Both groups keep their learning rate.
        train(model, optimizer, 60, look=lambda step, o=optimizer: o.param_groups[0].update(lr=0.05))
    rows.close()
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    other = Pair(MAPS["full"])
    plain = RowAdam(other.parameters(), [other.left, other.right], **how)
    train(other, plain, 60, look=lambda step: plain.param_groups[0].update(lr=0.05))
    plain.close()
    assert other.left.table.norm() > 2 * models[0].left.table.norm()


def test_rows_read_by_folds_are_up_to_date():
    graph = graphs.random_graph(0, 60, 40, 400)
    labels = graphhash.cluster(graph, rows=50)
    half = graphs.random_graph(1, 60, 40, 200)
    (users, _), (folded, _) = (
        graphhash.soft_maps(graph, labels, indices_per_id=2, folds=f) for f in ((), (graph, half))
    )
    parts = []
    for make in (
        lambda e: RowAdam(e.parameters(), [e], lr=0.05, weight_decay=1e-2),
        lambda e: torch.optim.Adam(e.parameters(), lr=0.05, weight_decay=1e-2),
    ):
        embedding = BucketEmbedding(users, 16, generator=torch.Generator().manual_seed(0))
        embedding.use_folds(folded)
        optimizer = make(embedding)
        generator = torch.Generator().manual_seed(1)
        for _ in range(50):
            ids, fold = torch.randint(61, (4,), generator=generator), torch.randint(2, (4,), generator=generator)
            optimizer.zero_grad()
            (embedding(ids, fold) - 1).square().mean().backward()
            optimizer.step()
        getattr(optimizer, "close", lambda: None)()
        parts.append(embedding.table.detach())
    torch.testing.assert_close(*parts, rtol=1e-3, atol=1e-5)


def test_looking_in_between_changes_no_bit():
    models = [Pair(MAPS["full"]) for _ in range(3)]
    optimizers = [RowAdam(m.parameters(), [m.left, m.right], lr=0.05, weight_decay=1e-3) for m in models]
    looks = [lambda step: None, lambda step: optimizers[1].finish(), lambda step: models[2].left(torch.arange(step))]
    for model, optimizer, look in zip(models, optimizers, looks, strict=True):
        train(model, optimizer, 40, look=look)
        optimizer.close()
    for other in models[1:]:
        for a, b in zip(models[0].parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_no_bit(threads, monkeypatch):
    monkeypatch.setattr("graphhash.nn.table_reads.SMALL_WORK", 0)
    before = torch.get_num_threads()
    results = []
    try:
        for n in (threads, 3 - threads):
            torch.set_num_threads(n)
            model = Pair(MAPS["double"])
            optimizer = RowAdam(model.parameters(), [model.left, model.right], lr=0.05, weight_decay=1e-3)
            train(model, optimizer, 20)
            optimizer.close()
            results.append(model.left.table.detach().clone())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_its_state_resumes_to_the_same_bits_and_in_plain_adam():
    whole = Pair(MAPS["full"])
    optimizer = RowAdam(whole.parameters(), [whole.left, whole.right], lr=0.05, weight_decay=1e-3)
    train(whole, optimizer, 20, seed=1)
    state = copy.deepcopy(optimizer.state_dict())
    half = copy.deepcopy(whole.state_dict())
    train(whole, optimizer, 20, seed=2)
    optimizer.close()
    for waiting, exact in ((True, True), (False, False)):
        resumed = Pair(MAPS["full"])
        resumed.load_state_dict(half)
        again = RowAdam(
            resumed.parameters(), [resumed.left, resumed.right] if waiting else [], lr=1.0, weight_decay=0.0
        )
        again.load_state_dict(copy.deepcopy(state))
        train(resumed, again, 20, seed=2)
        again.close()
        assert torch.equal(resumed.left.table, whole.left.table) or not exact
        torch.testing.assert_close(resumed.left.table, whole.left.table, rtol=1e-3, atol=1e-5)


def test_closing_leaves_the_layer_as_it_was():
    model = Pair(MAPS["full"])
    optimizer = RowAdam(model.parameters(), [model.left, model.right], lr=0.05, weight_decay=0.0)
    train(model, optimizer, 1)
    assert model.left.table.grad.is_sparse
    optimizer.close()
    model.loss(torch.tensor([1]), torch.tensor([2])).backward()
    model.zero_grad()
    model.loss(torch.tensor([1]), torch.tensor([2])).backward()
    assert not model.left.table.grad.is_sparse
    assert not model.left._forward_pre_hooks
    assert np.isfinite(model.left.table.detach().numpy()).all()
