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
from typing import Any, NotRequired, TypedDict

import numba
from scipy.sparse import csr_array
from tqdm import tqdm

from graphhash.clustering.balanced import balanced_labels
from graphhash.clustering.bounded import cluster_graph
from graphhash.clustering.hierarchy import hierarchy_graph
from graphhash.clustering.labels import Labels
from graphhash.clustering.resolution_search import cluster_to_rows
from graphhash.errors import DataError
from graphhash.graph.local import LocalGraph
from pipeline.config.run_config import RunConfig
from pipeline.distributed.graph import RayGraph
from pipeline.distributed.shards import ShardedCsr
from pipeline.maps.communities import CommunityFacts, describe_communities, save_communities
from pipeline.maps.levels import write_levels
from pipeline.retrieval.budget import BudgetSettings, GraphSize, planned_precisions, rows_for_ratio
from pipeline.retrieval.defaults import clustering_budget
from pipeline.storage.atomic import write_json_atomic


class ClusterFacts(CommunityFacts):
    """What ``cluster.json`` holds. ``levels``: resolution, modularity and rows by column name; ``seconds``: by phase."""

    method: str
    seconds: dict[str, float]
    levels: NotRequired[dict[str, dict[str, Any]]]


class ClusteringOptions(TypedDict):
    """Options of a clustering beside its budget, as in ``pipeline.config.cluster.ClusterConfig``."""

    method: str
    max_size: int | None
    tolerance: float
    max_cycles: int


def cluster_run(config: RunConfig, ingest_dir: Path, out_dir: Path) -> ClusterFacts:
    """Cluster the training graph of a run by the budget that the configuration names, and write the files above.

    Args:
        config: ``cluster`` for the budget and the algorithm; ``map``, ``train`` and ``run`` for the bytes of a ratio.
        ingest_dir: holds ``train/`` and ``train_by_item/``.
        out_dir: exists and is empty.

    Raises:
        DataError: no training interactions, or a budget that the graph cannot meet.
    """
    started = time.perf_counter()
    by_user, by_item = ShardedCsr.open(ingest_dir / "train"), ShardedCsr.open(ingest_dir / "train_by_item")
    if by_user.n_edges == 0:
        raise DataError("there are no training interactions to cluster; check the data and the split")
    budget = _budget(config, GraphSize(by_user.n_rows, by_user.n_cols, by_user.n_edges))
    threads = numba.get_num_threads()
    working_dir = tempfile.TemporaryDirectory(dir=out_dir, prefix="working-")
    try:
        numba.set_num_threads(min(config.cluster.threads or threads, threads))
        biadjacency = None if config.cluster.shards else by_user.load()
        graph: RayGraph | LocalGraph
        if biadjacency is None:
            graph = RayGraph(by_user, by_item, config.cluster.shards, Path(working_dir.name))
        else:
            graph = LocalGraph(biadjacency, by_user.total_weight)
        loaded = time.perf_counter()
        labels = cluster_by_budget(config, graph, biadjacency, budget)
        clustered = time.perf_counter()
        figures = describe_communities(graph, labels)
        described = time.perf_counter()
        seconds = {"load": loaded - started, **labels.seconds, "describe": described - clustered}
        facts: ClusterFacts = {"method": config.cluster.method, **figures, "seconds": seconds}
        if config.cluster.levels:
            levels = hierarchy_graph(graph, [float(level) for level in config.cluster.levels], **_options(config))
            facts["levels"] = write_levels(levels, ingest_dir, out_dir)
            seconds["levels"] = time.perf_counter() - described
    except ValueError as error:
        raise DataError(str(error)) from error
    finally:
        numba.set_num_threads(threads)
        working_dir.cleanup()
    save_communities(labels, out_dir)
    seconds["total"] = time.perf_counter() - started
    facts["seconds"] = {phase: round(value, 3) for phase, value in seconds.items()}
    write_json_atomic(out_dir / "cluster.json", facts)
    return facts


def _budget(config: RunConfig, size: GraphSize) -> tuple[str, Any]:
    """Kind and value of the budget; a ratio of the bytes as rows."""
    kind, value = clustering_budget(config)
    if kind == "rows" and value - 2 >= size.n_users + size.n_items:
        raise DataError(
            f"cluster.rows={value} is no budget for {size.n_users + size.n_items} users and items; give 4 to "
            f"{size.n_users + size.n_items + 1}, or use method 'full'"
        )
    if kind != "ratio":
        return kind, value
    return "rows", rows_for_ratio(BudgetSettings.of(config), value, planned_precisions(config), size)


def _options(config: RunConfig) -> ClusteringOptions:
    cluster = config.cluster
    return {
        "method": cluster.method,
        "max_size": cluster.max_size,
        "tolerance": cluster.tolerance,
        "max_cycles": cluster.max_cycles,
    }


def cluster_by_budget(
    config: RunConfig, graph: RayGraph | LocalGraph, biadjacency: csr_array | None, budget: tuple[str, Any]
) -> Labels:
    """Communities by a resolution, or as many as rows allow.

    Args:
        biadjacency: the graph where it is in memory, shape (n_users, n_items).
    """
    kind, value = budget
    with tqdm(desc="cluster", unit=" cycles", disable=None, leave=False) as bar:

        def on_cycle(n_cycles: int, modularity: float, n_communities: int) -> None:
            bar.update()
            bar.set_postfix_str(f"Q {modularity:.4f}, {n_communities:,} communities")

        if kind == "resolution":
            return cluster_graph(graph, value, on_cycle=on_cycle, **_options(config))
        # Each side has one more row, for OOV ids.
        rows = int(value) - 2 if kind == "rows" else (value[0] - 1, value[1] - 1)
        if config.cluster.method == "balanced":
            assert biadjacency is not None, "the configuration refuses shards with this method"
            return balanced_labels(biadjacency, rows=rows, max_size=config.cluster.max_size)
        return cluster_to_rows(graph, rows, on_cycle=on_cycle, **_options(config))
