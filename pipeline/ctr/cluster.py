"""The cluster stage of CTR: the graph of every pair of columns, clustered to a budget that the pairs share.

Pairs are clustered by Ray tasks where Ray is running, else one after the other in this process, with the same bytes.

Files (``RUN/cluster/``): ``N/labels_users.npy`` and ``N/labels_items.npy`` of pair N (`pipeline.ctr.maps.find_pairs`; its first column
stands for users), and ``cluster.json``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from graphhash.clustering.connected import cluster_connected
from graphhash.clustering.labels import Labels
from graphhash.errors import DataError
from graphhash.graph.local import LocalGraph
from pipeline.config.run_config import RunConfig
from pipeline.ctr.budget import rows_of_columns
from pipeline.ctr.data import Features
from pipeline.ctr.defaults import clustering_budget
from pipeline.ctr.maps import Pair, check_compressed, find_pairs, pair_graph
from pipeline.distributed.session import is_running, run_tasks
from pipeline.maps.communities import describe_communities, load_communities, save_communities
from pipeline.storage.atomic import write_json_atomic

# What a table of a pair needs at least, OOV rows among them.
LEAST_ROWS = 8


def cluster_ctr(config: RunConfig, ingest_dir: Path, out_dir: Path) -> dict[str, Any]:
    """Cluster the pairs of a CTR data set by the budget that the configuration names, and write the files above.

    A resolution applies to every pair. Rows, or the rows that a ratio of the bytes leaves, are shared out by the ids of the columns
    that are compressed.

    Returns: ``pairs``, the figures of each with its ``columns``, and which of them are ``compressed``; ``seconds``.

    Raises:
        DataError: a budget that cannot be met, or a pair without a positive sample.
        ConfigError: no column can be compressed, and a method wants to.
    """
    started = time.perf_counter()
    features = Features.open(ingest_dir)
    check_compressed(features, config.run.methods)
    pairs = find_pairs(features)
    kind, value = clustering_budget(config)
    rows = None if kind == "resolution" else pair_rows(features, pairs, rows_of_columns(config, features, kind, value))
    settings: dict[str, Any] = {
        "method": config.cluster.method,
        "max_size": config.cluster.max_size,
        # A task has one CPU.
        "threads": 1 if is_running() else config.cluster.threads,
        "tolerance": config.cluster.tolerance,
        "max_cycles": config.cluster.max_cycles,
    }
    ingest_dir, out_dir = ingest_dir.absolute(), out_dir.absolute()
    budgets: list[dict[str, Any]] = [
        {"resolution": value} if rows is None else {"rows": rows[n]} for n in range(len(pairs))
    ]
    tasks = [(ingest_dir, out_dir, number, settings | budget) for number, budget in enumerate(budgets)]
    facts = run_tasks(_cluster_pair, tasks, label="cluster")
    result = {"budget": kind, "pairs": facts, "seconds": round(time.perf_counter() - started, 3)}
    write_json_atomic(out_dir / "cluster.json", result)
    return result


def _cluster_pair(ingest_dir: Path, out_dir: Path, number: int, options: dict[str, Any]) -> dict[str, Any]:
    """Cluster the pair of this number, write its communities, and return its figures.

    Args:
        options: of :func:`graphhash.clustering.connected.cluster_connected`.
    """
    features = Features.open(ingest_dir)
    pair = find_pairs(features)[number]
    graph = pair_graph(features, features.part("train"), pair)
    names = pair.names(features)
    try:
        labels = cluster_connected(graph, **options)
    except ValueError as error:
        raise DataError(f"columns {names[0]!r} and {names[1]!r}: {error}") from error
    folder = out_dir / str(number)
    folder.mkdir()
    save_communities(labels, folder)
    # Ids without a positive sample are one community per side, which is not connected.
    linked = _linked(graph, labels)
    return {
        "columns": list(names),
        "compressed": list(pair.compressed),
        "method": options["method"],
        **describe_communities(*linked),
        "user_rows": labels.user_rows,
        "item_rows": labels.item_rows,
        "rows": labels.rows,
        "n_edges": graph.nnz,
        "n_isolated": [int((np.diff(side.indptr) == 0).sum()) for side in (graph, csr_array(graph.T.tocsr()))],
    }


def clustering_labels(cluster_dir: Path) -> list[Labels]:
    """Labels of all pairs, as :func:`cluster_ctr` wrote them."""
    facts = json.loads((cluster_dir / "cluster.json").read_text(encoding="utf-8"))
    return [load_communities(cluster_dir / str(number), pair) for number, pair in enumerate(facts["pairs"])]


def pair_labels(cluster_dir: Path, number: int) -> Labels:
    """Those of one pair."""
    facts = json.loads((cluster_dir / "cluster.json").read_text(encoding="utf-8"))
    return load_communities(cluster_dir / str(number), facts["pairs"][number])


def pair_rows(features: Features, pairs: Sequence[Pair], total: int) -> list[int | tuple[int, int]]:
    """Rows of every pair's labels, out of ``total`` table rows of all compressed columns, OOV rows among them.

    Raises:
        DataError: a pair gets too few.
    """
    n_ids = [[features.columns[c].n_ids for c in pair.columns] for pair in pairs]
    used = [
        sum(n for n, on in zip(ids, pair.compressed, strict=True) if on) for ids, pair in zip(n_ids, pairs, strict=True)
    ]
    rows: list[int | tuple[int, int]] = []
    for pair, ids, n_used in zip(pairs, n_ids, used, strict=True):
        n_rows = total * n_used // max(1, sum(used))
        if n_rows < LEAST_ROWS:
            names = " and ".join(map(repr, pair.names(features)))
            least = math.ceil(LEAST_ROWS * sum(used) / min(used))
            raise DataError(
                f"{total} rows leave {n_rows} for columns {names}, which need {LEAST_ROWS}; raise the budget to {least} rows or more"
            )
        if all(pair.compressed):
            rows.append(min(n_rows - 2, sum(ids) - 1))
        else:
            # The other side has no table; it is clustered as finely.
            own = pair.compressed.index(True)
            wanted = min(n_rows - 1, ids[own] - 1)
            other = max(1, min(ids[1 - own], round(ids[1 - own] * wanted / ids[own])))
            rows.append((wanted, other) if own == 0 else (other, wanted))
    return rows


def _linked(graph: csr_array, labels: Labels) -> tuple[LocalGraph, Labels]:
    """The graph of the ids that have positive samples, and their communities."""
    sides = [np.diff(graph.indptr) > 0, np.diff(csr_array(graph.T.tocsr()).indptr) > 0]
    part = csr_array(graph[sides[0]][:, sides[1]])
    found = Labels(labels.users[sides[0]], labels.items[sides[1]], labels.resolution, labels.modularity, labels.history)
    return LocalGraph(part), found
