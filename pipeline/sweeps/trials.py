"""The trials of a search, as `trials.csv`, `--json` and the printed table have them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.sweeps.scheduler import Result
from pipeline.sweeps.space import Space, in_words


@dataclass(frozen=True)
class Trial:
    """One choice of settings and what its training has come to.

    Args:
        settings: the chosen ones, by dotted key.
        run: its folder, relative to that of the search.
        result: of the training.
        score_key: of the validation score in the metrics.
    """

    settings: Mapping[str, Any]
    run: str
    result: Result
    score_key: str

    @property
    def score(self) -> float | None:
        """On the validation rows; None where the training failed."""
        return None if self.result.metrics is None else self.result.metrics[self.score_key]

    def facts(self) -> dict[str, Any]:
        """Settings, score, ``run`` and ``finished_before``; then those of the training, or the ``reason`` why there are none."""
        facts: dict[str, Any] = {
            **self.settings,
            "run": self.run,
            "finished_before": self.result.finished_before,
            self.score_key: self.score,
        }
        if (metrics := self.result.metrics) is None:
            return facts | {"reason": self.result.reason}
        kept = {key: metrics[key] for key in ("best_epoch", "epochs")}
        return facts | kept | {"seconds": metrics["seconds"]["train"], "mlflow_run_id": metrics.get("mlflow_run_id")}


def best_first(trials: Sequence[Trial]) -> list[Trial]:
    """By score, those that failed last; equal ones in the order in which they were chosen."""
    return sorted(trials, key=lambda trial: math.inf if trial.score is None else -trial.score)


def to_csv(trials: Sequence[Trial], space: Space, score_key: str) -> str:
    """A line per trial."""
    text = io.StringIO()
    columns = [score_key, *space, "best_epoch", "epochs", "seconds", "run", "reason"]
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(trial.facts() for trial in trials)
    return text.getvalue()


def table(
    trials: Sequence[Mapping[str, Any]], space: Space, score_key: str
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and lines to print.

    Args:
        trials: the facts of each, in the order of the lines.
    """

    def text(value: Any, spec: str) -> str:
        return "-" if value is None else format(value, spec)

    header = ("trial", *(key.split(".")[1] for key in space), score_key.partition("_")[2], "best epoch", "train s", "")
    return header, [
        (
            Path(trial["run"]).name,
            *(in_words((trial[key],)) for key in space),
            text(trial[score_key], ".4f"),
            text(trial.get("best_epoch"), "d"),
            text(trial.get("seconds"), ".0f"),
            trial.get("reason") or "",
        )
        for trial in trials
    ]
