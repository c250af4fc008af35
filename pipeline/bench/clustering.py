"""The benchmark of the clustering: ours against other libraries, on the same graphs and in the same process.

Every program gets the same CSR matrix in memory, and the clustering alone is timed: ours with the checks and
the transposition that it starts with, scikit-network's with the adjacency matrix that it builds, igraph's and
networkit's without the conversion to their own graph types. The programs take turns, round by round, so that
a slow minute of the machine hits all of them; medians are reported. Ours runs once uncounted before, because
numba loads its kernels at the first call; the others have nothing to load.

Q is Barber's modularity (`graphhash.clustering.modularity`) of the labels that a program returned, whatever it optimises
itself (`pipeline.bench.clustering_peers`).

Memory is measured apart, in a fresh process per program: the kernel's high-water mark of resident memory
while it clusters, interpreter, libraries and the graph included; `start_mib` is what was there before.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from graphhash.clustering.modularity import modularity
from pipeline.bench.clustering_peers import OURS, PROGRAMS, Run
from pipeline.config.run_config import DataConfig
from pipeline.distributed.shards import ShardedCsr

_log = logging.getLogger(__name__)


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


def bench(data: DataConfig | None, planted: Sequence[Mapping[str, Any]], **how: Any) -> list[dict[str, Any]]:
    """`compare` on a log, read like any other, and on planted graphs.

    Args:
        planted: the arguments of `pipeline.logs.synthetic.synth`, per graph.
        how: the keyword arguments of `compare`.
    """
    from pipeline.distributed.session import ray_session
    from pipeline.logs.synthetic import synth
    from pipeline.retrieval.ingest import ingest

    results = []
    for sizes in ([None] if data is not None else []) + list(planted):
        name = f"planted {sizes['n_interactions']:,}" if sizes else Path(data.path).name
        _log.info("%s: making the graph", name)
        with tempfile.TemporaryDirectory(prefix="graphhash-bench-") as folder:
            config = data
            if sizes:
                synth(Path(folder, "log"), **sizes)
                config = DataConfig(str(Path(folder, "log")), validation=0.0, test=0.0)
            with ray_session():
                ingest(config, Path(folder, "ingest"))
            results += compare(name, Path(folder, "ingest", "train"), **how)
    return results


def compare(
    name: str,
    graph: Path,
    *,
    resolutions: Sequence[float],
    programs: Sequence[str],
    rounds: int,
    threads: int | None,
) -> list[dict[str, Any]]:
    """Time the programs in turns on one stored graph, then measure the memory of each.

    Args:
        graph: folder of a `ShardedCsr`, rows = users.
        programs: as `bench_programs.choose_programs` returns them, ours first.
        threads: of the programs that have threads; None means one per core.

    Returns: one object per resolution and program, with program, graph, resolution, n_users, n_items,
        n_edges and threads; seconds (the median) and rounds_s (all of them), edges_per_s; rows (both sides)
        and modularity, medians too; start_mib and peak_mib. Ours has phases_s, too; a peer has speedup (its
        seconds over ours) and modularity_ratio (our Q over its).
    """
    biadjacency = ShardedCsr.open(graph).load()
    (n_users, n_items), n_edges = biadjacency.shape, biadjacency.nnz
    prepared = {program: PROGRAMS[program](biadjacency, threads) for program in programs}
    results = []
    for resolution in resolutions:
        setting = f"{name}, resolution {resolution:g}"
        _log.info("%s: %s, uncounted", setting, OURS)
        prepared[OURS][0](resolution)
        runs: dict[str, list[dict[str, Any]]] = {program: [] for program in programs}
        for number in range(rounds):
            for program, (run, _) in prepared.items():
                runs[program].append(_timed(run, biadjacency, resolution))
                seconds = runs[program][-1]["seconds"]
                _log.info("%s: %s, round %d: %.2f s", setting, program, number + 1, seconds)
        entries = []
        for program, (_, n_threads) in prepared.items():
            _log.info("%s: %s, memory", setting, program)
            seconds, rows, q = (
                statistics.median(run[key] for run in runs[program]) for key in ("seconds", "rows", "modularity")
            )
            entry = {"program": program, "graph": name, "resolution": resolution, "threads": n_threads,
                     "n_users": n_users, "n_items": n_items, "n_edges": n_edges, "seconds": seconds,
                     "rounds_s": [run["seconds"] for run in runs[program]], "edges_per_s": n_edges / seconds,
                     "rows": rows, "modularity": q}  # fmt: skip
            entry |= _memory(graph, program, threads, resolution)
            if program == OURS:
                typical = min(runs[program], key=lambda run: abs(run["seconds"] - seconds))
                entry["phases_s"] = typical["phases"]
            else:
                entry["speedup"] = seconds / entries[0]["seconds"]
                entry["modularity_ratio"] = entries[0]["modularity"] / q
            entries.append(entry)
        results += entries
    return results


def by_setting(results: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[tuple[str, ...]], str]]:
    """What to print per graph and resolution: a title, a table with its header, and where our time went."""
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
        # What the phases leave: the checks, the transposition and the degrees before them.
        "phases": phases and {"prepare": seconds - sum(phases.values())} | phases,
        "rows": len(np.unique(users)) + len(np.unique(items)),
        "modularity": modularity(biadjacency, users, items, resolution=resolution),
    }


def _memory(graph: Path, program: str, threads: int | None, resolution: float) -> dict[str, float]:
    """start_mib and peak_mib of one run in a process of its own; a fork would start with our memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_resident_of_run, graph, program, threads, resolution).result()


def _resident_of_run(graph: Path, program: str, threads: int | None, resolution: float) -> dict[str, float]:
    biadjacency = ShardedCsr.open(graph).load()
    run, _ = PROGRAMS[program](biadjacency, threads)
    # A program that keeps a graph type of its own does not need the matrix any more.
    del biadjacency
    gc.collect()
    start = _peak_mib(reset=True)
    run(resolution)
    return {"start_mib": start, "peak_mib": _peak_mib()}


def _peak_mib(reset: bool = False) -> float:
    """Most resident memory of this process so far; Linux can forget the past first."""
    status = Path("/proc/self/status")
    if not status.exists():
        # Bytes on macOS, else KiB. It cannot be reset, so it may be the peak of loading the graph.
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    # Not ru_maxrss, which a new process inherits from its parent.
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024
