"""Negative samplers: items for users who have not (or may have) used them."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from graphhash.errors import ArgumentError

SAMPLERS = ("uniform", "uniform_rejecting", "popularity")
# A user who has nearly everything would be asked for ever.
MAX_TRIES = 50


class NegativeSampler:
    """Draws one item per user of a batch.

    ``uniform`` draws from the whole catalogue; ``uniform_rejecting`` draws again what the user has, at most MAX_TRIES times;
    ``popularity`` draws item i in proportion to ``degree_i ** power``, not rejected.

    Args:
        graph: training interactions, shape (n_users, n_items).
        kind: one of SAMPLERS.
        power: exponent of ``popularity``; 0 is uniform, 0.75 is word2vec's.
        device: where batches are.

    Raises:
        ArgumentError: an unknown kind, a power that is not finite, or an empty catalogue.
    """

    def __init__(
        self,
        graph: csr_array,
        kind: str = "uniform",
        *,
        power: float = 0.75,
        device: torch.device | str = "cpu",
    ):
        if kind not in SAMPLERS:
            raise ArgumentError(f"sampler is {kind!r}; use one of {', '.join(SAMPLERS)}")
        if not np.isfinite(power):
            raise ArgumentError(f"power is {power}; use a finite number")
        self.n_items = graph.shape[1]
        if self.n_items == 0:
            raise ArgumentError("the catalogue is empty; there is nothing to draw negatives from")
        self.kind = kind
        if kind == "uniform_rejecting":
            users = np.repeat(np.arange(graph.shape[0], dtype=np.int64), np.diff(graph.indptr))
            self._pairs = torch.from_numpy(np.unique(users * self.n_items + graph.indices)).to(device)
        if kind == "popularity":
            degrees = np.bincount(graph.indices, minlength=self.n_items).astype(np.float64)
            weights = (
                np.power(degrees, power, where=degrees > 0, out=np.zeros_like(degrees))
                if power
                else np.ones_like(degrees)
            )
            self._cumulative = torch.from_numpy(np.cumsum(weights / weights.sum())).to(device)

    def __call__(self, users: Tensor, generator: torch.Generator) -> Tensor:
        """Items, int64, for ``users``, int64, both of shape (n,); the same generator state gives the same items."""
        device = users.device
        if self.kind == "popularity":
            points = torch.rand(users.shape, generator=generator, device=device, dtype=torch.float64)
            return torch.searchsorted(self._cumulative, points * self._cumulative[-1], right=True).clamp_max(
                self.n_items - 1
            )
        items = torch.randint(self.n_items, users.shape, generator=generator, device=device)
        if self.kind == "uniform_rejecting":
            again = self._seen(users, items).nonzero().squeeze(1)
            for _ in range(MAX_TRIES):
                if not len(again):
                    break
                items[again] = torch.randint(self.n_items, again.shape, generator=generator, device=device)
                again = again[self._seen(users[again], items[again])]
        return items

    def _seen(self, users: Tensor, items: Tensor) -> Tensor:
        if not len(self._pairs):
            return torch.zeros(users.shape, dtype=torch.bool, device=users.device)
        keys = users * self.n_items + items
        places = torch.searchsorted(self._pairs, keys).clamp_max(len(self._pairs) - 1)
        return self._pairs[places] == keys
