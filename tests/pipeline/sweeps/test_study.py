"""Studies: the settings of a trial depend on the seed and its number alone, and a search goes on where it was stopped."""

from __future__ import annotations

import math

import pytest

from pipeline.sweeps.space import Range
from pipeline.sweeps.study import SAMPLERS, SearchRecord, Study

SPACE = {
    "train.lr": Range(0.01, 0.1),
    "train.weight_decay": Range(0.0, 1e-5),
    "map.indices_per_id": Range(1, 4, whole=True),
    "map.hops": ("1", "1+2"),
    "train.hidden": (("8",), ("16",)),
}
FIRST = {"train.lr": 0.02, "map.hops": "1+2"}


def score_of(settings) -> float:
    return -abs(math.log(settings["train.lr"] / 0.05)) + 0.1 * settings["map.indices_per_id"]


def search(sampler: str, n_trials: int, *, n_running: int = 1, seed: int = 3, recorded=()) -> list[dict]:
    """The settings of a search in which the trial before the last of ``n_running`` ends first."""
    study = Study(SPACE, sampler=sampler, seed=seed, first=FIRST, recorded=recorded)
    running: list[int] = []
    for _ in range(n_trials):
        running.append(study.ask())
        if len(running) == n_running:
            number = running.pop(-2 if n_running > 1 else -1)
            study.tell(number, score_of(study.settings[number]))
    return study.settings


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_draws_lie_in_the_space_and_the_first_trial_has_the_defaults(sampler):
    trials = search(sampler, 30)
    assert FIRST.items() <= trials[0].items()
    for settings in trials:
        assert settings.keys() == SPACE.keys()
        assert all(settings[key] in values for key, values in SPACE.items())
        assert isinstance(settings["map.indices_per_id"], int)
        assert isinstance(settings["train.hidden"], tuple)
    for key in ("map.indices_per_id", "map.hops", "train.hidden"):
        assert len({settings[key] for settings in trials}) > 1
    assert len({settings["train.lr"] for settings in trials}) == 30


def test_random_draws_are_the_same_for_any_number_of_trials_at_once():
    alone = search("random", 12)
    assert alone == search("random", 12) == search("random", 12, n_running=3) == search("random", 20)[:12]
    assert alone != search("random", 12, seed=4)


def test_tpe_starts_at_random_and_then_prefers_what_scored_high():
    random, tpe = search("random", 40), search("tpe", 40)
    assert tpe[:10] == random[:10]
    assert tpe[10:] != random[10:]
    mean = {name: sum(map(score_of, trials[10:])) / 30 for name, trials in (("random", random), ("tpe", tpe))}
    assert mean["tpe"] > mean["random"] + 0.1


@pytest.mark.parametrize("n_before", [1, 7, 13])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(sampler, n_before):
    whole = search(sampler, 16)
    assert search(sampler, 16, recorded=whole[:n_before]) == whole


def test_a_failed_trial_is_ignored():
    study = Study(SPACE, sampler="tpe", seed=0, first=FIRST)
    for _ in range(12):
        study.tell(study.ask(), None)
    assert study.settings == search("random", 12, seed=0)


def test_a_record_returns_the_settings_that_were_added(tmp_path):
    record = SearchRecord.read(tmp_path / "tune.json", {"space": {"train.lr": "a"}, "first": {"train.hidden": ("8",)}})
    trials = search("random", 3)
    for number, settings in enumerate(trials):
        record.add(number, settings)
    record.mlflow_run_id = "r1"
    record.add(1, {"train.lr": 9.0})
    record.write()
    again = SearchRecord.read(record.file, {"space": {"train.lr": "a"}, "first": {"train.hidden": ("8",)}})
    assert again.trials == trials
    assert again.mlflow_run_id == "r1"
    # Other conditions choose other settings; the MLflow run is still the one of this folder.
    other = SearchRecord.read(record.file, {"space": {"train.lr": "b"}, "first": {}})
    assert other.trials == []
    assert other.mlflow_run_id == "r1"
    record.file.write_text('{"mlflow_run_id": ')
    assert SearchRecord.read(record.file, {}).trials == []
