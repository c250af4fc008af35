"""Sums over shared negatives against loops over all pairs, and what is left out of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from graphhash.models.losses import bsl_loss, ccl_loss, softmax_loss
from graphhash.models.samplers import SHARED_SAMPLERS, NegativeSampler
from graphhash.models.shared_negatives import accidental_hits, log_sum_exp, mean_excess


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype, requires_grad=True)


POSITIVES, NEGATIVES = torch.tensor([3, 1, 4, 1, 9]), torch.tensor([1, 2, 1, 3, 8, 1])
PAIRS = {(i, j) for i in range(5) for j in range(6) if POSITIVES[i] == NEGATIVES[j]}


def test_hits_are_the_pairs_of_equal_keys():
    rows, columns = accidental_hits(POSITIVES, NEGATIVES)
    found = list(zip(rows.tolist(), columns.tolist(), strict=True))
    assert set(found) == PAIRS
    assert len(found) == len(PAIRS)
    assert accidental_hits(torch.tensor([5]), NEGATIVES).rows.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.2, 0.002], ids=["small logits", "large logits"])
@pytest.mark.parametrize("biased", [False, True])
def test_log_sum_exp_is_the_sum_over_the_negatives_that_count(dtype, biased, temperature):
    users, items, offsets = random(5, 3, dtype=dtype), random(6, 3, seed=1, dtype=dtype), random(6, seed=2, dtype=dtype)
    hits = accidental_hits(POSITIVES, NEGATIVES)
    found = log_sum_exp(users, items, temperature=temperature, offsets=offsets if biased else None, hits=hits)
    logits = users @ items.T / temperature + (offsets if biased else 0)
    expected = torch.stack(
        [torch.stack([logits[i, j].double() for j in range(6) if (i, j) not in PAIRS]).logsumexp(0) for i in range(5)]
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    inputs = (users, items, offsets) if biased else (users, items)
    got = torch.autograd.grad((found.double() * weights).sum(), inputs)
    for gradient, true in zip(got, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, true, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_interaction_without_a_negative_has_no_gradient(dtype):
    users, items = random(2, 3, dtype=dtype), random(2, 3, seed=1, dtype=dtype)
    hits = accidental_hits(torch.tensor([0, 1]), torch.tensor([0, 0]))
    log_sums = log_sum_exp(users, items, temperature=0.1, hits=hits)
    assert log_sums[0] == -math.inf
    positives = torch.zeros(2, dtype=dtype)
    loss = softmax_loss(positives, log_sums) + bsl_loss(positives, log_sums - math.log(2), negative_weight=1.2)
    loss.backward()
    assert torch.isfinite(loss)
    assert users.grad[0].abs().max() == 0
    assert users.grad[1].abs().min() > 0


def test_the_losses_are_their_formulas():
    users, items = (torch.nn.functional.normalize(random(n, 3, seed=n).detach(), dim=-1) for n in (5, 6))
    positives = torch.linspace(-0.5, 0.9, 5, dtype=torch.float64)
    scores = (users @ items.T).tolist()
    softmax, bsl, ccl = [], [], []
    for i, positive in enumerate(positives.tolist()):
        counted = [scores[i][j] for j in range(6) if (i, j) not in PAIRS]
        total = sum(math.exp(s / 0.1) for s in counted)
        softmax.append(-math.log(math.exp(positive / 0.1) / (math.exp(positive / 0.1) + total)))
        bsl.append(-positive / 0.1 + 1.3 * math.log(total / 6))
        ccl.append(1 - positive + 150 * sum(max(0, s - 0.2) for s in counted) / 6)
    hits = accidental_hits(POSITIVES, NEGATIVES)
    sums = log_sum_exp(users, items, temperature=0.1, hits=hits)
    excess = mean_excess(users, items, margin=0.2, hits=hits)
    assert softmax_loss(positives / 0.1, sums).item() == pytest.approx(np.mean(softmax))
    assert bsl_loss(positives / 0.1, sums - math.log(6), negative_weight=1.3).item() == pytest.approx(np.mean(bsl))
    assert ccl_loss(positives, excess, negative_weight=150).item() == pytest.approx(np.mean(ccl))


# Degrees 6, 1, 3, 0, 2.
GRAPH = csr_array((np.ones(12, np.float32), (np.arange(12) % 7, [0] * 6 + [1] + [2] * 3 + [4] * 2)), shape=(7, 5))


@pytest.mark.parametrize("kind", SHARED_SAMPLERS)
def test_corrected_sums_estimate_that_of_uniform_negatives(kind):
    """Over items with a degree, as others are never drawn by it."""
    graph = GRAPH[:, [0, 1, 2, 4]]
    sampler = NegativeSampler(graph, kind, power=0.75)
    generator = torch.Generator().manual_seed(0)
    batch = torch.from_numpy(np.random.default_rng(0).choice(graph.indices, 40_000).astype(np.int64))
    items, log_weights = sampler.shared(batch, 40_000, generator)
    assert len(items) == 40_000
    values = torch.tensor([1.0, 2.0, 5.0, 0.5])
    weights = torch.ones(len(items)) if log_weights is None else log_weights.exp()
    assert (values[items] * weights).mean().item() == pytest.approx(values.mean().item(), rel=0.03)


def test_samplers_refuse_what_they_cannot_draw():
    batch, generator = torch.zeros(3, dtype=torch.int64), torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="'uniform_rejecting' draws for one user"):
        NegativeSampler(GRAPH, "uniform_rejecting").shared(batch, 5, generator)
    with pytest.raises(ValueError, match="'in_batch' is for negatives that a batch shares"):
        NegativeSampler(GRAPH, "in_batch")(batch, generator)
    assert torch.equal(NegativeSampler(GRAPH, "in_batch").shared(batch, 5, generator).items, batch)
