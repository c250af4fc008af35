"""What a comparison writes: a table (`compare.md`, `compare.csv`), all figures (`compare.json`) and a picture (`compare.png`).

A line of the table is a model, a method and a budget: the mean over the seeds, and the standard deviation of the sample (divided by
n - 1) where there are several. Runs that failed are counted, and listed with their reasons.

    compare.json: {"n_runs", "mlflow_run_id", "k", "summary": [a line each], "runs": [the metrics of each], "failed": [...]}
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from pipeline.config.sections import EvaluateConfig
from pipeline.reports.report import TRAINING_BYTES
from pipeline.runs.tasks import TASKS
from pipeline.storage.atomic import write_json_atomic, write_text_atomic
from pipeline.sweeps.grid import FULL
from pipeline.sweeps.plot import draw
from pipeline.sweeps.scheduler import Result
from pipeline.task import Measure, Task, remarks

RETRIEVAL = TASKS["retrieval"]
DEFAULT_CUTOFFS = EvaluateConfig().cutoffs


class PointLabels(TypedDict):
    """What tells a run of the comparison from the others; ``run`` is its folder, relative to that of the comparison."""

    method: str
    model: str
    seed: int
    budget: str
    run: str


# A run, and what it has come to.
Entry = tuple[PointLabels, Result]


def header(measures: Sequence[Measure], summary: Sequence[Mapping[str, Any]] = ()) -> tuple[str, ...]:
    """Names of the columns of the table.

    Args:
        summary: its lines; bytes of training are a column where they were counted.
    """
    names = ("model", "method", "budget", "seeds", "rows", "bytes", "of full")
    return (*names, *_training_titles(summary), *(m.title for m in measures), "train s")


def write_comparison(
    out: Path,
    entries: Sequence[Entry],
    *,
    n_runs: int,
    mlflow_run_id: str | None,
    task: Task = RETRIEVAL,
    cutoffs: Sequence[int] = DEFAULT_CUTOFFS,
) -> dict[str, Any]:
    """Write the four files and return what `compare.json` holds.

    Args:
        entries: the runs that have ended.
        n_runs: of the whole comparison.
        mlflow_run_id: the MLflow run that the others are nested under.
        task: what the runs measure.
        cutoffs: of the runs' rankings.
    """
    written: dict[str, Any] = {
        "n_runs": n_runs,
        "mlflow_run_id": mlflow_run_id,
        "k": list(cutoffs),
        "summary": summarise(entries, task, cutoffs),
        "runs": [{**labels, **result.metrics} for labels, result in entries if result.metrics is not None],
        "failed": [{**labels, "reason": result.reason} for labels, result in entries if result.metrics is None],
    }
    write_json_atomic(out / "compare.json", written)
    write_text_atomic(out / "compare.csv", _csv(written["summary"]))
    main = task.measures_of(cutoffs)[0]
    drawn = any(line[main.key] is not None for line in written["summary"])
    if drawn:
        from pipeline.reports.figures import save

        save(draw(written["summary"], main), out / "compare.png")
    else:
        (out / "compare.png").unlink(missing_ok=True)
    write_text_atomic(out / "compare.md", _markdown(written, task, drawn=drawn))
    return written


def summarise(
    entries: Iterable[Entry], task: Task = RETRIEVAL, cutoffs: Sequence[int] = DEFAULT_CUTOFFS
) -> list[dict[str, Any]]:
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
        for key in ("rows", "bytes", "bytes_ratio", *TRAINING_BYTES):
            values = [m[key] for m in measured if m.get(key) is not None]
            line[key] = float(np.mean(values)) if values else None
        for key in task.metric_keys(cutoffs):
            values = [m[key] for m in measured if m.get(key) is not None]
            line[key] = float(np.mean(values)) if values else None
            line[f"{key}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        line["train_seconds"] = float(np.mean([m["seconds"]["train"] for m in measured])) if measured else None
        lines.append(line)
    return lines


def table(summary: Sequence[Mapping[str, Any]], measures: Sequence[Measure]) -> list[tuple[str, ...]]:
    """The lines of a summary as texts, by `header`; `-` where there is no figure."""

    def number(value: float | None, spec: str, unit: str = "") -> str:
        return "-" if value is None else format(value, spec) + unit

    def measure(line: Mapping[str, Any], key: str) -> str:
        spread = line[f"{key}_std"]
        return number(line[key], ".4f") + ("" if spread is None else f" ({spread:.4f})")

    training = [key for key in TRAINING_BYTES if any(line.get(key) is not None for line in summary)]
    return [
        (
            line["model"],
            line["method"],
            line["budget"] or "-",
            f"{line['n_seeds']}" + (f" ({line['n_failed']} failed)" if line["n_failed"] else ""),
            number(line["rows"], ",.0f"),
            number(line["bytes"], ",.0f"),
            number(line["bytes_ratio"] and 100 * line["bytes_ratio"], ".1f", " %"),
            *(number(line[key], ",.0f") for key in training),
            *(measure(line, m.key) for m in measures),
            number(line["train_seconds"], ".0f"),
        )
        for line in summary
    ]


def _training_titles(summary: Sequence[Mapping[str, Any]]) -> list[str]:
    return [title for key, title in TRAINING_BYTES.items() if any(line.get(key) is not None for line in summary)]


def _markdown(written: Mapping[str, Any], task: Task, *, drawn: bool) -> str:
    summary, measures = written["summary"], task.measures_of(written["k"])
    n_ended = len(written["runs"]) + len(written["failed"])
    lines = ["# Comparison", ""]
    if n_ended < written["n_runs"]:
        lines += [f"{n_ended} of {written['n_runs']} runs so far.", ""]
    lines += _rows(header(measures, summary), table(summary, measures))
    lines += ["", f"Mean, and standard deviation over seeds in brackets. {task.bytes_note}"]
    if found := remarks(measures, written["runs"]):
        lines += ["", *(f"- {line}" for line in found)]
    if drawn:
        lines += ["", f"![{measures[0].title} against bytes](compare.png)"]
    for further in task.further_tables(written["k"]):
        shown = [line for line in summary if further.has_figures(line)]
        if shown:
            titles = ("model", "method", "budget", *(title for title, _ in further.columns))
            cells = [(line["model"], line["method"], line["budget"] or "-", *further.cells(line)) for line in shown]
            lines += ["", f"## {further.title}", "", *_rows(titles, cells), "", further.note]
    if written["failed"]:
        lines += ["", "## Failed", ""]
        for run in written["failed"]:
            labels = ", ".join(filter(None, [run["method"], run["model"], f"seed {run['seed']}", run["budget"]]))
            lines.append(f"- {labels}: {run['reason']}")
    return "\n".join(lines) + "\n"


def _rows(titles: Sequence[str], cells: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in (titles, ("---",) * len(titles), *cells)]


def _csv(summary: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    columns = list(summary[0]) if summary else []
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(summary)
    return text.getvalue()
