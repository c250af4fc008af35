"""The space of a search: which settings it chooses, and from which values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config.run_config import HOPS, RunConfig, parse_override
from pipeline.errors import ConfigError
from pipeline.runs.tasks import task_of
from pipeline.task import budget_of

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

# Sections whose settings a search may choose; the others say what is measured, and where.
SECTIONS = ("cluster", "map", "train")
EXCLUDED = ("train.seed", "train.eval_users", "map.seed", "cluster.threads", "cluster.shards", "cluster.levels")
# A default learning rate is searched within this factor, in both directions.
LR_FACTOR = 4.0


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included: evenly drawn, or by logarithm where both are above 0 and not whole.

    Args:
        whole: whether only whole numbers are meant.
    """

    low: float
    high: float
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        return isinstance(value, (int, float)) and self.low <= value <= self.high


# By dotted key: a range, or the values to choose from.
Space = dict[str, Range | tuple[Any, ...]]


def parse_space(text: str) -> tuple[str, Range | tuple[Any, ...]]:
    """Read `train.lr=0.01..0.1` as ("train.lr", Range(0.01, 0.1)) and `map.hops=1,2` as ("map.hops", ("1", "2")).

    Raises:
        ConfigError: no such setting, one that a search must not choose, or values that it does not take.
    """
    key, separator, values = text.partition("=")
    key = key.strip()
    if not separator or not values.strip():
        raise ConfigError(
            f"{text!r} is no space; write section.key=a,b,c or section.key=low..high, such as train.lr=0.01..0.1"
        )
    ends = [end.strip() for end in values.split("..")]
    if len(ends) == 1:
        choices = tuple(parse_override(f"{key}={choice}")[1] for choice in values.split(","))
        _check_searchable(key)
        return key, choices
    if len(ends) != 2:
        raise ConfigError(f"{text!r} has more than two ends; write section.key=low..high")
    (_, low), (_, high) = (parse_override(f"{key}={end}") for end in ends)
    _check_searchable(key)
    if isinstance(low, bool) or not all(isinstance(end, (int, float)) for end in (low, high)):
        raise ConfigError(f"{key} is not a number and has no range; write its values as {key}=a,b,c")
    if not low < high:
        raise ConfigError(f"{text!r} is empty: {low:g} is not below {high:g}")
    # A key of whole numbers has read both ends as such.
    return key, Range(low, high, whole=isinstance(low, int) and isinstance(high, int))


def _check_searchable(key: str) -> None:
    if key.split(".")[0] not in SECTIONS or key in EXCLUDED:
        raise ConfigError(
            f"{key} cannot be searched: it changes what is measured, or nothing; sections are {', '.join(SECTIONS)}"
        )


def default_space(base: RunConfig) -> Space:
    """What is searched unless the user says otherwise: learning rate, L2 regularisation, and the hops of soft methods."""
    from pipeline.maps.methods import METHODS

    (method,) = base.run.methods
    space: Space = {
        key: Range(value / LR_FACTOR, value * LR_FACTOR) if key == "train.lr" else Range(*task_of(base).l2_total_range)
        for key, value in task_of(base).defaults(base, method).items()
    }
    if METHODS[method].free_indices:
        space["map.hops"] = ("auto", *HOPS)
    return space


def default_point(base: RunConfig, space: Space) -> dict[str, Any]:
    """The method's own defaults, as far as they lie in the space; the sampler chooses the others."""
    from pipeline.maps.methods import METHODS

    (method,) = base.run.methods
    configured = {key: value for key, value in base.flat().items() if value is not None}
    known = base.flat() | task_of(base).defaults(base, method) | configured
    if budget_of(base, task_of(base).default_budget)[0] != "ratio":
        # Under a budget of bytes it depends on the graph.
        known["map.indices_per_id"] = METHODS[method].resolve_indices(base.map.indices_per_id)
    return {key: known[key] for key, values in space.items() if known[key] in values}


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """The space as Optuna has it."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    def distribution(values: Range | tuple[Any, ...]) -> BaseDistribution:
        if not isinstance(values, Range):
            return CategoricalDistribution(values)
        if values.whole:
            return IntDistribution(int(values.low), int(values.high))
        return FloatDistribution(values.low, values.high, log=values.low > 0)

    return {key: distribution(values) for key, values in space.items()}


def in_words(values: Range | Sequence[Any]) -> str:
    """A range as `low..high`, values with commas between them, numbers in four digits."""
    if isinstance(values, Range):
        return f"{values.low:.4g}..{values.high:.4g}"
    return ",".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values)
