"""Modularity clustering of the user-item graph: the function that users call.

The algorithm is described in ``graphhash.clustering.engine``.
"""

from __future__ import annotations

from typing import Any

from scipy.sparse import csr_array

from graphhash.clustering.balanced import balanced_labels
from graphhash.clustering.bounded import cluster_graph
from graphhash.clustering.labels import Labels
from graphhash.clustering.resolution_search import cluster_to_rows
from graphhash.errors import ArgumentError
from graphhash.graph.local import LocalGraph
from graphhash.graph.threads import numba_threads


def cluster(
    biadjacency: csr_array,
    *,
    resolution: float | None = None,
    rows: int | tuple[int, int] | None = None,
    method: str = "louvain",
    max_size: int | None = None,
    threads: int | None = None,
    tolerance: float = 1e-3,
    max_cycles: int = 20,
    initial: Labels | None = None,
) -> Labels:
    """Cluster users and items together by modularity.

    Args:
        biadjacency: interactions, shape (n_users, n_items), weights above 0.
        resolution: larger values give more and smaller communities; 1 is plain modularity.
        rows: instead of a resolution, exactly how many rows users and items take together, or (rows of users, rows of items); the
            resolution is searched, and single buckets are merged or split to make up the rest (``graphhash.clustering.resolution_search``).
        method: "louvain"; "leiden" (slower, modularity no lower, every community connected); "lpa" (half-sweeps alone: faster, lower
            modularity, more and smaller communities). What an exact number of rows merges or splits may be disconnected.
            "balanced" (``graphhash.clustering.balanced``; only to a number of rows): few passes of label propagation, no levels.
        max_size: no community holds more users than this, or more items; None for no bound.
        threads: numba threads; all cores when None. The labels do not depend on it.
        tolerance: stop when a cycle raises modularity by less than this share of it.
        max_cycles: bound on cycles.
        initial: labels to start from, such as yesterday's; every user and item on its own when None. Modularity at the resolution asked
            for ends no lower than theirs. Not with rows, whose search has its own start.

    Returns: labels, the same for the same graph and settings, always.

    Raises:
        ArgumentError: not exactly one of resolution and rows, or a value out of range, or an unknown method, or no edges.
    """
    if (resolution is None) == (rows is None):
        raise ArgumentError(
            f"give either a resolution or a number of rows, got resolution={resolution} and rows={rows}"
        )
    settings: dict[str, Any] = {
        "method": method,
        "max_size": max_size,
        "tolerance": tolerance,
        "max_cycles": max_cycles,
    }
    with numba_threads(threads):
        if method == "balanced":
            if rows is None:
                raise ArgumentError(
                    f"method 'balanced' stops at a number of rows: give rows instead of resolution={resolution}"
                )
            return balanced_labels(biadjacency, rows=rows, max_size=max_size)
        graph = LocalGraph(biadjacency)
        if rows is not None:
            if initial is not None:
                raise ArgumentError("initial labels go with a resolution, not with a number of rows")
            return cluster_to_rows(graph, rows, **settings)
        assert resolution is not None
        return cluster_graph(graph, resolution, initial=initial, **settings)
