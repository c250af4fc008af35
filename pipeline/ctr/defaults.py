"""What click-through rate prediction measures on the test, and its budget and precisions where none is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.task import Measure, budget_of, planned_precision, stored_precision

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
# Tables are stored in int8, and in int4 under a budget below this share of the bytes, which then has about twice as many numbers. Log loss
# on Frappe, seeds 0 and 1, in int8 and int4: `full_soft_small_dim` at a quarter .0943 and .0959 (in int4 whole vectors take 14.5 %), at an
# eighth .1047 and .0969, at a twentieth .1443 and .1202; `soft` at a quarter .0933 and .0943; `cafe` at an eighth .1476 and .1157.
INT8_RATIO = 0.25


def keeps_every_row(method: str) -> bool:
    """Whether a method trains a row for every id, of every column; what it stores of them may be less."""
    from pipeline.maps.methods import METHODS

    return (METHODS[method].trained_as or method) in ("full", "full_small_dim", "full_soft", "full_soft_small_dim")


def compresses_pairs(method: str) -> bool:
    """Whether a method does something to the columns that have a partner, and nothing to the others."""
    from pipeline.maps.methods import METHODS

    return not keeps_every_row(method) or METHODS[method].embedding != "bucket"


def clustering_budget(config: RunConfig) -> tuple[str, Any]:
    """Kind and value of the budget that the clustering meets; one quick clustering where no method of the run reads communities, nor
    takes its number of rows from them."""
    from pipeline.maps.methods import METHODS

    budget = budget_of(config, DEFAULT_BUDGET)
    if budget[0] != "ratio" or any(METHODS[method].reads_communities for method in config.run.methods):
        return budget
    return DEFAULT_BUDGET


def precision_of(config: RunConfig, method: str) -> str:
    """Type of a method's stored tables."""
    auto = auto_precision(config, method)
    return auto if _is_fixed(method) else stored_precision(config, auto)


def planned_precision_of(config: RunConfig, method: str) -> str:
    """Type of a method's tables in which a byte budget counts rows."""
    auto = auto_precision(config, method)
    return auto if _is_fixed(method) else planned_precision(config, auto)


def _is_fixed(method: str) -> bool:
    from pipeline.maps.methods import METHODS

    return METHODS[method].fixed_precision


def kept_precision_of(config: RunConfig) -> str:
    """Type of the stored tables of columns that a method leaves full while it compresses others.

    At small budgets these take more bytes than what is compressed, and 8 bits lose nothing (docs/experiments/frappe-ctr.md).
    """
    return stored_precision(config, _small_type(config))


def planned_kept_precision_of(config: RunConfig) -> str:
    """The same type as a byte budget counts it."""
    return planned_precision(config, _small_type(config))


def auto_precision(config: RunConfig, method: str) -> str:
    """float32 for full tables, that of the method where it is fixed or of a network, else int8, or int4 under a small budget."""
    from pipeline.maps.methods import METHODS

    own = METHODS[method]
    of_full = keeps_every_row(method) and (own.fixed_precision or not own.sized)
    return own.precision if of_full or own.precision == "float16" else _small_type(config)


def _small_type(config: RunConfig) -> str:
    kind, value = budget_of(config, DEFAULT_BUDGET)
    return "int4" if kind == "ratio" and value < INT8_RATIO else "int8"
