"""What click-through rate prediction measures on the test, and its budget where none is given."""

from __future__ import annotations

from pipeline.task import Measure

MEASURES = (
    Measure("log_loss", "log loss", "log loss on the test rows", higher_is_better=False),
    Measure("auc", "AUC", "AUC on the test rows"),
    Measure("group_auc", "group AUC", "AUC within groups"),
    Measure("calibration", "calibration", "mean prediction over mean label", higher_is_better=None),
    Measure("ece", "ECE", "expected calibration error", higher_is_better=False),
)
DEFAULT_BUDGET = ("resolution", 5.0)
