"""The grid of a comparison: which runs there are, with which settings, and what is refused."""

from __future__ import annotations

import pytest

from pipeline.config.run_config import RunConfig
from pipeline.errors import ConfigError
from pipeline.runs.tasks import TASKS
from pipeline.sweeps.grid import (
    Budget,
    GridPoint,
    choose_budgets,
    grid_specs,
    make_grid,
    parse_method_override,
    point_config,
)
from pipeline.task import budget_of

MODELS = TASKS["retrieval"].models


def test_every_point_is_there_once_and_full_once_per_model_and_seed():
    budgets = [Budget("rows", 10), Budget("rows", 20)]
    points = make_grid(["soft", "full", "soft"], ["mf", "lightgcn"], [0, 1], budgets, "retrieval")
    assert len(points) == len(set(points)) == 2 * 2 * (2 + 1)
    assert len({point.folder for point in points}) == len(points)
    assert {point.budget for point in points if point.method == "full"} == {None}
    # A whole table of the first seed comes first.
    assert [point.seed for point in points] == sorted(point.seed for point in points)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["sfot"]}, "unknown method 'sfot'; did you mean '?soft"),
        ({"models": ["mff"]}, "unknown model 'mff'; did you mean '?mf"),
        ({"seeds": []}, "no seeds"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, message):
    whole = {"methods": ["soft"], "models": ["mf"], "seeds": [0], "budgets": [Budget("rows", 9)], "task": "retrieval"}
    with pytest.raises(ConfigError, match=message):
        make_grid(**(whole | change))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "budget",
    [Budget("ratio", 0.25), Budget("rows", 50), Budget("resolution", 2.0), Budget("side_rows", (30, 20)), None],
)
def test_a_point_is_an_ordinary_run_of_one_method(budget, model):
    base = RunConfig.from_flat(
        {"data.path": "log", "run.out": "cmp", "cluster.ratio": 0.9, "train.dim": 8, "data.shards": 3}
    )
    point = GridPoint("soft" if budget else "full", model, 5, budget)
    config = point_config(base, point)
    assert budget_of(config, ("ratio", 0.25)) == ((budget.kind, budget.value) if budget else ("resolution", 1.0))
    assert (config.data.seed, config.map.seed, config.train.seed) == (5, 5, 5)
    assert (config.run.methods, config.run.out) == ((point.method,), f"cmp/{point.folder}")
    assert {key: config.flat()[key] for key in MODELS[model]} == MODELS[model]
    assert (config.train.dim, config.data.shards) == (8, 3)
    assert RunConfig.from_flat(config.flat()) == config


@pytest.mark.parametrize(("asked", "refits"), [(None, False), (False, False), (True, True)])
def test_a_comparison_refits_only_if_asked(asked, refits):
    base = RunConfig.from_flat({"data.path": "log", "run.out": "cmp", "train.refit": asked})
    assert point_config(base, GridPoint("soft", "mf", 0, None)).train.refit is refits
    overrides = [parse_method_override("soft:train.refit=true")]
    assert point_config(base, GridPoint("soft", "mf", 0, None), overrides).train.refit is True


def test_full_depends_on_no_setting_of_the_clusters():
    settings = {"data.path": "log", "run.out": "cmp", "cluster.method": "balanced", "cluster.rows": 60}
    full = GridPoint("full", "mf", 0, None)
    plain = RunConfig.from_flat({"data.path": "log", "run.out": "cmp"})
    assert point_config(RunConfig.from_flat(settings), full) == point_config(plain, full)


def test_an_override_of_one_method_changes_its_runs_alone():
    base = RunConfig.from_flat({"data.path": "log", "run.out": "cmp"})
    overrides = [parse_method_override("full:train.lr=0.04"), parse_method_override("full:map.item_bias=true")]
    full, soft = (point_config(base, GridPoint(method, "mf", 0, None), overrides) for method in ("full", "soft"))
    assert (full.train.lr, full.map.item_bias) == (0.04, True)
    assert soft == point_config(base, GridPoint("soft", "mf", 0, None))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.lr=0.04", "names no method"),
        ("fulll:train.lr=0.04", "unknown method 'fulll'; did you mean '?full"),
        ("full:train.lrr=0.04", "unknown key 'train.lrr'"),
        ("full:data.seed=1", "data.seed cannot differ between methods"),
        ("full:train.seed=1", "train.seed cannot differ"),
    ],
)
def test_an_override_that_cannot_be_one_methods_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_method_override(text)


def test_budgets_are_the_requested_ones_then_the_configured_one_then_the_tasks():
    configured = RunConfig.from_flat({"cluster.user_rows": 30, "cluster.item_rows": 20})
    assert choose_budgets(configured, ratio=[0.1, 0.2], rows=[]) == [Budget("ratio", 0.1), Budget("ratio", 0.2)]
    assert choose_budgets(configured, ratio=[], rows=[]) == [Budget("side_rows", (30, 20))]
    assert [budget.kind for budget in choose_budgets(RunConfig(), ratio=[])] == ["ratio", "ratio"]
    with pytest.raises(ConfigError, match="ratio and in rows contradict"):
        choose_budgets(configured, ratio=[0.1], rows=[5])


def test_runs_of_one_seed_reuse_each_others_log():
    points = make_grid(["graph", "modulo"], ["mf"], [0, 1], [Budget("rows", 9)], "retrieval")
    specs = grid_specs(RunConfig.from_flat({"data.path": "log", "run.out": "cmp"}), points, [])
    for point, spec in specs.items():
        assert {source.name for source in spec.reuse_from} == {
            other.name.removeprefix("runs/")
            for twin, other in specs.items()
            if twin.seed == point.seed and twin != point
        }


def test_runs_that_store_what_another_trains_come_after_it():
    from pipeline.sweeps.grid import in_waves

    base = RunConfig.from_flat({"data.path": "log", "run.out": "cmp"})
    budgets = [Budget("ratio", 0.25), Budget("ratio", 0.1)]

    def names(methods):
        specs = grid_specs(base, make_grid(methods, ["mf"], [0], budgets, "retrieval"), [])
        return [[spec.title.split()[0] for spec in wave] for wave in in_waves(specs)]

    assert names(["full_int8", "full_pq", "full", "soft"]) == [
        ["full", "soft", "soft"],
        ["full_int8", "full_pq", "full_pq"],
    ]
    # One of them trains where nobody else does.
    assert names(["full_int8", "full_pq"]) == [["full_int8"], ["full_pq", "full_pq"]]
