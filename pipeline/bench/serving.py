"""The benchmark of serving: a bundle next to another one, such as the full table's, and next to PyTorch eager.

Every program takes raw user ids and gives raw item ids and scores; of a CTR model, raw rows and probabilities. They take
turns, request by request, so that a slow minute of the machine hits all of them. Memory is measured apart, in a fresh process per
bundle that has loaded another model before, so that ONNX Runtime itself does not count: the growth of the proportional set size,
after free memory went back to the system.
"""

from __future__ import annotations

import itertools
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from pipeline.bench.serving_subjects import Answer, Subject, check_comparable, subject_of
from pipeline.export.graph import IR_VERSION, OPSET
from serving.bundle_model import Provider
from serving.errors import BundleError
from serving.node_placement import nodes_by_provider

_log = logging.getLogger(__name__)

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WARM_UP = 3
EAGER = "PyTorch eager"


@dataclass(frozen=True)
class BenchOptions:
    """How a bundle is timed."""

    provider: Provider = "auto"
    threads: int | None = None
    """CPU threads of a request; None: one per core."""
    k: int = 20
    """Items per user; not used by CTR models."""
    n_requests: int = 200
    """Timed requests of one user or row each; of larger requests as many as have four times the users, at least 10."""
    batch_sizes: Sequence[int] = BATCH_SIZES
    seed: int = 0
    """Draws the users or rows, all of them in the vocabulary of the first bundle."""


DEFAULT_OPTIONS = BenchOptions()

# Runs in a process of its own; what it imports is what serving imports.
_MEMORY = """
import ctypes, json, re, sys
from serving import open_bundle, session

def resident():
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        return 1024 * int(re.search(r"Pss:\\s+(\\d+)", open("/proc/self/smaps_rollup").read())[1])
    except OSError:
        import psutil
        return psutil.Process().memory_info().rss

empty, bundle, provider, threads, calls = json.loads(sys.stdin.read())
session.open_session(empty, provider, threads)
before = resident()
loaded = open_bundle(bundle, provider, threads)
sizes = {"loaded": resident() - before}
for n, (method, arguments) in calls.items():
    getattr(loaded, method)(*arguments)
    sizes[f"after {n}"] = resident() - before
print(json.dumps(sizes))
"""


def bench(
    bundle: Path, against: Path | None = None, *, options: BenchOptions = DEFAULT_OPTIONS
) -> list[dict[str, Any]]:
    """Figures of every program.

    Args:
        bundle, against: folders; the second may be None.

    Returns: an object per program: ``program``, ``unit`` ("users" or "rows"), ``precision``, ``runtime``, ``disk_bytes``, ``memory``
        (bytes ``loaded``, ``after 1``, ``after 256``; None for PyTorch), ``providers`` (kernels by provider), ``provider`` and ``sizes``:
        per batch size ``batch``, ``n_requests``, ``p50_ms``, ``p95_ms``, ``p99_ms``, ``per_second`` and ``cpu_ms``, the median of all
        threads' CPU time, which a busy machine stretches less.

    Raises:
        BundleError: a bundle is refused, or both take different requests.
    """
    bundles = {"bundle": bundle} | ({} if against is None else {"against": against})
    subjects = {name: subject_of(path, options.provider, options.threads, options.k) for name, path in bundles.items()}
    first = subjects["bundle"]
    if against is not None:
        check_comparable(bundle, first, against, subjects["against"])
    answers: dict[str, Answer] = {name: subject.answer for name, subject in subjects.items()}
    if (eager := first.eager()) is not None:
        answers[EAGER] = eager
    rng = np.random.default_rng(options.seed)
    timed: dict[str, list[dict[str, Any]]] = {name: [] for name in answers}
    for batch in options.batch_sizes:
        _log.info("%d %s a request ...", batch, first.unit)
        n = min(options.n_requests, max(10, 4 * options.n_requests // batch))
        for name, figures in _time(answers, [first.draw(rng, batch) for _ in range(WARM_UP + n)], batch).items():
            timed[name].append(figures)
    calls = {n: first.call(rng, n) for n in (1, 256)}
    results = []
    for name in answers:
        entry: dict[str, Any] = {"program": name, "unit": first.unit, "sizes": timed[name]}
        entry |= dict.fromkeys(("memory", "providers", "disk_bytes"))
        if name in subjects:
            _log.info("memory of %s ...", bundles[name])
            entry |= _facts(bundles[name], subjects[name], calls, options)
        results.append(entry)
    return results


def _time(answers: Mapping[str, Answer], requests: Sequence[Any], batch: int) -> dict[str, dict[str, Any]]:
    """Figures of every program for the same requests, by turns."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in answers}
    # Who comes after whom makes some ten percent: in a circle, one program would always come after PyTorch, which empties the caches.
    for order, request in zip(itertools.cycle(itertools.permutations(answers)), requests, strict=False):
        for name in order:
            started = time.perf_counter(), time.process_time()
            answers[name](request)
            seconds[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    return {name: _figures(batch, *np.array(values[WARM_UP:]).T) for name, values in seconds.items()}


def _facts(bundle: Path, subject: Subject, calls: Mapping[int, Any], options: BenchOptions) -> dict[str, Any]:
    """What of a bundle is measured or known beside its time."""
    return {
        "program": subject.name,
        "precision": subject.manifest["precision"],
        "runtime": subject.manifest["runtime"].get("mode", "as stored"),
        "disk_bytes": sum(path.stat().st_size for path in bundle.iterdir()),
        "memory": memory(bundle, options.provider, options.threads, calls),
        "providers": nodes_by_provider(bundle, options.provider),
        "provider": subject.provider,
    }


def memory(bundle: Path, provider: Provider, threads: int | None, calls: Mapping[int, Any]) -> dict[str, int]:
    """Bytes that a fresh process grows by: ``loaded``, and after each of the calls, ``after 1`` and so on.

    Args:
        calls: by number of users or rows, as `Subject.call` makes them.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "empty.onnx"
        value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "empty", value[:1], value[1:])
        opset = [helper.make_opsetid("", OPSET)]
        file.write_bytes(helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION).SerializeToString())
        arguments = json.dumps([str(file), str(bundle.absolute()), provider, threads, calls])
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run(
            [sys.executable, "-c", _MEMORY], input=arguments, cwd=root, capture_output=True, text=True
        )
    if done.returncode:
        raise BundleError(
            f"{bundle}: measuring its memory failed ({(done.stderr.splitlines() or ['no reason given'])[-1]})"
        )
    return json.loads(done.stdout)


