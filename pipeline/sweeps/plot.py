"""The picture of a comparison, `compare.png`: the main measure against the share of bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.sweeps.grid import FULL
from pipeline.task import Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "os^Dv"
# Width of the axes over the largest share of bytes, which leaves room on the right for the names.
ROOM = 1.42


def draw(summary: Sequence[Mapping[str, Any]], task: Task) -> Figure:
    """The main measure against the share of bytes: a panel per model, a line per method over its budgets, `full` across."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [line for line in summary if line[task.measures[0].key] is not None]
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
    from pipeline.reports.figures import INK, style

    style(axes)
    key = task.measures[0].key
    widest = max([100 * line["bytes_ratio"] for line in lines if line["method"] != FULL], default=100.0)
    low, high = _limits([line[key] for line in lines], task)
    axes.set_xlim(0, widest * ROOM)
    axes.set_ylim(low, high)
    for line in lines:
        if line["method"] == FULL:
            _draw_full(axes, line, key)
    _draw_methods(axes, lines, methods, key)
    axes.set_title(model, loc="left", fontsize=11, color=INK)
    axes.set_xlabel("bytes of everything kept (% of full float32 tables)", color=INK)
    axes.set_ylabel(task.measures[0].words, color=INK)


def _limits(values: Sequence[float], task: Task) -> tuple[float, float]:
    """Of the vertical axis."""
    if task.measures[0].higher_is_better:
        return 0.0, max(max(values), 1e-9) * 1.18
    # A loss is far from 0, and differences would not be seen from there.
    margin = 0.18 * max(max(values) - min(values), 0.05 * max(values), 1e-9)
    return min(values) - margin, max(values) + margin


def _draw_full(axes: Axes, line: Mapping[str, Any], key: str) -> None:
    from pipeline.reports.figures import FAINT

    axes.axhline(line[key], color=FAINT, linewidth=1.2, linestyle=(0, (4, 4)))
    text = f"full tables, {100 * line['bytes_ratio']:.0f} % of the bytes: {line[key]:.3f}"
    axes.annotate(text, (0, line[key]), xytext=(4, 4), textcoords="offset points", fontsize=8.5, color=FAINT)


def _draw_methods(axes: Axes, lines: Sequence[Mapping[str, Any]], methods: Sequence[str], key: str) -> None:
    """A line per method over its budgets, with its name at the right end. The axes have their limits."""
    from pipeline.reports.figures import COLOURS, spread

    names: list[tuple[float, float, str, str]] = []
    for i, method in enumerate(methods):
        points = sorted(
            (100 * line["bytes_ratio"], line[key], line[f"{key}_std"] or 0.0)
            for line in lines
            if line["method"] == method
        )
        if not points:
            continue
        x, y, deviation = zip(*points, strict=True)
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)]
        axes.errorbar(x, y, yerr=deviation, color=colour, marker=marker, linewidth=2, markersize=6, capsize=3, zorder=3)
        names.append((x[-1], y[-1], f"{method}  {y[-1]:.3f}", colour))
    (low, high), width = axes.get_ylim(), axes.get_xlim()[1] / ROOM
    heights = spread([y_end for _, y_end, _, _ in names], (high - low) * 0.055)
    for (x_end, y_end, text, colour), height in zip(names, heights, strict=True):
        place = (x_end + width * 0.025, height)
        axes.annotate(text, (x_end, y_end), xytext=place, va="center", fontsize=9.5, color=colour)
