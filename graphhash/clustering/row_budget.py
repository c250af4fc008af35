"""Exact budgets: labels with a wanted number of rows per side, and communities of bounded size.

:func:`fit_rows` merges the smallest buckets of a side, or splits its largest, until the side has exactly as
many as wanted. A bucket is what a community holds of one side, so the other side's labels stay as they are:
there is still one label space, but a label may then hold users alone or items alone, and a fitted side is no
longer a local optimum of modularity.

:func:`cap_sizes` clusters what is inside an oversize community again, at twice the resolution and twice
again, and cuts by row order what that does not separate.
"""

from __future__ import annotations

import heapq
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from graphhash.clustering.engine import ascend
from graphhash.clustering.labels import Labels
from graphhash.errors import ArgumentError
from graphhash.graph import _kernels
from graphhash.graph.bipartite import Graph

CAP_ROUNDS = 12


def fit_rows(
    graph: Graph,
    labels: Labels,
    *,
    user_rows: int | None = None,
    item_rows: int | None = None,
    max_size: int | None = None,
) -> Labels:
    """Labels with exactly ``user_rows`` user buckets and ``item_rows`` item buckets.

    Too many: the smallest bucket joins the bucket of its side that lowers modularity least, again and again. Too few: the largest
    gives the half of its members that hold to it least a label of their own. Ties go to the lowest label, and to the lowest row.

    Args:
        graph: any :class:`graphhash.graph.bipartite.Graph`.
        labels: where to begin; their resolution weighs the merges.
        user_rows, item_rows: wanted; None leaves a side as it is.
        max_size: merges make no bucket of more members than this.

    Returns: labels numbered 0.. in order of first appearance, users first, with the modularity that they have now.

    Raises:
        ArgumentError: a side cannot have that many rows, or not with buckets of at most ``max_size``.
    """
    sides = {"users": labels.users, "items": labels.items}
    other = {"users": "items", "items": "users"}
    for side, wanted in (("users", user_rows), ("items", item_rows)):
        if wanted is None:
            continue
        n_ids = len(sides[side])
        if not 1 <= wanted <= n_ids:
            raise ArgumentError(f"{wanted} rows for {n_ids} {side} are out of range; give 1 to {n_ids}")
        if max_size is not None and wanted * max_size < n_ids:
            raise ArgumentError(
                f"{wanted} rows of at most {max_size} cannot hold {n_ids} {side}; raise rows or max_size"
            )
        n_found = len(np.unique(sides[side]))
        if n_found > wanted:
            sides[side] = _merge(
                graph, side, sides[side], sides[other[side]], labels.resolution, n_found - wanted, max_size
            )
        elif n_found < wanted:
            sides[side] = _split(graph, side, sides[side], sides[other[side]], labels.resolution, wanted - n_found)
    return _relabelled(graph, labels, sides["users"], sides["items"])


def share_rows(labels: Labels, rows: int) -> tuple[int, int]:
    """``rows`` divided between users and items as these labels divide theirs; at least one for each side."""
    n_users, n_items = len(labels.users), len(labels.items)
    users = round(rows * labels.user_rows / labels.rows)
    users = min(max(users, 1, rows - n_items), n_users, rows - 1)
    return users, rows - users


