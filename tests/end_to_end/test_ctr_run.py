"""CTR from the command line: a comparison of methods, one of its runs to the report, the same again, and what is refused."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from graphhash.errors import DataError
from graphhash.metrics.ctr import auc
from pipeline.bench.serving import EAGER
from pipeline.bench.serving_subjects import subject_of
from pipeline.config.run_config import RunConfig
from pipeline.ctr.data import Features
from pipeline.ctr.evaluate import predict
from pipeline.ctr.models import CTR_PRESETS
from pipeline.ctr.settings import ctr_settings, spec_of
from pipeline.ctr.train import SCORES, ctr_loss, validated
from pipeline.ctr.weights import load_ctr
from pipeline.errors import ConfigError
from pipeline.runs.plan import plan
from pipeline.sweeps.scheduler import LocalPool
from pipeline.sweeps.space import Range, default_point, default_space
from pipeline.sweeps.study import SearchRecord
from pipeline.sweeps.trials import table
from pipeline.sweeps.tune import SearchSettings, run_trials, score_key
from pipeline.training.loop import Callbacks, FitSettings, Objective, fit
from serving import Scorer
from tests.helpers.command import exit_code_of
from tests.helpers.ctr_log import columns, write_csv, write_schema
from tests.helpers.small_models import small_model

SMALL = ["train.dim=8", "train.hidden=16", "train.epochs=8", "--resolution", "1", "--batch-size", "128", "--lr", "0.02"]


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clicks")
    write_csv(folder / "log.csv", columns(4000))
    return folder, ["--task", "ctr", "--data", folder / "log.csv", "--schema", write_schema(folder)]


@pytest.fixture(scope="module")
def compared(log):
    """The folder of a comparison of two methods."""
    folder, data = log
    words = [*data, "--methods", "graph,modulo", "--models", "dlrm", "--out", folder / "cmp", *SMALL]
    assert exit_code_of(folder, "compare", *words) == 0
    return folder / "cmp"


@pytest.fixture(scope="module")
def run_dir(compared):
    """The run folder of one of its trainings, which `graphhash run` brings to its report."""
    folder = compared / "runs" / "graph-dlrm-seed0-resolution1"
    assert exit_code_of(compared.parent, "run", "--out", folder) == 0
    return folder


def test_a_run_leaves_metrics_a_model_and_a_report(run_dir):
    (metrics,) = json.loads((run_dir / "metrics.json").read_text())
    assert 0.7 < metrics["auc"] <= 1
    assert 0.7 < metrics["group_auc"] <= 1
    assert metrics["log_loss"] < 0.6
    assert 0.7 < metrics["calibration"] < 1.4
    assert 0 <= metrics["ece"] < 0.2
    assert metrics["compressed_columns"] == ["user", "item"]
    assert set(metrics["bytes_of"]["columns"]) == {
        "user",
        "item",
        "device",
        "genres",
    }
    page = (run_dir / "report.html").read_text()
    assert page.count("data:image/png") == 4
    assert "Bytes by feature" in page
    assert "id bias" in page
    # With scalars per id, DLRM takes more weight decay on a small log than full tables do.
    facts = json.loads((run_dir / "methods" / "graph" / "history.json").read_text())["facts"]
    assert facts["weight_decay"] == CTR_PRESETS["dlrm"].most_decay_with_scalars > CTR_PRESETS["dlrm"].most_decay
    # The figures are those of the model that was kept.
    trained = load_ctr(run_dir / "methods" / "graph", run_dir / "ingest")
    test = trained.features.part("test")
    assert auc(np.asarray(test.labels), predict(trained.model, test)) == pytest.approx(metrics["auc"], abs=0.02)
    assert [len(v) for v in trained.vocabularies] == [60, 40, 5, 3]
    assert len(trained.maps) == 4


def test_the_bundle_of_a_run_predicts_from_raw_rows_what_the_model_does(run_dir, log):
    from graphhash.models.ctr_bytes import store_rounded
    from pipeline.config.run_config import RunConfig
    from pipeline.ctr.budget import precisions_of
    from pipeline.ctr.passes import row_parts

    scorer = Scorer(run_dir / "bundle", provider="cpu")
    (metrics,) = json.loads((run_dir / "metrics.json").read_text())
    loss = scorer.manifest["precision_loss"]
    assert loss["log_loss"] == metrics["log_loss"]
    assert abs(loss["relative"]) < 0.005
    assert scorer.manifest["metrics"]["auc"] == metrics["auc"]
    assert scorer.manifest["provenance"]["data"]["n_test"] == metrics["n_test_rows"]
    raw, config = columns(4000), RunConfig.load(run_dir / "config.toml")
    trained = load_ctr(run_dir / "methods" / "graph", run_dir / "ingest")
    store_rounded(trained.model, precisions_of(config, "graph", trained.maps))
    for number, part in enumerate(("train", "validation", "test")):
        chosen = np.flatnonzero(
            row_parts(0, 4000, seed=config.data.seed, validation=config.data.validation, test=config.data.test)
            == number
        )
        rows = {name: [values[i] for i in chosen] for name, values in raw.items()}
        logits = predict(trained.model, trained.features.part(part))
        np.testing.assert_allclose(scorer.details(rows).logits, logits, atol=1e-5)


def test_the_benchmark_of_serving_asks_bundle_and_torch_for_the_same_rows(run_dir, tmp_path, capsys):
    subject = subject_of(run_dir / "bundle", "cpu", 1, 20)
    request = subject.draw(np.random.default_rng(0), 50)
    assert all(flags.all() for flags in Scorer(run_dir / "bundle").details(request).known.values())
    np.testing.assert_allclose(subject.answer(request), subject.eager()(request), rtol=0, atol=1e-4)
    shutil.copytree(run_dir / "bundle", tmp_path / "apart")
    how = ("--requests", "5", "--threads", "1", "--plot", tmp_path / "plot.png", "--json", tmp_path / "figures.json")
    assert exit_code_of(tmp_path, "bench", "serve", run_dir / "bundle", "--against", tmp_path / "apart", *how) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [entry["program"] for entry in figures] == 2 * [subject.name] + [EAGER]
    assert all(entry["unit"] == "rows" and entry["sizes"][-1]["batch"] == 256 for entry in figures)
    assert figures[0]["memory"]["loaded"] > 0
    assert "rows/s" in capsys.readouterr().out
    small_model(users="int64").export(tmp_path / "retrieval")
    assert exit_code_of(tmp_path, "bench", "serve", run_dir / "bundle", "--against", tmp_path / "retrieval") == 1
    assert "takes other ids or columns than" in capsys.readouterr().err


def test_mlflow_has_the_curve_of_validation_and_the_test(run_dir, compared):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{compared.parent}/mlflow.db")
    (metrics,) = json.loads((run_dir / "metrics.json").read_text())
    run = client.get_run(metrics["mlflow_run_id"])
    assert run.data.metrics["test.auc"] == pytest.approx(metrics["auc"])
    assert len(client.get_metric_history(metrics["mlflow_run_id"], "auc")) >= 2
    (model,) = client.search_logged_models([run.info.experiment_id])
    manifest = json.loads((run_dir / "bundle" / "manifest.json").read_text())
    assert model.source_run_id == run.info.run_id
    assert model.tags["graphhash.bundle"] == manifest["manifest_sha256"]
    assert "bundle/model.onnx" in {file.path for file in client.list_artifacts(run.info.run_id, "bundle")}
    assert "graphhash.ingest.schema_hash" in run.data.tags
    assert "graphhash.bucket_map_hash.user" in run.data.tags


def test_the_same_command_does_nothing_again(run_dir, capsys):
    assert exit_code_of(run_dir.parents[2], "run", "--out", run_dir) == 0
    assert capsys.readouterr().err.count("unchanged, skipped") == 5


def test_a_comparison_names_the_measures_of_clicks(compared):
    result = json.loads((compared / "compare.json").read_text())
    lines = {line["method"]: line for line in result["summary"]}
    assert set(lines) == {"graph", "modulo"}
    assert not result["failed"]
    assert lines["graph"]["rows"] == lines["modulo"]["rows"]
    assert lines["graph"]["budget"] == "resolution 1"
    # The tastes are planted along the communities.
    assert lines["graph"]["log_loss"] < lines["modulo"]["log_loss"]
    assert lines["graph"]["auc"] > lines["modulo"]["auc"]
    table = (compared / "compare.md").read_text()
    assert "| log loss | AUC | group AUC |" in table
    assert "recall" not in table
    assert (compared / "compare.png").stat().st_size > 5000


def test_an_export_alone_makes_the_bundle_anew(run_dir, log, capsys):
    folder, _data = log
    assert exit_code_of(folder, "export", "--out", run_dir, "--precision", "float32") == 0
    assert "bundle:" in capsys.readouterr().out
    manifest = json.loads((run_dir / "bundle" / "manifest.json").read_text())
    assert manifest["precision"] == "float32"
    assert manifest["precision_loss"]["relative"] == 0
    assert exit_code_of(folder, "check", run_dir / "bundle") == 0
    assert "trial request" in capsys.readouterr().out
    assert exit_code_of(folder, "triton", run_dir / "bundle", folder / "models") == 0
    assert f"Triton model: {folder / 'models' / 'graphhash'}" in capsys.readouterr().out
    assert exit_code_of(folder, "recommend", run_dir / "bundle", "--user-id", "u1") == 1
    assert "made for the task 'ctr'" in capsys.readouterr().err


def test_impossible_settings_are_refused_in_one_line(log, capsys):
    folder, data = log
    for words, reason in (
        (["--model", "mf"], "train.model=mf is not of run.task=ctr"),
        (["--loss", "ials"], "train.loss=ials is not supported with run.task=ctr"),
        (["--method", "lsh"], "method 'lsh' needs features"),
        (["--runtime", "materialized"], "export.runtime=materialized is not supported"),
        (["--shards", "2"], "are not supported with run.task=ctr"),
        (["--bad-rows", "skip"], "stops at a bad row"),
        (["--user-rows", "5", "--item-rows", "5"], "cluster.user_rows=5 is not supported"),
    ):
        assert exit_code_of(folder, "run", *data, "--out", folder / "no", *words) == 2
        assert reason in capsys.readouterr().err
    for words, reason in (
        (["--format", "libfm"], "add run.task=ctr"),
        (["--label-column", "x"], "add run.task=ctr"),
        (["--model", "dlrm"], "not of run.task=retrieval"),
    ):
        assert exit_code_of(folder, "run", "--data", folder / "log.csv", "--out", folder / "no", *words) == 2
        assert reason in capsys.readouterr().err


def test_the_ingest_command_says_what_is_wrong_with_a_log(log, capsys):
    folder, data = log
    assert exit_code_of(folder, "ingest", *data[:4], "--schema", folder / "none.toml", "--out", folder / "bad") == 1
    assert "cannot read the schema" in capsys.readouterr().err


def test_a_search_compares_clicks_by_auc_and_starts_from_the_recipe(log, tmp_path):
    _folder, data = log
    base = RunConfig.from_flat(
        {
            "run.task": "ctr", "run.methods": ("graph",), "run.out": str(tmp_path), "run.mlflow": False, "data.path": str(data[3]),
            "data.schema": data[5], "train.dim": 8, "train.hidden": ("16",), "train.epochs": 2, "cluster.resolution": 1.0,
        }
    )  # fmt: skip
    space = default_space(base)
    lr = ctr_settings(base, 1000).lr
    assert {key.partition(".")[2] for key in space} == {"lr", "l2_total"}
    assert default_point(base, space)["train.l2_total"] == CTR_PRESETS["dlrm"].l2_total
    assert space["train.lr"] == Range(lr / 4, lr * 4)
    assert default_point(base, space)["train.lr"] == lr
    (trial,) = run_trials_of_search(base, {"train.lr": (0.02,), "train.l2_total": (1.0,)})
    assert score_key(base) == "validation_auc"
    assert 0.4 < trial.score < 1
    (again,) = run_trials_of_search(base, {"train.lr": (0.02,), "train.l2_total": (1.0,)})
    assert again.result.finished_before
    assert table([trial.facts()], {"train.lr": space["train.lr"]}, score_key(base))[0] == (
        "trial",
        "lr",
        "auc",
        "best epoch",
        "train s",
        "",
    )


def run_trials_of_search(base, space):
    search = SearchSettings(space, n_trials=1, seed=0)
    record = SearchRecord.read(Path(base.run.out) / "tune.json", search.chosen_by(base))
    return run_trials(base, search, record, LocalPool(None), lambda trial: None)


# ---- without Ray


@pytest.fixture(scope="module")
def parts(run_dir):
    trained = load_ctr(run_dir / "methods" / "graph", run_dir / "ingest")
    return Features.open(run_dir / "ingest"), trained.maps


def trained_weights(parts, dropout=0.0, stop=None, state=None):
    features, maps = parts
    config = RunConfig.from_flat({"run.task": "ctr", "train.dim": 8, "train.hidden": ("16",), "train.dropout": dropout})
    model = spec_of(config, "graph").build(maps, len(features.dense), len(features.multi_valued))
    settings = FitSettings(lr=1e-2, weight_decay=1e-6, epochs=3, eval_every=1, patience=9, batch_size=256, seed=1)
    states = []
    last = fit(
        model, features.part("train").tensors(), settings, Objective(ctr_loss(len(features.multi_valued)), "auc"), state=state,
        callbacks=Callbacks(on_evaluation=lambda s: states.append(copy.deepcopy(s))),
    )  # fmt: skip
    return last["model"], states


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_training_is_repeatable_and_goes_on_where_it_stopped(parts, dropout):
    first, states = trained_weights(parts, dropout)
    again, _ = trained_weights(parts, dropout)
    assert all(torch.equal(first[name], again[name]) for name in first)
    resumed, _ = trained_weights(parts, dropout, state=states[0])
    assert all(torch.equal(first[name], resumed[name]) for name in first)


def test_a_damaged_checkpoint_is_named(run_dir, tmp_path):
    shutil.copytree(run_dir / "methods" / "graph", tmp_path / "m")
    (tmp_path / "m" / "checkpoint" / "model.npz").write_bytes(b"no")
    with pytest.raises(DataError, match="not a readable checkpoint"):
        load_ctr(tmp_path / "m", run_dir / "ingest")


def test_training_may_keep_the_epoch_of_least_log_loss(parts):
    features, maps = parts
    config = RunConfig.from_flat(
        {
            "run.task": "ctr",
            "train.dim": 8,
            "train.hidden": ("64",),
            "train.epochs": 6,
            "train.lr": 0.05,
            "train.patience": 9,
        }
    )
    validation = features.part("validation")
    for name, key in SCORES.items():
        model = spec_of(config, "graph").build(maps, len(features.dense), len(features.multi_valued))
        state = fit(
            model, features.part("train").tensors(), ctr_settings(config, len(features.part("train"))),
            Objective(ctr_loss(len(features.multi_valued)), key, lambda model: validated(model, validation)),
        )  # fmt: skip
        best = {"auc": max, "log_loss": min}[name](entry[name] for entry in state["history"])
        assert state["history"][state["best_epoch"] - 1][name] == best


def test_where_a_schema_lies_changes_nothing_and_what_it_says_does(log, tmp_path):
    folder, _data = log
    base = {"run.task": "ctr", "run.out": str(tmp_path), "data.path": str(folder / "log.csv")}
    keys = []
    for name, text in (("a", None), ("b", None), ("c", "# other\n")):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "schema.toml"
        shutil.copy2(folder / "schema.toml", file)
        if text:
            file.write_text(file.read_text() + text)
            os.utime(file, (1, 1))
        keys.append(plan(RunConfig.from_flat({**base, "data.schema": str(file)}), "ingest")["ingest"].key)
    assert keys[0] == keys[1] != keys[2]


def test_a_model_of_retrieval_is_no_default_of_clicks():
    config = RunConfig.from_flat({"run.task": "ctr"})
    assert config.train.model == "dlrm"
    assert ctr_settings(config, 200_000).batch_size == 2048
    # The same prior for logs of any size but small ones, unless told otherwise.
    assert [ctr_settings(config, n).weight_decay * n for n in (200_000, 10_000_000)] == [10.0, 10.0]
    assert [ctr_settings(config, n).weight_decay for n in (1000, 100_000)] == [1e-4, 1e-4]
    assert [ctr_settings(config, n, id_scalars=True).weight_decay for n in (1000, 20_000)] == [1e-3, 5e-4]
    linear = RunConfig.from_flat({"run.task": "ctr", "train.model": "dcnv2"})
    assert [ctr_settings(linear, n).weight_decay for n in (1000, 100_000)] == [2e-3, 2e-5]
    for key, expected in (("train.l2_total", 4.0 / 500), ("train.weight_decay", 4.0)):
        assert ctr_settings(RunConfig.from_flat({"run.task": "ctr", key: 4.0}), 500).weight_decay == expected
    # A small log sees enough steps, unless told otherwise.
    assert [ctr_settings(config, n).batch_size for n in (8192, 100)] == [128, 64]
    config = RunConfig.from_flat({"run.task": "ctr", "train.batch_size": 512})
    assert ctr_settings(config, 100).batch_size == 512
    with pytest.raises(ConfigError, match=r"train.hidden=0 must be whole numbers above 0"):
        RunConfig.from_flat({"run.task": "ctr", "train.hidden": ("0",)})


def test_a_budget_that_a_method_cannot_keep_is_refused_before_anything_is_trained(log, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["--method", "full_soft_small_dim", "--ratio", "0.001", "--out", out, "--no-mlflow"]
    assert exit_code_of(tmp_path, "run", *log[1], *SMALL[:3], *words) == 1
    assert "method 'full_soft_small_dim' needs" in capsys.readouterr().err
    assert (out / "ingest").is_dir()
    assert not (out / "cluster").exists()
    assert not (out / "methods").exists()
