"""What the stages of a run recorded, as the reports of both tasks read it from the run folder."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from pipeline.config.toml_file import CONFIG_FILE
from pipeline.errors import RunFolderError
from pipeline.reports.figures import COLOURS
from pipeline.task import Measure


class History(TypedDict):
    """`methods/METHOD/history.json`: an object per epoch, with the measures of those that were validated."""

    epochs: list[dict[str, Any]]
    best_epoch: int | None


@dataclass(frozen=True)
class RunFacts:
    """What the stages recorded.

    Args:
        path: the run folder.
        measure: key of the test measure that is drawn; its value is None where there was no test.
        measure_title: its name in texts.
        watched: key of the validation measure that is drawn.
        config: `config.toml`, by section.
        config_text: the same as text.
        ingest, cluster: what these stages returned.
        metrics: one object per method, in the order of training.
        histories: of every method.
    """

    path: Path
    measure: str
    measure_title: str
    watched: str
    config: dict[str, dict[str, Any]]
    config_text: str
    ingest: dict[str, Any]
    cluster: dict[str, Any]
    metrics: list[dict[str, Any]]
    histories: dict[str, History]

    @classmethod
    def read(cls, path: Path, main: Callable[[Sequence[Mapping[str, Any]]], Measure], watched: str) -> RunFacts:
        """Read a run folder.

        Args:
            main: the test measure that is drawn, by the metrics.
            watched: key of the validation measure that is drawn.

        Raises:
            RunFolderError: a file is missing or is not the JSON it should be.
        """
        metrics = read_json(path / "metrics.json")
        text, measure = (path / CONFIG_FILE).read_text(encoding="utf-8"), main(metrics)
        return cls(
            path,
            measure.key,
            measure.title,
            watched,
            tomllib.loads(text),
            text,
            read_json(path / "stages" / "ingest.json")["result"],
            read_json(path / "cluster" / "cluster.json"),
            metrics,
            {m["method"]: read_json(path / "methods" / m["method"] / "history.json") for m in metrics},
        )

    @property
    def title(self) -> str:
        log = self.config["data"]["path"]
        return f"GraphHash run: {Path(log).name or log}"

    @property
    def methods(self) -> list[str]:
        return [entry["method"] for entry in self.metrics]

    @property
    def full(self) -> dict[str, Any] | None:
        """The metrics of the full tables, if they were trained."""
        return next((entry for entry in self.metrics if entry["method"] == "full"), None)

    @property
    def tested(self) -> list[dict[str, Any]]:
        """The metrics of the methods that were tested: all of them, or none where there was nothing to test with."""
        return [entry for entry in self.metrics if entry[self.measure] is not None]

    def colour(self, method: str) -> str:
        return COLOURS[self.methods.index(method) % len(COLOURS)]

    def evaluations(self, history: History) -> list[dict[str, Any]]:
        """The epochs that were followed by a validation."""
        return [entry for entry in history["epochs"] if entry.get(self.watched) is not None]

    @property
    def validated(self) -> bool:
        return any(self.evaluations(history) for history in self.histories.values())

    @property
    def refitted(self) -> bool:
        """Whether the tested models were trained on train and validation."""
        return any("validation" in entry.get("trained_on", ()) for entry in self.metrics)

    def kept_epochs(self) -> list[tuple[str, int | None, int]]:
        """Of every method its name, the epoch whose weights were kept, and the last epoch."""
        return [
            (method, history.get("best_epoch"), history["epochs"][-1]["epoch"] if history["epochs"] else 0)
            for method, history in self.histories.items()
        ]

    def stage_seconds(self) -> dict[str, float]:
        """Seconds by stage, summed over the methods; ingest and cluster ran once for all."""
        seconds: dict[str, float] = {}
        for entry in self.metrics:
            for stage, value in entry["seconds"].items():
                seconds[stage] = value if stage in ("ingest", "cluster") else seconds.get(stage, 0.0) + value
        return seconds

    def rounding(self, entry: Mapping[str, Any]) -> str:
        """Relative change of the test measure by storing the tables in fewer bits; empty for float32, or where it was not measured."""
        stored, exact = entry[self.measure], entry.get(f"{self.measure}_float32")
        if entry.get("precision", "float32") == "float32" or stored is None or not exact:
            return ""
        return f"{100 * (stored / exact - 1):+.2f} %"


def read_json(path: Path) -> Any:
    """What a stage left in a JSON file.

    Raises:
        RunFolderError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: cannot be read ({error}); run the stages first: graphhash run") from error
