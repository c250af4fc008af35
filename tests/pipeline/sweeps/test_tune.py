"""The search for settings: what is drawn, that the test is never read, that trials are kept, and that the winner repeats."""

from __future__ import annotations

import csv
import json
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.cli import main as cli
from pipeline.config.run_config import RunConfig
from pipeline.distributed.shards import ShardedCsr
from pipeline.errors import ConfigError
from pipeline.logs.synthetic import synth
from pipeline.maps.methods import METHODS
from pipeline.runs.run import run
from pipeline.sweeps.tune import Range, default_point, default_space, parse_space, run_trial, trial_config
from pipeline.training.workers import fit_here

SCORE = "validation_recall@20"


@dataclass(frozen=True)
class Search:
    """A folder, and the command that searches in it."""

    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def run(self, n_trials: int) -> int:
        """The command's exit code."""
        before = signal.getsignal(signal.SIGTERM)
        words = [
            "tune",
            "--data",
            self.folder / "log",
            "--out",
            self.out,
            "--trials",
            n_trials,
            "--seed",
            3,
            "--jobs",
            1,
        ]
        words += ["--resolution", 2, "--epochs", 4, "--dim", 8, "--space", "map.indices_per_id=1..3"]
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_:
            patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{self.folder}/mlflow.db")
            patch.delenv("MLFLOW_RUN_ID", raising=False)
            cli.main([str(word) for word in words])
        signal.signal(signal.SIGTERM, before)
        return exit_.value.code

    def trials(self) -> list[dict[str, str]]:
        with open(self.out / "trials.csv") as file:
            return list(csv.DictReader(file))

    def trained(self) -> dict[str, int]:
        """When each trial's training was recorded."""
        return {path.parts[-3]: path.stat().st_mtime_ns for path in self.out.glob("trials/*/stages/train-*.json")}


@pytest.fixture(scope="module")
def search(tmp_path_factory, ray_local):
    """After a search of three trials."""
    made = Search(tmp_path_factory.mktemp("tune"))
    synth(made.folder / "log", n_users=120, n_items=80, n_interactions=2400, n_communities=4, mixing=0.2, seed=0)
    assert made.run(3) == 0
    return made


def test_trials_are_listed_best_first_with_their_settings(search):
    scores = [float(trial[SCORE]) for trial in search.trials()]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True) and scores[0] > 0
    for trial in search.trials():
        config = RunConfig.load(search.out / trial["run"] / "config.toml")
        for key in ("train.lr", "train.decay", "map.hops", "map.indices_per_id"):
            assert str(config.flat()[key]) == trial[key]
    # The method's default is one of them.
    default = METHODS["soft"].lr
    assert any(float(trial["train.lr"]) == default and trial["map.hops"] == "auto" for trial in search.trials())


@pytest.fixture
def as_a_task(monkeypatch):
    """This process has what Ray would give to a trial."""
    from ray.runtime_context import RuntimeContext

    monkeypatch.setattr(RuntimeContext, "get_assigned_resources", lambda self: {"CPU": 2})


def test_the_best_settings_are_a_run_that_repeats_the_winner(search, tmp_path, as_a_task):
    config = RunConfig.load(search.out / "best.toml", **{"run.out": str(tmp_path / "run"), "run.mlflow": False})
    (metrics,) = run(config, until="train", fit_job=fit_here).metrics
    best = search.trials()[0]
    assert metrics[SCORE] == pytest.approx(float(best[SCORE]), abs=1e-3)
    recorded = json.loads((search.out / best["run"] / "stages" / "train-soft.json").read_text())["result"]
    for side in ("users", "items"):
        assert metrics[f"bucket_map_hash.{side}"] == recorded[f"bucket_map_hash.{side}"]


