"""Filters of the log: a least rating, and the core of train; which are set, and what they removed."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from pipeline.config.run_config import DataConfig


class FilterFacts(TypedDict):
    """What the filters removed: rows of a low rating, users, items and pairs of train outside of the core, and rows of a given test file
    whose user or item train then lacks."""

    rows_below: int
    users: int
    items: int
    interactions: int
    test_rows: int


def is_filtered(config: DataConfig) -> bool:
    """Whether the settings leave good rows out."""
    return config.positive_from is not None or has_core(config)


def has_core(config: DataConfig) -> bool:
    """Whether users or items of too few interactions are removed."""
    return max(config.min_user_interactions, config.min_item_interactions) > 1


def describe_removed(removed: FilterFacts) -> str:
    """What the filters removed, as one line."""
    words = {
        "rows_below": "rows of a lower rating",
        "users": "users",
        "items": "items",
        "interactions": "interactions of too few others",
        "test_rows": "test rows of ids that train lacks",
    }
    counts = [f"{removed[key]:,} {text}" for key, text in words.items()]  # type: ignore[literal-required]  # Its keys.
    return f"removed {', '.join(counts)}"
