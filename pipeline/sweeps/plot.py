"""The picture of a comparison, `compare.png`: the frontier of the main measure against the bytes that are kept.

The axis of the bytes is logarithmic, because a method is worth its trouble at a quarter of the bytes as at a fiftieth. Our methods are
coloured, and what they are compared with is grey (`Method.ours`). Bars are standard deviations over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.sweeps.grid import FULL
from pipeline.task import Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "os^DvPX*"
GREYS = ("#6b747d", "#9aa3ab")
LEGEND = "coloured: GraphHash and the methods of this package; grey: what they are compared with"
# Share of the axis' length that the names take on the right.
NAMES = 0.34
# Least distance of two names, in shares of the axis' height.
LINE = 0.048


@dataclass(frozen=True)
class Curve:
    """A method over its budgets.

    Args:
        bytes_percent: ascending.
        deviations: over the seeds; 0 where there is one.
    """

    method: str
    bytes_percent: Sequence[float]
    values: Sequence[float]
    deviations: Sequence[float]
    is_ours: bool
    colour: str
    marker: str


def draw(summary: Sequence[Mapping[str, Any]], main: Measure) -> Figure:
    """The main measure against the share of the bytes: a panel per model, a line per method over its budgets, `full` across."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from pipeline.reports.figures import FAINT

    lines = [line for line in summary if line[main.key] is not None]
    models = list(dict.fromkeys(line["model"] for line in lines))
    n_columns = min(2, len(models))
    n_rows = -(-len(models) // n_columns)
    most = max(len({line["method"] for line in lines if line["model"] == model}) for model in models)
    height = max(4.2, 0.6 + 0.3 * most)
    figure = Figure(figsize=(0.8 + 7.4 * n_columns, 0.4 + height * n_rows), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    curves = _curves(lines, main)
    for panel, model in zip(panels, models, strict=False):
        _draw_panel(panel, model, curves[model], main)
    for panel in panels[len(models) :]:
        panel.set_visible(False)
    several = any(line["n_seeds"] > 1 for line in lines)
    legend = LEGEND + ("; bars: standard deviation over seeds" if several else "")
    figure.supxlabel(legend, x=0.01, ha="left", fontsize=8, color=FAINT)
    return figure


def _curves(lines: Sequence[Mapping[str, Any]], main: Measure) -> dict[str, list[Curve]]:
    """The curves of every model; a method looks the same in all panels."""
    from pipeline.maps.methods import METHODS
    from pipeline.reports.figures import COLOURS

    methods = list(dict.fromkeys(line["method"] for line in lines))
    ours = [method for method in methods if METHODS[method].ours]
    others = [method for method in methods if method not in ours]
    found: dict[str, list[Curve]] = {}
    for model in dict.fromkeys(line["model"] for line in lines):
        for group, colours in ((others, GREYS), (ours, COLOURS)):
            for i, method in enumerate(group):
                points = sorted(
                    (100 * line["bytes_ratio"], line[main.key], line[f"{main.key}_std"] or 0.0)
                    for line in lines
                    if (line["model"], line["method"]) == (model, method)
                )
                if points:
                    # Neighbours in the list differ in colour, and those of one colour in their markers.
                    marker = MARKERS[i // len(colours) % len(MARKERS)] if group is ours else MARKERS[i % len(MARKERS)]
                    shares, values, deviations = zip(*points, strict=True)
                    colour = colours[i % len(colours)]
                    curve = Curve(method, shares, values, deviations, group is ours, colour, marker)
                    found.setdefault(model, []).append(curve)
    return found


def _draw_panel(axes: Axes, model: str, curves: Sequence[Curve], main: Measure) -> None:
    from pipeline.reports.figures import FAINT, INK, style

    style(axes)
    axes.set_xscale("log")
    shares = [share for curve in curves for share in curve.bytes_percent]
    low, high = min(shares) / 1.25, max(*shares, 1.05 * min(shares)) * 1.12
    axes.set_ylim(*_limits([value for curve in curves for value in curve.values], main))
    # Room on the right for the names: the axis is longer than its figures.
    axes.set_xlim(low, high * (high / low) ** (NAMES / (1 - NAMES)))
    axes.set_xticks(_ticks(low, high))
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda value, _position: f"{value:g} %")
    for curve in curves:
        if curve.method == FULL:
            axes.plot([low, high], [curve.values[-1]] * 2, color=FAINT, linewidth=1, linestyle=(0, (4, 4)), zorder=1)
        axes.errorbar(
            curve.bytes_percent,
            curve.values,
            yerr=curve.deviations,
            color=curve.colour,
            marker=curve.marker,
            linewidth=2.2 if curve.is_ours else 1.2,
            markersize=6.5 if curve.is_ours else 5,
            capsize=3,
            zorder=4 if curve.is_ours else 2,
        )
    _name_curves(axes, curves, high)
    axes.set_title(model, loc="left", fontsize=11, color=INK)
    axes.set_xlabel("bytes of everything kept, of full float32 tables (log scale)", color=INK, loc="left")
    axes.set_ylabel(main.words, color=INK)


def _limits(values: Sequence[float], main: Measure) -> tuple[float, float]:
    """Of the vertical axis."""
    if main.higher_is_better:
        return 0.0, max(max(values), 1e-9) * 1.1
    # A loss is far from 0, and differences would not be seen from there.
    margin = 0.18 * max(max(values) - min(values), 0.05 * max(values), 1e-9)
    return min(values) - margin, max(values) + margin


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between the limits, about four to eight of them."""
    for steps in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**power for power in range(-6, 7) for step in steps if low <= step * 10.0**power <= high]
        if len(ticks) <= 8:
            break
    return ticks or [(low * high) ** 0.5]


def _name_curves(axes: Axes, curves: Sequence[Curve], right: float) -> None:
    """Names and last values in a column on the right, each with a thin line to the end of its curve. The axes have their limits."""
    from pipeline.reports.figures import spaced

    (low, high), (_, edge) = axes.get_ylim(), axes.get_xlim()
    gap = LINE * (high - low)
    heights = spaced([curve.values[-1] for curve in curves], gap, low + gap / 2, high - gap / 2)
    start = right * (edge / right) ** 0.12
    for curve, height in zip(curves, heights, strict=True):
        end = (curve.bytes_percent[-1], curve.values[-1])
        axes.plot(
            [end[0], right, start], [end[1], end[1], height], color=curve.colour, linewidth=0.6, alpha=0.6, zorder=1
        )
        axes.annotate(
            f"{curve.method}  {curve.values[-1]:.3f}",
            (start, height),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5 if curve.is_ours else 8.5,
            fontweight="bold" if curve.is_ours else "normal",
            color=curve.colour,
        )
