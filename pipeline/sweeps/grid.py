"""The grid of a comparison: every method with every model, seed and budget, as runs.

A budget in bytes leaves every method its own number of rows: the smaller its maps, the more rows. `full` depends on no budget and is
trained once per model and seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from graphhash.errors import did_you_mean
from pipeline.config.run_config import BUDGET_KEYS, RunConfig, parse_override
from pipeline.errors import ConfigError
from pipeline.runs.plan import check_methods
from pipeline.runs.tasks import TASKS, task_of
from pipeline.sweeps.scheduler import RunSpec
from pipeline.task import budget_of

FULL = "full"
# Methods that depend on no budget read no communities, so their clustering is kept short and is the same for all budgets.
CLUSTERS_OF_FULL = {
    "cluster.resolution": 1.0,
    "cluster.method": "louvain",
    "cluster.max_size": None,
    "cluster.levels": (),
}
SEED_KEYS = ("data.seed", "map.seed", "train.seed")
# Of sections map and train, but the comparison sets them.
KEYS_OF_GRID = ("train.seed", "map.seed", "train.model", "train.loss")


@dataclass(frozen=True)
class Budget:
    """How far to compress: a kind of `ClusterConfig.budget`, with its value."""

    kind: str
    value: Any

    @property
    def settings(self) -> dict[str, Any]:
        """By dotted key."""
        if self.kind == "side_rows":
            return dict(zip(("cluster.user_rows", "cluster.item_rows"), self.value, strict=True))
        return {f"cluster.{self.kind}": self.value}

    def __str__(self) -> str:
        values = self.value if isinstance(self.value, tuple) else (self.value,)
        return f"{self.kind} " + "+".join(f"{value:.10g}" for value in values)


@dataclass(frozen=True)
class GridPoint:
    """What tells a run of the comparison from the others; the budget is None where the method depends on none, as `full`."""

    method: str
    model: str
    seed: int
    budget: Budget | None

    @property
    def folder(self) -> str:
        """Of its run, relative to that of the comparison."""
        words = [self.method, self.model, f"seed{self.seed}"]
        if self.budget is not None:
            words.append(str(self.budget).replace(" ", ""))
        return f"runs/{'-'.join(words)}"

    def __str__(self) -> str:
        return " ".join([self.method, self.model, f"seed {self.seed}", *([str(self.budget)] if self.budget else [])])


class MethodOverride(NamedTuple):
    """A setting that holds for the runs of one method."""

    method: str
    key: str
    value: Any


def make_grid(
    methods: Sequence[str], models: Sequence[str], seeds: Sequence[int], budgets: Sequence[Budget], task: str
) -> list[GridPoint]:
    """Every point once, seed by seed, so that the whole table of the first seed is complete first.

    Raises:
        ConfigError: nothing to compare, or an unknown name.
    """
    for name, values in (("methods", methods), ("models", models), ("seeds", seeds), ("budgets", budgets)):
        if not values:
            raise ConfigError(f"the comparison has no {name}; name one or more, separated by commas")
    check_methods(methods, task)
    for model in models:
        model_settings(model, task)
    points = [
        GridPoint(method, model, seed, budget if depends_on_budget(method) else None)
        for seed in seeds
        for model in models
        for budget in budgets
        for method in methods
    ]
    return list(dict.fromkeys(points))


def depends_on_budget(method: str) -> bool:
    """Whether a method is another one at another budget."""
    from pipeline.maps.methods import METHODS

    return METHODS[method].reads_communities or METHODS[method].sized


def in_waves(specs: Mapping[GridPoint, RunSpec]) -> list[list[RunSpec]]:
    """The runs to do, in an order in which no training is done twice: those that store another one's weights come after a run that
    trains them, which is the first of them where nobody else does."""
    first: list[RunSpec] = []
    then: list[RunSpec] = []
    trained: set[tuple[str, str, int]] = {(point.method, point.model, point.seed) for point in specs}
    for point, spec in specs.items():
        trained_as = TASKS[spec.config.run.task].trained_as(point.method)
        key = (trained_as or point.method, point.model, point.seed)
        (then if trained_as is not None and key in trained else first).append(spec)
        trained.add(key)
    return [first, then]


def model_settings(name: str, task: str) -> Mapping[str, str]:
    """The settings of the model that a task calls by this name, by dotted key.

    Raises:
        ConfigError: there is none.
    """
    models = TASKS[task].models
    if name not in models:
        raise ConfigError(f"unknown model {name!r}; {did_you_mean(name, models)}models are {', '.join(models)}")
    return models[name]


def choose_budgets(base: RunConfig, **requested: Sequence[float]) -> list[Budget]:
    """The requested budgets, all of one kind; without any the configured one; without that the task's defaults.

    Raises:
        ConfigError: budgets of several kinds.
    """
    kinds = [kind for kind, values in requested.items() if values]
    if len(kinds) > 1:
        raise ConfigError(f"budgets in {' and in '.join(kinds)} contradict each other; give them in one kind")
    if kinds:
        return [Budget(kinds[0], value) for value in requested[kinds[0]]]
    if any(getattr(base.cluster, key) is not None for key in BUDGET_KEYS):
        return [Budget(*budget_of(base, task_of(base).default_budget))]
    return [Budget(kind, value) for kind, value in task_of(base).comparison_budgets]


def parse_method_override(text: str) -> MethodOverride:
    """Read ``full:train.lr=0.04`` as ``("full", "train.lr", 0.04)``.

    Raises:
        ConfigError: no method before a colon, or no setting of a map or a training after it.
    """
    method, separator, setting = text.partition(":")
    if not separator or "=" in method:
        raise ConfigError(f"{text!r} names no method; write METHOD:section.key=value, such as full:train.lr=0.04")
    check_methods([method], None)
    key, value = parse_override(setting)
    if key.split(".")[0] not in ("map", "train") or key in KEYS_OF_GRID:
        raise ConfigError(f"{key} cannot differ between methods; give settings of map and train")
    return MethodOverride(method, key, value)


def point_config(base: RunConfig, point: GridPoint, overrides: Sequence[MethodOverride] = ()) -> RunConfig:
    """The configuration of a point's run, whose folder lies below that of the comparison."""
    settings = base.flat() | {key: value for method, key, value in overrides if method == point.method}
    settings |= dict.fromkeys((f"cluster.{key}" for key in BUDGET_KEYS), None)
    settings |= CLUSTERS_OF_FULL if point.budget is None else point.budget.settings
    settings |= dict.fromkeys(SEED_KEYS, point.seed)
    settings |= model_settings(point.model, base.run.task)
    settings |= {"run.methods": (point.method,), "run.remote": None, "train.refit": bool(settings["train.refit"])}
    settings |= {"run.out": str(Path(base.run.out) / point.folder)}
    return RunConfig.from_flat(settings)


def grid_specs(
    base: RunConfig, points: Sequence[GridPoint], overrides: Sequence[MethodOverride]
) -> dict[GridPoint, RunSpec]:
    """The runs of a comparison. Those of one seed share the ingested log, those of one seed and size the clusters as well."""
    configs = {point: point_config(base, point, overrides) for point in points}
    return {
        point: RunSpec(
            name=point.folder,
            title=str(point),
            config=config,
            until="evaluate",
            driver_until="cluster",
            reuse_from=tuple(
                Path(configs[other].run.out) for other in points if other.seed == point.seed and other != point
            ),
        )
        for point, config in configs.items()
    }
