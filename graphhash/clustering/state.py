"""The state of a clustering: labels of both sides, the rows that are active, and the moves that improve them."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from graphhash.clustering import merging
from graphhash.clustering.labels import Labels
from graphhash.errors import ArgumentError
from graphhash.graph import _kernels
from graphhash.graph.bipartite import Graph, label_dtype

LPA_HALF_SWEEPS = 50
LPA_ROUNDS = 100
# Half-sweeps end where both sides together moved at most this share of their rows: merging communities does more than the rest.
SETTLED_SHARE = 0.003


class ClusteringState:
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
                n_moved += int(np.count_nonzero(moved != self.labels[side]))
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
        user_degrees = np.bincount(users, self.degrees["users"], n_nodes).astype(np.float64, copy=False)
        item_degrees = np.bincount(items, self.degrees["items"], n_nodes).astype(np.float64, copy=False)
        groups, self.n_communities = merging.merge(communities, user_degrees, item_degrees, self.scale, self.dtype)
        self.labels = {"users": groups[users], "items": groups[items]}
        self.wake_all()
        self.seconds["louvain"] += time.perf_counter() - contracted

    def compact(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Labels of users and items as int32, which the communities left nearly always fit."""
        if self.n_communities > 2**31:
            raise ArgumentError(
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
