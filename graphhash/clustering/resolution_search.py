"""The resolution for a number of rows: rows grow with the resolution, so it is searched on a logarithmic
scale.

The search ends a little above the budget and the smallest buckets are merged, because that costs next to no
modularity, where splitting as few of the largest does (measured on Gowalla at 11,500 rows: 0.1 % lost by
merging 44 buckets, 3.6 % by 28 splits).

On a large graph, where a step takes minutes, a lower resolution starts from the labels of the last higher one, whose communities it merges,
and not from single ids; a higher one is no further than rows need; and the search ends with up to 2 % of the rows to merge.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

from graphhash.clustering.bounded import cluster_graph
from graphhash.clustering.labels import Labels
from graphhash.clustering.row_budget import fit_rows, share_rows
from graphhash.errors import ArgumentError
from graphhash.graph.bipartite import Graph

MAX_STEPS = 16
SLACK = 0.005
# Ids from which on a graph is large. Below, a search takes seconds, and the recall that this project publishes is that of its labels.
LARGE_GRAPH, LARGE_SLACK = 1_000_000, 0.02


def cluster_to_rows(graph: Graph, rows: int | tuple[int, int], *, max_size: int | None = None, **settings) -> Labels:
    """Labels with exactly so many rows.

    Args:
        graph: any :class:`graphhash.graph.bipartite.Graph`.
        rows: of users and items together, divided between them as the search finds them; or (rows of users, rows of items).
        max_size: most users, and most items, of a community.
        settings: of :func:`graphhash.clustering.bounded.cluster_graph`.

    Raises:
        ArgumentError: fewer than 1 row for a side, or no fewer rows than ids, or not with communities of at most ``max_size``.
    """
    started = time.perf_counter()
    n_ids = graph.n_users + graph.n_items
    total = rows if isinstance(rows, int) else sum(rows)
    if total < 2:
        raise ArgumentError(f"rows must be at least 2 (one for users, one for items), got {rows}")
    if total >= n_ids:
        raise ArgumentError(f"{total} rows are no fewer than the {n_ids} ids: use method 'full'")
    if not isinstance(rows, int):
        for n_rows, n_side, side in ((rows[0], graph.n_users, "users"), (rows[1], graph.n_items, "items")):
            if not 1 <= n_rows <= n_side:
                raise ArgumentError(f"{n_rows} rows for {n_side} {side} are out of range; give 1 to {n_side}")

    def share(labels: Labels) -> float:
        """Rows found over rows wanted, of the side that is shorter of them."""
        if isinstance(rows, int):
            return labels.rows / rows
        return min(labels.user_rows / rows[0], labels.item_rows / rows[1])

    # About rows / 50 is the resolution of so many rows on the graphs measured.
    labels = search_resolution(graph, share, max(1.0, total / 50), max_size=max_size, **settings)
    searched = time.perf_counter()
    user_rows, item_rows = share_rows(labels, rows) if isinstance(rows, int) else rows
    labels = fit_rows(graph, labels, user_rows=user_rows, item_rows=item_rows, max_size=max_size)
    # The phases are those of the resolution that was chosen.
    search = searched - started - sum(labels.seconds.values())
    return replace(labels, seconds={**labels.seconds, "search": search, "fit_rows": time.perf_counter() - searched})


def search_resolution(graph: Graph, share: Callable[[Labels], float], start: float, **settings) -> Labels:
    """Labels of smallest ``share`` at or above 1; it ends at most ``SLACK`` (``LARGE_SLACK``) above 1, or after ``MAX_STEPS``.

    Args:
        share: what of the goal labels reach; it grows with the resolution.
        start: resolution tried first.
        settings: of :func:`graphhash.clustering.bounded.cluster_graph`.

    Returns: where no resolution tried reaches 1, the labels of largest share; where lower ones stop to lessen it, those of least.
    """
    above: Labels | None = None  # The labels nearest to the goal on either side.
    below: Labels | None = None
    low: tuple[float, float] | None = None  # (log resolution, log share) of them.
    high: tuple[float, float] | None = None
    log_resolution = math.log(start)
    is_large = graph.n_users + graph.n_items >= LARGE_GRAPH
    slack = LARGE_SLACK if is_large else SLACK
    for _ in range(MAX_STEPS):
        is_finer = above is not None and above.resolution > math.exp(log_resolution)
        initial = above if is_finer and is_large else None
        labels = cluster_graph(graph, math.exp(log_resolution), initial=initial, **settings)
        reached = share(labels)
        point = (log_resolution, math.log(reached))
        if reached >= 1:
            # A quarter of the resolution that saves no row: what is left are pieces that nothing connects.
            settled = low is None and high is not None and point[1] >= high[1]
            high = point
            if above is None or reached < share(above):
                above = labels
            if reached <= 1 + slack or settled:
                break
        else:
            low = point
            if below is None or reached > share(below):
                below = labels
        if low is None or high is None:
            upwards = min(math.log(4), 1.5 * (math.log(1.15) - point[1])) if is_large else math.log(4)
            log_resolution = point[0] - math.log(4) if reached >= 1 else point[0] + upwards
        elif abs(high[0] - low[0]) < 1e-6:
            break
        else:
            part = (slack / 2 - low[1]) / max(high[1] - low[1], 1e-12)
            # Away from the ends, so that every step shrinks the bracket.
            log_resolution = low[0] + min(max(part, 0.05), 0.95) * (high[0] - low[0])
    found = below if above is None else above
    assert found is not None
    return found
