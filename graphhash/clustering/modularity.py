"""Barber's modularity of a bipartite graph (Barber, Phys. Rev. E 76, 066102, 2007) at a resolution.

``Q = (1/m) * sum over users u, items i of (A_ui - g * k_u * d_i / m) * [label(u) = label(i)]``
with m the total weight, k and d the weighted degrees and g the resolution.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graphhash.errors import ArgumentError


def modularity(
    biadjacency: csr_array,
    user_labels: NDArray[np.integer],
    item_labels: NDArray[np.integer],
    *,
    resolution: float = 1.0,
) -> float:
    """Barber modularity of a labelling.

    Args:
        biadjacency: weights, shape (n_users, n_items).
        user_labels: community per user, shape (n_users,), not negative.
        item_labels: community per item, shape (n_items,), in the same label space.
        resolution: g above.

    Raises:
        ArgumentError: shapes differ.
    """
    n_users, n_items = biadjacency.shape
    if user_labels.shape != (n_users,) or item_labels.shape != (n_items,):
        raise ArgumentError(
            f"labels of shape {user_labels.shape} and {item_labels.shape} do not fit a {n_users} x {n_items} graph"
        )
    edges = biadjacency.tocoo()
    weights = edges.data.astype(np.float64)
    users, items = edges.coords
    inside = weights[user_labels[users] == item_labels[items]].sum()
    n_labels = int(max(user_labels.max(), item_labels.max())) + 1
    user_totals = np.bincount(user_labels[users], weights, n_labels)
    item_totals = np.bincount(item_labels[items], weights, n_labels)
    total = weights.sum()
    return float(inside / total - resolution * (user_totals @ item_totals) / total**2)
