"""Parameters of a model in groups, of which each has a weight decay of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def parameter_groups(
    model: nn.Module, tables: Sequence[nn.Parameter], table_decay: float | None
) -> list[nn.Parameter] | list[dict[str, Any]]:
    """All parameters; or two groups, of which the second has a weight decay of its own."""
    if table_decay is None:
        return list(model.parameters())
    numbers = {id(table) for table in tables}
    others = [parameter for parameter in model.parameters() if id(parameter) not in numbers]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": list(tables), "weight_decay": table_decay}]
    return groups
