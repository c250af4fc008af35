"""The alternating ascent of a clustering at one resolution, on any graph.

Maximises Barber's bipartite modularity at a resolution (see ``graphhash.clustering.modularity``). The key fact: a user's gain depends
on item labels alone and an item's on user labels alone. So moving *all* users with the items fixed, then all items with the users
fixed, is exact coordinate ascent: it never lowers modularity, needs no locks, and gives the same labels, bit for bit, for any
number of threads or shards. Those half-sweeps alternate with Louvain moves (Blondel et al., 2008; ``graphhash.clustering.merging``) on
the graph whose nodes are the communities so far:

    half-sweeps from singletons -> [contract -> Louvain moves, level by level -> project back -> half-sweeps] until Q stands still

The larger side moves first (measured: higher modularity on every graph tried). That is ``method="louvain"``. ``"leiden"`` goes on from
there with ``graphhash.clustering.refinement`` until Q stands still again, and every community is connected; ``"lpa"`` (label
propagation) does half-sweeps alone.

The graph is reached through a handful of row-parallel operations (``graphhash.graph.bipartite.Graph``): over threads in
``graphhash.graph.local``, over files and machines in ``pipeline.distributed.graph``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from graphhash.clustering import refinement
from graphhash.clustering.labels import Labels
from graphhash.clustering.state import ClusteringState
from graphhash.errors import ArgumentError, did_you_mean
from graphhash.graph.bipartite import Graph

METHODS = ("louvain", "leiden", "lpa", "balanced")
FIRST_HALF_SWEEPS = 16
CYCLE_HALF_SWEEPS = 4


def ascend(
    graph: Graph,
    resolution: float,
    *,
    method: str = "louvain",
    tolerance: float = 1e-3,
    max_cycles: int = 20,
    initial: Labels | None = None,
    on_cycle: Callable[[int, float, int], None] | None = None,
) -> Labels:
    """:func:`graphhash.clustering.bounded.cluster_graph` without a bound on the size of communities."""
    if not (math.isfinite(resolution) and resolution > 0):
        raise ArgumentError(f"resolution must be finite and above 0, got {resolution}")
    if not 0 <= tolerance < 1 or max_cycles < 1:
        raise ArgumentError(f"tolerance must be in [0, 1) and max_cycles at least 1, got {tolerance} and {max_cycles}")
    if method not in METHODS:
        hint = did_you_mean(method, METHODS)
        raise ArgumentError(f"unknown clustering method {method!r}; {hint}methods are {', '.join(METHODS)}")
    if method == "balanced":
        raise ArgumentError(
            "method 'balanced' takes its turns one after the other and not over a Graph: see graphhash.balanced_labels"
        )
    if initial is not None and (len(initial.users), len(initial.items)) != (graph.n_users, graph.n_items):
        raise ArgumentError(
            f"initial labels are of {len(initial.users)} users and {len(initial.items)} items, "
            f"the graph has {graph.n_users} and {graph.n_items}"
        )
    run = ClusteringState(graph, resolution, initial)
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
    return Labels(*run.compact(), resolution, history[-1], tuple(history), run.seconds)
