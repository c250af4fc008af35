"""Draws validation curves of run folders: a panel for each, a line for each method, a dot at the epoch that was kept.

python docs/experiments/draw_validation.py OUT.png "TITLE=RUN" "TITLE=RUN" ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.ticker import MaxNLocator

from pipeline.reports.figures import COLOURS, INK, figure_of, save, style

MEASURE = "capped_recall@20"
COLUMNS = 2


def draw(panels: list[tuple[str, Path]], file: Path) -> None:
    """Write the picture; panels of a row share their vertical axis, so that before and after can be compared."""
    rows = -(-len(panels) // COLUMNS)
    figure, axes = figure_of(9.6, 3.2 * rows)
    axes.remove()
    grid = figure.subplots(rows, COLUMNS, squeeze=False, sharey="row").ravel()
    methods: list[str] = []
    for number, ((title, run), panel) in enumerate(zip(panels, grid, strict=False)):
        style(panel)
        for method, epochs, scores, kept in curves(run):
            methods += [method] * (method not in methods)
            colour = COLOURS[methods.index(method) % len(COLOURS)]
            panel.plot(epochs, scores, color=colour, linewidth=1.6, marker=".", markersize=4, label=method)
            panel.scatter([kept], [scores[epochs.index(kept)]], s=44, color=colour, zorder=3)
        panel.set_title(title, loc="left", fontsize=10, color=INK)
        panel.set_xlabel("epoch", color=INK)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        if number % COLUMNS or number == len(panels) - 1:
            panel.legend(frameon=False, fontsize=8.5, loc="lower right")
        if not number % COLUMNS:
            panel.set_ylabel(f"{MEASURE} on validation", color=INK)
    for panel in grid[len(panels) :]:
        panel.remove()
    for panel in grid[: len(panels)]:
        # When all curves of a row are there, as they share the axis.
        panel.set_ylim(bottom=0)
    save(figure, file)


def curves(run: Path) -> list[tuple[str, list[int], list[float], int]]:
    """Method, epochs, scores and kept epoch of every training in a run folder."""
    found = []
    for file in sorted(run.glob("methods/*/history.json")):
        history = json.loads(file.read_text(encoding="utf-8"))
        validated = [entry for entry in history["epochs"] if MEASURE in entry]
        epochs, scores = [entry["epoch"] for entry in validated], [entry[MEASURE] for entry in validated]
        found.append((file.parent.name, epochs, scores, history["best_epoch"]))
    return found


if __name__ == "__main__":
    target, *named = sys.argv[1:]
    draw([(title, Path(run)) for title, run in (one.split("=", 1) for one in named)], Path(target))
