"""The report of the GPU check as markdown, and its place in a page of the docs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Of trainings: errors that say nothing of the code.
NO_MEMORY, NO_TIME = "out of device memory", "no time left"
MARKER = "<!-- FIGURES: gpu -->"
END = "<!-- end of figures -->"
BLOCK = re.compile(rf"{re.escape(MARKER)}\n.*?{re.escape(END)}", re.DOTALL)


def markdown(report: Mapping[str, Any]) -> str:
    """The tables of a report, and a line on the machine, commit and day."""
    lines = [_parity(report["parity"]), "", *_table(SPEED, [_speed(line) for line in report["speed"]]), ""]
    lines += [_bundle(report["onnx_runtime"]), "", _caption(report)]
    failed = [line for line in report["parity"] if not line["passed"]]
    if failed:
        lines[1:1] = ["", *_table(PARITY, [_failed(line) for line in failed])]
    for broken in report["errors"]:
        lines += ["", f"Broken off: {broken['part']}, by {broken['error']}."]
    return "\n".join(lines)


def failures(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Comparisons that differ, trainings that failed, and parts that broke off. What had no memory or no time left is none."""
    failed = [line for line in report["parity"] if not line["passed"]]
    failed += [line for line in report["speed"] if line["error"] not in ("", NO_MEMORY, NO_TIME)]
    return failed + list(report["errors"])


SPEED = (
    "model", "table", "precision", "batch", "parameters", "examples/s", "ms per step", "forecast MiB", "allocated MiB", "peak MiB",
    "share of the bandwidth bound",
)  # fmt: skip
PARITY = ("compared", "name", "difference", "in")


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows)]


def _parity(lines: Sequence[Mapping[str, Any]]) -> str:
    found = [line["difference"] for line in lines if line["difference"] is not None]
    n_passed = sum(line["passed"] for line in lines)
    return f"Parity with the CPU: {n_passed} of {len(lines)} comparisons agree; the largest difference is {max(found, default=0):.1e}."


def _failed(line: Mapping[str, Any]) -> list[str]:
    difference = "-" if line["difference"] is None else f"{line['difference']:.1e}"
    return [line["part"], line["name"], difference, line["where"].replace("|", "/")]


def _speed(line: Mapping[str, Any]) -> list[str]:
    first = [line["model"], line["map"], line["precision"], f"{line['batch']:,}", f"{line['n_parameters']:,}"]
    if line["per_second"] is None:
        return [*first, line["error"].replace("|", "/"), *["-"] * 5]
    memory = ["-" if line[f"{key}_mib"] is None else f"{line[f'{key}_mib']:,.0f}" for key in MEMORY]
    return [*first, f"{line['per_second']:,.0f}", f"{line['step_ms']:.2f}", *memory, f"{line['bound_share']:.3f}"]


MEMORY = ("forecast", "allocated", "peak")


def _bundle(found: Mapping[str, Any]) -> str:
    if "skipped" in found:
        return f"ONNX Runtime: skipped, {found['skipped']}."
    return (
        f"ONNX Runtime, {found['provider']}: {found['ms']:.2f} ms for a request, {found['cpu_ms']:.2f} ms on the CPU; "
        f"scores differ by at most {found['difference']:.1e}, {found['same_items']:.1%} of the items are the same."
    )


def _caption(report: Mapping[str, Any]) -> str:
    facts = report["machine"]
    return (
        f"{facts['device']}, {facts.get('bandwidth_gb_s', 0):,.0f} GB/s copied, PyTorch {facts['torch']}, commit {report['commit']}, "
        f"{report['date']}, {report['seconds']:.0f} s."
    )


def write_page(page: Path, text: str) -> None:
    """Put the tables between the marker of a page and its end.

    Raises:
        ValueError: the page has no marker.
    """
    old = page.read_text(encoding="utf-8")
    if not BLOCK.search(old):
        raise ValueError(f"{page} has no lines {MARKER} and {END}; add both")
    page.write_text(BLOCK.sub(lambda _: f"{MARKER}\n\n{text}\n\n{END}", old, count=1), encoding="utf-8")
