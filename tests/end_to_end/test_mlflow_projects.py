"""MLflow projects call the commands, with options that exist, and end as one run."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.cli.main import app
from tests.helpers.mlflow_store import sqlite_store

ROOT = Path(__file__).parents[2]
PROJECTS = sorted((ROOT / "mlflow_projects").glob("*/MLproject"))


NAMES = {"run", "cluster", "train", "compare", "tune", "export", "submit"}


def options(command: str) -> set[str]:
    return {option for parameter in app.commands[command].params for option in parameter.opts}


@pytest.mark.parametrize("path", PROJECTS, ids=lambda p: p.parent.name)
def test_every_entry_point_is_a_command_with_these_options(path):
    project = yaml.safe_load(path.read_text())
    assert project["entry_points"].keys() == NAMES
    assert (path.parent / project["python_env"]).read_text() == (PROJECTS[0].parent / "python_env.yaml").read_text()
    fixed = {"--task": "ctr"} if path.parent.name == "ctr" else {}
    for name, entry in project["entry_points"].items():
        words = entry["command"].split()
        assert words[:4] == ["python", "-m", "pipeline", name]
        parts = [words[3:]]
        if "--" in words:
            cut = words.index("--")
            parts = [words[3:cut], words[cut + 1 :]]
        given: dict[str, str] = {}
        for command, *rest in parts:
            pairs = dict(zip(rest[::2], rest[1::2], strict=True))
            assert set(pairs) <= options(command)
            given |= pairs
        assert given == {f"--{parameter}": f"{{{parameter}}}" for parameter in entry["parameters"]} | (
            {} if name == "export" else fixed
        )


def test_a_project_runs_end_to_end_as_one_mlflow_run(tmp_path, monkeypatch):
    import mlflow.projects

    rows = "\n".join(f"{u},{i}" for u in range(40) for i in range(30) if (u + i) % 4 == 0)
    (tmp_path / "log.csv").write_text(f"user,item\n{rows}\n")
    store = sqlite_store(tmp_path)
    for name, value in {
        "MLFLOW_TRACKING_URI": store,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    # What `mlflow run -e run --env-manager local -P NAME=VALUE` calls, in a process that has imported MLflow.
    parameters = {"data": f"{tmp_path}/log.csv", "user-column": "user", "item-column": "item", "out": f"{tmp_path}/run"}
    parameters |= {"method": "graph", "ratio": 0.9, "epochs": 3}
    project = str(ROOT / "mlflow_projects" / "retrieval")
    mlflow.projects.run(project, entry_point="run", env_manager="local", parameters=parameters)
    assert (tmp_path / "run" / "bundle" / "model.onnx").exists()
    from mlflow import MlflowClient

    client = MlflowClient(store)
    runs = [run for e in client.search_experiments() for run in client.search_runs([e.experiment_id])]
    assert [run.info.status for run in runs] == ["FINISHED"]
    assert any(re.fullmatch("test.recall.*", key) for key in runs[0].data.metrics)
    # The settings that were used, the log, and a model with its metrics.
    (run,) = runs
    assert {"train.lr", "train.batch_size", "map.indices_per_id"} <= run.data.params.keys()
    assert "None" not in run.data.params.values()
    assert run.data.params["data.user_column"] == "user"
    assert [entry.dataset.name for entry in run.inputs.dataset_inputs] == ["log.csv"]
    (model,) = client.search_logged_models([run.info.experiment_id])
    assert {metric.key: metric.value for metric in model.metrics}["test.recall_at_20"] == (
        run.data.metrics["test.recall_at_20"]
    )
