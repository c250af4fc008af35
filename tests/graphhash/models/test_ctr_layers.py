"""Interactions of fields against einsum and loops, and dropout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphhash.models.ctr_layers import CrossNetwork, DotInteraction, Dropout, fm_interaction
from tests.helpers.ctr_batches import noisy


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


def test_low_rank_cross_layers_are_those_of_the_products():
    low, square = noisy(CrossNetwork(5, 3, rank=2)), CrossNetwork(5, 3)
    with torch.no_grad():
        for (narrow, wide), layer in zip(low.layers, square.layers, strict=True):
            layer.weight.copy_(wide.weight @ narrow.weight)
            layer.bias.copy_(wide.bias)
    first = torch.randn(7, 5)
    torch.testing.assert_close(low(first), square(first), rtol=1e-4, atol=1e-4)
    assert sum(weight.numel() for weight in low.parameters()) == 3 * (5 * 2 + 2 * 5 + 5)


def test_dropout_is_for_training_and_keeps_the_mean():
    layer = Dropout(0.25)
    layer.generator = torch.Generator().manual_seed(0)
    units = torch.ones(200, 200)
    dropped = layer(units)
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert dropped.mean().item() == pytest.approx(1, abs=0.01)
    assert torch.equal(layer.eval()(units), units)