def cap_sizes(graph: Graph, labels: Labels, max_size: int, *, tolerance: float = 1e-3, max_cycles: int = 20) -> Labels:
    """Labels of which none holds more than ``max_size`` users or more than ``max_size`` items.

    Args:
        graph: any :class:`graphhash.graph.bipartite.Graph`.
        tolerance, max_cycles: of the clustering inside oversize communities.

    Returns: labels numbered 0.. in order of first appearance, users first; the same ones when none is oversize.

    Raises:
        ArgumentError: max_size is below 1.
    """
    if max_size < 1:
        raise ArgumentError(f"max_size must be at least 1, got {max_size}")
    users, items = labels.users.copy(), labels.items.copy()
    resolution, n_labels = labels.resolution, int(max(users.max(), items.max())) + 1
    for _ in range(CAP_ROUNDS):
        oversize = (np.bincount(users, minlength=n_labels) > max_size) | (
            np.bincount(items, minlength=n_labels) > max_size
        )
        if not oversize.any():
            break
        resolution *= 2
        inside = graph.inside(*(np.where(oversize[side], side, -1).astype(np.int32) for side in (users, items)))
        found = ascend(inside, resolution, tolerance=tolerance, max_cycles=max_cycles)
        users = np.where(oversize[users], n_labels + found.users, users).astype(np.int32)
        items = np.where(oversize[items], n_labels + found.items, items).astype(np.int32)
        n_labels = _kernels.compact_labels(users, items, n_labels + found.n_communities)
    pieces: list[NDArray[np.int64]] = [side + n_labels * (_rank_in_label(side) // max_size) for side in (users, items)]
    _, numbered = np.unique(np.concatenate(pieces), return_inverse=True)
    renumbered = numbered.astype(np.int32).ravel()
    return _relabelled(graph, labels, renumbered[: len(users)], renumbered[len(users) :])


def modularity_of(graph: Graph, users: NDArray, items: NDArray, resolution: float) -> float:
    """:func:`graphhash.clustering.modularity` on any :class:`graphhash.graph.bipartite.Graph`."""
    n_labels = int(max(users.max(), items.max())) + 1
    user_totals = np.bincount(users, graph.user_degrees, n_labels)
    item_totals = np.bincount(items, graph.item_degrees, n_labels)
    total = graph.total_weight
    return graph.weight_inside(users, items) / total - resolution * float(user_totals @ item_totals) / total**2


def _relabelled(graph: Graph, labels: Labels, users: NDArray[np.int32], items: NDArray[np.int32]) -> Labels:
    users, items = users.copy(), items.copy()
    _kernels.compact_labels(users, items, int(max(users.max(), items.max())) + 1)
    return replace(labels, users=users, items=items, modularity=modularity_of(graph, users, items, labels.resolution))


def _rank_in_label(labels: NDArray[np.int32]) -> NDArray[np.int64]:
    """How many earlier rows have the same label, for every row."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return ranks


def _merge(
    graph: Graph,
    side: str,
    labels: NDArray[np.int32],
    other_labels: NDArray[np.int32],
    resolution: float,
    n_merges: int,
    max_size: int | None,
) -> NDArray[np.int32]:
    """Labels of a side after ``n_merges`` times merging its smallest bucket."""
    degrees = {"users": graph.user_degrees, "items": graph.item_degrees}
    n_labels = int(max(labels.max(), other_labels.max())) + 1
    sizes = np.bincount(labels, minlength=n_labels)
    own = np.bincount(labels, degrees[side], n_labels) * (resolution / graph.total_weight)
    other = np.bincount(other_labels, degrees["items" if side == "users" else "users"], n_labels)
    present = np.flatnonzero(sizes)
    # A merge touches two buckets, so the smallest is always among the 2 n_merges that were smallest at first.
    smallest = present[np.lexsort((present, sizes[present]))][: 2 * n_merges]
    wanted = np.zeros(n_labels, np.bool_)
    wanted[smallest] = True
    weights = _neighbours(smallest, n_labels, *graph.bucket_weights(side, labels, other_labels, n_labels, wanted))
    # Among buckets without a common edge, the best partner has the least degree on the other side.
    unconnected = present[np.lexsort((present, other[present]))].tolist()
    room = np.inf if max_size is None else max_size
    alive = sizes > 0
    into = np.arange(n_labels, dtype=np.int32)
    queue = [(int(sizes[c]), int(c)) for c in smallest]
    heapq.heapify(queue)
    merged: list[int] = []
    while len(merged) < n_merges:
        if not queue:
            raise ArgumentError(
                f"buckets of at most {max_size} {side} cannot be merged down to {len(present) - n_merges} rows; "
                "raise the rows or max_size"
            )
        size, c = heapq.heappop(queue)
        if not alive[c] or size != sizes[c]:
            continue
        candidates = [d for d in weights[c] if d != c and alive[d] and size + sizes[d] <= room]
        candidate = next((d for d in unconnected if d != c and alive[d] and size + sizes[d] <= room), None)
        if candidate is not None and candidate not in candidates:
            candidates.append(candidate)
        if not candidates:
            continue  # Nothing has room for the smallest bucket; only buckets as small are left to try.
        d = min(candidates, key=lambda d: (own[c] * other[d] - weights[c].get(d, 0.0), d))
        alive[c], into[c] = False, d
        merged.append(c)
        sizes[d] += size
        own[d] += own[c]
        if d in weights:
            for label, weight in weights[c].items():
                weights[d][label] = weights[d].get(label, 0.0) + weight
            heapq.heappush(queue, (int(sizes[d]), d))
        if len(unconnected) > 2 * (len(present) - len(merged)):
            unconnected = [d for d in unconnected if alive[d]]
    for c in reversed(merged):
        into[c] = into[into[c]]
    return into[labels]


def _neighbours(
    buckets: NDArray[np.int64], n_labels: int, pairs: NDArray[np.int64], values: NDArray[np.float64]
) -> dict[int, dict[int, float]]:
    """What each of some buckets has in common with others: a weight by their label.

    Args:
        pairs, values: as ``bucket_weights`` of a graph returns them, ascending.
    """
    starts = np.searchsorted(pairs, np.arange(n_labels + 1) * n_labels)
    return {
        int(c): dict(zip((pairs[a:b] % n_labels).tolist(), values[a:b].tolist(), strict=True))
        for c, a, b in zip(buckets, starts[buckets], starts[buckets + 1], strict=True)
    }


def _split(
    graph: Graph,
    side: str,
    labels: NDArray[np.int32],
    other_labels: NDArray[np.int32],
    resolution: float,
    n_splits: int,
) -> NDArray[np.int32]:
    """Labels of a side after ``n_splits`` times halving its largest bucket."""
    users, items = (labels, other_labels) if side == "users" else (other_labels, labels)
    degrees, other_degrees = graph.user_degrees, graph.item_degrees
    if side == "items":
        degrees, other_degrees = other_degrees, degrees
    n_labels = int(max(labels.max(), other_labels.max())) + 1
    totals = np.bincount(other_labels, other_degrees, n_labels)
    gains = graph.inside(users, items).row_weights(side) - resolution / graph.total_weight * degrees * totals[labels]
    # A bucket is a run of this order, its most attached members first.
    order = np.lexsort((np.arange(len(labels)), -gains, labels))
    ends = np.cumsum(np.bincount(labels, minlength=n_labels))
    queue = [
        (-(b - a), c, a) for c, (a, b) in enumerate(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)) if b > a
    ]
    heapq.heapify(queue)
    labels = labels.copy()
    for fresh in range(n_labels, n_labels + n_splits):
        size, c, start = heapq.heappop(queue)
        stay = (1 - size) // 2
        labels[order[start + stay : start - size]] = fresh
        heapq.heappush(queue, (-stay, c, start))
        heapq.heappush(queue, (size + stay, fresh, start + stay))
    return labels
