"""The loss `auto` is decided by the interactions and the neighbours of ids, once, and then it is a setting like any other."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.run_config import RunConfig
from pipeline.retrieval import default_loss
from pipeline.retrieval.budget import GraphSize
from pipeline.retrieval.default_loss import LARGE_LOG, with_loss_of_log
from pipeline.runs.run import is_done, run
from pipeline.runs.status import run_status
from tests.helpers import graphs

LARGE = GraphSize(10**5, 10**5, LARGE_LOG)


@pytest.mark.parametrize(
    ("settings", "size", "loss"),
    [
        ({}, GraphSize(10**5, 10**5, LARGE_LOG - 1), "bpr"),
        ({}, GraphSize(10**3, 10**3, LARGE_LOG - 1), "bpr"),
        ({}, LARGE, "softmax"),
        ({}, GraphSize(10**3, 10**3, LARGE_LOG), "bsl"),
        ({"train.model": "lightgcn"}, LARGE, "bpr"),
        ({"train.model": "neumf"}, LARGE, "bpr"),
        ({"train.batch_size": 0}, LARGE, "bpr"),
        ({"train.sampler": "uniform_rejecting"}, LARGE, "bpr"),
        ({"train.loss": "ccl"}, LARGE, "ccl"),
        ({"train.loss": "bpr"}, LARGE, "bpr"),
    ],
)
def test_large_logs_have_a_loss_of_cosines_where_the_other_settings_allow_it(settings, size, loss):
    config = RunConfig.from_flat({"train.loss": "auto"} | settings)
    decided = with_loss_of_log(config, size)
    assert decided.train.loss == loss
    assert decided.flat() == config.flat() | {"train.loss": loss}


@pytest.mark.parametrize(("limit", "loss"), [(10, "softmax"), (10**6, "bpr")])
def test_a_run_writes_the_loss_and_does_nothing_again(limit, loss, tmp_path, monkeypatch):
    monkeypatch.setattr(default_loss, "LARGE_LOG", limit)
    graphs.write_log(tmp_path / "log.csv", graphs.planted(0, 3, 10, 0.5, 0.05)[0])
    out = tmp_path / "out"
    settings = {"data.path": str(tmp_path / "log.csv"), "run.out": str(out), "run.mlflow": False}
    config = RunConfig.from_flat(settings | {"cluster.rows": 12, "train.loss": "auto"})
    assert not is_done(config, "cluster")
    run(config, until="ingest")
    assert RunConfig.load(out / "config.toml").train.loss == "auto"
    run(config, until="cluster")
    assert RunConfig.load(out / "config.toml").train.loss == loss
    decided = RunConfig.from_flat(config.flat() | {"train.loss": loss})
    for same in (config, decided):
        assert is_done(same, "cluster")
        assert run_status(same, "cluster") == ["ingest: up to date", "cluster: up to date"]
    made = _written(out)
    run(config, until="cluster")
    assert _written(out) == made


def _written(out: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in (out / "cluster").iterdir()}
