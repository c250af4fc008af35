"""Synthetic CTR logs: their shape, their drift and communities, and that the best log loss is what they say."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline.ctr.synthetic as module
from graphhash.errors import ArgumentError
from pipeline.config.run_config import DataConfig
from pipeline.ctr.ingest import ingest_ctr
from pipeline.ctr.synthetic import synth_ctr
from pipeline.ctr.synthetic_model import (
    N_PAIRS,
    SIZE_EXPONENTS,
    LabelModel,
    LogSettings,
    entropies,
    power_law,
)

SIZES = {
    "n_rows": 3000,
    "cardinality": 2000,
    "n_days": 3,
    "n_communities": 10,
    "mixing": 0.2,
    "drift": 0.1,
    "positive_rate": 0.3,
    "seed": 0,
}


def settings(**changes):
    return LogSettings(**{**SIZES, **changes})


def log_of(folder):
    return pa.concat_tables([pq.read_table(file) for file in sorted(folder.glob("*.parquet"))])


def drawn(**changes):
    """Samples of days that are evenly spread, and their model."""
    chosen = settings(**changes)
    model = LabelModel(chosen)
    days = np.arange(chosen.n_rows) * chosen.n_days // chosen.n_rows
    return model, model.draw(np.random.default_rng(1), days), days


def test_a_log_has_26_columns_13_numbers_and_a_schema_that_reads_them(tmp_path):
    result = synth_ctr(tmp_path / "log", settings())
    log = log_of(tmp_path / "log")
    assert log.column_names[:2] == ["time", "label"]
    assert (log.num_rows, log.num_columns) == (3000, 2 + 13 + 26)
    assert result == json.loads((tmp_path / "log" / "synth.json").read_text())
    out = tmp_path / "ingest"
    out.mkdir()
    data = DataConfig(path=str(tmp_path / "log"), schema=str(tmp_path / "log" / "schema.toml"))
    facts = ingest_ctr(data, out)
    assert len(facts["columns"]) == len(SIZE_EXPONENTS) == 26
    assert len(facts["dense"]) == 13


def test_the_same_seed_gives_the_same_rows_whatever_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 500)
    synth_ctr(tmp_path / "one", settings())
    monkeypatch.setattr(module, "BLOCKS_PER_FILE", 2)
    assert synth_ctr(tmp_path / "many", settings())["n_files"] == 3
    assert log_of(tmp_path / "one") == log_of(tmp_path / "many")
    assert log_of(tmp_path / "one" / "truth") == log_of(tmp_path / "many" / "truth")
    synth_ctr(tmp_path / "other", settings(seed=1))
    assert log_of(tmp_path / "one") != log_of(tmp_path / "other")


def test_the_best_log_loss_of_each_part_is_the_mean_entropy_of_its_true_probabilities(tmp_path):
    result = synth_ctr(tmp_path / "log", settings())
    log, p = log_of(tmp_path / "log"), log_of(tmp_path / "log" / "truth")["probability"].to_numpy()
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    days = log["time"].to_numpy().astype("datetime64[D]").astype(str)
    assert list(result["by_day"]) == sorted(set(days))
    for day, facts in result["by_day"].items():
        assert facts["best_log_loss"] == pytest.approx(entropy[days == day].mean())
    assert result["all"]["best_log_loss"] == pytest.approx(entropy.mean())
    labels = log["label"].to_numpy()
    assert result["all"]["log_loss_of_truth"] == pytest.approx(-np.log(np.where(labels, p, 1 - p)).mean())


def test_the_random_split_is_that_of_a_run_with_default_settings(tmp_path):
    result = synth_ctr(tmp_path / "log", settings())
    out = tmp_path / "ingest"
    out.mkdir()
    facts = ingest_ctr(DataConfig(path=str(tmp_path / "log"), schema=str(tmp_path / "log" / "schema.toml")), out)
    for part, known in result["random_split"].items():
        assert known["rows"] == facts[f"n_{part}"]
        assert known["positive_rate"] == pytest.approx(facts["positive_rate"][part])


def test_the_entropy_of_known_probabilities():
    assert entropies(np.array([0.5, 0.25])) == pytest.approx([np.log(2), 0.25 * np.log(4) + 0.75 * np.log(4 / 3)])


def test_labels_are_positive_as_often_as_asked_for_and_calibrated():
    _, samples, _ = drawn(n_rows=60_000, positive_rate=0.1)
    assert samples.labels.mean() == pytest.approx(0.1, abs=0.01)
    high = samples.probabilities > np.quantile(samples.probabilities, 0.8)
    error = 4 * (samples.probabilities[high].mean() / high.sum()) ** 0.5
    assert samples.labels[high].mean() == pytest.approx(samples.probabilities[high].mean(), abs=error)


def test_rows_of_equal_values_have_equal_probabilities_on_every_day():
    _, samples, _ = drawn(drift=0.0)
    again = LabelModel(settings(drift=0.0)).draw(np.random.default_rng(1), np.full(3000, 2))
    assert np.array_equal(samples.values, again.values)
    assert np.array_equal(samples.probabilities, again.probabilities)


@pytest.mark.parametrize("mixing", [0.0, 0.5, 1.0])
def test_partners_are_of_one_community_but_for_the_share_that_mixes(mixing):
    model, samples, _ = drawn(n_rows=20_000, mixing=mixing)
    communities = model.communities(samples.values)
    for pair in range(N_PAIRS):
        same = (communities[:, pair] == communities[:, pair + N_PAIRS]).mean()
        of_chance = sum(
            (communities[:, pair] == k).mean() * (communities[:, pair + N_PAIRS] == k).mean() for k in range(10)
        )
        assert same == pytest.approx(1 - mixing + mixing * of_chance, abs=0.02)


def test_drift_replaces_its_share_of_the_values_and_no_more_values_than_asked_for_appear():
    _, samples, days = drawn(n_rows=30_000, drift=0.25, cardinality=500, n_communities=4)
    first, second = (set(samples.values[days == day, 1].tolist()) for day in (0, 1))
    assert len(second & first) / len(second) == pytest.approx(0.75, abs=0.15)
    assert samples.values[:, 0].max() < 500
    # Columns without a partner stay.
    assert set(samples.values[days == 0, 20].tolist()) == set(samples.values[days == 2, 20].tolist())


def test_ranks_follow_the_power_law():
    n = 1000
    ranks = power_law((np.arange(200_000) + 0.5) / 200_000, n)
    assert (ranks.min(), ranks.max()) == (0, n - 1)
    edges = np.array([0, 1, 10, 100, 1000])
    share = np.diff((edges + 2.0) ** -0.05) / ((n + 2.0) ** -0.05 - 2.0**-0.05)
    assert np.histogram(ranks, edges)[0] / 200_000 == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_rows": 2}, "every day has a row"),
        ({"mixing": 1.5}, "mixing=1.5 is a share"),
        ({"drift": -0.1}, "drift=-0.1 is a share"),
        ({"positive_rate": 1.0}, "positive_rate=1.0"),
        ({"cardinality": 2}, "cardinality=2"),
        ({"n_communities": 100}, "communities=100 are more than the"),
    ],
)
def test_sizes_that_cannot_be_met_are_refused(change, words):
    with pytest.raises(ArgumentError, match=words):
        settings(**change)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ArgumentError, match="holds something that is no synthetic log"):
        synth_ctr(tmp_path, settings())
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
