"""``python -m pipeline.bench.gpu``, which ``make gpu-check`` calls: the GPU paths beside the CPU's, their speed and their memory.

It needs PyTorch, NumPy, SciPy, Numba and PyArrow, and takes at most LIMIT_S on a GPU. Without a GPU it says so and exits with 0. The exit
code is 1 where a comparison with the CPU or a training fails.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from pipeline.bench.gpu.data import Data, Scale
    from pipeline.bench.gpu.speed import Result

LIMIT_S = 480.0
# A training is started only if this is left, for its start and for the bundle.
RESERVE_S = 45.0


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
    report = check(torch.device(options.device), small=options.small, until=start + options.limit)
    report["seconds"] = time.perf_counter() - start
    return publish(report, options.json, options.page)


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


def check(device: torch.device, *, small: bool, until: float) -> dict[str, Any]:
    """Everything that is measured.

    Args:
        until: of ``time.perf_counter``, when the last training has to be over.
    """
    from pipeline.bench.gpu.bundles import compare_runtimes
    from pipeline.bench.gpu.data import FULL, SMALL, Data
    from pipeline.bench.gpu.parity import compare_all
    from pipeline.bench.gpu.speed import bandwidth

    scale = SMALL if small else FULL
    say("parity with the CPU")
    parity = compare_all(device)
    say(f"{sum(line.passed for line in parity)} of {len(parity)} comparisons agree")
    say("data")
    data = Data.draw(scale)
    bytes_per_s = bandwidth(device, scale.copy_mib)
    speed = list(measured(data, scale, device, bytes_per_s, until))
    say("ONNX Runtime")
    return {
        "machine": machine(device) | {"bandwidth_gb_s": bytes_per_s / 1e9},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "scale": vars(scale) | {"n_interactions": data.graph.nnz},
        "parity": [line.to_json() for line in parity],
        "speed": [line.to_json() for line in speed],
        "onnx_runtime": compare_runtimes(Data.draw(SMALL), SMALL.dim, device.type),
    }


def measured(data: Data, scale: Scale, device: torch.device, bytes_per_s: float, until: float) -> Iterator[Result]:
    """Every training in float32, and in bf16 on a GPU, as long as there is time."""
    from pipeline.bench.gpu.speed import NO_TIME, Result, measure, trainings

    for training in trainings(data, scale, device):
        for amp in (None, "bf16") if device.type == "cuda" else (None,):
            precision = amp or "float32"
            if time.perf_counter() + scale.seconds + RESERVE_S > until:
                yield Result(training.name, training.map, precision, training.n_per_step, 0, error=NO_TIME)
                continue
            result = measure(training, device, amp, scale.seconds, bytes_per_s)
            rate = result.error or f"{result.per_second:,.0f} examples/s"
            say(f"{training.name}, {training.map}, {precision}, batches of {training.n_per_step:,}: {rate}")
            yield result


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


def publish(report: dict[str, Any], json_file: Path | None, page: Path | None) -> int:
    """Print the tables, write the files, and return the exit code."""
    from pipeline.bench.gpu.speed import NO_MEMORY, NO_TIME
    from pipeline.bench.gpu.tables import markdown, write_page

    text = markdown(report)
    print(text)
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if page is not None:
        write_page(page, text)
    failed = [line for line in report["parity"] if not line["passed"]]
    failed += [line for line in report["speed"] if line["error"] not in ("", NO_MEMORY, NO_TIME)]
    if failed:
        print(f"gpu-check: {len(failed)} failed", file=sys.stderr)
    return 1 if failed else 0


def say(line: str) -> None:
    """Progress, on standard error."""
    print(f"gpu-check: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
