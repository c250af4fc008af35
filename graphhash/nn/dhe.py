"""DeepHashEmbedding: vectors computed by a network from hashes of the id (DHE: Kang et al., KDD 2021, arXiv 2010.10784).

``n_hashes`` universal hash functions turn an id into whole numbers below a million, which are scaled to [-1, 1]. A network of hidden layers
with batch normalisation and Mish, and a linear layer at its end, turns them into the vector. No row belongs to an id: what is stored is the
network.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from graphhash.errors import ArgumentError
from graphhash.nn.compressed import OovVectorEmbedding, StoredTable

# Values of a hash, and the Mersenne prime of the universal hash functions: products stay below 2^63.
_HASH_VALUES, _PRIME = 1_000_000, 2**31 - 1


class DeepHashEmbedding(OovVectorEmbedding):
    """``embedding(id) = network(2 * hashes(id) / (10^6 - 1) - 1)``.

    In training, batch normalisation uses the batch's own statistics, and in evaluation mode the running ones. Several workers keep those
    of the first.

    Args:
        n_ids: ids of the vocabulary.
        dim: length of a vector.
        n_hashes: hash functions.
        width: units of every hidden layer.
        n_layers: hidden layers.
        seed: of the hash functions.
        generator: draws the initial weights; torch's global generator when None.

    Raises:
        ArgumentError: a size is below 1.

    Attributes:
        network: the layers; their weights are stored row by row, the others in float32.
        factors, offsets: buffers, int64, shape (n_hashes,); they follow from the seed and are not stored.
    """

    factors: Tensor
    offsets: Tensor
    stored_buffers: ClassVar[tuple[str, ...]] = ("oov",)

    def __init__(
        self,
        n_ids: int,
        dim: int,
        *,
        n_hashes: int,
        width: int,
        n_layers: int,
        seed: int,
        generator: torch.Generator | None = None,
    ):
        super().__init__(n_ids, dim)
        if min(n_hashes, width, n_layers) < 1:
            raise ArgumentError(f"hashes, width and layers must be at least 1, got {n_hashes}, {width}, {n_layers}")
        rng = np.random.default_rng(seed)
        for name, least in (("factors", 1), ("offsets", 0)):
            drawn = torch.from_numpy(rng.integers(least, _PRIME, n_hashes))
            self.register_buffer(name, drawn, persistent=False)
        layers: list[nn.Module] = []
        for n_inputs in [n_hashes] + (n_layers - 1) * [width]:
            # The normalisation takes every constant away, so a bias would do nothing.
            layers += [nn.Linear(n_inputs, width, bias=False), nn.BatchNorm1d(width), nn.Mish()]
        self.network = nn.Sequential(*layers, nn.Linear(width, dim))
        self._initialise(generator)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator | None) -> None:
        for linear in self._linears():
            linear.weight.normal_(std=(1 / linear.in_features) ** 0.5, generator=generator)
        assert self._linears()[-1].bias is not None
        self._linears()[-1].bias.zero_()

    def _linears(self) -> list[nn.Linear]:
        return [layer for layer in self.network if isinstance(layer, nn.Linear)]

    def _norms(self) -> list[nn.BatchNorm1d]:
        return [layer for layer in self.network if isinstance(layer, nn.BatchNorm1d)]

    @property
    def map_bytes(self) -> int:
        """Bytes of the OOV vector and of the running statistics."""
        return super().map_bytes + sum(8 * norm.num_features for norm in self._norms())

    def learned_buffers(self) -> dict[str, Tensor]:
        """The OOV vector, and the running statistics of the network."""
        return {name: buffer for name, buffer in self.named_buffers() if name == "oov" or name.startswith("network.")}

    def stored_tables(self, precision: str) -> list[StoredTable]:
        """The weight matrices, row by row in ``precision``."""
        weights = [linear.weight for linear in self._linears()]
        return [StoredTable(weight, precision) for weight in weights if isinstance(weight, nn.Parameter)]

    def encoded(self, ids: Tensor) -> Tensor:
        """Hashes of ids, int64, shape (n,), as the network reads them: float32 in [-1, 1], shape (n, n_hashes)."""
        hashes = (ids[:, None] * self.factors + self.offsets) % _PRIME % _HASH_VALUES
        return hashes.float() * (2 / (_HASH_VALUES - 1)) - 1

    def vectors(self, ids: Tensor) -> Tensor:
        """Vectors of known ids: shape (n, dim)."""
        return self.network(self.encoded(ids))

    def extra_repr(self) -> str:
        return f"n_ids={self.n_ids}, dim={self.dim}, n_hashes={len(self.factors)}"
