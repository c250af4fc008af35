"""Calibration of a trained CTR model: slope and offset of its logits, fitted to the validation rows (`graphhash.metrics.ctr`).

The validation rows chose the epoch, but trained nothing. A refit, which trains on them, takes over the calibration of the training whose
epochs were chosen: the model is as sure of the rows that it was trained on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from graphhash.metrics.ctr import fit_calibration
from graphhash.models.ctr import CtrModel
from pipeline.config.run_config import RunConfig
from pipeline.ctr.data import Features
from pipeline.ctr.evaluate import predict

# Facts of a training, in history.json and in the metrics.
SLOPE, OFFSET = "calibration_slope", "calibration_offset"


def calibrate(model: CtrModel, config: RunConfig, features: Features, chosen: Path | None) -> dict[str, Any]:
    """Calibrate a model in place, in evaluation mode; not at all with ``train.calibrate = false``, or without validation rows.

    Args:
        model: that of a training.
        chosen: folder of the training whose epochs were chosen, if this one is its refit.

    Returns: the facts SLOPE and OFFSET, 1 and 0 where nothing was calibrated.

    Raises:
        DataError: a logit is not finite.
    """
    slope, offset = 1.0, 0.0
    if chosen is not None:
        facts = json.loads((chosen / "history.json").read_text(encoding="utf-8"))["facts"]
        slope, offset = facts[SLOPE], facts[OFFSET]
    elif config.train.calibrate and len(validation := features.part("validation")):
        model.eval().calibrate(slope, offset)
        slope, offset = fit_calibration(np.asarray(validation.labels), predict(model, validation))
    model.calibrate(slope, offset)
    return {SLOPE: slope, OFFSET: offset}
