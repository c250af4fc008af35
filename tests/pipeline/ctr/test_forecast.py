"""The forecast of a CTR run: sizes and bytes are those that the run then has, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphhash.maps.hashes import double_map
from graphhash.models.ctr import CtrModel, CtrSpec
from pipeline.config.run_config import RunConfig
from pipeline.ctr.forecast import forecast
from pipeline.ctr.forecast_training import Growth, grown_parts
from pipeline.runs.forecast import run_forecast
from pipeline.runs.run import run
from pipeline.task import StageContext
from pipeline.training.forecast import RunForecast, StageForecast
from pipeline.training.memory import training_parts
from tests.helpers.ctr_log import columns, write_csv, write_schema

STAGES = ("ingest", "cluster", "train soft", "refit soft", "evaluate soft", "export")
PARTS = ("train", "validation", "test")
N_ROWS = 4000


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("forecast")
    write_csv(folder / "log.csv", columns(N_ROWS))
    write_schema(folder)
    return folder


def config_of(folder: Path, out: Path, **settings) -> RunConfig:
    fixed = {"run.task": "ctr", "data.path": str(folder / "log.csv"), "data.schema": str(folder / "schema.toml")}
    fixed |= {"run.out": str(out), "run.mlflow": False, "run.methods": ("soft",), "cluster.resolution": 1.0}
    fixed |= {"train.dim": 8, "train.hidden": ("16",), "train.epochs": 2, "map.indices_per_id": 4}
    return RunConfig.from_flat(fixed | {key.replace("__", "."): value for key, value in settings.items()})


def forecast_of(config: RunConfig, *stages: str) -> RunForecast:
    return forecast(StageContext(config, Path(config.run.out)), stages or STAGES)


def test_sizes_and_bytes_are_those_of_the_run_and_nothing_is_written(folder, tmp_path):
    methods = ("soft", "full", "double", "full_soft")
    config = config_of(folder, tmp_path / "out", run__methods=methods, train__refit=False, train__epochs=1)
    before = sorted(folder.iterdir())
    told = forecast_of(config, "ingest", "cluster", *(f"train {method}" for method in methods))
    assert sorted(folder.iterdir()) == before
    assert not (tmp_path / "out").exists()
    result = run(config, until="train")
    metrics, facts = result.metrics, result.ingest
    assert told.is_exact
    assert told.sizes == {
        "rows": N_ROWS,
        "ids": sum(facts["columns"].values()),
        **{part: facts[f"n_{part}"] for part in PARTS},
    }
    for entry in metrics:
        held = sum(told.training_bytes[entry["method"]].values())
        assert held == entry["training_bytes"] == entry["training_bytes_measured"], entry["method"]


@pytest.mark.parametrize("by_user", [False, True])
def test_a_part_of_a_log_tells_of_all_of_it(folder, tmp_path, monkeypatch, by_user):
    if by_user:  # Users come one behind the other, and all items come soon.
        log = columns(N_ROWS)
        order = sorted(range(N_ROWS), key=lambda row: log["user"][row])
        write_csv(tmp_path / "log.csv", {name: [values[row] for row in order] for name, values in log.items()})
        write_schema(tmp_path)
        folder = tmp_path
    config = config_of(folder, tmp_path / "out", cluster__resolution=None, cluster__rows=50)
    whole = forecast_of(config)
    monkeypatch.setattr("pipeline.ctr.forecast_sample.SAMPLE_ROWS", 1500)
    told = forecast_of(config)
    assert not told.is_exact
    assert told.sizes["rows"] == pytest.approx(N_ROWS, rel=0.02)
    assert told.sizes["ids"] == pytest.approx(whole.sizes["ids"], rel=0.05)
    for part in PARTS:
        assert told.sizes[part] == pytest.approx(whole.sizes[part], rel=0.2)
    for name, n_bytes in whole.training_bytes["soft"].items():
        assert told.training_bytes["soft"][name] == pytest.approx(n_bytes, rel=0.1), name
    # Once the log is ingested its sizes are known.
    run(config, until="ingest")
    after = forecast_of(config, *STAGES[1:])
    assert after.is_exact
    assert {part: after.sizes[part] for part in PARTS} == {part: whole.sizes[part] for part in PARTS}


@pytest.mark.parametrize("method", ["soft", "robe"])
def test_stages_are_those_that_are_asked_for(folder, tmp_path, method):
    config = config_of(folder, tmp_path / "out", run__methods=(method,))
    stages = tuple(name.replace("soft", method) for name in STAGES)
    told = forecast_of(config, *stages)
    assert tuple(stage.name for stage in told.stages) == stages
    for stage in told.stages[:-1]:
        low, high = stage.seconds
        assert 0 < low <= high
        assert stage.peak_bytes > sum(told.training_bytes[method].values())
    assert told.stages[-1] == StageForecast("export")


def test_a_dry_run_tells_it(folder, tmp_path):
    lines = run_forecast(config_of(folder, tmp_path / "out"))
    assert lines[0].startswith("log: rows 4,000, ids ")
    assert any(line.startswith("training of soft holds ") for line in lines)
    assert not (tmp_path / "out").exists()


def test_maps_of_tables_that_grow_beyond_16_bits_take_32():
    def model(n_ids: int, n_rows: int) -> CtrModel:
        return CtrSpec("dlrm", dim=2, hidden=(4,)).build([double_map(n_ids, n_rows, seed=0)], 1)

    told = grown_parts(model(50_000, 40_000), Growth([2.0], [2.0]))
    assert told["maps"] == pytest.approx(training_parts(model(100_000, 80_000))["maps"], rel=1e-3)
    told = grown_parts(model(50_000, 30_000), Growth([2.0], [2.0]))
    assert told["maps"] == pytest.approx(training_parts(model(100_000, 60_000))["maps"], rel=1e-3)
