"""Negatives that a test decides, in place of a sampler's draws."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graphhash.models.samplers import Shared
from graphhash.nn.workers import Workers


class GivenNegatives:
    """Stands for a `NegativeSampler`.

    Args:
        of_users: items for users, rows of shape (n,).
        shared: negatives that a batch shares, int64, and their log weights; in the batch without.
    """

    def __init__(self, of_users: Callable[[Tensor], Tensor], shared: Shared | None = None) -> None:
        self._of_users, self._shared = of_users, shared

    def __call__(self, users: Tensor, generator: torch.Generator) -> Tensor:
        return self._of_users(users)

    def shared(self, positives: Tensor, n: int, generator: torch.Generator, workers: Workers = Workers()) -> Shared:
        return Shared(workers.gather_rows(positives)[0], None) if self._shared is None else self._shared
