"""Clustering of any graph at a resolution, with communities of bounded size where that is asked for."""

from __future__ import annotations

from collections.abc import Callable

from graphhash.clustering.engine import ascend
from graphhash.clustering.labels import Labels
from graphhash.clustering.row_budget import cap_sizes
from graphhash.graph.bipartite import Graph


def cluster_graph(
    graph: Graph,
    resolution: float,
    *,
    method: str = "louvain",
    max_size: int | None = None,
    tolerance: float = 1e-3,
    max_cycles: int = 20,
    initial: Labels | None = None,
    on_cycle: Callable[[int, float, int], None] | None = None,
) -> Labels:
    """:func:`graphhash.cluster` on any :class:`~graphhash.graph.bipartite.Graph` at a resolution.

    ``on_cycle(n_cycles, modularity, n_communities)`` reports progress.

    Raises:
        ArgumentError: a value out of range, an unknown method, or initial labels of another size.
    """
    labels = ascend(
        graph,
        resolution,
        method=method,
        tolerance=tolerance,
        max_cycles=max_cycles,
        initial=initial,
        on_cycle=on_cycle,
    )
    if max_size is None:
        return labels
    return cap_sizes(graph, labels, max_size, tolerance=tolerance, max_cycles=max_cycles)
