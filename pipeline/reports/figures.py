"""Matplotlib figures of the reports: colours, axes, labels that do not overlap, and PNG files."""

from __future__ import annotations

import math
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


def figure_with_panels(width: float, height: float, n: int) -> tuple[Figure, list[Axes]]:
    """A figure with `n` pairs of axes side by side; width and height in inches."""
    figure, first = figure_of(width, height)
    first.remove()
    panels = list(figure.subplots(1, n, squeeze=False).ravel())
    for axes in panels:
        style(axes)
    return figure, panels


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


def draw_points(
    axes: Axes, points: Sequence[tuple[float, float, str]], colours: Sequence[str], *, span: float, gap: float
) -> None:
    """Draw points with a label to the right of each; labels do not overlap.

    Args:
        points: x, y and label.
        colours: of each point and its label.
        span: largest x that the axis shows points at.
        gap: least distance of two labels, in units of y.
    """
    x, y = [point[0] for point in points], [point[1] for point in points]
    axes.scatter(x, y, s=64, zorder=3, color=list(colours))
    # A label is about a quarter of the axis wide.
    for (a, b, label), height, colour in zip(points, spread(y, gap, x, 0.25 * span), colours, strict=True):
        axes.annotate(
            label,
            (a, b),
            xytext=(a + 0.02 * span, height),
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
            va="center",
            fontsize=9.5,
            color=colour,
        )


def spread(
    values: Sequence[float], gap: float, at: Sequence[float] | None = None, width: float = math.inf
) -> list[float]:
    """Vertical positions of labels near `values`, in the same order, no two closer than `gap`.

    Args:
        at: horizontal positions; labels that are `width` or more apart do not push each other. None: all are at the same place.
    """
    at = [0.0] * len(values) if at is None else at
    positions = list(values)
    order = sorted(range(len(values)), key=lambda i: values[i])
    for rank, upper in enumerate(order):
        for lower in order[:rank]:
            if abs(at[upper] - at[lower]) < width:
                positions[upper] = max(positions[upper], positions[lower] + gap)
    return positions


def spaced(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions nearest to `values`, in the same order, at least `gap` apart and within the limits.

    The sum of the squared distances to `values` is the least (isotonic regression, by pooling neighbours that are too close). Where the
    limits have no room, the gap is smaller.
    """
    if len(values) > 1:
        gap = min(gap, (high - low) / (len(values) - 1))
    order = sorted(range(len(values)), key=lambda i: values[i])
    # Without the gaps below them, positions must only not fall: blocks of equal ones are merged until they do not.
    blocks: list[tuple[float, int]] = []
    for rank, i in enumerate(order):
        mean, count = values[i] - rank * gap, 1
        while blocks and blocks[-1][0] > mean:
            other, n = blocks.pop()
            mean, count = (mean * count + other * n) / (count + n), count + n
        blocks.append((mean, count))
    room = high - (len(values) - 1) * gap
    levels = [min(max(mean, low), room) for mean, count in blocks for _ in range(count)]
    positions = [0.0] * len(values)
    for rank, i in enumerate(order):
        positions[i] = levels[rank] + rank * gap
    return positions
