"""The forecast of a retrieval run: sizes and bytes are those that the run then has, and nothing is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.run_config import RunConfig
from pipeline.logs.extent import bytes_per_line, grown
from pipeline.retrieval.budget import GraphSize
from pipeline.retrieval.forecast import forecast
from pipeline.retrieval.forecast_log import sample_log
from pipeline.retrieval.forecast_training import PlannedTraining, TrainingSize, random_interactions
from pipeline.runs.forecast import forecast_lines, range_text, size_text
from pipeline.runs.run import run
from pipeline.task import StageContext
from pipeline.training.forecast import RunForecast, StageForecast
from tests.helpers import graphs

STAGES = ("ingest", "cluster", "train soft", "refit soft", "evaluate soft", "export")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a log of 180 users, one row of it twice."""
    folder = tmp_path_factory.mktemp("forecast")
    users, items = graphs.planted(0, 6, 30, 0.3, 0.02)[0].nonzero()
    lines = [f"{user},{item}" for user, item in zip(users, items, strict=True)]
    (folder / "log.csv").write_text("\n".join(["user_id,item_id", *lines, lines[0]]) + "\n")
    return folder


def config_of(folder: Path, **settings) -> RunConfig:
    fixed = {"data.path": str(folder / "log.csv"), "run.out": str(folder / "out"), "run.mlflow": False}
    fixed |= {"run.methods": ("soft",), "cluster.ratio": 0.3, "train.dim": 16}
    fixed |= {"train.epochs": 2, "train.batch_size": 500, "train.lr": 0.01}
    return RunConfig.from_flat(fixed | {key.replace("__", "."): value for key, value in settings.items()})


def forecast_of(config: RunConfig, *stages: str) -> RunForecast:
    return forecast(StageContext(config, Path(config.run.out)), stages or STAGES)


def test_sizes_are_those_of_the_ingestion_and_nothing_is_written(folder, tmp_path, monkeypatch):
    # The whole log is read, however long the machine takes.
    monkeypatch.setattr("pipeline.retrieval.forecast.READ_SECONDS", 100.0)
    config = config_of(folder, run__out=str(tmp_path / "out"))
    before = sorted(folder.iterdir())
    told = forecast_of(config)
    assert sorted(folder.iterdir()) == before
    assert not (tmp_path / "out").exists()
    run(config, until="ingest")
    facts = json.loads((tmp_path / "out" / "ingest" / "ingest.json").read_text())
    assert told.is_exact
    assert (told.sizes["users"], told.sizes["items"]) == (facts["n_users"], facts["n_items"])
    n_pairs = facts["n_train"] + facts["n_validation"] + facts["n_test"]
    assert sum(told.sizes[part] for part in ("train", "validation", "test")) == n_pairs == told.sizes["rows"] - 1
    # After the ingestion they are those of the run folder.
    after = forecast_of(config, *STAGES[1:])
    assert {name: after.sizes[name] for name in ("train", "validation", "test")} == {
        name: facts[f"n_{name}"] for name in ("train", "validation", "test")
    }
    assert "rows" not in after.sizes


@pytest.mark.parametrize("method", ["soft", "full", "double", "residual", "full_soft"])
def test_training_bytes_are_those_that_the_training_holds(folder, tmp_path, method):
    config = config_of(folder, run__out=str(tmp_path / "out"), run__methods=(method,), train__refit=False)
    run(config, until="cluster")
    told = forecast_of(config, f"train {method}")
    facts = run(config, until="train").metrics[0]
    assert sum(told.training_bytes[method].values()) == facts["training_bytes"] == facts["training_bytes_measured"]


def test_bytes_of_a_model_are_known_without_making_it():
    config = RunConfig.from_flat({"cluster.rows": 500_000, "train.dim": 64, "run.methods": ("graph",)})
    size = GraphSize(30_000_000, 10_000_000, 10**9)
    parts = PlannedTraining.of(config, "graph", size, 499_998).parts
    numbers = 500_000 * 64
    assert parts["tables"] == parts["gradients"] == 4 * numbers
    assert parts["optimizer"] == 8 * numbers + 2 * 4
    assert parts["maps"] == 4 * (size.n_ids + 2)  # A row in int32, and no weights.


