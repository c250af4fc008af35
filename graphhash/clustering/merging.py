"""Merging communities: Louvain moves of whole communities (Blondel et al., 2008), in rounds that any number of workers share.

In a round every community says which group it would gain most by moving to, all at once; then the moves are carried out one after the
other, largest gain first, as far as they surely gain (``_level_kernels.accept_moves``). Modularity never falls, nothing depends on
how the communities are spread over workers, and the rounds need what is O(communities) alone, not their edges. Groups become the
nodes of the next level until no group moves.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from graphhash.graph import _kernels, _level_kernels
from graphhash.graph.bipartite import Communities, Grouping

MAX_ROUNDS = 100
# Rounds end where at most this share of the communities moved; the groups of the next level move on.
SETTLED_SHARE = 0.005


def move_communities(
    communities: Communities,
    user_degrees: NDArray[np.float64],
    item_degrees: NDArray[np.float64],
    scale: float,
    labels: NDArray[np.integer],
) -> int:
    """Move communities between groups until none gains.

    Args:
        communities: the graph between them.
        user_degrees, item_degrees: weight of each one's users and items, shape (n_nodes,).
        scale: resolution over total weight.
        labels: int32 or int64, shape (n_nodes,), in 0..n_nodes-1: groups to begin with; updated in place.

    Returns: number of moves.
    """
    n_nodes = communities.n_nodes
    group_users = np.bincount(labels, user_degrees, n_nodes).astype(np.float64, copy=False)
    group_items = np.bincount(labels, item_degrees, n_nodes).astype(np.float64, copy=False)
    grouping = Grouping(labels, user_degrees, item_degrees, group_users, group_items)
    active, moved = np.ones(n_nodes, np.bool_), np.zeros(n_nodes, np.bool_)
    n_moves = 0
    for _ in range(MAX_ROUNDS):
        targets, gains, to_target, to_own = communities.propose(grouping, scale, active, moved)
        proposed = np.flatnonzero(targets >= 0)
        if len(proposed) == 0:
            break
        order = proposed[np.argsort(-gains[proposed], kind="stable")]
        # Who could not move in this round asks again in the next.
        active[:], moved[:] = False, False
        active[proposed] = True
        n_accepted = _level_kernels.accept_moves(
            order,
            targets,
            to_target,
            to_own,
            user_degrees,
            item_degrees,
            scale,
            labels,
            group_users,
            group_items,
            active,
            moved,
        )
        n_moves += n_accepted
        if n_accepted <= SETTLED_SHARE * n_nodes:
            break
    return n_moves


def merge(
    communities: Communities,
    user_degrees: NDArray[np.float64],
    item_degrees: NDArray[np.float64],
    scale: float,
    dtype: type[np.signedinteger],
) -> tuple[NDArray[np.integer], int]:
    """Move communities between groups, groups between groups of groups, and so on until nothing gains.

    Args: see :func:`move_communities`; ``dtype`` is that of the labels of users and items.

    Returns: group of each community, shape (n_nodes,), and how many groups there are.
    """
    n_groups = communities.n_nodes
    groups = np.arange(n_groups, dtype=dtype)
    while True:
        labels = np.arange(n_groups, dtype=dtype)
        if not move_communities(communities, user_degrees, item_degrees, scale, labels):
            return groups, n_groups
        n_groups = _kernels.compact_labels(labels, np.empty(0, dtype), n_groups)
        groups = labels[groups]
        communities = communities.contract(labels, n_groups)
        user_degrees = np.bincount(labels, user_degrees, n_groups).astype(np.float64, copy=False)
        item_degrees = np.bincount(labels, item_degrees, n_groups).astype(np.float64, copy=False)
