"""The search for settings: that trials are kept, that the test is never read, and that the winner repeats."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.config.run_config import RunConfig
from pipeline.distributed.shards import ShardedCsr
from pipeline.errors import ConfigError
from pipeline.logs.synthetic import synth
from pipeline.maps.methods import METHODS
from pipeline.runs.run import run
from pipeline.sweeps import tune as tune_module
from pipeline.sweeps.scheduler import Result, execute, finished
from pipeline.sweeps.space import Range
from pipeline.sweeps.study import SearchRecord
from pipeline.sweeps.trials import best_first
from pipeline.sweeps.tune import SearchSettings, run_trials, trial_spec, tune
from pipeline.training.here import fit_here
from tests.helpers.command import exit_code_of
from tests.helpers.serial_pool import SerialPool

SCORE = "validation_capped_recall@20"

# ---- with trainings that are a formula


class FakeTrainings:
    """Trainings that take no time; those that ended are remembered as their folders would."""

    def __init__(self) -> None:
        self.done: dict[str, Result] = {}
        self.trained: list[str] = []

    def run(self, spec) -> Result:
        self.trained.append(spec.name)
        lr = spec.config.train.lr
        if lr > 0.08:
            return Result(reason="diverged")
        facts = {SCORE: 1.0 - lr, "best_epoch": 1, "epochs": 2, "seconds": {"train": 0.5}}
        self.done[spec.name] = Result(metrics=facts, finished_before=True)
        return Result(metrics=facts)

    def finished(self, spec) -> Result | None:
        return self.done.get(spec.name)


@pytest.fixture
def trainings(monkeypatch) -> FakeTrainings:
    fake = FakeTrainings()
    monkeypatch.setattr(tune_module, "finished", fake.finished)
    return fake


CHOICES = {"train.lr": (0.02, 0.04, 0.09), "map.hops": ("1", "2")}
LINES = {"train.lr": Range(0.01, 0.1)}


def trials_of(trainings, folder, n_trials, *, space=LINES, n_slots=1, sampler="random", run_one=None):
    base = RunConfig.from_flat({"data.path": "x", "run.out": str(folder)})
    search = SearchSettings(space, n_trials, seed=3, sampler=sampler)
    record = SearchRecord.read(folder / "tune.json", search.chosen_by(base))
    pool = SerialPool(n_slots, run_one or trainings.run, newest_first=True)
    return run_trials(base, search, record, pool, lambda trial: None)


def test_a_search_is_the_same_for_any_number_of_jobs(trainings, tmp_path):
    alone = trials_of(trainings, tmp_path / "1", 8)
    assert len({trial.run for trial in alone}) == 8
    for n_slots in (2, 5):
        trainings.done.clear()
        assert trials_of(trainings, tmp_path / str(n_slots), 8, n_slots=n_slots) == alone


def test_settings_that_are_chosen_twice_are_trained_once(trainings, tmp_path):
    for n_slots in (1, 3):
        trainings.trained.clear()
        trials = trials_of(trainings, tmp_path / str(n_slots), 20, space=CHOICES, n_slots=n_slots)
        assert len(trials) == 20
        succeeded = [trial.run for trial in trials if trial.score is not None]
        assert len(set(succeeded)) == 4
        assert all(trainings.trained.count(name) <= 1 for name in succeeded)
        for name in set(succeeded):
            twins = [trial for trial in trials if trial.run == name]
            assert len({trial.score for trial in twins}) == 1
        trainings.done.clear()


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_search_that_was_killed_goes_on_with_the_trial_that_ran(sampler, trainings, tmp_path):
    whole = trials_of(FakeTrainings(), tmp_path / "whole", 16, sampler=sampler)

    def killed_at_the_last(spec):
        if len(trainings.trained) == 13:
            raise KeyboardInterrupt
        return trainings.run(spec)

    with pytest.raises(KeyboardInterrupt):
        trials_of(trainings, tmp_path / "out", 16, sampler=sampler, run_one=killed_at_the_last)
    # Failed ones have left no result and are tried again.
    n_kept = len(trainings.done)
    trainings.trained.clear()
    again = trials_of(trainings, tmp_path / "out", 16, sampler=sampler)
    assert [(t.settings, t.score, t.result.reason) for t in again] == [
        (t.settings, t.score, t.result.reason) for t in whole
    ]
    assert len(trainings.trained) == 16 - n_kept
    assert sum(trial.result.finished_before for trial in again) == n_kept


def test_failed_trials_are_named_and_come_last(trainings, tmp_path):
    trials = best_first(trials_of(trainings, tmp_path, 12, space={"train.lr": (0.02, 0.09), "map.hops": ("1", "2")}))
    failed = [trial for trial in trials if trial.score is None]
    assert failed
    assert trials[-len(failed) :] == failed
    assert failed[0].facts()["reason"] == "diverged"
    scores = [trial.score for trial in trials[: -len(failed)]]
    assert scores == sorted(scores, reverse=True)


def test_settings_that_contradict_each_other_are_a_bad_trial(trainings, tmp_path):
    (trial,) = trials_of(trainings, tmp_path, 1, space={"train.l2_total": (0.1,), "train.weight_decay": (0.1,)})
    assert trial.score is None
    assert "contradict each other" in trial.result.reason


def test_a_trial_is_named_by_what_was_chosen(tmp_path):
    base = RunConfig.from_flat({"data.path": "x", "run.out": str(tmp_path)})
    out = {lr: trial_spec(base, {"train.lr": lr}).config.run.out for lr in (0.1, 0.2)}
    assert out[0.1] != out[0.2]
    assert trial_spec(base, {"train.lr": 0.1}).config.run.out == out[0.1]
    config = trial_spec(base, {"train.lr": 0.1}).config
    # A refit has no validation score to compare trials by.
    assert (config.train.lr, config.train.refit) == (0.1, False)


def test_a_search_without_validation_is_refused(tmp_path):
    base = RunConfig.from_flat({"data.path": "x", "run.out": str(tmp_path), "data.validation": 0.0})
    with pytest.raises(ConfigError, match="nothing to compare trials by"):
        tune(base, SearchSettings({}, 1, seed=0))


# ---- a whole search


@dataclass(frozen=True)
class Search:
    """A folder, and the command that searches in it."""

    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def run(self, n_trials: int) -> int:
        """The command's exit code."""
        words = [
            "tune",
            *("--data", self.folder / "log", "--out", self.out),
            "--trials",
            n_trials,
            "--seed",
            3,
            "--jobs",
            1,
        ]
        words += ["--resolution", 2, "--epochs", 4, "--dim", 8, "--space", "map.indices_per_id=1..3"]
        return exit_code_of(self.folder, *words)

    def trials(self) -> list[dict[str, str]]:
        with open(self.out / "trials.csv") as file:
            return list(csv.DictReader(file))

    def trained(self) -> dict[str, int]:
        """When each trial's training was recorded."""
        return {path.parts[-3]: path.stat().st_mtime_ns for path in self.out.glob("trials/*/stages/train-*.json")}


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    """After a search of two trials."""
    made = Search(tmp_path_factory.mktemp("tune"))
    synth(made.folder / "log", n_users=120, n_items=80, n_interactions=2400, n_communities=4, mixing=0.2, seed=0)
    assert made.run(2) == 0
    return made


