"""The method `auto` is decided by budget, model and loss, once, and then it is a setting like any other."""

from __future__ import annotations

import pytest

from pipeline.config.run_config import RunConfig
from pipeline.retrieval import default_loss
from pipeline.retrieval.budget import GraphSize
from pipeline.retrieval.default_method import with_method_of_budget
from pipeline.runs.forecast import run_forecast
from pipeline.runs.run import run
from pipeline.runs.status import run_status
from pipeline.runs.tasks import task_of
from pipeline.task import MOST_FULL_BYTES
from tests.helpers import graphs


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({}, "residual"),
        ({"cluster.ratio": 0.2}, "residual"),
        ({"cluster.ratio": 0.125}, "additive"),
        ({"cluster.ratio": 0.02, "train.loss": "bsl"}, "additive"),
        ({"train.loss": "bpr"}, "soft"),
        ({"train.loss": "ccl"}, "soft"),
        ({"train.model": "lightgcn"}, "soft"),
        ({"cluster.resolution": 5.0}, "soft"),
        ({"cluster.rows": 20}, "soft"),
        ({"run.methods": ("graph", "full")}, "graph,full"),
    ],
)
def test_softmax_losses_have_rows_of_the_ids_beside_the_mixture(settings, method):
    config = RunConfig.from_flat({"run.methods": ("auto",), "train.loss": "softmax"} | settings)
    decided = with_method_of_budget(config, GraphSize(1000, 1000, 10_000))
    assert decided.run.methods == tuple(method.split(","))
    assert decided.flat() == config.flat() | {"run.methods": decided.run.methods}


def test_tables_too_large_to_train_whole_are_soft_maps():
    config = RunConfig.from_flat({"run.methods": ("auto",), "train.loss": "softmax"})
    n_ids = MOST_FULL_BYTES // (4 * 64)
    assert with_method_of_budget(config, GraphSize(n_ids // 2, n_ids // 4, n_ids)).run.methods == ("residual",)
    assert with_method_of_budget(config, GraphSize(n_ids // 2, n_ids // 2, n_ids)).run.methods == ("soft",)


def test_dense_graphs_have_codes_of_full_rows():
    config = RunConfig.from_flat({"run.methods": ("auto",), "train.loss": "softmax"})
    assert with_method_of_budget(config, GraphSize(1000, 1000, 100_000)).run.methods == ("full_additive",)


@pytest.mark.parametrize(
    ("budget", "n_ids", "method"),
    [
        ({}, 1000, "soft"),
        ({"cluster.rows": 100}, 1000, "soft"),
        ({"cluster.ratio": 0.05}, 1000, "full_soft_small_dim"),
        ({"cluster.ratio": 0.05}, 2**22 + 1, "soft"),
    ],
)
def test_click_models_have_short_rows_beside_mixtures_where_the_budget_is_one_of_bytes(budget, n_ids, method):
    config = RunConfig.from_flat({"run.task": "ctr", "train.model": "dlrm", "run.methods": ("auto",), **budget})
    facts = {"columns": {"user": n_ids - 10, "hour": 10}}
    assert task_of(config).with_log_defaults(config, facts).run.methods == (method,)


@pytest.mark.parametrize(("limit", "method"), [(10, "additive"), (10**6, "soft")])
def test_a_run_writes_the_method_and_the_forecast_names_it(limit, method, tmp_path, monkeypatch):
    monkeypatch.setattr(default_loss, "LARGE_LOG", limit)
    graphs.write_log(tmp_path / "log.csv", graphs.planted(0, 3, 60, 0.3, 0.05)[0])
    out = tmp_path / "out"
    settings = {"data.path": str(tmp_path / "log.csv"), "run.out": str(out), "run.mlflow": False}
    settings |= {"cluster.ratio": 0.15, "train.dim": 64, "train.loss": "auto", "run.methods": ("auto",)}
    config = RunConfig.from_flat(settings)
    assert any(line.startswith(f"train {method} ") for line in run_forecast(config))
    assert "train auto: never computed here" in run_status(config, "train")
    run(config, until="cluster")
    assert RunConfig.load(out / "config.toml").run.methods == (method,)
    decided = RunConfig.load(out / "config.toml")
    assert run_status(config, "train") == run_status(decided, "train")
    assert f"train {method}: never computed here" in run_status(config, "train")
    assert any(line.startswith(f"train {method} ") for line in run_forecast(config))
