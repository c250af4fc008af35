"""Modularity clustering of the user-item graph.

Maximises Barber's bipartite modularity at a resolution (see ``graphhash.modularity``). The key fact: a user's gain depends on item
labels alone and an item's on user labels alone. So moving *all* users with the items fixed, then all items with the users
fixed, is exact coordinate ascent: it never lowers modularity, needs no locks, and gives the same labels, bit for bit, for any
number of threads or shards. Those half-sweeps alternate with Louvain moves (Blondel et al., 2008) on the graph whose nodes
are the communities so far:

    half-sweeps from singletons -> [contract -> Louvain moves, level by level -> project back -> half-sweeps] until Q stands still

The larger side moves first (measured: higher modularity on every graph tried). That is ``method="louvain"``. ``"leiden"`` goes on from
there with ``graphhash.refinement`` until Q stands still again, and every community is connected; ``"lpa"`` (label propagation) does
half-sweeps alone.

The graph is reached through a handful of row-parallel operations (:class:`LocalGraph`), so that the same algorithm runs over
shards on other machines; see ``pipeline.clusters``.
"""

from __future__ import annotations

import copy
import difflib
import math
import time
from dataclasses import dataclass, field
from typing import Protocol

import numba
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array

from graphhash import _kernels, _refine_kernels, refinement
from graphhash.graph import balanced_chunks

# Pieces of parallel work: many more than cores, so that threads end together, and few enough to cost nothing.
N_CHUNKS = 64
METHODS = ("louvain", "leiden", "lpa", "balanced")
FIRST_HALF_SWEEPS = 16
LPA_HALF_SWEEPS = 50
LPA_ROUNDS = 100
CYCLE_HALF_SWEEPS = 4
LOUVAIN_PASSES = 50


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
                raise ValueError(f"{name} labels must be a non-empty 1-D int32 array, got {side.dtype} of shape {side.shape}")
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


