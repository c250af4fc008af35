"""Negative samplers: items for users who have not (or may have) used them, one for each user of a batch or some for the whole batch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from graphhash.errors import ArgumentError
from graphhash.nn.workers import Workers

# Of one item per user, and of items that a batch shares.
PAIR_SAMPLERS = ("uniform", "uniform_rejecting", "popularity")
SHARED_SAMPLERS = ("uniform", "popularity", "in_batch")
SAMPLERS = (*PAIR_SAMPLERS, "in_batch")
# A user who has nearly everything would be asked for ever.
MAX_TRIES = 50


class Shared(NamedTuple):
    """Negatives of a batch.

    Args:
        items: rows, int64, shape (m,); an item may be there several times.
        log_weights: ``-log(n_items * q_j)`` for an item that is drawn with probability q_j, float32, shape (m,): added to its logit, the
            sum over the exponentials estimates that over uniform negatives. None: zeros.
    """

    items: Tensor
    log_weights: Tensor | None


class NegativeSampler:
    """Draws one item per user of a batch (:meth:`__call__`), or items that the batch shares (:meth:`shared`).

    ``uniform`` draws from the whole catalogue; ``uniform_rejecting`` draws again what the user has, at most MAX_TRIES times;
    ``popularity`` draws item i in proportion to ``degree_i ** power``, not rejected; ``in_batch`` takes the items of the batch.

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
        if kind in ("popularity", "in_batch"):
            degrees = np.bincount(graph.indices, minlength=self.n_items).astype(np.float64)
            # An interaction of a batch is any one.
            power = 1.0 if kind == "in_batch" else power
            weights = (
                np.power(degrees, power, where=degrees > 0, out=np.zeros_like(degrees))
                if power
                else np.ones_like(degrees)
            )
            shares = weights / weights.sum()
            self._cumulative = torch.from_numpy(np.cumsum(shares)).to(device)
            # Those of share 0 are never drawn.
            log_weights = -np.log(self.n_items * np.where(shares > 0, shares, 1.0))
            self._log_weights = torch.from_numpy(log_weights.astype(np.float32)).to(device)

    def __call__(self, users: Tensor, generator: torch.Generator) -> Tensor:
        """Items, int64, for ``users``, int64, both of shape (n,); the same generator state gives the same items.

        Raises:
            ArgumentError: the sampler is ``in_batch``, which draws nothing.
        """
        device = users.device
        if self.kind == "in_batch":
            raise ArgumentError(
                f"sampler 'in_batch' is for negatives that a batch shares; use one of {', '.join(PAIR_SAMPLERS)}"
            )
        if self.kind == "popularity":
            return self._by_popularity(len(users), generator)
        items = torch.randint(self.n_items, users.shape, generator=generator, device=device)
        if self.kind == "uniform_rejecting":
            again = self._seen(users, items).nonzero().squeeze(1)
            for _ in range(MAX_TRIES):
                if not len(again):
                    break
                items[again] = torch.randint(self.n_items, again.shape, generator=generator, device=device)
                again = again[self._seen(users[again], items[again])]
        return items

    def shared(self, positives: Tensor, n: int, generator: torch.Generator, workers: Workers = Workers()) -> Shared:
        """Negatives of a batch, the same for all workers.

        Args:
            positives: items of this worker's part of the batch, int64, shape (n_own,).
            n: negatives to draw; ``in_batch`` has as many as the batch of all workers.
            generator: the first worker's draws count.

        Raises:
            ArgumentError: the sampler rejects by user.
        """
        if self.kind not in SHARED_SAMPLERS:
            raise ArgumentError(
                f"sampler {self.kind!r} draws for one user; for negatives that a batch shares use one of {', '.join(SHARED_SAMPLERS)}"
            )
        if self.kind == "in_batch":
            items, _ = workers.gather_rows(positives)
            return Shared(items, self._log_weights[items])
        if self.kind == "popularity":
            items = self._by_popularity(n, generator)
        else:
            items = torch.randint(self.n_items, (n,), generator=generator, device=positives.device)
        workers.copy_from_first([items])
        return Shared(items, self._log_weights[items] if self.kind == "popularity" else None)

    def _by_popularity(self, n: int, generator: torch.Generator) -> Tensor:
        device = self._cumulative.device
        points = torch.rand(n, generator=generator, device=device, dtype=torch.float64)
        places = torch.searchsorted(self._cumulative, points * self._cumulative[-1], right=True)
        return places.clamp_max(self.n_items - 1)

    def _seen(self, users: Tensor, items: Tensor) -> Tensor:
        if not len(self._pairs):
            return torch.zeros(users.shape, dtype=torch.bool, device=users.device)
        keys = users * self.n_items + items
        places = torch.searchsorted(self._pairs, keys).clamp_max(len(self._pairs) - 1)
        return self._pairs[places] == keys
