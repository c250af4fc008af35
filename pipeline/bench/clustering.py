"""Benchmark of the clustering: GraphHash against other libraries, on the same graphs and in the same process.

Every program gets the same CSR matrix in memory, and the clustering alone is timed: that of GraphHash with its checks and its
transposition, scikit-network's with the adjacency matrix that it builds, igraph's and networkit's without the conversion to their own
graph types. The programs take turns, round by round, so that a slow minute of the machine hits all of them; medians are reported.
GraphHash runs once untimed before, because numba loads its kernels at the first call; the others have nothing to load.

Q is Barber's modularity (`graphhash.clustering.modularity`) of the communities that a program returned, whatever it optimises itself
(`pipeline.bench.clustering_peers`).

Memory is measured in a fresh process per program: the kernel's high-water mark of resident memory while it clusters, interpreter,
libraries and the graph included; `start_mib` is the resident memory before.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from graphhash.clustering.modularity import modularity
from pipeline.bench.clustering_peers import OURS, PROGRAMS, Run
from pipeline.config.run_config import DataConfig
from pipeline.distributed.shards import ShardedCsr
from pipeline.training.memory import peak_mib

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClusteringBench:
    """Programs, resolutions and number of rounds of a benchmark.

    Args:
        resolutions: of the modularity.
        programs: as `pipeline.bench.clustering_peers.choose_programs` returns them, GraphHash first.
        rounds: timed runs per program and resolution.
        threads: of the programs that have threads; None means one per core.
    """

    resolutions: Sequence[float]
    programs: Sequence[str]
    rounds: int
    threads: int | None


def planted_sizes(
    n_interactions: int, n_users: int | None, n_items: int | None, n_communities: int | None
) -> dict[str, int]:
    """Sizes of a planted graph; None keeps its proportion, so that graphs of several sizes are one family."""
    n_items = n_items or max(10, n_interactions // 50)
    return {
        "n_users": n_users or max(1, n_interactions // 10),
        "n_items": n_items,
        "n_interactions": n_interactions,
        "n_communities": n_communities or max(1, n_items // 100),
    }


def bench(
    data: DataConfig | None, planted: Sequence[Mapping[str, Any]], settings: ClusteringBench
) -> list[dict[str, Any]]:
    """:func:`compare` on a log, read as any other, and on planted graphs.

    Args:
        planted: the arguments of `pipeline.logs.synthetic.synth`, per graph.
    """
    from pipeline.logs.synthetic import synth

    results: list[dict[str, Any]] = []
    if data is not None:
        results += _bench_log(Path(data.path).name, data, settings)
    for sizes in planted:
        with tempfile.TemporaryDirectory(prefix="graphhash-bench-") as folder:
            synth(Path(folder, "log"), **sizes)
            log = DataConfig(str(Path(folder, "log")), validation=0.0, test=0.0)
            results += _bench_log(f"planted {sizes['n_interactions']:,}", log, settings)
    return results


def _bench_log(name: str, data: DataConfig, settings: ClusteringBench) -> list[dict[str, Any]]:
    from pipeline.retrieval.ingest import ingest

    _log.info("%s: making the graph", name)
    with tempfile.TemporaryDirectory(prefix="graphhash-bench-") as folder:
        ingest(data, Path(folder, "ingest"))
        return compare(name, Path(folder, "ingest", "train"), settings)


def compare(name: str, graph: Path, settings: ClusteringBench) -> list[dict[str, Any]]:
    """Time the programs in turns on one stored graph, then measure the memory of each.

    Args:
        name: of the graph, in the results.
        graph: folder of a `ShardedCsr`, rows = users.

    Returns: one object per resolution and program, with program, graph, resolution, n_users, n_items,
        n_edges and threads; seconds (the median) and rounds_s (all of them), edges_per_s; rows (both sides)
        and modularity, medians too; start_mib and peak_mib. GraphHash has phases_s as well; a peer has speedup (its
        seconds over those of GraphHash) and modularity_ratio (Q of GraphHash over its).
    """
    biadjacency = ShardedCsr.open(graph).load()
    (n_users, n_items), n_edges = biadjacency.shape, biadjacency.nnz
    prepared = {program: PROGRAMS[program](biadjacency, settings.threads) for program in settings.programs}
    results = []
    for resolution in settings.resolutions:
        title = f"{name}, resolution {resolution:g}"
        runs = _time_in_turns(title, prepared, biadjacency, resolution, settings.rounds)
        entries: list[dict[str, Any]] = []
        for program, (_, n_threads) in prepared.items():
            _log.info("%s: %s, memory", title, program)
            entry = {"program": program, "graph": name, "resolution": resolution, "threads": n_threads}
            entry |= {"n_users": n_users, "n_items": n_items, "n_edges": n_edges}
            entry |= _figures(runs[program], n_edges)
            entry |= _memory(graph, program, settings.threads, resolution)
            if program == OURS:
                typical = min(runs[program], key=lambda run: abs(run["seconds"] - entry["seconds"]))
                entry["phases_s"] = typical["phases"]
            else:
                entry["speedup"] = entry["seconds"] / entries[0]["seconds"]
                entry["modularity_ratio"] = entries[0]["modularity"] / entry["modularity"]
            entries.append(entry)
        results += entries
    return results


def _time_in_turns(
    title: str, prepared: Mapping[str, tuple[Run, int]], biadjacency: csr_array, resolution: float, rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """The timed runs of every program, round by round."""
    _log.info("%s: %s, uncounted", title, OURS)
    prepared[OURS][0](resolution)
    runs: dict[str, list[dict[str, Any]]] = {program: [] for program in prepared}
    for number in range(rounds):
        for program, (run, _) in prepared.items():
            runs[program].append(_timed(run, biadjacency, resolution))
            _log.info("%s: %s, round %d: %.2f s", title, program, number + 1, runs[program][-1]["seconds"])
    return runs


def _figures(runs: Sequence[Mapping[str, Any]], n_edges: int) -> dict[str, Any]:
    """Medians of the timed runs of a program."""
    seconds, rows, q = (statistics.median(run[key] for run in runs) for key in ("seconds", "rows", "modularity"))
    return {
        "seconds": seconds,
        "rounds_s": [run["seconds"] for run in runs],
        "edges_per_s": n_edges / seconds,
        "rows": rows,
        "modularity": q,
    }


def by_setting(results: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[tuple[str, ...]], str]]:
    """What to print per graph and resolution: a title, a table with its header, and the phases of GraphHash."""
    header = ("program", "threads", "seconds", "edges/s", "rows", "Q", "peak MiB", "speedup", "Q ratio")
    for ours in (entry for entry in results if entry["program"] == OURS):
        lines = [
            (e["program"], str(e["threads"]), f"{e['seconds']:.2f}", f"{e['edges_per_s']:,.0f}",
             f"{e['rows']:,.0f}", f"{e['modularity']:.4f}", f"{e['peak_mib']:,.0f}",
             f"{e['speedup']:.2f}" if "speedup" in e else "",
             f"{e['modularity_ratio']:.4f}" if "speedup" in e else "")
            for e in results
            if (e["graph"], e["resolution"]) == (ours["graph"], ours["resolution"])
        ]  # fmt: skip
        sizes = f"{ours['n_users']:,} users, {ours['n_items']:,} items, {ours['n_edges']:,} edges"
        phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in ours["phases_s"].items())
        title = f"{ours['graph']}: {sizes}; resolution {ours['resolution']:g}"
        yield title, [header, *lines], f"our seconds: {phases}"


def draw(results: Sequence[dict[str, Any]], file: Path) -> None:
    """Seconds against edges, a line per program and resolution, as a PNG."""
    from matplotlib.figure import Figure

    from pipeline.reports.figures import COLOURS

    figure = Figure(figsize=(7.2, 4.2), dpi=144, layout="constrained")
    axes = figure.add_subplot()
    programs, resolutions = (list(dict.fromkeys(entry[key] for entry in results)) for key in ("program", "resolution"))
    for program in programs:
        for number, resolution in enumerate(resolutions):
            points = sorted(
                (entry["n_edges"], entry["seconds"])
                for entry in results
                if (entry["program"], entry["resolution"]) == (program, resolution)
            )
            axes.plot(
                *zip(*points, strict=True),
                color=COLOURS[programs.index(program)],
                linestyle=("-", "--", ":", "-.")[number % 4],
                marker="o",
                label=f"{program}, resolution {resolution:g}",
            )
    axes.set(xscale="log", yscale="log", xlabel="edges", ylabel="seconds to cluster")
    axes.grid(True, which="major", color="#e6e9ec")
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(file, format="png")


def _timed(run: Run, biadjacency: csr_array, resolution: float) -> dict[str, Any]:
    gc.collect()
    started = time.perf_counter()
    users, items, phases = run(resolution)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        # The time outside the phases: the checks, the transposition and the degrees before them.
        "phases": {"prepare": seconds - sum(phases.values()), **phases} if phases else {},
        "rows": len(np.unique(users)) + len(np.unique(items)),
        "modularity": modularity(biadjacency, users, items, resolution=resolution),
    }


def _memory(graph: Path, program: str, threads: int | None, resolution: float) -> dict[str, float]:
    """start_mib and peak_mib of one run in a process of its own; a fork would start with the memory of this one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_resident_of_run, graph, program, threads, resolution).result()


def _resident_of_run(graph: Path, program: str, threads: int | None, resolution: float) -> dict[str, float]:
    biadjacency = ShardedCsr.open(graph).load()
    run, _ = PROGRAMS[program](biadjacency, threads)
    # A program that has built its own graph type does not need the matrix any more.
    del biadjacency
    gc.collect()
    start = peak_mib(reset=True)
    run(resolution)
    return {"start_mib": start, "peak_mib": peak_mib()}
