"""Modularity clustering of the user-item graph.

Maximises Barber's bipartite modularity at a resolution (see ``graphhash.modularity``). The key fact: a user's gain depends on item
labels alone and an item's on user labels alone. So moving *all* users with the items fixed, then all items with the users
fixed, is exact coordinate ascent: it never lowers modularity, needs no locks, and gives the same labels, bit for bit, for any
number of threads or shards. Those half-sweeps alternate with Louvain moves (Blondel et al., 2008; ``graphhash.merging``) on the
graph whose nodes are the communities so far:

    half-sweeps from singletons -> [contract -> Louvain moves, level by level -> project back -> half-sweeps] until Q stands still

The larger side moves first (measured: higher modularity on every graph tried). That is ``method="louvain"``. ``"leiden"`` goes on from
there with ``graphhash.refinement`` until Q stands still again, and every community is connected; ``"lpa"`` (label propagation) does
half-sweeps alone.

The graph is reached through a handful of row-parallel operations (``graphhash.graph.Graph``): over threads in
``graphhash.local_graph``, over files and machines in ``pipeline.ray_graph``.
"""

from __future__ import annotations

import difflib
import math
import time
from dataclasses import dataclass, field

import numba
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graphhash import _kernels, merging, refinement
from graphhash.graph import Graph, label_dtype
from graphhash.local_graph import LocalGraph

