"""The report of a run: draws the pictures and renders the page into the run folder."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.reports.facts import RunFacts
from pipeline.reports.figures import INK, figure_of, save, spread
from pipeline.reports.page import render
from pipeline.storage.atomic import write_text_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Bytes of parameters, gradients, optimizer state and maps while training, in metrics where they were counted, and their titles.
TRAINING_BYTES = {"training_bytes": "training bytes", "training_bytes_measured": "measured"}


@dataclass(frozen=True)
class Trained:
    """What was trained, in words.

    Args:
        model: with its sizes.
        loss: with what it draws.
        score: the validation measure that decides when training stops.
        examples: what the model is trained and tested on.
        stored: the parts that bytes are counted of.
    """

    model: str
    loss: str
    score: str
    examples: str
    stored: tuple[str, ...]


def write_page(
    facts: RunFacts,
    trained: Trained,
    template: Path,
    pictures: Mapping[str, Callable[[RunFacts], Figure] | None],
    values: Mapping[str, Any],
) -> list[Path]:
    """Draw the pictures and write `report.html` into the run folder.

    Args:
        template: of the task; it extends `page.html.j2`.
        pictures: by file name; None: there is nothing to draw, and an older picture is removed.
        values: of the task, for its template.

    Returns: the files written, `report.html` first.
    """
    for name, draw in pictures.items():
        if draw is None:
            (facts.path / name).unlink(missing_ok=True)
        else:
            save(draw(facts), facts.path / name)
    shared = {
        "facts": facts,
        "trained": trained,
        "when": datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
        "out": shlex.quote(str(facts.path)),
    }
    file = facts.path / "report.html"
    write_text_atomic(file, render(template, {**shared, **values}))
    return [file, *(facts.path / name for name, draw in pictures.items() if draw is not None)]


def training_titles(metrics: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The titles of TRAINING_BYTES, by key, that any method has figures of."""
    entries = list(metrics)
    return {key: title for key, title in TRAINING_BYTES.items() if any(entry.get(key) is not None for entry in entries)}


def draw_training(facts: RunFacts, label: str, *, from_zero: bool) -> Figure:
    """The watched measure by epoch; a dot marks the epoch whose weights were kept.

    Args:
        label: of the vertical axis.
        from_zero: whether this axis starts at 0.
    """
    figure, axes = figure_of(7.2, 3.6)
    ends: list[tuple[float, float, str]] = []
    for method, history in facts.histories.items():
        epochs = facts.evaluations(history)
        x, y = [entry["epoch"] for entry in epochs], [entry[facts.watched] for entry in epochs]
        axes.plot(x, y, color=facts.colour(method), linewidth=2)
        kept = [(a, b) for a, b in zip(x, y, strict=True) if a == history.get("best_epoch")]
        axes.scatter([a for a, _ in kept], [b for _, b in kept], s=44, color=facts.colour(method), zorder=3)
        if x:
            ends.append((x[-1], y[-1], method))
    if from_zero:
        # With room for a dot at the highest value.
        axes.set_ylim(0, 1.05 * max(axes.get_ylim()[1], 1e-9))
    low, high = axes.get_ylim()
    for (x_end, y_end, method), label_y in zip(
        ends, spread([y for _, y, _ in ends], (high - low) * 0.065), strict=True
    ):
        axes.annotate(
            method,
            (x_end, y_end),
            xytext=(8, label_y),
            textcoords=("offset points", "data"),
            va="center",
            fontsize=9.5,
            color=facts.colour(method),
            annotation_clip=False,
        )
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # Locator's stub knows no options
    axes.set_xlabel("epoch", color=INK)
    axes.set_ylabel(label, color=INK)
    return figure
