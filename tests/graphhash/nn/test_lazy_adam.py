"""LazyAdam is Adam for the rows that a step reads, and nothing for the others."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from graphhash.maps.bucket_map import full_map
from graphhash.nn.embedding import BucketEmbedding
from graphhash.nn.lazy_adam import LazyAdam

N_IDS, DIM = 60, 8


class Products(nn.Module):
    """Products of two embeddings, and a dense parameter."""

    def __init__(self):
        super().__init__()
        self.left, self.right = (
            BucketEmbedding(full_map(N_IDS), DIM, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)
        )
        self.bias = nn.Parameter(torch.zeros(DIM))

    def loss(self, a, b):
        return (((self.left(a) + self.bias) * self.right(b)).sum(-1) - 1).square().mean()

    @property
    def tables(self):
        return [self.left.table, self.right.table]


def steps(model, optimizer, batches):
    for a, b in batches:
        optimizer.zero_grad(set_to_none=True)
        model.loss(a, b).backward()
        optimizer.step()
    optimizer.close()
    return [p.detach().clone() for p in model.parameters()]


def batches(n, size, n_ids=N_IDS):
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randint(n_ids, (2, size), generator=generator)) for _ in range(n)]


def lazy(model, *, sparse=False, **how):
    rarely_read = [model.left, model.right] if sparse else []
    return LazyAdam(model.parameters(), model.tables, rarely_read, **{"lr": 0.05, "weight_decay": 0.0, **how})


@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
def test_where_every_row_is_read_it_is_adam(weight_decay):
    ours, theirs = Products(), Products()
    everything = [(torch.arange(N_IDS), torch.arange(N_IDS).flip(0))] * 7
    optimizer = torch.optim.Adam(theirs.parameters(), lr=0.05, weight_decay=weight_decay)
    optimizer.close = lambda: None
    expected = steps(theirs, optimizer, everything)
    # The out-of-vocabulary row is never read: Adam lets it decay.
    for ours_now, wanted in zip(steps(ours, lazy(ours, weight_decay=weight_decay), everything), expected, strict=True):
        torch.testing.assert_close(ours_now[:N_IDS], wanted[:N_IDS])


def test_rows_that_are_not_read_keep_numbers_and_moments():
    model = Products()
    optimizer = lazy(model)
    steps(model, optimizer, batches(3, 40))
    before, moments = model.left.table.detach().clone(), optimizer.state[model.left.table]["exp_avg"].clone()
    steps(model, optimizer, [(torch.tensor([4, 4, 7]), torch.tensor([0, 1, 2]))])
    changed = (model.left.table != before).any(1).nonzero().ravel().tolist()
    assert changed == [4, 7]
    moved = (optimizer.state[model.left.table]["exp_avg"] != moments).any(1).nonzero().ravel().tolist()
    assert moved == [4, 7]


@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
def test_sparse_gradients_give_the_same_steps(weight_decay):
    dense, sparse = Products(), Products()
    expected = steps(dense, lazy(dense, weight_decay=weight_decay), batches(9, 6))
    optimizer = lazy(sparse, sparse=True, weight_decay=weight_decay)
    assert sparse.left.sparse
    for ours, wanted in zip(steps(sparse, optimizer, batches(9, 6)), expected, strict=True):
        torch.testing.assert_close(ours, wanted)
    assert not sparse.left.sparse


@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
def test_the_arithmetic_of_other_devices_is_the_same(weight_decay, monkeypatch):
    on_cpu, elsewhere = Products(), Products()
    expected = steps(on_cpu, lazy(on_cpu, weight_decay=weight_decay), batches(9, 6))
    # The masked step on this device, which is what a GPU would do.
    monkeypatch.setattr(
        LazyAdam,
        "_step_rows_of_table",
        lambda self, table, gradient, *sizes: self._step_masked(table, gradient, *sizes),
    )
    for ours, wanted in zip(
        steps(elsewhere, lazy(elsewhere, weight_decay=weight_decay), batches(9, 6)), expected, strict=True
    ):
        torch.testing.assert_close(ours, wanted)


def test_a_saved_state_goes_on_as_if_nothing_had_happened():
    whole, parts = Products(), Products()
    expected = steps(whole, lazy(whole), batches(8, 6))
    first = lazy(parts)
    steps(parts, first, batches(8, 6)[:5])
    saved = copy.deepcopy(first.state_dict())
    second = lazy(parts)
    second.load_state_dict(saved)
    for ours, wanted in zip(steps(parts, second, batches(8, 6)[5:]), expected, strict=True):
        assert np.array_equal(ours.numpy(), wanted.numpy())
