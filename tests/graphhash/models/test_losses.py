"""DirectAU and implicit ALS against the obvious sums, and their gradients against differences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from graphhash.models.losses import directau_loss, ials_loss, uniformity


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)


def test_uniformity_is_the_log_of_the_mean_over_pairs():
    vectors = torch.nn.functional.normalize(random(7, 4), dim=-1).detach()
    pairs = [math.exp(-2 * float((a - b).square().sum())) for a, b in itertools.combinations(vectors, 2)]
    assert uniformity(vectors).item() == pytest.approx(math.log(sum(pairs) / len(pairs)))


def test_directau_of_opposite_unit_vectors_in_closed_form():
    users = torch.tensor([[3.0, 0.0], [-2.0, 0.0]])  # distance 2 once scaled: the uniformity is log exp(-8)
    assert directau_loss(users, users.clone(), gamma=0.5).item() == pytest.approx(0.5 * -8)
    assert directau_loss(users, -users, gamma=0.5).item() == pytest.approx(4 + 0.5 * -8)


@pytest.mark.parametrize("biased", [False, True])
def test_ials_is_the_sum_over_all_pairs(biased):
    users, items, bias = random(5, 3), random(6, 3, seed=1), random(6, seed=2) if biased else None
    rows, columns = torch.tensor([0, 1, 1, 4]), torch.tensor([2, 0, 5, 3])
    scores = users @ items.T + (0 if bias is None else bias)
    positives = scores[rows, columns]
    naive = sum((1 - float(p)) ** 2 for p in positives) + 0.3 * sum(float(s) ** 2 for s in scores.flatten())
    assert ials_loss(users, items, positives, unobserved_weight=0.3, item_bias=bias).item() == pytest.approx(naive / 4)


def test_gradients_against_differences():
    users, items = random(6, 3), random(6, 3, seed=1)
    assert torch.autograd.gradcheck(lambda u, i: directau_loss(u, i, gamma=0.7), (users, items))
    assert torch.autograd.gradcheck(
        lambda u, i: ials_loss(u, i, (u[:4] * i[2:]).sum(-1), unobserved_weight=0.2), (users, items)
    )


def test_what_cannot_be_a_loss_is_refused():
    with pytest.raises(ValueError, match="two or more pairs"):
        directau_loss(torch.ones(1, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="unobserved_weight=-1"):
        ials_loss(torch.ones(2, 2), torch.ones(2, 2), torch.ones(1), unobserved_weight=-1)
