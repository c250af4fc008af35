"""The cluster stage: training graph in, one community per user and item out, with figures a person can read.

``shards=0`` clusters with numba threads in this process. ``shards=N`` cuts each side into N row ranges of equal work and runs
everything as Ray tasks over memory-mapped files (``pipeline.distributed.graph``). Both give the same labels, bit for bit.

Files (``RUN/cluster/``): ``labels_users.npy``, ``labels_items.npy`` (int32, one community per row), ``cluster.json`` and, where asked for,
the levels of ``pipeline.maps.levels``.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numba
from tqdm import tqdm

from graphhash.clustering.balanced import balanced_labels
from graphhash.clustering.bounded import cluster_graph
from graphhash.clustering.hierarchy import hierarchy_graph
from graphhash.clustering.resolution_search import cluster_to_rows
from graphhash.errors import DataError
from graphhash.graph.local import LocalGraph
from pipeline.config.run_config import RunConfig
from pipeline.distributed.graph import RayGraph
from pipeline.distributed.shards import ShardedCsr
from pipeline.maps.communities import describe_communities, save_communities
from pipeline.maps.levels import write_levels
from pipeline.retrieval.budget import BudgetSettings, GraphSize, planned_precisions, rows_for_ratio
from pipeline.retrieval.defaults import DEFAULT_BUDGET
from pipeline.storage.atomic import write_json_atomic
from pipeline.task import budget_of


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
    kind, budget = budget_of(config, DEFAULT_BUDGET)
    if kind == "ratio":
        size = GraphSize(by_user.n_rows, by_user.n_cols, by_user.n_edges)
        kind, budget = "rows", rows_for_ratio(BudgetSettings.of(config), budget, planned_precisions(config), size)
    threads = numba.get_num_threads()
    levels_dir = tempfile.TemporaryDirectory(dir=out_dir, prefix="working-")
    try:
        numba.set_num_threads(min(config.cluster.threads or threads, threads))
        if config.cluster.shards:
            graph = RayGraph(by_user, by_item, config.cluster.shards, Path(levels_dir.name))
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
        facts = {"method": config.cluster.method, **describe_communities(graph, labels)}
        described = time.perf_counter()
        if config.cluster.levels:
            levels = hierarchy_graph(graph, [float(level) for level in config.cluster.levels], **settings)
            facts["levels"] = write_levels(levels, ingest_dir, out_dir)
    except ValueError as error:
        raise DataError(str(error)) from error
    finally:
        numba.set_num_threads(threads)
        levels_dir.cleanup()
    save_communities(labels, out_dir)
    facts["seconds"] = {
        "load": round(loaded - started, 3),
        **{phase: round(seconds, 3) for phase, seconds in labels.seconds.items()},
        "describe": round(described - clustered, 3),
        **({"levels": round(time.perf_counter() - described, 3)} if config.cluster.levels else {}),
        "total": round(time.perf_counter() - started, 3),
    }
    write_json_atomic(out_dir / "cluster.json", facts)
    return facts
