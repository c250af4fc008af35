"""A whole comparison: that each run is trained once, that a failed one is named, and that the table has the figures of the runs."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.run_config import RunConfig
from pipeline.logs.synthetic import synth
from pipeline.runs.run import is_done
from tests.helpers.command import exit_code_of

METHODS = ("graph", "full")
BLOCKED = "graph-mf-seed1-ratio0.4"


@dataclass(frozen=True)
class Comparison:
    """A folder, and the command that fills it."""

    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def log(self) -> str:
        return f"file://{self.folder}/log"

    def run(self) -> int:
        """The command's exit code."""
        words = [
            "compare",
            *("--data", self.log, "--out", self.out),
            "--methods",
            ",".join(METHODS),
            "--jobs",
            2,
        ]
        words += ["--seeds", 0, 1, "--ratios", 0.4, "--precision", "float32", "train.epochs=4", "train.dim=8"]
        return exit_code_of(self.folder, *words)

    def read(self) -> dict:
        return json.loads((self.out / "compare.json").read_text())

    def trained(self) -> dict[str, int]:
        """When each run's training was recorded."""
        return {path.parts[-3]: path.stat().st_mtime_ns for path in self.out.glob("runs/*/stages/train-*.json")}

    def mlflow_runs(self) -> list:
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.folder}/mlflow.db")
        return client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])


@pytest.fixture(scope="module")
def comparison(tmp_path_factory, ray_local):
    """After its first command, in which one run could not be trained."""
    made = Comparison(tmp_path_factory.mktemp("compare"))
    synth(made.folder / "log", n_users=120, n_items=80, n_interactions=2400, n_communities=4, mixing=0.2, seed=0)
    (made.out / "runs" / BLOCKED).mkdir(parents=True)
    (made.out / "runs" / BLOCKED / "methods").write_text("a file where a folder has to be")
    assert made.run() == 1
    return made


def datasets(run) -> set[tuple[str, str]]:
    """Name and digest of the datasets of an MLflow run."""
    return {(entry.dataset.name, entry.dataset.digest) for entry in run.inputs.dataset_inputs}


def names(runs) -> set[str]:
    return {run["run"].removeprefix("runs/") for run in runs}


def test_a_failed_run_is_named_with_its_reason_and_the_others_are_kept(comparison):
    result = comparison.read()
    # Two methods, for two seeds.
    assert result["n_runs"] == 4
    assert len(names(result["runs"])) == 3
    (failed,) = result["failed"]
    assert (failed["run"], failed["method"], failed["seed"]) == (f"runs/{BLOCKED}", "graph", 1)
    assert failed["reason"] in (comparison.out / "compare.md").read_text()
    assert "Traceback" in (comparison.out / "runs" / BLOCKED / "error.txt").read_text()
    assert "\n" not in failed["reason"]
    assert "methods" in failed["reason"]
    (line,) = [entry for entry in result["summary"] if (entry["method"], entry["budget"]) == ("graph", "ratio 0.4")]
    assert (line["n_seeds"], line["n_failed"], line["recall@20_std"]) == (1, 1, None)


def test_each_run_has_an_mlflow_run_below_one_parent(comparison):
    runs = comparison.mlflow_runs()
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run is not parent]
    assert parent.info.run_id == comparison.read()["mlflow_run_id"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert parent.info.run_name == "compare log"
    # A seed is a split, and a split is a dataset.
    assert len(datasets(parent)) == 2
    assert set().union(*map(datasets, children)) == datasets(parent)
    sources = {entry.dataset.source for entry in parent.inputs.dataset_inputs}
    assert sources == {json.dumps({"uri": comparison.log})}, "not that of the copy"
    assert {run.data.params["data.path"] for run in runs} == {comparison.log}
    finished = {run.info.run_name for run in children if run.info.status == "FINISHED"}
    assert len(finished) == 3
    assert "graph mf seed 0 ratio 0.4" in finished
    assert all("test.recall_at_20" in run.data.metrics for run in children if run.info.run_name in finished)


def test_the_settings_of_a_run_have_the_uri_and_find_it_finished(comparison):
    for name in names(comparison.read()["runs"]):
        config = RunConfig.load(comparison.out / "runs" / name / "config.toml")
        assert config.data.path == comparison.log, "not that of the copy"
        assert is_done(config, "evaluate")


def test_the_runs_of_a_seed_share_its_log_and_fill_their_budgets(comparison):
    folders = {name: comparison.out / "runs" / name for name in names(comparison.read()["runs"])}
    files = [(folder / "ingest" / "users.parquet").stat() for folder in folders.values()]
    assert len({status.st_ino for status in files}) == 2
    for run in comparison.read()["runs"]:
        ratio = 1.0 if run["method"] == "full" else float(run["budget"].split()[1])
        assert ratio - 0.01 < run["bytes_ratio"] <= ratio


def test_the_same_command_trains_what_is_missing_and_nothing_twice(comparison):
    before, n_runs = comparison.trained(), len(comparison.mlflow_runs())
    (comparison.out / "runs" / BLOCKED / "methods").unlink()
    assert comparison.run() == 0
    after = comparison.trained()
    assert after.keys() - before.keys() == {BLOCKED}
    assert {name: when for name, when in after.items() if name != BLOCKED} == before
    assert len(comparison.mlflow_runs()) == n_runs + 1
    assert not (comparison.out / "runs" / BLOCKED / "error.txt").exists()
    written = comparison.read()
    assert comparison.run() == 0
    assert comparison.read() == written
    assert len(written["runs"]) == 4
    assert not written["failed"]
    assert comparison.trained() == after
    assert len(comparison.mlflow_runs()) == n_runs + 1


def test_a_comparison_killed_after_its_last_run_is_finished_by_the_next_command(comparison):
    from mlflow import MlflowClient

    from pipeline.tracking.store import outbox_of

    parent, store = comparison.read()["mlflow_run_id"], f"sqlite:///{comparison.folder}/mlflow.db"
    client = MlflowClient(store)
    # What SIGKILL leaves: the store has the run as running, and the folder has it as not ended.
    client.update_run(parent, status="RUNNING")
    outbox_of(comparison.out, store).opened(parent)
    before = comparison.trained()
    assert comparison.run() == 0
    assert client.get_run(parent).info.status == "FINISHED"
    assert comparison.trained() == before


def test_the_table_holds_means_and_deviations_of_its_runs(comparison):
    result = comparison.read()
    with open(comparison.out / "compare.csv") as file:
        lines = list(csv.DictReader(file))
    assert next((line["method"], line["budget"]) for line in lines) == ("full", "")
    assert len(lines) == 2
    for line in lines:
        runs = [r for r in result["runs"] if (r["method"], r["budget"]) == (line["method"], line["budget"])]
        assert len(runs) == int(line["n_seeds"])
        for key in ("recall@20", "ndcg@20", "rows", "bytes", "bytes_ratio"):
            assert float(line[key]) == pytest.approx(np.mean([r[key] for r in runs]))
        for key in ("recall@20", "capped_recall@20", "ndcg@20"):
            if len(runs) > 1:
                assert float(line[f"{key}_std"]) == pytest.approx(np.std([r[key] for r in runs], ddof=1))
        assert float(line["train_seconds"]) == pytest.approx(np.mean([r["seconds"]["train"] for r in runs]))
    text = (comparison.out / "compare.md").read_text()
    main, *further = text.split("\n## ")
    assert main.count("| mf | ") == 2
    assert all(table.count("| mf | ") == 2 for table in further)
    assert "![recall@20 against bytes](compare.png)" in text
    assert (comparison.out / "compare.png").read_bytes().startswith(b"\x89PNG")