def _figures(batch: int, seconds: NDArray[np.float64], cpu_seconds: NDArray[np.float64]) -> dict[str, Any]:
    times = {f"p{share}_ms": 1e3 * float(np.percentile(seconds, share)) for share in (50, 95, 99)}
    rate = {"per_second": batch * len(seconds) / float(seconds.sum())}
    return {"batch": batch, "n_requests": len(seconds)} | times | rate | {"cpu_ms": 1e3 * float(np.median(cpu_seconds))}


def size_table(results: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Header and rows: bytes on disk and in memory."""
    header = ("program", "precision", "runtime", "on disk", "MB loaded", "after 1", "after 256", "on CUDA")
    lines: list[tuple[str, ...]] = [header]
    for entry in results:
        if entry["memory"] is None:
            continue
        kernels = entry["providers"]
        on_cuda = kernels.get("CUDAExecutionProvider", 0) / sum(kernels.values())
        sizes = (f"{entry['memory'][key] / 1e6:.1f}" for key in ("loaded", "after 1", "after 256"))
        lines.append(
            (
                entry["program"],
                entry["precision"],
                entry["runtime"],
                f"{entry['disk_bytes']:,}",
                *sizes,
                f"{100 * on_cuda:.0f} %",
            )
        )
    return lines


def markdown_table(results: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Header and rows: latency and throughput per batch size and program."""
    unit = results[0]["unit"]
    lines: list[tuple[str, ...]] = [(unit, "program", "p50 ms", "p95 ms", "p99 ms", "CPU ms", f"{unit}/s")]
    for i, size in enumerate(results[0]["sizes"]):
        for entry in results:
            row = entry["sizes"][i]
            times = (f"{row[key]:.2f}" for key in ("p50_ms", "p95_ms", "p99_ms", "cpu_ms"))
            lines.append((str(size["batch"]), _label(entry), *times, f"{row['per_second']:,.0f}"))
    return lines


def as_markdown(results: Sequence[dict[str, Any]]) -> str:
    tables = []
    for header, *rows in (size_table(results), markdown_table(results)):
        lines = [header, ("---",) * len(header), *rows]
        tables.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(tables) + "\n"


def _label(entry: dict[str, Any]) -> str:
    return f"{entry['program']}, {entry['precision']}, {entry['runtime']}" if entry["memory"] else entry["program"]


def draw(results: Sequence[dict[str, Any]], file: Path) -> None:
    """Latency (p50 as a line, up to p95 as a band) and throughput against users per request, as a PNG."""
    from matplotlib.figure import Figure

    from pipeline.reports.figures import COLOURS

    figure = Figure(figsize=(9.6, 4.0), dpi=144, layout="constrained")
    latency, throughput = figure.subplots(1, 2)
    for number, entry in enumerate(results):
        colour = COLOURS[number % len(COLOURS)]
        batch, p50, p95, rate = (
            [row[key] for row in entry["sizes"]] for key in ("batch", "p50_ms", "p95_ms", "per_second")
        )
        latency.plot(batch, p50, color=colour, marker="o", label=_label(entry))
        latency.fill_between(batch, p50, p95, color=colour, alpha=0.15, linewidth=0)
        throughput.plot(batch, rate, color=colour, marker="o", label=_label(entry))
    latency.set(ylabel="ms a request, p50 to p95")
    unit = results[0]["unit"]
    throughput.set(ylabel=f"{unit} a second")
    for axes in (latency, throughput):
        axes.set(xscale="log", yscale="log", xlabel=f"{unit} a request")
        axes.set_xticks(batch, labels=[str(n) for n in batch])
        axes.minorticks_off()
        axes.grid(True, which="major", color="#e6e9ec")
    latency.legend(fontsize=8, frameon=False)
    figure.savefig(file, format="png")
