"""What the reports of both tasks share: what the stages recorded, the picture of training, and the files that are written."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.reports.page import COLOURS, INK, escape, figure_of, read_json, save, spread
from pipeline.storage.atomic import write_text_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class RunFacts:
    """What the stages recorded, as read from the run folder.

    Args:
        measure: of the test; it is None where there was none.
        watched: the measure of validation that is drawn.
    """

    path: Path
    measure: str
    watched: str
    config: dict[str, Any]
    ingest: dict[str, Any]
    cluster: dict[str, Any]
    metrics: list[dict[str, Any]]
    histories: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, path: Path, measure: str, watched: str) -> RunFacts:
        """Read a run folder.

        Raises:
            RunFolderError: a file is missing or is not the JSON it should be.
        """
        metrics = read_json(path / "metrics.json")
        histories = {m["method"]: read_json(path / "methods" / m["method"] / "history.json") for m in metrics}
        config = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
        ingest = read_json(path / "stages" / "ingest.json")["result"]
        return cls(
            path, measure, watched, config, ingest, read_json(path / "cluster" / "cluster.json"), metrics, histories
        )

    @property
    def title(self) -> str:
        log = self.config["data"]["path"]
        return f"GraphHash run: {Path(log).name or log}"

    @property
    def tested(self) -> list[dict[str, Any]]:
        """The metrics of the methods that were tested: all of them, or none where there was nothing to test with."""
        return [entry for entry in self.metrics if entry[self.measure] is not None]

    def colour(self, method: str) -> str:
        return COLOURS[[m["method"] for m in self.metrics].index(method) % len(COLOURS)]

    def evaluations(self, history: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The epochs that were followed by a validation."""
        return [entry for entry in history["epochs"] if entry.get(self.watched) is not None]

    @property
    def validated(self) -> bool:
        return any(self.evaluations(history) for history in self.histories.values())

    def kept_epochs(self) -> str:
        """Of every method the epoch that was kept, as a part of a sentence in HTML."""
        parts = []
        for method, history in self.histories.items():
            last = history["epochs"][-1]["epoch"] if history["epochs"] else 0
            parts.append(f"{escape(method)} kept epoch {escape(history.get('best_epoch'))} of {last}")
        return "; ".join(parts)


def write_files(
    facts: RunFacts, pictures: Mapping[str, Callable[[RunFacts], Figure] | None], page_of: Callable[[RunFacts], str]
) -> list[Path]:
    """Draw pictures and write `report.html` into the run folder; a picture of None is taken away. Returns the files written."""
    for name, draw in pictures.items():
        if draw is None:
            (facts.path / name).unlink(missing_ok=True)
        else:
            save(draw(facts), facts.path / name)
    file = facts.path / "report.html"
    write_text_atomic(file, page_of(facts))
    return [file, *(facts.path / name for name, draw in pictures.items() if draw is not None)]


def draw_training(facts: RunFacts, label: str, *, from_zero: bool) -> Figure:
    """The watched measure by epoch; a dot marks the epoch whose model was kept."""
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
        place = {"xytext": (8, label_y), "textcoords": ("offset points", "data"), "va": "center", "fontsize": 9.5}
        axes.annotate(method, (x_end, y_end), color=facts.colour(method), annotation_clip=False, **place)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("epoch", color=INK)
    axes.set_ylabel(label, color=INK)
    return figure
