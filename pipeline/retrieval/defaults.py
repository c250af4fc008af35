"""What retrieval measures on the test, and its budget and precisions where none is given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.task import Measure, planned_precision, stored_precision

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig

MEASURES = (
    Measure("recall@20", "recall@20", "recall@20 on the test interactions"),
    Measure("ndcg@20", "NDCG@20", "NDCG@20 on the test interactions"),
)
DEFAULT_BUDGET = ("ratio", 0.25)


def precision_of(config: RunConfig, method: str) -> str:
    """Type of a method's stored tables."""
    return stored_precision(config, auto_precision(config, method))


def planned_precision_of(config: RunConfig, method: str) -> str:
    """Type of a method's tables in which a byte budget counts rows."""
    return planned_precision(config, auto_precision(config, method))


def auto_precision(config: RunConfig, method: str) -> str:
    """float32 for full tables; int4 for soft maps, which average the rounding of many rows away; else int8, also for LightGCN."""
    if method == "full":
        return "float32"
    averaged = method in ("soft", "double_soft") and config.train.model != "lightgcn"
    return "int4" if averaged else "int8"
