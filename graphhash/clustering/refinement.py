"""Refinement of communities: their connected pieces, and moves of parts of a community (Leiden; Traag,
Waltman and van Eck, 2019).

A Louvain community can fall apart in the bipartite graph, because the nodes that held it together moved on.
Two things mend that:

- :func:`split_disconnected` gives every connected piece a community of its own. This never lowers modularity:
  no edge is cut, and the expected weight between the pieces is no longer paid for.
- :func:`refine` cuts every community into parts, found by half-sweeps from singletons along the edges inside
  communities, and runs Louvain moves of whole parts, which start where they are. A part can so leave for a
  community that suits it better, where Louvain alone could move only the whole community or one user or item.

Both are ascents. They differ from the paper's Leiden in that parts are found by deterministic half-sweeps
instead of a randomised merging, so that the labels do not depend on threads or shards, and in that parts need
not be connected before the final split.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from graphhash.clustering import merging
from graphhash.graph import _kernels, _refine_kernels

if TYPE_CHECKING:
    from graphhash.clustering.state import ClusteringState
    from graphhash.graph.bipartite import Graph

PART_HALF_SWEEPS = 8


def components(graph: Graph, user_labels: NDArray[np.int32], item_labels: NDArray[np.int32]) -> tuple[NDArray, NDArray]:
    """Connected pieces of every community.

    One pass over the edges: every part of the users joins the items that its users connect (union-find), and the forests are joined.
    Users are nodes 0..n_users-1, items follow.

    Args:
        graph: any :class:`graphhash.graph.bipartite.Graph`.
        user_labels, item_labels: community of each user and item, int32, not negative.

    Returns:
        The lowest node number of the piece of every user and every item, int64, shapes (n_users,) and (n_items,).
    """
    users, items = np.empty(graph.n_users, np.int64), np.empty(graph.n_items, np.int64)
    _refine_kernels.join_forests(*graph.joined(user_labels, item_labels), users, items)
    return users, items


def n_disconnected(graph: Graph, user_labels: NDArray[np.int32], item_labels: NDArray[np.int32]) -> int:
    """Communities that the edges inside them do not hold together."""
    roots = np.concatenate(components(graph, user_labels, item_labels))
    labels = np.concatenate([user_labels, item_labels])
    # A root belongs to one community, so the roots of a community are counted by their own labels.
    return int((np.bincount(labels[np.unique(roots)]) > 1).sum())


def split_disconnected(
    graph: Graph, user_labels: NDArray[np.int32], item_labels: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32], int]:
    """Labels in which every community is connected, numbered 0.. in order of first appearance, users first.

    Returns: user labels, item labels (int32), and how many communities there are.
    """
    users, items = (roots.astype(user_labels.dtype) for roots in components(graph, user_labels, item_labels))
    return users, items, _kernels.compact_labels(users, items, graph.n_users + graph.n_items)


def connect(run: ClusteringState) -> None:
    """Split a run's disconnected communities; replaces its ``labels`` and ``n_communities``."""
    started = time.perf_counter()
    users, items, run.n_communities = split_disconnected(run.graph, run.labels["users"], run.labels["items"])
    run.labels = {"users": users, "items": items}
    run.seconds["refine"] = run.seconds.get("refine", 0.0) + time.perf_counter() - started


def refine(run: ClusteringState) -> None:
    """One refinement of a run's labels: split, find parts, Louvain moves of parts. Modularity does not fall.

    Args:
        run: its ``labels`` and ``n_communities`` are replaced; ``seconds["refine"]`` grows.
    """
    connect(run)
    started = time.perf_counter()
    graph, users, items = run.graph, run.labels["users"], run.labels["items"]
    inside = type(run)(graph.inside(users, items), run.resolution)
    inside.half_sweeps(PART_HALF_SWEEPS)
    # Labels spread along edges inside communities alone, so a part lies in one community.
    user_parts, item_parts, n_parts = inside.labels["users"], inside.labels["items"], inside.n_communities
    community = np.empty(n_parts, run.dtype)
    community[user_parts], community[item_parts] = users, items
    communities = graph.contract(user_parts, item_parts, n_parts)
    user_degrees = np.bincount(user_parts, graph.user_degrees, n_parts).astype(np.float64, copy=False)
    item_degrees = np.bincount(item_parts, graph.item_degrees, n_parts).astype(np.float64, copy=False)
    merging.move_communities(communities, user_degrees, item_degrees, run.scale, community)
    users, items = community[user_parts], community[item_parts]
    run.n_communities = _kernels.compact_labels(users, items, run.n_communities)
    run.labels = {"users": users, "items": items}
    run.wake_all()
    run.seconds["refine"] += time.perf_counter() - started
