"""Layers of CTR models behind the embeddings (`graphhash.models.ctr_fields`): a perceptron, and interactions of fields.

Interactions work on the vectors of all fields at once, float32, shape (batch, n_fields, dim).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class Dropout(nn.Module):
    """Dropout that draws from ``generator`` (None: torch's global one), so that a resumed training draws the same numbers.

    Args:
        rate: share of the units set to zero in training, in [0, 1); the others grow by ``1 / (1 - rate)``.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.generator: torch.Generator | None = None

    def forward(self, units: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return units
        kept = torch.empty_like(units).bernoulli_(1 - self.rate, generator=self.generator)
        return units * kept / (1 - self.rate)


class Perceptron(nn.Sequential):
    """Hidden layers of ReLU units with dropout after each; without layers it returns its input.

    Args:
        n_in: length of the input.
        hidden: units of every layer.
        dropout: rate of :class:`Dropout`.
    """

    def __init__(self, n_in: int, hidden: Sequence[int], dropout: float = 0.0):
        layers: list[nn.Module] = []
        for before, units in zip((n_in, *hidden), hidden, strict=False):
            layers += [nn.Linear(before, units), nn.ReLU(inplace=True)]
            if dropout:
                layers.append(Dropout(dropout))
        super().__init__(*layers)
        self.n_out = hidden[-1] if hidden else n_in


class CrossNetwork(nn.Module):
    """Cross layers of DCN-V2: ``x_{l+1} = x_0 * (W_l x_l + b_l) + x_l`` (Wang et al., WWW 2021, eq. 1).

    Args:
        n_in: length of x_0.
        n_layers: how many.
        rank: of every W_l, which is then the product of two matrices of shapes (n_in, rank) and (rank, n_in) (eq. 2); None: W_l is square.
    """

    def __init__(self, n_in: int, n_layers: int, rank: int | None = None):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(n_in, n_in)
            if rank is None
            else nn.Sequential(nn.Linear(n_in, rank, bias=False), nn.Linear(rank, n_in))
            for _ in range(n_layers)
        )

    def forward(self, first: Tensor) -> Tensor:
        """x_0 in, x_n out, both of shape (batch, n_in)."""
        crossed = first
        for layer in self.layers:
            crossed = torch.addcmul(crossed, first, layer(crossed))
        return crossed


class FactorizedLayer(nn.Module):
    """Linear terms and products of two of them, side by side: ``[a, a * b]`` with ``[a, b] = W x + c`` (Zhu et al., SIGIR 2023).

    A layer squares the degree of the interactions of its input, as a layer of a perceptron does not.

    Args:
        n_in: length of x.
        n_out: units, an even number; W has as many rows.
    """

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.linear = nn.Linear(n_in, n_out)

    def forward(self, units: Tensor) -> Tensor:
        linear, factor = self.linear(units).chunk(2, 1)
        return torch.cat([linear, linear * factor], 1)


class BatchNorm(nn.Module):
    """``scale * (x - mean) / sqrt(variance + 1e-5) + offset`` of each unit (Ioffe and Szegedy, ICML 2015, algorithms 1 and 2).

    In training with the mean and variance of the batch, of two samples or more; else with means of those of the batches, the last ones
    first: each keeps 0.9 of the mean so far. Workers that train together normalize with their own parts of a batch.

    Args:
        n: units.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, n: int):
        super().__init__()
        self.scale, self.offset = nn.Parameter(torch.ones(n)), nn.Parameter(torch.zeros(n))
        self.register_buffer("mean", torch.zeros(n))
        self.register_buffer("variance", torch.ones(n))

    def forward(self, units: Tensor) -> Tensor:
        of_batch = self.training and len(units) > 1
        return functional.batch_norm(units, self.mean, self.variance, self.scale, self.offset, of_batch, 0.1, 1e-5)

    @torch.no_grad()
    def factor_and_offset(self) -> tuple[Tensor, Tensor]:
        """``a`` and ``b`` of the same function outside training, ``a * x + b``, float32, shape (n,) each."""
        factor = self.scale / torch.sqrt(self.variance + 1e-5)
        return factor, self.offset - factor * self.mean


class FactorizedPerceptron(nn.Sequential):
    """Layers of :class:`FactorizedLayer`, :class:`BatchNorm`, ReLU and dropout: a block of FinalNet (Zhu et al., SIGIR 2023).

    Args:
        n_in: length of the input.
        hidden: units of every layer, even numbers.
        dropout: rate of :class:`Dropout`.
    """

    def __init__(self, n_in: int, hidden: Sequence[int], dropout: float = 0.0):
        layers: list[nn.Module] = []
        for before, units in zip((n_in, *hidden), hidden, strict=False):
            layers += [FactorizedLayer(before, units), BatchNorm(units), nn.ReLU(inplace=True)]
            if dropout:
                layers.append(Dropout(dropout))
        super().__init__(*layers)
        self.n_out = hidden[-1] if hidden else n_in


class FieldGate(nn.Module):
    """All fields, and behind them each times a gate that reads the same place of all fields (Zhu et al., SIGIR 2023).

    (batch, n_fields, dim) -> (batch, 2 * n_fields, dim): ``[e, e * (G e + c)]``. Gates begin as 1.
    """

    def __init__(self, n_fields: int):
        super().__init__()
        self.gates = nn.Linear(n_fields, n_fields)
        with torch.no_grad():
            self.gates.weight.zero_()
            self.gates.bias.fill_(1)

    def forward(self, vectors: Tensor) -> Tensor:
        gates = self.gates(vectors.transpose(1, 2)).transpose(1, 2)
        return torch.cat([vectors, vectors * gates], 1)


def fm_interaction(vectors: Tensor) -> Tensor:
    """Sum over pairs of fields of their inner product, (batch, n_fields, dim) -> (batch,).

    ``((sum v)^2 - sum v^2) / 2`` (Rendle, ICDM 2010, lemma 3.1), linear in the number of fields.
    """
    return (vectors.sum(1).square().sum(1) - vectors.square().sum((1, 2))) / 2


class DotInteraction(nn.Module):
    """Inner product of every pair of fields (Naumov et al., 2019, section 2.1.3): (batch, n_fields, dim) -> (batch, n_pairs).

    Pairs (i, j), i > j, come as (1, 0), (2, 0), (2, 1), (3, 0), ...
    """

    pairs: Tensor

    def __init__(self, n_fields: int):
        super().__init__()
        below = torch.tril_indices(n_fields, n_fields, -1)
        self.n_out = below.shape[1]
        self.register_buffer("pairs", below[0] * n_fields + below[1], persistent=False)

    def forward(self, vectors: Tensor) -> Tensor:
        products = vectors @ vectors.transpose(1, 2)
        return products.flatten(1).index_select(1, self.pairs)


def binary_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross-entropy of logits and labels 0 or 1, shape (batch,) each."""
    return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
