"""What a comparison writes: a table (`compare.md`, `compare.csv`), all figures (`compare.json`) and a picture (`compare.png`).

A line of the table is a model, a method and a budget, over all seeds: means, and the standard deviations of a sample (divided by
n - 1), which one seed alone has none of. Cells that failed are counted, and listed with their reasons.

    compare.json: {"n_cells", "mlflow_run_id", "summary": [a line each], "cells": [the metrics of each], "failed": [...]}
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.runs.tasks import TASKS, Task
from pipeline.storage.atomic import write_json_atomic, write_text_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FULL = "full"
RETRIEVAL = TASKS["retrieval"]
MARKERS = "os^Dv"


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: its metrics, or the reason why there are none."""

    metrics: dict[str, Any] | None = None
    reason: str | None = None


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
    entries: Sequence[tuple[Mapping[str, Any], Outcome]],
    *,
    n_cells: int,
    run_id: str | None,
    task: Task = RETRIEVAL,
) -> dict[str, Any]:
    """Write the four files and return what `compare.json` holds.

    Args:
        entries: method, model, seed, budget and run folder of each cell that was tried, with its outcome.
        n_cells: of the whole comparison.
        run_id: the MLflow run that the cells' runs are nested under.
        task: what the cells measure.
    """
    result = {
        "n_cells": n_cells,
        "mlflow_run_id": run_id,
        "summary": summarise(entries, task),
        "cells": [{**cell, **o.metrics} for cell, o in entries if o.metrics is not None],
        "failed": [{**cell, "reason": o.reason} for cell, o in entries if o.metrics is None],
    }
    write_json_atomic(out / "compare.json", result)
    write_text_atomic(out / "compare.csv", _csv(result["summary"]))
    drawn = any(line[task.main.key] is not None for line in result["summary"])
    if drawn:
        from pipeline.reports.figures import save

        save(draw(result["summary"], task), out / "compare.png")
    else:
        (out / "compare.png").unlink(missing_ok=True)
    write_text_atomic(out / "compare.md", _markdown(result, task, drawn=drawn))
    return result


def summarise(entries: Iterable[tuple[Mapping[str, Any], Outcome]], task: Task = RETRIEVAL) -> list[dict[str, Any]]:
    """One dict per model, method and budget, in the order of their first cells, `full` first of its model."""
    groups: dict[tuple[str, str, str], list[Outcome]] = {}
    for cell, outcome in entries:
        groups.setdefault((cell["model"], cell["method"], cell["budget"]), []).append(outcome)
    models = list(dict.fromkeys(model for model, _, _ in groups))
    order = sorted(groups, key=lambda group: (models.index(group[0]), group[1] != FULL))
    lines = []
    for group in order:
        outcomes = groups[group]
        measured = [o.metrics for o in outcomes if o.metrics is not None]
        line: dict[str, Any] = dict(zip(("model", "method", "budget"), group, strict=True))
        line |= {"n_seeds": len(measured), "n_failed": len(outcomes) - len(measured)}
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
    """The lines of a summary as texts, by `header`; `-` for what there is not."""

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


def _markdown(result: Mapping[str, Any], task: Task, *, drawn: bool) -> str:
    lines, names = ["# Comparison", ""], header(task)
    tried = len(result["cells"]) + len(result["failed"])
    if tried < result["n_cells"]:
        lines += [f"{tried} of {result['n_cells']} cells so far.", ""]
    lines += ["| " + " | ".join(row) + " |" for row in (names, ("---",) * len(names), *table(result["summary"], task))]
    lines += ["", f"Mean, and standard deviation over seeds in brackets. {task.about_bytes}"]
    if drawn:
        lines += ["", f"![{task.main.title} against bytes](compare.png)"]
    if result["failed"]:
        lines += ["", "## Failed", ""]
        for cell in result["failed"]:
            named = ", ".join(filter(None, [cell["method"], cell["model"], f"seed {cell['seed']}", cell["budget"]]))
            lines.append(f"- {named}: {cell['reason']}")
    return "\n".join(lines) + "\n"


def _csv(summary: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    columns = list(summary[0]) if summary else []
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(summary)
    return text.getvalue()


def draw(summary: Sequence[Mapping[str, Any]], task: Task = RETRIEVAL) -> Figure:
    """The main measure against the share of bytes: a panel per model, a line per method over its budgets, `full` across."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [line for line in summary if line[task.main.key] is not None]
    models = list(dict.fromkeys(line["model"] for line in lines))
    methods = list(dict.fromkeys(line["method"] for line in lines if line["method"] != FULL))
    n_columns = min(2, len(models))
    n_rows = -(-len(models) // n_columns)
    figure = Figure(figsize=(0.8 + 6.2 * n_columns, 0.4 + 4.0 * n_rows), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    for panel, model in zip(panels, models, strict=False):
        _draw_panel(panel, model, [line for line in lines if line["model"] == model], methods, task)
    for panel in panels[len(models) :]:
        panel.set_visible(False)
    return figure


def _draw_panel(axes: Axes, model: str, lines: Sequence[Mapping[str, Any]], methods: Sequence[str], task: Task) -> None:
    from pipeline.reports.figures import COLOURS, FAINT, INK, spread, style

    style(axes)
    key = task.main.key
    widest = max([100 * line["bytes_ratio"] for line in lines if line["method"] != FULL], default=100.0)
    values = [line[key] for line in lines]
    if task.main.higher_is_better:
        low, high = 0.0, max(max(values), 1e-9) * 1.18
    else:
        # A loss is far from 0, and differences would not be seen from there.
        margin = 0.18 * max(max(values) - min(values), 0.05 * max(values), 1e-9)
        low, high = min(values) - margin, max(values) + margin
    # Room on the right for the names.
    axes.set_xlim(0, widest * 1.42)
    axes.set_ylim(low, high)
    labels: list[tuple[float, float, str, str]] = []
    for line in lines:
        if line["method"] == FULL:
            axes.axhline(line[key], color=FAINT, linewidth=1.2, linestyle=(0, (4, 4)))
            text = f"full tables, {100 * line['bytes_ratio']:.0f} % of the bytes: {line[key]:.3f}"
            place = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 8.5, "color": FAINT}
            axes.annotate(text, (0, line[key]), **place)
    for i, method in enumerate(methods):
        points = sorted(
            (l["bytes_ratio"] * 100, l[key], l[f"{key}_std"] or 0.0) for l in lines if l["method"] == method
        )
        if not points:
            continue
        x, y, deviation = zip(*points, strict=True)
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)]
        axes.errorbar(x, y, yerr=deviation, color=colour, marker=marker, linewidth=2, markersize=6, capsize=3, zorder=3)
        labels.append((x[-1], y[-1], f"{method}  {y[-1]:.3f}", colour))
    for (x_end, y_end, text, colour), label_y in zip(
        labels, spread([y for _, y, _, _ in labels], (high - low) * 0.055), strict=True
    ):
        place = {"xytext": (x_end + widest * 0.025, label_y), "va": "center", "fontsize": 9.5, "color": colour}
        axes.annotate(text, (x_end, y_end), **place)
    axes.set_title(model, loc="left", fontsize=11, color=INK)
    axes.set_xlabel("bytes of everything kept (% of full float32 tables)", color=INK)
    axes.set_ylabel(task.main.words, color=INK)