def test_more_trials_are_added_to_those_before(search):
    before, trials = search.trained(), search.trials()
    assert search.run(5) == 0
    after = search.trained()
    assert len(before) == 3 and len(after) == 5
    assert {name: after[name] for name in before} == before
    assert {trial["run"] for trial in trials} < {trial["run"] for trial in search.trials()}
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{search.folder}/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {run.info.run_name for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert children == {trial["run"] for trial in search.trials()}
    assert parent.data.metrics["validation_recall_at_20"] == pytest.approx(float(search.trials()[0][SCORE]))


@pytest.fixture
def base(search, tmp_path):
    """The settings of a search that has only read its log, through the folder of another one."""
    settings = {"data.path": str(search.folder / "log"), "data.seed": 3, "run.mlflow": False, "run.out": str(tmp_path)}
    config = RunConfig.from_flat(settings | {"cluster.resolution": 2.0, "train.dim": 8, "train.epochs": 4})
    log = RunConfig.from_flat(config.flat() | {"run.out": str(tmp_path / "log")})
    run(log, until="ingest", lenders=[search.out / "log"])
    return config


def test_a_trial_never_reads_the_test(base, monkeypatch, as_a_task):
    opened, known = [], ShardedCsr.open

    def note(path):
        opened.append(Path(path).name)
        return known(path)

    monkeypatch.setattr(ShardedCsr, "open", note)
    seen = []
    result = run_trial({"train.lr": 0.05}, base, None, seen.append)
    assert result[SCORE] == max(entry["recall@20"] for entry in seen)
    assert {"train", "validation"} <= set(opened) and not any("test" in name for name in opened)


def test_settings_that_do_not_train_are_a_bad_trial(base, as_a_task):
    result = run_trial({"train.lr": 1e38}, base, None)
    assert result[SCORE] is None and "diverged" in result["reason"]


def test_a_trial_is_named_by_what_was_chosen(base):
    out = {key: trial_config(base, {"train.lr": key}).run.out for key in (0.1, 0.2)}
    assert out[0.1] != out[0.2] and trial_config(base, {"train.lr": 0.1}).run.out == out[0.1]
    assert trial_config(base, {"train.lr": 0.1}).train.lr == 0.1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.lr=0.01..0.1", ("train.lr", Range(0.01, 0.1))),
        ("train.weight_decay = 0..1e-5", ("train.weight_decay", Range(0.0, 1e-5))),
        ("map.indices_per_id=4..16", ("map.indices_per_id", Range(4, 16, whole=True))),
        ("map.hops=1,1+2", ("map.hops", ("1", "1+2"))),
        ("map.item_bias=true,false", ("map.item_bias", (True, False))),
        ("train.lr=0.05", ("train.lr", (0.05,))),
        ("cluster.method=louvain, leiden", ("cluster.method", ("louvain", "leiden"))),
    ],
)
def test_a_space_is_read_as_its_settings_are(text, expected):
    assert parse_space(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.lr", "write section.key=a,b,c or section.key=low..high"),
        ("train.lrr=1,2", "did you mean train.lr"),
        ("train.lr=1..x", "train.lr='x' is not a number"),
        ("train.lr=1..0.1", "is empty: 1 is not below 0.1"),
        ("train.lr=1..2..3", "more than two ends"),
        ("cluster.method=a..b", "has no range"),
        ("data.validation=0.1,0.2", "changes what is measured"),
        ("train.eval_users=10,20", "changes what is measured"),
        ("train.seed=0..9", "changes what is measured"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_space(text)


@pytest.mark.parametrize(("method", "hops"), [("soft", True), ("double_soft", True), ("graph", False), ("full", False)])
def test_the_default_space_lies_around_the_methods_own_settings(method, hops):
    base = RunConfig.from_flat({"run.methods": (method,), "cluster.ratio": 0.5})
    space = default_space(base)
    assert ("map.hops" in space) == hops
    point = default_point(base, space | {"map.indices_per_id": Range(1, 3, whole=True)})
    assert set(point) == set(space)
    assert space["train.lr"].low < point["train.lr"] < space["train.lr"].high
    # What depends on the graph, or lies outside of its range, is left to chance.
    assert "map.indices_per_id" not in point
    by_rows = RunConfig.from_flat({"run.methods": ("soft",), "cluster.rows": 50, "map.indices_per_id": 2})
    assert default_point(by_rows, {"map.indices_per_id": Range(1, 3, whole=True)}) == {"map.indices_per_id": 2}


def test_a_search_without_validation_is_refused(tmp_path):
    from pipeline.sweeps.tune import tune

    base = RunConfig.from_flat({"data.path": "x", "run.out": str(tmp_path), "data.validation": 0.0})
    with pytest.raises(ConfigError, match="nothing to compare trials by"):
        tune(base, {}, 1, seed=0)
