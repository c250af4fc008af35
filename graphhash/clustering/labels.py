"""The result of a clustering: one community per user and item."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from graphhash.errors import ArgumentError


@dataclass(frozen=True, eq=False)
class Labels:
    """Communities of users and items in one label space.

    Args:
        users: community of each user, int32, shape (n_users,), in 0..n_communities-1.
        items: community of each item, int32, shape (n_items,).
        resolution: resolution the labels were found at.
        modularity: Barber's Q at that resolution.
        history: Q after each cycle.
        seconds: wall time by phase.
    """

    users: NDArray[np.int32]
    items: NDArray[np.int32]
    resolution: float
    modularity: float
    history: tuple[float, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        for name, side in (("user", self.users), ("item", self.items)):
            if side.ndim != 1 or side.dtype != np.int32 or len(side) == 0:
                raise ArgumentError(
                    f"{name} labels must be a non-empty 1-D int32 array, got {side.dtype} of shape {side.shape}"
                )
            if side.min() < 0:
                raise ArgumentError(f"{name} labels must not be negative, got {side.min()}")

    @property
    def n_communities(self) -> int:
        """Communities that hold a user or an item."""
        return len(np.union1d(self.users, self.items))

    @property
    def user_rows(self) -> int:
        """Communities that hold a user: rows that the users' side needs."""
        return len(np.unique(self.users))

    @property
    def item_rows(self) -> int:
        """Communities that hold an item: rows that the items' side needs."""
        return len(np.unique(self.items))

    @property
    def rows(self) -> int:
        """Rows of both sides."""
        return self.user_rows + self.item_rows


def compact_side(side: NDArray[np.integer]) -> tuple[NDArray[np.int32], int]:
    """Communities of one side renumbered 0..n-1 in ascending order, int32, of the shape of ``side``, and n."""
    present, buckets = np.unique(side, return_inverse=True)
    return buckets.astype(np.int32).ravel(), len(present)