class Graph(Protocol):
    """What clustering asks of a graph; every operation returns the same bits however it is spread over workers."""

    n_users: int
    n_items: int
    total_weight: float
    user_degrees: NDArray[np.float64]
    item_degrees: NDArray[np.float64]

    def move(
        self, side: str, labels: NDArray, other_labels: NDArray, totals: NDArray, scale: float, fresh: int, active: NDArray
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Half-sweep of one side ("users" or "items"): its new labels, and which nodes of the other side have a moved neighbour."""
        ...

    def contract(self, user_labels: NDArray, item_labels: NDArray, n_groups: int) -> tuple[NDArray, NDArray, NDArray]:
        """Symmetric weights between communities, without the diagonal: indptr, columns, values."""
        ...

    def weight_inside(self, user_labels: NDArray, item_labels: NDArray) -> float:
        """Weight of the edges whose ends share a label."""
        ...

    def inside(self, user_labels: NDArray, item_labels: NDArray) -> Graph:
        """The graph of the edges whose ends share a label that is not negative; degrees and total weight stay the whole graph's."""
        ...

    def lowest(self, side: str, roots: NDArray[np.int64], other_roots: NDArray[np.int64]) -> NDArray[np.int64]:
        """The lowest of each node's own root and its neighbours' roots, for one side ("users" or "items")."""
        ...

    def row_weights(self, side: str) -> NDArray[np.float64]:
        """Weight of every node's edges in this graph, which :meth:`inside` lessens and degrees do not."""
        ...

    def bucket_weights(
        self, side: str, labels: NDArray, other_labels: NDArray, n_labels: int, wanted: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Weight between the ``wanted`` labels of one side and the other side's other labels, as ``label * n_labels + other``."""
        ...


def exact_weights(weights: NDArray[np.floating], total: float) -> NDArray[np.float32]:
    """Weights rounded to multiples of a power of two so small in number that float64 sums of them are exact.

    The unit is at least ``total / 2^52``. Exact sums do not depend on the order of their terms, so shards and threads agree bit for
    bit; the rounding moves a weight by less than ``total * 2^-51``.

    Args:
        weights: above 0, shape (n_edges,).
        total: their sum over the whole graph.

    Returns: float32, same shape, still above 0; an empty array when all are 1.
    """
    if total == len(weights) and (weights == 1).all():
        return np.empty(0, np.float32)
    unit = 2.0 ** (math.ceil(math.log2(total)) - 52)
    rounded = np.maximum(np.rint(np.asarray(weights, np.float64) / unit), 1) * unit
    return rounded.astype(np.float32)


class Rows:
    """Rows of one side of the graph, all of them or a shard, and what clustering does with them.

    Args:
        indptr: int64, shape (n_rows + 1,), from 0.
        indices: columns, ascending and distinct in each row.
        weights: float32, as :func:`exact_weights` returns them.
        degrees: weighted degrees, float64, shape (n_rows,), where they are not the sums of these weights.
    """

    def __init__(
        self,
        indptr: NDArray[np.int64],
        indices: NDArray[np.integer],
        weights: NDArray[np.float32],
        degrees: NDArray[np.float64] | None = None,
    ):
        self.indptr, self.indices, self.weights = indptr, indices, weights
        self.degrees = row_sums(indptr, weights) if degrees is None else degrees
        self.chunks = balanced_chunks(indptr, N_CHUNKS)

    def move(self, labels, other_labels, totals, scale, fresh, active):
        """See :meth:`Graph.move`; ``labels`` and ``active`` are these rows' own, ``fresh`` belongs to the first of them."""
        moved = np.empty_like(labels)
        _kernels.move_rows(
            self.indptr, self.indices, self.weights, self.degrees, labels, active, other_labels, totals, scale, fresh,
            self.chunks, moved,
        )  # fmt: skip
        awake = np.zeros(len(other_labels), np.bool_)
        _kernels.wake_columns(self.indptr, self.indices, labels, moved, self.chunks, awake)
        return moved, awake

    def label_weights(self, labels, other_labels, n_groups):
        """Weight between the labels of these rows and those of their columns, equal labels left out.

        Returns: pairs as ``label * n_groups + other_label``, int64, ascending, and their weights, float64.
        """
        pairs = np.repeat(labels.astype(np.int64) * n_groups, np.diff(self.indptr)) + other_labels[self.indices]
        outside = pairs // n_groups != pairs % n_groups
        pairs, place = np.unique(pairs[outside], return_inverse=True)
        weights = self.weights[outside] if len(self.weights) else None
        return pairs, np.bincount(place, weights, len(pairs)).astype(np.float64)

    def weight_inside(self, labels, other_labels):
        """See :meth:`Graph.weight_inside`."""
        return float(_kernels.weight_inside(self.indptr, self.indices, self.weights, labels, other_labels, self.chunks).sum())

    def inside(self, labels, other_labels):
        """These rows with the edges alone whose ends share a label that is not negative, and with the same degrees."""
        kept = _refine_kernels.keep_inside(self.indptr, self.indices, self.weights, labels, other_labels, self.chunks)
        return Rows(*kept, self.degrees)

    def lowest(self, roots, other_roots):
        """See :meth:`Graph.lowest`."""
        lowered = np.empty_like(roots)
        _refine_kernels.lowest_roots(self.indptr, self.indices, roots, other_roots, self.chunks, lowered)
        return lowered

    def row_weights(self):
        """See :meth:`Graph.row_weights`."""
        return row_sums(self.indptr, self.weights)

    def bucket_weights(self, labels, other_labels, n_labels, wanted):
        """See :meth:`Graph.bucket_weights`."""
        rows = np.flatnonzero(wanted[labels])
        lengths = np.diff(self.indptr)[rows]
        ends = np.cumsum(lengths)
        edges = np.repeat(self.indptr[rows] - ends + lengths, lengths) + np.arange(lengths.sum())
        own, other = np.repeat(labels[rows].astype(np.int64), lengths), other_labels[self.indices[edges]]
        outside = own != other
        weights = np.float64(self.weights[edges][outside]) if len(self.weights) else np.ones(outside.sum())
        return sum_pairs((own * n_labels + other)[outside], weights)


class LocalGraph:
    """The graph in this process's memory, moved over by numba threads.

    Args:
        biadjacency: weights above 0, shape (n_users, n_items), indices ascending and distinct in each row.
        total: sum of the weights, where the caller knows it.

    Raises:
        ValueError: no edges, or a weight that is not finite and above 0.
    """

    def __init__(self, biadjacency: csr_array, total: float | None = None):
        if biadjacency.nnz == 0:
            raise ValueError("the graph has no edges: there is nothing to cluster")
        if not np.isfinite(biadjacency.data).all() or not (biadjacency.data > 0).all():
            raise ValueError("edge weights must be finite and above 0")
        self.n_users, self.n_items = biadjacency.shape
        total = float(biadjacency.data.sum(dtype=np.float64)) if total is None else total
        self._sides = {
            side: Rows(matrix.indptr.astype(np.int64), matrix.indices, exact_weights(matrix.data, total))
            for side, matrix in (("users", biadjacency), ("items", biadjacency.T.tocsr()))
        }
        self.user_degrees, self.item_degrees = self._sides["users"].degrees, self._sides["items"].degrees
        self.total_weight = float(self.user_degrees.sum())

    def move(self, side, labels, other_labels, totals, scale, fresh, active):
        return self._sides[side].move(labels, other_labels, totals, scale, fresh, active)

    def contract(self, user_labels, item_labels, n_groups):
        arguments = []
        work = np.zeros(n_groups + 1, np.int64)
        for side, labels in (("users", user_labels), ("items", item_labels)):
            rows = self._sides[side]
            starts, members = _kernels.group_rows(labels, n_groups)
            arguments += [starts, members, rows.indptr, rows.indices, rows.weights, labels]
            work[1:] += np.bincount(labels, np.diff(rows.indptr), n_groups).astype(np.int64)
        return _kernels.contract_bipartite(*arguments, balanced_chunks(np.cumsum(work), N_CHUNKS))

    def weight_inside(self, user_labels, item_labels):
        return self._sides["users"].weight_inside(user_labels, item_labels)

    def inside(self, user_labels, item_labels):
        graph = copy.copy(self)
        graph._sides = {
            "users": self._sides["users"].inside(user_labels, item_labels),
            "items": self._sides["items"].inside(item_labels, user_labels),
        }
        return graph

    def lowest(self, side, roots, other_roots):
        return self._sides[side].lowest(roots, other_roots)

    def row_weights(self, side):
        return self._sides[side].row_weights()

    def bucket_weights(self, side, labels, other_labels, n_labels, wanted):
        return self._sides[side].bucket_weights(labels, other_labels, n_labels, wanted)


def symmetric_graph(
    pairs: list[NDArray[np.int64]], weights: list[NDArray[np.float64]], n_groups: int
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float64]]:
    """The graph that :meth:`Graph.contract` returns, from every shard's :meth:`Rows.label_weights` of the users."""
    users, items = np.divmod(np.concatenate(pairs), n_groups)
    matrix = coo_array((np.concatenate(weights), (users, items)), shape=(n_groups, n_groups)).tocsr()
    matrix = (matrix + matrix.T).tocsr()
    return matrix.indptr.astype(np.int64), matrix.indices.astype(np.int32), matrix.data


def sum_pairs(pairs: NDArray[np.int64], weights: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The distinct pairs, ascending, and the sum of each one's weights."""
    distinct, place = np.unique(pairs, return_inverse=True)
    return distinct, np.bincount(place.ravel(), weights, len(distinct))


def row_sums(indptr: NDArray[np.int64], weights: NDArray[np.float32]) -> NDArray[np.float64]:
    """Weighted degree of every row; an empty ``weights`` means all ones."""
    if len(weights) == 0:
        return np.diff(indptr).astype(np.float64)
    # A plain reduceat gives an empty row its neighbour's first weight.
    running = np.concatenate([[0.0], np.cumsum(weights, dtype=np.float64)])
    return running[indptr[1:]] - running[indptr[:-1]]


def cluster(
    biadjacency: csr_array,
    *,
    resolution: float | None = None,
    rows: int | tuple[int, int] | None = None,
    method: str = "louvain",
    max_size: int | None = None,
    threads: int | None = None,
    tolerance: float = 1e-4,
    max_cycles: int = 20,
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
                raise ValueError(f"method 'balanced' stops at a number of rows: give rows instead of resolution={resolution}")
            return balanced_labels(biadjacency, rows=rows, max_size=max_size)
        graph = LocalGraph(biadjacency)
        if rows is not None:
            from graphhash.row_search import cluster_to_rows  # It clusters, so it imports this module.

            return cluster_to_rows(graph, rows, **settings)
        return cluster_graph(graph, resolution, **settings)
    finally:
        numba.set_num_threads(before)


def cluster_graph(
    graph: Graph,
    resolution: float,
    *,
    method: str = "louvain",
    max_size: int | None = None,
    tolerance: float = 1e-4,
    max_cycles: int = 20,
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
        raise ValueError("method 'balanced' takes its turns one after the other and not over a Graph: see graphhash.balanced")
    run = _Run(graph, resolution)
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
    labels = Labels(run.labels["users"], run.labels["items"], resolution, history[-1], tuple(history), run.seconds)
    if max_size is not None:
        from graphhash.row_budget import cap_sizes  # It clusters, so it imports this module.

        return cap_sizes(graph, labels, max_size, tolerance=tolerance, max_cycles=max_cycles)
    return labels


class _Run:
    """Labels of both sides while they are being improved."""

    def __init__(self, graph: Graph, resolution: float):
        self.graph = graph
        self.resolution = resolution
        self.scale = resolution / graph.total_weight
        self.sizes = {"users": graph.n_users, "items": graph.n_items}
        self.degrees = {"users": graph.user_degrees, "items": graph.item_degrees}
        self.labels = {
            "users": np.arange(graph.n_users, dtype=np.int32),
            "items": np.arange(graph.n_users, graph.n_users + graph.n_items, dtype=np.int32),
        }
        self.n_communities = graph.n_users + graph.n_items
        self.order = ("items", "users") if graph.n_items > graph.n_users else ("users", "items")
        self.seconds = {"half_sweeps": 0.0, "contract": 0.0, "louvain": 0.0, "modularity": 0.0}

    def half_sweeps(self, n_rounds: int) -> None:
        started = time.perf_counter()
        first, second = self.order
        # A row that leaves every community takes a label of its own past those in use.
        fresh = {first: self.n_communities, second: self.n_communities + self.sizes[first]}
        n_labels = self.n_communities + self.sizes[first] + self.sizes[second]
        active = {side: np.ones(size, np.bool_) for side, size in self.sizes.items()}
        for _ in range(n_rounds):
            for side, other in ((first, second), (second, first)):
                totals = np.bincount(self.labels[other], self.degrees[other], n_labels)
                self.labels[side], awake = self.graph.move(
                    side, self.labels[side], self.labels[other], totals, self.scale, fresh[side], active[side]
                )
                active[side] = np.zeros(self.sizes[side], np.bool_)
                active[other] |= awake
            if not (active[first].any() or active[second].any()):
                break
        self.n_communities = _kernels.compact_labels(self.labels["users"], self.labels["items"], n_labels)
        self.seconds["half_sweeps"] += time.perf_counter() - started

    def settle(self) -> None:
        """Half-sweeps until no user and no item gains by moving, however far from it the last moves were."""
        for _ in range(LPA_ROUNDS):
            before = self.labels
            self.labels = {side: labels.copy() for side, labels in before.items()}
            self.half_sweeps(LPA_HALF_SWEEPS)
            # Compact labels are numbered by first appearance, so equal partitions are equal arrays.
            if all(np.array_equal(self.labels[side], before[side]) for side in before):
                break

    def merge_communities(self) -> None:
        """Louvain moves on the graph of communities, contracted again until nothing moves."""
        started = time.perf_counter()
        users, items, n_nodes = self.labels["users"], self.labels["items"], self.n_communities
        indptr, columns, values = self.graph.contract(users, items, n_nodes)
        user_degrees = np.bincount(users, self.degrees["users"], n_nodes)
        item_degrees = np.bincount(items, self.degrees["items"], n_nodes)
        contracted = time.perf_counter()
        self.seconds["contract"] += contracted - started
        community = np.arange(n_nodes, dtype=np.int32)
        while True:
            labels = np.arange(n_nodes, dtype=np.int32)
            if not _kernels.move_communities(
                indptr, columns, values, user_degrees, item_degrees, self.scale, LOUVAIN_PASSES, labels
            ):
                break
            n_nodes = _kernels.compact_labels(labels, np.empty(0, np.int32), n_nodes)
            community = labels[community]
            indptr, columns, values = _kernels.contract_graph(indptr, columns, values, labels, n_nodes)
            user_degrees = np.bincount(labels, user_degrees, n_nodes)
            item_degrees = np.bincount(labels, item_degrees, n_nodes)
        self.labels = {"users": community[users], "items": community[items]}
        self.n_communities = n_nodes
        self.seconds["louvain"] += time.perf_counter() - contracted

    def modularity(self) -> float:
        started = time.perf_counter()
        total = self.graph.total_weight
        inside = self.graph.weight_inside(self.labels["users"], self.labels["items"])
        user_totals = np.bincount(self.labels["users"], self.degrees["users"], self.n_communities)
        item_totals = np.bincount(self.labels["items"], self.degrees["items"], self.n_communities)
        self.seconds["modularity"] += time.perf_counter() - started
        return inside / total - self.resolution * float(user_totals @ item_totals) / total**2
