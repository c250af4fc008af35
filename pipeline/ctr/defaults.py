"""What click-through rate prediction measures on the test, and its budget and precisions where none is given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.task import Measure, planned_precision, stored_precision

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig

MEASURES = (
    Measure("log_loss", "log loss", "log loss on the test rows", higher_is_better=False),
    Measure("auc", "AUC", "AUC on the test rows"),
    Measure("group_auc", "group AUC", "AUC within groups"),
    Measure("calibration", "calibration", "mean prediction over mean label", higher_is_better=None),
    Measure("ece", "ECE", "expected calibration error", higher_is_better=False),
)
DEFAULT_BUDGET = ("resolution", 5.0)


def precision_of(config: RunConfig, method: str) -> str:
    """Type of a method's stored tables."""
    return stored_precision(config, auto_precision(method))


def planned_precision_of(config: RunConfig, method: str) -> str:
    """Type of a method's tables in which a byte budget counts rows."""
    return planned_precision(config, auto_precision(method))


def auto_precision(method: str) -> str:
    """float32 for full tables, else int8."""
    return "float32" if method == "full" else "int8"
