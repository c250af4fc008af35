"""The cluster stage: training graph in, one community per user and item out, with figures a person can read.

``shards=0`` clusters with numba threads in this process. ``shards=N`` cuts each side into N row ranges of equal work and runs
every half-sweep, contraction and count as N Ray tasks over memory-mapped files: a task gets a path, the other side's labels and
totals, and returns labels. Both give the same labels, bit for bit.

Files (``RUN/cluster/``): ``labels_users.npy``, ``labels_items.npy`` (int32, one community per row), ``cluster.json`` and, where asked for,
the levels of ``pipeline.levels``.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path

import numba
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from graphhash.balanced import balanced_labels
from graphhash.clustering import (
    Graph,
    Labels,
    LocalGraph,
    Rows,
    cluster_graph,
    exact_weights,
    sum_pairs,
    symmetric_graph,
)
from graphhash.errors import DataError
from graphhash.graph import balanced_chunks
from graphhash.hierarchy import hierarchy_graph
from graphhash.refinement import n_disconnected
from graphhash.row_search import cluster_to_rows
from pipeline.budget import rows_for_ratio
from pipeline.config import RunConfig
from pipeline.levels import write_levels
from pipeline.shards import ShardedCsr
from pipeline.stages import write_json_atomic


def cluster_run(config: RunConfig, ingest_dir: Path, out_dir: Path) -> dict:
    """Cluster the training graph of a run by the budget that the configuration names, and write the files above.

    Args:
        config: ``cluster`` for the budget and the way; ``map``, ``train`` and ``run`` for the bytes of a ratio.
        ingest_dir: holds ``train/`` and ``train_by_item/``.
        out_dir: exists and is empty.

    Returns: what ``cluster.json`` holds.

    Raises:
        DataError: no training interactions, or a budget that the graph cannot meet.
    """
    started = time.perf_counter()
    by_user, by_item = ShardedCsr.open(ingest_dir / "train"), ShardedCsr.open(ingest_dir / "train_by_item")
    if by_user.n_edges == 0:
        raise DataError("there are no training interactions to cluster; check the data and the split")
    settings = {
        "method": config.cluster.method,
        "max_size": config.cluster.max_size,
        "tolerance": config.cluster.tolerance,
        "max_cycles": config.cluster.max_cycles,
    }
    kind, budget = config.cluster.budget
    if kind == "ratio":
        kind, budget = "rows", rows_for_ratio(config, budget, by_user.n_rows, by_user.n_cols)
    threads = numba.get_num_threads()
    try:
        numba.set_num_threads(min(config.cluster.threads or threads, threads))
        if config.cluster.shards:
            graph = RayGraph(by_user, by_item, config.cluster.shards)
        else:
            biadjacency = by_user.load()
            graph = LocalGraph(biadjacency, by_user.total_weight)
        loaded = time.perf_counter()
        with tqdm(desc="cluster", unit=" cycles", disable=None, leave=False) as bar:

            def on_cycle(n_cycles: int, modularity: float, n_communities: int) -> None:
                bar.update()
                bar.set_postfix_str(f"Q {modularity:.4f}, {n_communities:,} communities")

            if kind == "resolution":
                labels = cluster_graph(graph, budget, on_cycle=on_cycle, **settings)
            else:
                # Each side has one more row, for unknown ids.
                rows = int(budget) - 2 if kind == "rows" else (budget[0] - 1, budget[1] - 1)
                if config.cluster.method == "balanced":
                    labels = balanced_labels(biadjacency, rows=rows, max_size=config.cluster.max_size)
                else:
                    labels = cluster_to_rows(graph, rows, on_cycle=on_cycle, **settings)
        clustered = time.perf_counter()
        facts = {"method": config.cluster.method, **_describe(graph, labels)}
        described = time.perf_counter()
        if config.cluster.levels:
            levels = hierarchy_graph(graph, [float(level) for level in config.cluster.levels], **settings)
            facts["levels"] = write_levels(levels, ingest_dir, out_dir)
    except ValueError as error:
        raise DataError(str(error)) from error
    finally:
        numba.set_num_threads(threads)
    np.save(out_dir / "labels_users.npy", labels.users)
    np.save(out_dir / "labels_items.npy", labels.items)
    facts["seconds"] = {
        "load": round(loaded - started, 3),
        **{phase: round(seconds, 3) for phase, seconds in labels.seconds.items()},
        "describe": round(described - clustered, 3),
        **({"levels": round(time.perf_counter() - described, 3)} if config.cluster.levels else {}),
        "total": round(time.perf_counter() - started, 3),
    }
    write_json_atomic(out_dir / "cluster.json", facts)
    return facts


def load_labels(cluster_dir: Path, facts: dict) -> Labels:
    """Labels written by :func:`cluster_run`.

    Raises:
        DataError: a file is missing or damaged.
    """
    try:
        users, items = (np.load(cluster_dir / f"labels_{side}.npy", allow_pickle=False) for side in ("users", "items"))
        return Labels(users, items, facts["resolution"], facts["modularity"], tuple(facts["history"]))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"{cluster_dir}: labels cannot be read ({error}); run 'graphhash cluster' again") from error


def _describe(graph: Graph, labels: Labels) -> dict:
    """What a person wants to know of a clustering; ``n_disconnected`` counts communities that their edges do not hold together."""
    sizes = {}
    for side, values in (("users", labels.users), ("items", labels.items)):
        counts = np.unique(values, return_counts=True)[1]
        sizes[side] = {
            "median": float(np.median(counts)),
            "p99": float(np.percentile(counts, 99)),
            "largest": int(counts.max()),
        }
    return {
        "resolution": labels.resolution,
        "modularity": labels.modularity,
        "share_inside": graph.weight_inside(labels.users, labels.items) / graph.total_weight,
        "n_communities": labels.n_communities,
        "n_disconnected": n_disconnected(graph, labels.users, labels.items),
        "user_rows": labels.user_rows,
        "item_rows": labels.item_rows,
        "rows": labels.rows,
        "sizes": sizes,
        "n_cycles": len(labels.history) - 1,
        "history": list(labels.history),
    }


class RayGraph:
    """:class:`graphhash.clustering.Graph` over Ray tasks; Ray must be running.

    Args:
        by_user, by_item: the graph and its transpose, in files that every worker can read.
        n_shards: row ranges per side; one task each. Ray runs as many at a time as there are CPUs.
    """

    def __init__(self, by_user: ShardedCsr, by_item: ShardedCsr, n_shards: int):
        import ray

        self.n_users, self.n_items = by_user.n_rows, by_user.n_cols
        self._ray = ray
        self._remote = ray.remote(num_cpus=1, max_retries=3)(_run_on_rows)
        self._total = by_user.total_weight
        self._within = None  # Labels of users and items, where only the edges inside them are this graph's.
        self._sides = {}
        degrees = {}
        for side, stored in (("users", by_user), ("items", by_item)):
            counts = np.concatenate([[0], np.cumsum(np.concatenate(self._each_stored(stored)))])
            starts = balanced_chunks(counts, n_shards)
            self._sides[side] = [
                (str(stored.path), int(start), int(stop)) for start, stop in zip(starts[:-1], starts[1:], strict=True)
            ]
            degrees[side] = np.concatenate(self._all(side, "degrees", lambda start, stop: ()))
        self.user_degrees, self.item_degrees = degrees["users"], degrees["items"]
        self.total_weight = float(self.user_degrees.sum())

    def move(self, side, labels, other_labels, totals, scale, fresh, active):
        shared = self._ray.put((other_labels, totals))
        parts = self._all(
            side, "move", lambda start, stop: (labels[start:stop], shared, scale, fresh + start, active[start:stop])
        )
        awake = np.zeros(len(other_labels), np.bool_)
        for _, bits in parts:
            awake |= np.unpackbits(bits, count=len(awake)).view(np.bool_)
        return np.concatenate([moved for moved, _ in parts]), awake

    def contract(self, user_labels, item_labels, n_groups):
        shared = self._ray.put(item_labels)
        parts = self._all("users", "label_weights", lambda start, stop: (user_labels[start:stop], shared, n_groups))
        return symmetric_graph([pairs for pairs, _ in parts], [weights for _, weights in parts], n_groups)

    def weight_inside(self, user_labels, item_labels):
        shared = self._ray.put(item_labels)
        return sum(self._all("users", "weight_inside", lambda start, stop: (user_labels[start:stop], shared)))

    def inside(self, user_labels, item_labels):
        graph = copy.copy(self)
        graph._within = {
            "users": self._ray.put((user_labels, item_labels)),
            "items": self._ray.put((item_labels, user_labels)),
        }
        return graph

    def lowest(self, side, roots, other_roots):
        shared = self._ray.put(other_roots)
        return np.concatenate(self._all(side, "lowest", lambda start, stop: (roots[start:stop], shared)))

    def row_weights(self, side):
        return np.concatenate(self._all(side, "row_weights", lambda start, stop: ()))

    def bucket_weights(self, side, labels, other_labels, n_labels, wanted):
        shared = self._ray.put((other_labels, n_labels, wanted))
        parts = self._all(side, "bucket_weights", lambda start, stop: (labels[start:stop], shared))
        return sum_pairs(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _all(self, side: str, operation: str, arguments) -> list:
        """Results of one operation on every shard of a side, in shard order."""
        within = self._within and self._within[side]
        tasks = [
            self._remote.remote(path, start, stop, self._total, within, operation, *arguments(start, stop))
            for path, start, stop in self._sides[side]
        ]
        return self._ray.get(tasks)

    def _each_stored(self, stored: ShardedCsr) -> list[NDArray[np.int64]]:
        """Edges of every row, by stored shard."""
        tasks = [
            self._remote.remote(str(stored.path), start, stop, self._total, None, "counts") for start, stop in stored.shards
        ]
        return self._ray.get(tasks)


def _run_on_rows(path: str, start: int, stop: int, total: float, within, operation: str, *arguments):
    """One Ray task: read rows [start, stop) of a graph, or of what is inside the labels ``within``, and run one operation."""
    numba.set_num_threads(1)
    stored = ShardedCsr.open(path)
    indptr, indices, weights = stored.read(start, stop)
    if operation == "counts":
        return np.diff(indptr)
    rows = Rows(indptr, indices, weights if stored.unit_weights else exact_weights(weights, total))
    if within is not None:
        labels, other_labels = within
        rows = rows.inside(labels[start:stop], other_labels)
    if operation == "degrees":
        return rows.degrees
    if operation == "lowest":
        return rows.lowest(*arguments)
    if operation == "row_weights":
        return rows.row_weights()
    if operation == "bucket_weights":
        labels, shared = arguments
        return rows.bucket_weights(labels, *shared)
    if operation == "move":
        labels, (other_labels, totals), scale, fresh, active = arguments
        moved, awake = rows.move(labels, other_labels, totals, scale, fresh, active)
        return moved, np.packbits(awake)
    if operation == "label_weights":
        return rows.label_weights(*arguments)
    assert operation == "weight_inside", operation
    return rows.weight_inside(*arguments)
