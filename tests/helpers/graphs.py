"""Tiny named graphs with a provable answer, and naive second implementations of what is tested on them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_array

import graphhash


def from_pairs(pairs, weights=None, n_users=None, n_items=None) -> csr_array:
    users, items = np.array(pairs).T
    return graphhash.biadjacency(users, items, weights, n_users=n_users, n_items=n_items)


def two_blocks() -> csr_array:
    """Two complete 3 x 3 blocks that share no edge."""
    return from_pairs([(u + 3 * b, i + 3 * b) for b in range(2) for u in range(3) for i in range(3)])


def star() -> csr_array:
    return from_pairs([(u, 0) for u in range(6)])


def one_edge() -> csr_array:
    return from_pairs([(0, 0)])


def isolated_user() -> csr_array:
    """User 2 and item 3 have no interaction."""
    return from_pairs([(0, 0), (0, 1), (1, 1), (3, 2)], n_users=4, n_items=4)


def disconnected() -> csr_array:
    return from_pairs([(i, i) for i in range(5)])


def southern_women() -> csr_array:
    """Davis, Gardner and Gardner (1941): 18 women, 14 events, 89 attendances."""
    import networkx

    graph = networkx.davis_southern_women_graph()
    women, events = graph.graph["top"], graph.graph["bottom"]
    return from_pairs([(women.index(w), events.index(e)) for w, e in graph.edges(women)])


def random_graph(
    seed: int, n_users: int = 60, n_items: int = 40, n_edges: int = 300, weighted: bool = False
) -> csr_array:
    rng = np.random.default_rng(seed)
    users, items = rng.integers(0, n_users, n_edges), rng.integers(0, n_items, n_edges)
    weights = rng.uniform(0.1, 3, n_edges) if weighted else None
    return graphhash.biadjacency(users, items, weights, n_users=n_users, n_items=n_items)


def covering_graph(rng: np.random.Generator, n_users: int = 30, n_items: int = 24, n_edges: int = 150) -> csr_array:
    """Random interactions of weight 1 to 3, at least one of every id."""
    weights = rng.integers(1, 4, n_edges).astype(np.float32)
    users = np.concatenate([np.arange(n_users), rng.integers(0, n_users, n_edges - n_users)])
    items = np.concatenate([rng.permutation(n_items), rng.integers(0, n_items, n_edges - n_items)])
    return graphhash.biadjacency(users, items, weights, n_users=n_users, n_items=n_items)


def planted(seed: int, n_blocks: int, size: int, p_in: float, p_out: float) -> tuple[csr_array, np.ndarray, np.ndarray]:
    """Equal blocks of users and items with their memberships."""
    rng = np.random.default_rng(seed)
    blocks = np.repeat(np.arange(n_blocks), size)
    dense = rng.random((len(blocks), len(blocks))) < np.where(blocks[:, None] == blocks, p_in, p_out)
    users, items = dense.nonzero()
    return graphhash.biadjacency(users, items, n_users=len(blocks), n_items=len(blocks)), blocks, blocks


def write_log(path: Path, graph: csr_array) -> Path:
    """The interactions of a graph as a csv of `user_id` and `item_id`, which are its rows and columns; returns the file."""
    lines = [f"{user},{item}" for user, item in zip(*graph.nonzero(), strict=True)]
    path.write_text("\n".join(["user_id,item_id", *lines, ""]))
    return path


def features(graph: csr_array) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    """Random ones of its users and items, as a method reads them."""
    rng = np.random.default_rng(0)
    return lambda: (rng.normal(size=(graph.shape[0], 8)), rng.normal(size=(graph.shape[1], 8)))


def gowalla(name: str) -> csr_array:
    """A file of the Gowalla data set, read without the project's readers; skips where the data is absent."""
    folder = Path(os.environ.get("GRAPHHASH_DATA", Path(__file__).parents[3] / "shared" / "data")) / "gowalla"
    if not (folder / name).exists():
        pytest.skip(f"no Gowalla data at {folder}; GRAPHHASH_DATA names the folder of data sets")
    lines = [np.array(line.split(), np.int64) for line in (folder / name).read_text().splitlines()]
    users = np.concatenate([np.full(len(line) - 1, line[0]) for line in lines])
    return graphhash.biadjacency(users, np.concatenate([line[1:] for line in lines]))


ALL = {
    "two_blocks": two_blocks,
    "star": star,
    "one_edge": one_edge,
    "isolated_user": isolated_user,
    "disconnected": disconnected,
    "southern_women": southern_women,
    "random": lambda: random_graph(0),
    "weighted": lambda: random_graph(1, weighted=True),
}


def naive_modularity(graph: csr_array, user_labels, item_labels, resolution: float) -> float:
    """Barber's Q as its double sum."""
    dense = graph.toarray().astype(np.float64)
    total, users, items = dense.sum(), dense.sum(1), dense.sum(0)
    q = 0.0
    for u in range(dense.shape[0]):
        for i in range(dense.shape[1]):
            if user_labels[u] == item_labels[i]:
                q += dense[u, i] - resolution * users[u] * items[i] / total
    return q / total


def naive_half_sweep(graph: csr_array, user_labels, item_labels, resolution: float, fresh: int) -> np.ndarray:
    """Every user to the best community by trying each, in dictionaries; ties to the lowest label; staying wins ties."""
    dense = graph.toarray().astype(np.float64)
    total, degrees = dense.sum(), dense.sum(1)
    item_totals = {}
    for i, label in enumerate(item_labels):
        item_totals[label] = item_totals.get(label, 0.0) + dense[:, i].sum()
    moved = np.array(user_labels)
    for u in range(dense.shape[0]):
        weight = {}
        for i, label in enumerate(item_labels):
            if dense[u, i]:
                weight[label] = weight.get(label, 0.0) + dense[u, i]

        def gain(label, u=u, weight=weight):
            return weight.get(label, 0.0) - resolution / total * degrees[u] * item_totals.get(label, 0.0)

        candidates = sorted(weight)
        if item_totals.get(fresh + u, 0.0) == 0:
            candidates.append(fresh + u)
        best = max(candidates, key=lambda label: (gain(label), -label), default=user_labels[u])
        if gain(best) > gain(user_labels[u]) + 1e-12 * degrees[u]:
            moved[u] = best
    return moved
