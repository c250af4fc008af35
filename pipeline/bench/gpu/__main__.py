"""``python -m pipeline.bench.gpu``, which ``make gpu-check`` calls: the GPU paths beside the CPU's, their speed and their memory.

It needs PyTorch, NumPy, SciPy, Numba and PyArrow, and takes at most LIMIT_S on a GPU. Without a GPU it says so and exits with 0. What fails
is reported, with its traceback in the JSON file, and the rest goes on; the exit code is then 1. The file is written anew after every
result, so that a check that is cut off leaves what it has measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphhash.errors import first_line

if TYPE_CHECKING:
    import torch

    from pipeline.bench.gpu.data import Scale

LIMIT_S = 480.0
# A training is started only if this is left, for its start and for the bundle.
RESERVE_S = 45.0
NOT_REACHED = "it was not reached"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, check and write; the exit code."""
    start = time.perf_counter()
    options = parser().parse_args(arguments)
    try:
        import torch
    except ModuleNotFoundError:
        print("gpu-check: PyTorch is not installed; pip install torch", file=sys.stderr)
        return 2
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: skipped: PyTorch sees no GPU here; --device cpu --small runs the check on the CPU")
        return 0

    def save(report: dict[str, Any]) -> None:
        report["seconds"] = time.perf_counter() - start
        if options.json is not None:
            options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    report = check(torch.device(options.device), small=options.small, until=start + options.limit, save=save)
    return publish(report, options.page)


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        prog="python -m pipeline.bench.gpu", description="Check the GPU paths of GraphHash."
    )
    found.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    found.add_argument("--small", action="store_true", help="small data and short measurements")
    found.add_argument("--limit", type=float, default=LIMIT_S, metavar="SECONDS", help="no training begins after it")
    found.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    found.add_argument(
        "--page", type=Path, metavar="FILE", help="put the tables into a page, such as docs/experiments/gpu.md"
    )
    return found


def check(device: torch.device, *, small: bool, until: float, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Everything that is measured.

    Args:
        until: of ``time.perf_counter``, when the last training has to be over.
        save: called with the report so far after every result.
    """
    from pipeline.bench.gpu.data import FULL, SMALL

    scale = SMALL if small else FULL
    report: dict[str, Any] = {
        "machine": machine(device), "commit": commit(), "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "scale": dict(vars(scale)), "parity": [], "speed": [], "onnx_runtime": {"skipped": NOT_REACHED}, "errors": [],
    }  # fmt: skip
    parts = {
        "parity with the CPU": lambda: compared(device, report),
        "speed": lambda: measured(scale, device, until, report),
        "ONNX Runtime": lambda: asked(device, report),
    }
    for name, part in parts.items():
        say(name)
        try:
            for _ in part():
                save(report)
        except Exception as error:  # What the other parts tell is not lost.
            report["errors"].append(
                {"part": name, "error": f"{type(error).__name__}: {first_line(error)}", "trace": traceback.format_exc()}
            )
        save(report)
    return report


def compared(device: torch.device, report: dict[str, Any]) -> Iterator[None]:
    """Put every comparison with the CPU into the report."""
    from pipeline.bench.gpu.parity import compare_all

    for line in compare_all(device):
        report["parity"].append(line.to_json())
        yield
    say(f"{sum(line['passed'] for line in report['parity'])} of {len(report['parity'])} comparisons agree")


def measured(scale: Scale, device: torch.device, until: float, report: dict[str, Any]) -> Iterator[None]:
    """Put every training into the report, in float32, and in bf16 on a GPU, as long as there is time."""
    from pipeline.bench.gpu.data import Data
    from pipeline.bench.gpu.speed import Result, bandwidth, measure, trainings
    from pipeline.bench.gpu.tables import NO_TIME

    data = Data.draw(scale)
    report["scale"]["n_interactions"] = data.graph.nnz
    bytes_per_s = bandwidth(device, scale.copy_mib)
    report["machine"]["bandwidth_gb_s"] = bytes_per_s / 1e9
    for training in trainings(data, scale, device):
        for amp in (None, "bf16") if device.type == "cuda" else (None,):
            result = Result(training.name, training.map, amp or "float32", training.n_per_step, 0, error=NO_TIME)
            if time.perf_counter() + scale.seconds + RESERVE_S <= until:
                result = measure(training, device, amp, scale.seconds, bytes_per_s)
            report["speed"].append(result.to_json())
            rate = result.error or f"{result.per_second:,.0f} examples/s"
            say(f"{result.model}, {result.map}, {result.precision}, batches of {result.batch:,}: {rate}")
            yield


def asked(device: torch.device, report: dict[str, Any]) -> Iterator[None]:
    """Put the answers of ONNX Runtime into the report."""
    from pipeline.bench.gpu.bundles import compare_runtimes
    from pipeline.bench.gpu.data import SMALL, Data

    report["onnx_runtime"] = compare_runtimes(Data.draw(SMALL), SMALL.dim, device.type)
    yield


def machine(device: torch.device) -> dict[str, Any]:
    """Device and versions."""
    import numba
    import numpy
    import scipy
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "numba": numba.__version__,
        "python": sys.version.split()[0],
    }


def commit() -> str:
    """Of this checkout; "unknown" without git."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def publish(report: dict[str, Any], page: Path | None) -> int:
    """Print the tables, put them into the page, and return the exit code."""
    from pipeline.bench.gpu.tables import failures, markdown, write_page

    text = markdown(report)
    print(text)
    if page is not None:
        write_page(page, text)
    if n_failed := len(failures(report)):
        print(f"gpu-check: {n_failed} failed; the file of --json has their tracebacks", file=sys.stderr)
    return 1 if n_failed else 0


def say(line: str) -> None:
    """Progress, on standard error."""
    print(f"gpu-check: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