def test_trials_are_listed_best_first_with_their_settings(search):
    scores = [float(trial[SCORE]) for trial in search.trials()]
    assert len(scores) == 2
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0
    for trial in search.trials():
        config = RunConfig.load(search.out / trial["run"] / "config.toml")
        for key in ("train.lr", "train.l2_total", "map.hops", "map.indices_per_id"):
            assert str(config.flat()[key]) == trial[key]
    # The method's default is one of them.
    default = METHODS["soft"].lr
    assert any(float(trial["train.lr"]) == default and trial["map.hops"] == "auto" for trial in search.trials())


def test_the_best_settings_are_a_run_that_repeats_the_winner(search, tmp_path):
    config = RunConfig.load(search.out / "best.toml", **{"run.out": str(tmp_path / "run"), "run.mlflow": False})
    (metrics,) = run(config, until="train", fit_job=fit_here).metrics
    best = search.trials()[0]
    assert metrics[SCORE] == pytest.approx(float(best[SCORE]), abs=1e-3)
    recorded = json.loads((search.out / best["run"] / "stages" / "train-soft.json").read_text())["result"]
    for side in ("users", "items"):
        assert metrics[f"bucket_map_hash.{side}"] == recorded[f"bucket_map_hash.{side}"]


def test_more_trials_are_added_to_those_before(search):
    before, trials = search.trained(), search.trials()
    assert search.run(4) == 0
    after = search.trained()
    assert len(before) == 2
    assert len(after) == 4
    assert {name: after[name] for name in before} == before
    assert {trial["run"] for trial in trials} < {trial["run"] for trial in search.trials()}
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{search.folder}/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {run.info.run_name for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert children == {trial["run"] for trial in search.trials()}
    assert parent.info.run_name == "tune soft mf bpr log"
    (dataset,) = [entry.dataset for entry in parent.inputs.dataset_inputs]
    assert (dataset.name, json.loads(dataset.source)) == ("log", {"uri": str(search.folder / "log")})
    assert all(run.inputs.dataset_inputs[0].dataset.digest == dataset.digest for run in runs if run is not parent)
    assert parent.data.metrics["validation_capped_recall_at_20"] == pytest.approx(float(search.trials()[0][SCORE]))


@pytest.fixture
def base(search, tmp_path):
    """The settings of a search that has only read its log, through the folder of another one."""
    settings = {"data.path": str(search.folder / "log"), "data.seed": 3, "run.mlflow": False, "run.out": str(tmp_path)}
    config = RunConfig.from_flat(settings | {"cluster.resolution": 2.0, "train.dim": 8, "train.epochs": 4})
    log = RunConfig.from_flat(config.flat() | {"run.out": str(tmp_path / "log")})
    run(log, until="ingest", reuse_from=[search.out / "log"])
    return config


def test_a_trial_never_reads_the_test(base, monkeypatch):
    opened, known = [], ShardedCsr.open

    def note(path):
        opened.append(Path(path).name)
        return known(path)

    monkeypatch.setattr(ShardedCsr, "open", note)
    spec = trial_spec(base, {"train.lr": 0.05})
    result = execute(spec, spec.until, fit_job=fit_here)
    history = json.loads((Path(spec.config.run.out) / "methods" / "soft" / "history.json").read_text())["epochs"]
    assert result.metrics[SCORE] == max(entry["capped_recall@20"] for entry in history)
    assert {"train", "validation"} <= set(opened)
    assert not any("test" in name for name in opened)
    assert finished(spec).finished_before
    assert finished(trial_spec(base, {"train.lr": 0.06})) is None


def test_settings_that_do_not_train_are_a_bad_trial(base):
    spec = trial_spec(base, {"train.lr": 1e38})
    assert "diverged" in execute(spec, spec.until, fit_job=fit_here).reason
