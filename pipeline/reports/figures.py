"""Matplotlib figures of the reports: colours, axes, labels that do not overlap, and PNG files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One colour per method in every figure; safe for colour-blind readers (after Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#5c5c5c")
INK, FAINT = "#1f2933", "#8a949e"
GRID = "#e6e9ec"


def figure_of(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with one pair of axes; width and height in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Figure and canvas by hand: pyplot would keep state and look for a display.
    figure = Figure(figsize=(width, height), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    style(axes)
    return figure, axes


def style(axes: Axes) -> None:
    """Plain axes with a faint grid."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG file atomically."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, format="png", facecolor="white")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Label positions near `values`, in the same order, no two closer than `gap`."""
    positions = list(values)
    order = sorted(range(len(values)), key=lambda i: values[i])
    for lower, upper in itertools.pairwise(order):
        positions[upper] = max(positions[upper], positions[lower] + gap)
    return positions