@pytest.mark.parametrize(("n_rows", "of_row"), [(60_000, 2), (65_000, 2), (66_000, 4)])
def test_maps_of_tables_with_more_rows_take_more_bytes(n_rows, of_row):
    config = RunConfig.from_flat({"cluster.rows": n_rows, "map.indices_per_id": 8, "run.methods": ("soft",)})
    size = GraphSize(300_000, 100_000, 10**7)
    parts = PlannedTraining.of(config, "soft", size, n_rows).parts
    codebooks = 2 * 256 * 8 * 4
    assert parts["maps"] == (8 * of_row + 1) * (size.n_ids + 2) + codebooks


def test_stages_are_those_that_are_asked_for(folder):
    told = forecast_of(config_of(folder))
    assert tuple(stage.name for stage in told.stages) == STAGES
    for stage in told.stages[:-1]:
        low, high = stage.seconds
        assert 0 < low <= high
        assert stage.peak_bytes > sum(told.training_bytes["soft"].values())
    assert told.stages[-1] == StageForecast("export")


def test_a_part_of_a_log_tells_of_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.logs.csv.BLOCK_BYTES", 2**20)
    rng = np.random.default_rng(0)
    # Users come one behind the other, and all items come soon.
    rows = "".join(f"{100_000 + n // 10},{100 + rng.integers(300)}\n" for n in range(400_000))
    (tmp_path / "log.csv").write_text("user_id,item_id\n" + rows)
    config = config_of(tmp_path)
    told = sample_log(config.data, 0.0)
    assert not told.is_exact
    assert told.n_rows == pytest.approx(400_000, rel=0.01)
    assert told.n_users == pytest.approx(40_000, rel=0.01)
    assert told.n_items == 300
    assert bytes_per_line(str(tmp_path / "log.csv")) == pytest.approx(11, rel=0.01)


def test_ids_grow_as_the_last_half_of_the_sample_says():
    rows = np.arange(0, 1001, 100)
    assert grown(np.stack([rows, rows // 10], axis=1), 10_000) == 1000
    assert grown(np.stack([rows, np.minimum(rows, 300)], axis=1), 10_000) == 300
    assert grown(np.stack([rows, 100 * np.sqrt(rows)], axis=1).astype(int), 100_000) == pytest.approx(31_600, rel=0.02)
    # Draws of 1000 items, of which 3 in 100 are not seen yet: Heaps' law alone says 2000.
    draws = np.arange(0, 3501, 250)
    assert grown(np.stack([draws, 1000 * (1 - np.exp(-draws / 1000))], axis=1).astype(int), 100_000) == pytest.approx(
        1000, rel=0.03
    )


def test_random_interactions_have_the_sizes_that_were_asked_for():
    size = TrainingSize(user_rows=7, item_rows=5, n_users=40, n_items=30, n_edges=600)
    graph, labels = random_interactions(size)
    assert (graph.shape, graph.nnz) == ((40, 30), 600)
    assert (labels.user_rows, labels.item_rows) == (7, 5)


def test_lines_name_what_does_not_fit():
    stages = (StageForecast("ingest", (2.0, 2.0), 2**30), StageForecast("train full", (70.4, 400.0), 40 * 2**30))
    told = RunForecast(
        {"rows": 12_000}, False, {"full": {"tables": 2**20, "maps": 512}}, (*stages, StageForecast("export"))
    )
    lines = forecast_lines(told, 24 * 2**30)
    assert lines[:2] == ["log: rows about 12,000", "training of full holds 1.0 MiB: tables 1.0 MiB, maps 512 B"]
    assert lines[3].split() == ["ingest", "2.0", "1.0", "GiB"]
    assert lines[4].split() == ["train", "full", "70-400", "40.0", "GiB"]
    assert lines[5].split() == ["export", "-", "-"]
    assert lines[-1].startswith("warning: train full needs about 40.0 GiB, and this machine has 24.0 GiB; ")
    assert (range_text(0.04, 9.97), size_text(1536)) == ("0.0-10", "1.5 KiB")


def test_the_command_prints_it_and_imports_neither_ray_nor_mlflow(folder):
    program = (
        "import sys; from pipeline.cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as end: assert not end.code, end.code\n"
        "print(sorted({'ray', 'mlflow'} & set(sys.modules)))"
    )
    words = ["run", "--data", folder / "log.csv", "--out", folder / "none", "--dry-run"]
    done = subprocess.run([sys.executable, "-c", program, *map(str, words)], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "ingest: never computed here"
    assert any(line.startswith("training of soft holds ") for line in lines)
    assert lines[-1] == "[]"
    assert not (folder / "none").exists()
