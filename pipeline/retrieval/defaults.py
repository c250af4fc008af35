"""What retrieval measures on the test, and its budget and precisions where none is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.task import Measure, MetricTable, budget_of, planned_precision, stored_precision

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig

# Cut-offs of the test where none is given.
CUTOFFS = (20,)
# Thirds of the training interactions: items by popularity, and users by activity.
ITEM_PARTS = ("head_items", "middle_items", "tail_items")
USER_PARTS = ("most_active_users", "middle_users", "least_active_users")


def measures_of(cutoffs: Sequence[int] = CUTOFFS) -> tuple[Measure, ...]:
    """The columns of tables, at the first cut-off; the first measure is drawn."""
    k = cutoffs[0]
    titles = {"recall": "recall", "capped_recall": "capped recall", "ndcg": "NDCG"}
    return tuple(
        Measure(f"{name}@{k}", f"{title}@{k}", f"{title}@{k} on the test interactions")
        for name, title in titles.items()
    )


def metric_keys(cutoffs: Sequence[int] = CUTOFFS) -> tuple[str, ...]:
    """Keys of all figures of a test, in metrics: every measure at every cut-off, and at the first one also for parts of the ids."""
    whole = ("recall", "capped_recall", "ndcg", "hit_rate", "mrr", "coverage")
    parts = (f"{name}@{cutoffs[0]}_{part}" for part in (*ITEM_PARTS, *USER_PARTS) for name in ("recall", "ndcg"))
    return (*(f"{name}@{k}" for k in cutoffs for name in whole), *parts)


def further_tables(cutoffs: Sequence[int] = CUTOFFS) -> tuple[MetricTable, ...]:
    """Whom recommendations serve, and all measures at all cut-offs."""
    k = cutoffs[0]

    def columns(parts: Sequence[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
        return tuple((part.replace("_", " "), (f"recall@{k}_{part}", f"ndcg@{k}_{part}")) for part in parts)

    served = MetricTable(
        "Who is served",
        f"Recall@{k} / NDCG@{k} by popularity of the items and by activity of the users, in thirds of the training interactions: the head "
        "is the few items, and the most active users are the few users, that have the first third of them. Coverage: share of the "
        "catalogue that is recommended to any test user.",
        (*columns(ITEM_PARTS), *columns(USER_PARTS), (f"coverage@{k}", (f"coverage@{k}",))),
    )
    names = {"recall": "recall", "capped_recall": "capped recall", "ndcg": "NDCG", "hit_rate": "hit rate", "mrr": "MRR"}
    at = " / ".join(map(str, cutoffs))
    whole = MetricTable(
        "Cut-offs",
        f"Measures at k = {at}." if len(cutoffs) > 1 else f"Measures at k = {k}.",
        tuple(
            (title, tuple(f"{name}@{cutoff}" for cutoff in cutoffs))
            for name, title in (names | {"coverage": "coverage"}).items()
        ),
    )
    return served, whole


DEFAULT_BUDGET = ("ratio", 0.25)


def clustering_budget(config: RunConfig) -> tuple[str, Any]:
    """Kind and value of the budget that the clustering meets; one quick clustering where no method of the run reads its communities."""
    from pipeline.maps.methods import METHODS

    budget = budget_of(config, DEFAULT_BUDGET)
    if budget[0] != "ratio" or any(METHODS[method].reads_communities for method in config.run.methods):
        return budget
    return "resolution", 1.0


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


def auto_precision(config: RunConfig, method: str) -> str:
    """The method's own: float32 for full tables; int4 for soft maps, which average the rounding of many rows away, but not for
    LightGCN; int8 for most others."""
    from pipeline.maps.methods import METHODS

    own = METHODS[method]
    if own.embedding == "product":
        return "int8"  # Codebooks have a type of their own: it is that of the item bias alone.
    averaged = own.precision == "int4" and own.trained_as is None
    return "int8" if averaged and config.train.model == "lightgcn" else own.precision
