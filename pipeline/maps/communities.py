"""Stored communities of a bipartite graph, and the figures that describe them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from graphhash.clustering.labels import Labels
from graphhash.clustering.refinement import n_disconnected
from graphhash.errors import DataError
from graphhash.graph.bipartite import Graph

SIDES = ("users", "items")


class CommunitySizes(TypedDict):
    """Sizes of the communities of one side, in ids."""

    median: float
    p99: float
    largest: int


class CommunityFacts(TypedDict):
    """Figures of a clustering.

    ``share_inside``: of the edges' weight, inside communities. ``n_disconnected``: communities that are not connected subgraphs.
    ``user_rows``, ``item_rows``: communities with users, and with items. ``history``: modularity after each cycle.
    """

    resolution: float
    modularity: float
    share_inside: float
    n_communities: int
    n_disconnected: int
    user_rows: int
    item_rows: int
    rows: int
    sizes: dict[str, CommunitySizes]
    n_cycles: int
    history: list[float]


def save_communities(labels: Labels, folder: Path) -> None:
    """Write ``labels_users.npy`` and ``labels_items.npy``: int32, one community per row of the graph's side."""
    np.save(folder / "labels_users.npy", labels.users)
    np.save(folder / "labels_items.npy", labels.items)


def load_communities(folder: Path, facts: Mapping[str, Any]) -> Labels:
    """What :func:`save_communities` wrote.

    Args:
        facts: holds ``resolution``, ``modularity`` and ``history``.

    Raises:
        DataError: a file is missing or damaged.
    """
    try:
        users, items = (np.load(folder / f"labels_{side}.npy", allow_pickle=False) for side in SIDES)
        return Labels(users, items, facts["resolution"], facts["modularity"], tuple(facts["history"]))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"{folder}: labels cannot be read ({error}); run 'graphhash cluster' again") from error


def describe_communities(graph: Graph, labels: Labels) -> CommunityFacts:
    """Figures of a clustering of ``graph``."""
    sizes: dict[str, CommunitySizes] = {}
    for side, values in zip(SIDES, (labels.users, labels.items), strict=True):
        counts = np.unique(values, return_counts=True)[1]
        sizes[side] = {
            "median": float(np.median(counts)),
            "p99": float(np.percentile(counts, 99)),
            "largest": int(counts.max()),
        }
    return {
        "resolution": labels.resolution,
        "modularity": labels.modularity,
        "share_inside": graph.weight_inside(labels.users, labels.items) / graph.total_weight,
        "n_communities": labels.n_communities,
        "n_disconnected": n_disconnected(graph, labels.users, labels.items),
        "user_rows": labels.user_rows,
        "item_rows": labels.item_rows,
        "rows": labels.rows,
        "sizes": sizes,
        "n_cycles": max(0, len(labels.history) - 1),
        "history": list(labels.history),
    }