METHODS = ("louvain", "leiden", "lpa", "balanced")
FIRST_HALF_SWEEPS = 16
LPA_HALF_SWEEPS = 50
LPA_ROUNDS = 100
CYCLE_HALF_SWEEPS = 4
# Half-sweeps end where both sides together moved at most this share of their rows: merging communities does more than the rest.
SETTLED_SHARE = 0.003


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
                raise ValueError(
                    f"{name} labels must be a non-empty 1-D int32 array, got {side.dtype} of shape {side.shape}"
                )
            if side.min() < 0:
                raise ValueError(f"{name} labels must not be negative, got {side.min()}")

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
            resolution is searched, and single buckets are merged or split to make up the rest (``graphhash.row_search``).
        method: "louvain"; "leiden" (slower, modularity no lower, every community connected); "lpa" (half-sweeps alone: faster, lower
            modularity, more and smaller communities). What an exact number of rows merges or splits may be disconnected.
            "balanced" (``graphhash.balanced``; only to a number of rows): few passes of label propagation, no levels.
        max_size: no community holds more users than this, or more items; None for no bound.
        threads: numba threads; all cores when None. The labels do not depend on it.
        tolerance: stop when a cycle raises modularity by less than this share of it.
        max_cycles: bound on cycles.
        initial: labels to start from, such as yesterday's; every user and item on its own when None. Modularity at the resolution asked
            for ends no lower than theirs. Not with rows, whose search has its own start.

    Returns: labels, the same for the same graph and settings, always.

    Raises:
        ValueError: not exactly one of resolution and rows, or a value out of range, or an unknown method, or no edges.
    """
    if (resolution is None) == (rows is None):
        raise ValueError(f"give either a resolution or a number of rows, got resolution={resolution} and rows={rows}")
    settings = {"method": method, "max_size": max_size, "tolerance": tolerance, "max_cycles": max_cycles}
    before = numba.get_num_threads()
    numba.set_num_threads(min(threads or numba.config.NUMBA_NUM_THREADS, numba.config.NUMBA_NUM_THREADS))
    try:
        if method == "balanced":
            from graphhash.balanced import balanced_labels  # It uses this module.

            if rows is None:
                raise ValueError(
                    f"method 'balanced' stops at a number of rows: give rows instead of resolution={resolution}"
                )
            return balanced_labels(biadjacency, rows=rows, max_size=max_size)
        graph = LocalGraph(biadjacency)
        if rows is not None:
            if initial is not None:
                raise ValueError("initial labels go with a resolution, not with a number of rows")
            from graphhash.row_search import cluster_to_rows  # It clusters, so it imports this module.

            return cluster_to_rows(graph, rows, **settings)
        return cluster_graph(graph, resolution, initial=initial, **settings)
    finally:
        numba.set_num_threads(before)


def cluster_graph(
    graph: Graph,
    resolution: float,
    *,
    method: str = "louvain",
    max_size: int | None = None,
    tolerance: float = 1e-3,
    max_cycles: int = 20,
    initial: Labels | None = None,
    on_cycle=None,
) -> Labels:
    """:func:`cluster` on any :class:`Graph` at a resolution; ``on_cycle(n_cycles, modularity, n_communities)`` reports progress."""
    if not (math.isfinite(resolution) and resolution > 0):
        raise ValueError(f"resolution must be finite and above 0, got {resolution}")
    if not 0 <= tolerance < 1 or max_cycles < 1:
        raise ValueError(f"tolerance must be in [0, 1) and max_cycles at least 1, got {tolerance} and {max_cycles}")
    if method not in METHODS:
        close = difflib.get_close_matches(method, METHODS, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"unknown clustering method {method!r}; {hint}methods are {', '.join(METHODS)}")
    if method == "balanced":
        raise ValueError(
            "method 'balanced' takes its turns one after the other and not over a Graph: see graphhash.balanced"
        )
    if initial is not None and (len(initial.users), len(initial.items)) != (graph.n_users, graph.n_items):
        raise ValueError(
            f"initial labels are of {len(initial.users)} users and {len(initial.items)} items, "
            f"the graph has {graph.n_users} and {graph.n_items}"
        )
    run = _Run(graph, resolution, initial)
    run.half_sweeps(FIRST_HALF_SWEEPS)
    if method == "lpa":
        run.settle()
    history = [run.modularity()]
    # Leiden is Louvain to its end, and then cycles that refine first: its modularity is never below Louvain's.
    for refined in {"louvain": [False], "leiden": [False, True], "lpa": []}[method]:
        for _ in range(max_cycles):
            if refined:
                refinement.refine(run)
            run.merge_communities()
            run.half_sweeps(CYCLE_HALF_SWEEPS)
            history.append(run.modularity())
            if on_cycle is not None:
                on_cycle(len(history) - 1, history[-1], run.n_communities)
            if history[-1] - history[-2] <= tolerance * abs(history[-2]):
                break
    if method == "leiden":
        refinement.connect(run)
        history[-1] = run.modularity()
    labels = Labels(*run.compact(), resolution, history[-1], tuple(history), run.seconds)
    if max_size is not None:
        from graphhash.row_budget import cap_sizes  # It clusters, so it imports this module.

        return cap_sizes(graph, labels, max_size, tolerance=tolerance, max_cycles=max_cycles)
    return labels


class _Run:
    """Labels of both sides while they are being improved."""

    def __init__(self, graph: Graph, resolution: float, initial: Labels | None = None):
        self.graph = graph
        self.resolution = resolution
        self.scale = resolution / graph.total_weight
        self.sizes = {"users": graph.n_users, "items": graph.n_items}
        self.degrees = {"users": graph.user_degrees, "items": graph.item_degrees}
        n_ids = graph.n_users + graph.n_items
        # Every id may leave its community for a label of its own, past those in use.
        self.dtype = label_dtype(2 * n_ids)
        if initial is None:
            users, items = (
                np.arange(graph.n_users, dtype=self.dtype),
                np.arange(graph.n_users, n_ids, dtype=self.dtype),
            )
            self.n_communities = n_ids
        else:
            users, items = (np.array(side, self.dtype) for side in (initial.users, initial.items))
            n_labels = int(max(users.max(), items.max())) + 1
            self.n_communities = _kernels.compact_labels(users, items, n_labels)
        self.labels = {"users": users, "items": items}
        self.order = ("items", "users") if graph.n_items > graph.n_users else ("users", "items")
        self.wake_all()
        self.seconds = {"half_sweeps": 0.0, "contract": 0.0, "louvain": 0.0, "modularity": 0.0}

    def half_sweeps(self, n_rounds: int, settled_share: float = SETTLED_SHARE) -> None:
        """Half-sweeps of both sides in turn, over the rows that are active, until few move; what is then active stays so."""
        started = time.perf_counter()
        first, second = self.order
        # A row that leaves every community takes a label of its own past those in use.
        fresh = {first: self.n_communities, second: self.n_communities + self.sizes[first]}
        n_labels = self.n_communities + self.sizes[first] + self.sizes[second]
        for _ in range(n_rounds):
            n_moved = 0
            for side, other in ((first, second), (second, first)):
                if not self.active[side].any():
                    continue
                totals = np.bincount(self.labels[other], self.degrees[other])
                moved, awake = self.graph.move(
                    side,
                    self.labels[side],
                    self.labels[other],
                    totals,
                    self.scale,
                    fresh[side],
                    self.active[side],
                )
                n_moved += np.count_nonzero(moved != self.labels[side])
                self.labels[side] = moved
                self.active[side] = np.zeros(self.sizes[side], np.bool_)
                self.active[other] |= awake
            if n_moved <= settled_share * (self.sizes[first] + self.sizes[second]):
                break
        self.n_communities = _kernels.compact_labels(self.labels["users"], self.labels["items"], n_labels)
        self.seconds["half_sweeps"] += time.perf_counter() - started

    def settle(self) -> None:
        """Half-sweeps until no user and no item gains by moving, however far from it the last moves were."""
        for _ in range(LPA_ROUNDS):
            before = self.labels
            self.labels = {side: labels.copy() for side, labels in before.items()}
            self.wake_all()
            self.half_sweeps(LPA_HALF_SWEEPS, settled_share=0.0)
            # Compact labels are numbered by first appearance, so equal partitions are equal arrays.
            if all(np.array_equal(self.labels[side], before[side]) for side in before):
                break

    def wake_all(self) -> None:
        """Make every row active."""
        self.active = {side: np.ones(size, np.bool_) for side, size in self.sizes.items()}

    def merge_communities(self) -> None:
        """Move whole communities into one another, where that gains."""
        started = time.perf_counter()
        users, items, n_nodes = self.labels["users"], self.labels["items"], self.n_communities
        communities = self.graph.contract(users, items, n_nodes)
        contracted = time.perf_counter()
        self.seconds["contract"] += contracted - started
        degrees = [np.bincount(self.labels[side], self.degrees[side], n_nodes) for side in ("users", "items")]
        groups, self.n_communities = merging.merge(communities, *degrees, self.scale, self.dtype)
        self.labels = {"users": groups[users], "items": groups[items]}
        self.wake_all()
        self.seconds["louvain"] += time.perf_counter() - contracted

    def compact(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Labels of users and items as int32, which the communities left nearly always fit."""
        if self.n_communities > 2**31:
            raise ValueError(
                f"{self.n_communities:,} communities are more than int32 labels can name; lower the resolution"
            )
        return self.labels["users"].astype(np.int32, copy=False), self.labels["items"].astype(np.int32, copy=False)

    def modularity(self) -> float:
        started = time.perf_counter()
        total = self.graph.total_weight
        inside = self.graph.weight_inside(self.labels["users"], self.labels["items"])
        user_totals = np.bincount(self.labels["users"], self.degrees["users"], self.n_communities)
        item_totals = np.bincount(self.labels["items"], self.degrees["items"], self.n_communities)
        self.seconds["modularity"] += time.perf_counter() - started
        return inside / total - self.resolution * float(user_totals @ item_totals) / total**2
