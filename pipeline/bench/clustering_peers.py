"""The programs of the clustering benchmark behind one interface: GraphHash and its peers.

    scikit-network       Louvain, one thread, Barber's modularity, called as in the GraphHash paper
    scikit-network-fine  the same with tolerances 1e-5 instead of 1e-3: higher modularity, slower
    networkit            PLM (parallel Louvain), all threads; it has Newman's modularity only
    igraph               Leiden, one thread, two iterations as by default; Newman's modularity, since its
                         directed one, Barber's by definition, gives it lower Q by a third (measured)
    igraph-fine          the same with ten iterations: higher modularity, slower

A program is a function of a matrix and a number of threads. It prepares itself, for example by building its own graph type, and
returns a function that clusters, and the number of threads that this uses.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, csr_matrix

from graphhash.clustering.api import cluster
from pipeline.errors import ConfigError

OURS = "graphhash"
# Program -> the package it needs. igraph is GPL: used where somebody installed it, never required.
PEERS = {
    "scikit-network": "sknetwork",
    "networkit": "networkit",
    "igraph": "igraph",
    "scikit-network-fine": "sknetwork",
    "igraph-fine": "igraph",
}

# The community of every user and of every item, and seconds by phase.
Communities = tuple[NDArray[np.integer], NDArray[np.integer], Mapping[str, float]]
# Clusters at a resolution.
Run = Callable[[float], Communities]


def choose_programs(peers: Sequence[str]) -> list[str]:
    """GraphHash and the named peers; without names every installed one at its usual settings.

    Raises:
        ConfigError: a peer is unknown or not installed.
    """
    installed = [name for name, package in PEERS.items() if importlib.util.find_spec(package)]
    for name in peers:
        if name not in PEERS:
            raise ConfigError(f"there is no peer {name!r}; the peers are {', '.join(PEERS)}")
        if name not in installed:
            raise ConfigError(
                f"{name}: the package {PEERS[name]} is not installed; install it, or leave out --peer {name}"
            )
    return [OURS, *(dict.fromkeys(peers) or [name for name in installed if not name.endswith("-fine")])]


def _graphhash(biadjacency: csr_array, threads: int | None) -> tuple[Run, int]:
    import numba

    most: int = numba.config.NUMBA_NUM_THREADS  # Set when numba is imported.
    n_threads = min(threads or most, most)

    def run(resolution: float) -> Communities:
        found = cluster(biadjacency, resolution=resolution, threads=n_threads)
        return found.users, found.items, found.seconds

    return run, n_threads


def _scikit_network(biadjacency: csr_array, threads: int | None, **tolerances: float) -> tuple[Run, int]:
    from sknetwork.clustering import Louvain

    matrix = csr_matrix(biadjacency)

    def run(resolution: float) -> Communities:
        louvain = Louvain(resolution=resolution, **tolerances).fit(matrix, force_bipartite=True)
        return louvain.labels_row_, louvain.labels_col_, {}

    return run, 1


def _networkit(biadjacency: csr_array, threads: int | None) -> tuple[Run, int]:
    import networkit

    n_users = biadjacency.shape[0]
    networkit.setNumberOfThreads(threads or multiprocessing.cpu_count())
    users, items = biadjacency.tocoo().coords
    edges = (biadjacency.data.astype(np.float64), (users.astype(np.int64), items.astype(np.int64) + n_users))
    graph = networkit.GraphFromCoo(edges, n=sum(biadjacency.shape), weighted=bool((biadjacency.data != 1).any()))

    def run(resolution: float) -> Communities:
        communities = np.array(networkit.community.PLM(graph, gamma=resolution).run().getPartition().getVector())
        return communities[:n_users], communities[n_users:], {}

    return run, networkit.getMaxNumberOfThreads()


def _igraph(biadjacency: csr_array, threads: int | None, n_iterations: int = 2) -> tuple[Run, int]:
    import igraph

    n_users = biadjacency.shape[0]
    users, items = biadjacency.tocoo().coords
    edges = np.column_stack([users, items.astype(np.int64) + n_users])
    graph = igraph.Graph(sum(biadjacency.shape), edges)
    weights = biadjacency.data.tolist() if (biadjacency.data != 1).any() else None

    def run(resolution: float) -> Communities:
        found = graph.community_leiden("modularity", weights=weights, resolution=resolution, n_iterations=n_iterations)
        communities = np.array(found.membership)
        return communities[:n_users], communities[n_users:], {}

    return run, 1


PROGRAMS: dict[str, Callable[[csr_array, int | None], tuple[Run, int]]] = {
    OURS: _graphhash,
    "scikit-network": _scikit_network,
    "networkit": _networkit,
    "igraph": _igraph,
    "scikit-network-fine": partial(_scikit_network, tol_optimization=1e-5, tol_aggregation=1e-5),
    "igraph-fine": partial(_igraph, n_iterations=10),
}
