"""Settings of a training with every default decided: how long it waits for a better score, where it ends, and what MLflow is told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from pipeline.config.run_config import RunConfig
from pipeline.tracking.tracker import Tracker
from pipeline.training.loop import FitSettings

Settings = TypeVar("Settings", bound=FitSettings)

# Without a better score, a training is stopped after this share of its epochs, and after at least so many evaluations.
PATIENCE_SHARE, LEAST_PATIENCE = 1 / 3, 5
# Settings of every training whose defaults the task decides.
DECIDED = ("lr", "weight_decay", "epochs", "eval_every", "patience")


def patience(epochs: int, eval_every: int) -> int:
    """Evaluations without a better score before a training stops: PATIENCE_SHARE of its epochs, and at least LEAST_PATIENCE.

    A training of 6 epochs, such as those of CTR, goes through all of them: a cosine lowers its learning rate to 0 by the last one, and the
    best score may come after a dip.
    """
    return max(LEAST_PATIENCE, math.ceil(PATIENCE_SHARE * epochs / eval_every))


def resolved_settings(
    config: RunConfig, settings: Settings, further: Mapping[str, Any], tracker: Tracker, last_epoch: int | None
) -> Settings:
    """The settings that a training runs with.

    Without ``last_epoch`` MLflow is told those that the configuration leaves open. A refit has one, and runs up to it without evaluations.

    Args:
        further: settings beside DECIDED whose defaults the task decides, by dotted key.
        last_epoch: of a refit; None: validation decides.
    """
    if last_epoch is not None:
        return replace(settings, last_epoch=last_epoch, eval_every=last_epoch)
    used = {f"train.{name}": getattr(settings, name) for name in DECIDED} | dict(further)
    requested = config.flat()
    tracker.log_params({key: value for key, value in used.items() if requested[key] is None})
    return settings
