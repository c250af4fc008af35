"""What a comparison writes: a table (`compare.md`, `compare.csv`), all figures (`compare.json`) and a picture (`compare.png`).

A line of the table is a model, a method and a budget: the mean over the seeds, and the standard deviation of the sample (divided by
n - 1) where there are several. Runs that failed are counted, and listed with their reasons.

    compare.json: {"n_runs", "mlflow_run_id", "summary": [a line each], "runs": [the metrics of each], "failed": [...]}
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from pipeline.runs.tasks import TASKS
from pipeline.storage.atomic import write_json_atomic, write_text_atomic
from pipeline.sweeps.grid import FULL
from pipeline.sweeps.plot import draw
from pipeline.sweeps.scheduler import Result
from pipeline.task import Task

RETRIEVAL = TASKS["retrieval"]


class PointLabels(TypedDict):
    """What tells a run of the comparison from the others; ``run`` is its folder, relative to that of the comparison."""

    method: str
    model: str
    seed: int
    budget: str
    run: str


# A run, and what it has come to.
Entry = tuple[PointLabels, Result]


def header(task: Task = RETRIEVAL) -> tuple[str, ...]:
    """Names of the columns of the table."""
    return (
        "model",
        "method",
        "budget",
        "seeds",
        "rows",
        "bytes",
        "of full",
        *(m.title for m in task.measures),
        "train s",
    )


def write_comparison(
    out: Path,
    entries: Sequence[Entry],
    *,
    n_runs: int,
    mlflow_run_id: str | None,
    task: Task = RETRIEVAL,
) -> dict[str, Any]:
    """Write the four files and return what `compare.json` holds.

    Args:
        entries: the runs that have ended.
        n_runs: of the whole comparison.
        mlflow_run_id: the MLflow run that the others are nested under.
        task: what the runs measure.
    """
    written: dict[str, Any] = {
        "n_runs": n_runs,
        "mlflow_run_id": mlflow_run_id,
        "summary": summarise(entries, task),
        "runs": [{**labels, **result.metrics} for labels, result in entries if result.metrics is not None],
        "failed": [{**labels, "reason": result.reason} for labels, result in entries if result.metrics is None],
    }
    write_json_atomic(out / "compare.json", written)
    write_text_atomic(out / "compare.csv", _csv(written["summary"]))
    drawn = any(line[task.measures[0].key] is not None for line in written["summary"])
    if drawn:
        from pipeline.reports.figures import save

        save(draw(written["summary"], task), out / "compare.png")
    else:
        (out / "compare.png").unlink(missing_ok=True)
    write_text_atomic(out / "compare.md", _markdown(written, task, drawn=drawn))
    return written


def summarise(entries: Iterable[Entry], task: Task = RETRIEVAL) -> list[dict[str, Any]]:
    """One dict per model, method and budget, in the order of their first runs, `full` first of its model."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for labels, result in entries:
        groups.setdefault((labels["model"], labels["method"], labels["budget"]), []).append(result)
    models = list(dict.fromkeys(model for model, _, _ in groups))
    order = sorted(groups, key=lambda group: (models.index(group[0]), group[1] != FULL))
    lines = []
    for group in order:
        measured = [result.metrics for result in groups[group] if result.metrics is not None]
        line: dict[str, Any] = dict(zip(("model", "method", "budget"), group, strict=True))
        line |= {"n_seeds": len(measured), "n_failed": len(groups[group]) - len(measured)}
        for key in ("rows", "bytes", "bytes_ratio"):
            line[key] = float(np.mean([m[key] for m in measured])) if measured else None
        for key in (m.key for m in task.measures):
            values = [m[key] for m in measured if m[key] is not None]
            line[key] = float(np.mean(values)) if values else None
            line[f"{key}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        line["train_seconds"] = float(np.mean([m["seconds"]["train"] for m in measured])) if measured else None
        lines.append(line)
    return lines


def table(summary: Iterable[Mapping[str, Any]], task: Task = RETRIEVAL) -> list[tuple[str, ...]]:
    """The lines of a summary as texts, by `header`; `-` where there is no figure."""

    def number(value: float | None, spec: str, unit: str = "") -> str:
        return "-" if value is None else format(value, spec) + unit

    def measure(line: Mapping[str, Any], key: str) -> str:
        spread = line[f"{key}_std"]
        return number(line[key], ".4f") + ("" if spread is None else f" ({spread:.4f})")

    return [
        (
            line["model"],
            line["method"],
            line["budget"] or "-",
            f"{line['n_seeds']}" + (f" ({line['n_failed']} failed)" if line["n_failed"] else ""),
            number(line["rows"], ",.0f"),
            number(line["bytes"], ",.0f"),
            number(line["bytes_ratio"] and 100 * line["bytes_ratio"], ".1f", " %"),
            *(measure(line, m.key) for m in task.measures),
            number(line["train_seconds"], ".0f"),
        )
        for line in summary
    ]


def _markdown(written: Mapping[str, Any], task: Task, *, drawn: bool) -> str:
    lines, names = ["# Comparison", ""], header(task)
    n_ended = len(written["runs"]) + len(written["failed"])
    if n_ended < written["n_runs"]:
        lines += [f"{n_ended} of {written['n_runs']} runs so far.", ""]
    lines += ["| " + " | ".join(row) + " |" for row in (names, ("---",) * len(names), *table(written["summary"], task))]
    lines += ["", f"Mean, and standard deviation over seeds in brackets. {task.bytes_note}"]
    if drawn:
        lines += ["", f"![{task.measures[0].title} against bytes](compare.png)"]
    if written["failed"]:
        lines += ["", "## Failed", ""]
        for run in written["failed"]:
            labels = ", ".join(filter(None, [run["method"], run["model"], f"seed {run['seed']}", run["budget"]]))
            lines.append(f"- {labels}: {run['reason']}")
    return "\n".join(lines) + "\n"


def _csv(summary: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    columns = list(summary[0]) if summary else []
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(summary)
    return text.getvalue()
