"""Communities at several resolutions: ids from coarse to fine for every user and item, as features for any
model.

Nested levels cluster, at each resolution, the edges inside the communities of the level before, with the
degrees and the total weight of the whole graph: a fine community lies in one coarse community, and the ids of
an entity are a path down a tree. Levels that are not nested are independent clusterings, each the same as
``graphhash.cluster`` gives at its resolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graphhash.clustering.bounded import cluster_graph
from graphhash.clustering.row_budget import modularity_of
from graphhash.errors import ArgumentError
from graphhash.graph.bipartite import Graph
from graphhash.graph.local import LocalGraph
from graphhash.graph.threads import numba_threads


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """Community ids by level, coarsest first; users and items share the ids of a level.

    Args:
        users: int32, shape (n_users, n_levels); each column in 0..n_communities-1 of its level.
        items: int32, shape (n_items, n_levels).
        resolutions: of the levels, ascending.
        modularity: Barber's Q of each level at its resolution.
        nested: whether every community lies in one community of the level before.

    Raises:
        ArgumentError: shapes differ.
    """

    users: NDArray[np.int32]
    items: NDArray[np.int32]
    resolutions: tuple[float, ...]
    modularity: tuple[float, ...]
    nested: bool

    def __post_init__(self):
        n_levels = len(self.resolutions)
        if self.users.ndim != 2 or self.items.ndim != 2 or {self.users.shape[1], self.items.shape[1]} != {n_levels}:
            raise ArgumentError(
                f"levels of shape {self.users.shape} and {self.items.shape} do not fit {n_levels} resolutions"
            )


def hierarchy(
    biadjacency: csr_array,
    *,
    resolutions: Sequence[float],
    nested: bool = True,
    method: str = "louvain",
    threads: int | None = None,
    tolerance: float = 1e-3,
    max_cycles: int = 20,
) -> Hierarchy:
    """Cluster users and items at several resolutions.

    Args:
        biadjacency: interactions, shape (n_users, n_items), weights above 0.
        resolutions: ascending, such as (1, 20, 200).
        nested: whether a level splits the communities of the one before; otherwise every level stands alone.
        method, threads, tolerance, max_cycles: as in :func:`graphhash.cluster`.

    Raises:
        ArgumentError: no resolution, or not ascending, or what :func:`graphhash.cluster` refuses.
    """
    settings = {"method": method, "tolerance": tolerance, "max_cycles": max_cycles}
    with numba_threads(threads):
        return hierarchy_graph(LocalGraph(biadjacency), resolutions, nested=nested, **settings)


def hierarchy_graph(graph: Graph, resolutions: Sequence[float], *, nested: bool = True, **settings: Any) -> Hierarchy:
    """:func:`hierarchy` on any :class:`graphhash.graph.bipartite.Graph`; ``settings`` are those of ``cluster_graph``."""
    resolutions = tuple(float(resolution) for resolution in resolutions)
    if not resolutions or any(math.isnan(r) for r in resolutions) or list(resolutions) != sorted(set(resolutions)):
        raise ArgumentError(f"resolutions must be ascending and at least one, got {resolutions}")
    levels = []
    within: Graph = graph
    for resolution in resolutions:
        labels = cluster_graph(within, resolution, **settings)
        levels.append(labels)
        if nested:
            within = graph.inside(labels.users, labels.items)
    return Hierarchy(
        np.stack([labels.users for labels in levels], axis=1),
        np.stack([labels.items for labels in levels], axis=1),
        resolutions,
        tuple(modularity_of(graph, labels.users, labels.items, labels.resolution) for labels in levels),
        nested,
    )
