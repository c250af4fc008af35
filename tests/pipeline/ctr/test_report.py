"""The report of a CTR run: what was trained, how features read the tables, and a page that is complete without a test set."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

from pipeline.config.run_config import RunConfig
from pipeline.ctr.report import write_ctr_report

MODELS = {"widedeep": "Wide & Deep", "deepfm": "DeepFM", "dcnv2": "DCN-V2", "dlrm": "DLRM", "finalnet": "FinalNet"}


def make_run(out: Path, methods: tuple[str, ...] = ("graph", "full"), **train: object) -> Path:
    """A run folder with what the stages up to `evaluate` leave there; settings are of training."""
    for folder in ("stages", "cluster"):
        (out / folder).mkdir(parents=True)
    flat = {"run.task": "ctr", "data.path": "/data/log.csv", "run.out": str(out), "run.methods": methods}
    config = RunConfig.from_flat(flat | {f"train.{key}": value for key, value in ({"model": "dlrm"} | train).items()})
    (out / "config.toml").write_text(config.to_toml())
    ingest = {
        "n_train": 8000,
        "n_validation": 1000,
        "n_test": 1000,
        "positive_rate": {"train": 0.25, "validation": 0.25, "test": 0.2},
        "columns": {"user": 300, "<item>": 200, "genres": 5},
        "dense": ["price"],
        "dropped": {"hour": "it has one value in all of train"},
        "left_out": {},
        "oov_rate": {"user": 0.02, "<item>": 0.0, "genres": 0.0},
        "oov_values": {"user": 17, "<item>": 0, "genres": 0},
        "n_cut": 3,
    }
    (out / "stages" / "ingest.json").write_text(json.dumps({"result": ingest}))
    pair = {"columns": ["user", "<item>"], "n_edges": 1234, "resolution": 5.0, "modularity": 0.43, "user_rows": 30}
    pair |= {"item_rows": 20, "n_isolated": [7, 0]}
    (out / "cluster" / "cluster.json").write_text(json.dumps({"pairs": [pair]}))
    metrics = []
    for method in methods:
        n_bytes = 4_000_000 if method == "full" else 1_000_000
        sizes = {"table": n_bytes // 4, "map": 0 if method == "full" else 100, "wide": 0, "bias": 10}
        metrics.append(
            {"method": method, "auc": 0.7, "log_loss": 0.45, "calibration": 0.95, "ece": 0.03, "group_auc": 0.6}
            | {"curve": {"predicted": [0.1, 0.6], "positive": [0.2, 0.5], "counts": [10, 10]}, "log_loss_float32": 0.44}
            | {"rows": 50, "bytes": n_bytes, "bytes_full": 4_000_000, "bytes_ratio": n_bytes / 4_000_000}
            | {"bytes_of": {"columns": dict.fromkeys(("user", "<item>", "genres"), sizes), "layers": 5000}}
            | {
                "compressed_columns": ["user"],
                "precision": "float32" if method == "full" else "int8",
                "item_bias": True,
            }
            | {"training_bytes": 3 * n_bytes, "training_bytes_measured": 3 * n_bytes, "compressed": None}
            | {"mlflow_run_id": None, "seconds": {"ingest": 1.0, "cluster": 2.0, "train": 90.0}}
        )
        (out / "methods" / method).mkdir(parents=True)
        history = {"epochs": [{"epoch": e, "loss": 0.5, "auc": 0.6 + e / 100} for e in (1, 2)], "best_epoch": 2}
        (out / "methods" / method / "history.json").write_text(json.dumps(history))
    (out / "metrics.json").write_text(json.dumps(metrics))
    return out


def report_text(run_dir: Path) -> str:
    """The words of the page, with single spaces."""
    write_ctr_report(run_dir)
    page = (run_dir / "report.html").read_text()
    text = re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))
    return re.sub(r" ([.,;)])", r"\1", " ".join(html.unescape(text).split()))


def test_page_says_what_happened(tmp_path):
    text = report_text(make_run(tmp_path / "run"))
    for words in (
        "graph keeps 25.0 % of the bytes",
        "a log loss of 0.4500 and an AUC of 0.7000; full tables have 0.4500 and 0.7000",
        "training bytes measured log loss",
        "3 categorical and multi-valued features and 1 dense features",
        "hour (it has one value in all of train)",
        "Out-of-vocabulary values in the test samples: user 2.0 % (17 different)",
        "3 values of multi-valued features were cut",
        "train 8,000 25.0 %",
        "graph + id bias",
        "graph: stored as int8, 1,000,000 bytes; log loss 0.4500 against 0.4400 in float32, a change of +2.27 %",
        "user x <item> 1,234 5 0.4300 30 + 20 7 + 0",
        "The bucket maps of graph are made from these communities; full does not use them.",
        "graph kept epoch 2 of 2; full kept epoch 2 of 2",
        "train 3.0 min",
    ):
        assert words in text, words


@pytest.mark.parametrize("model", MODELS)
def test_page_names_the_model_and_the_loss_that_were_trained(tmp_path, model):
    text = report_text(make_run(tmp_path / "run", model=model))
    assert f"{MODELS[model]} with binary cross-entropy and embedding dimension" in text


@pytest.mark.parametrize(("score", "words"), [("auc", "AUC"), ("log_loss", "log loss")])
def test_page_names_the_measure_that_stops_training(tmp_path, score, words):
    assert f"Training stops when {words} on the validation samples" in report_text(
        make_run(tmp_path / "run", score=score)
    )


def test_the_page_says_where_parts_of_a_split_by_time_begin(tmp_path):
    run_dir = make_run(tmp_path / "run")
    stage = json.loads((run_dir / "stages" / "ingest.json").read_text())
    stage["result"]["times"] = {"column": "seen", "first": {"validation": None, "test": "2024-05-01 00:00:00"}}
    (run_dir / "stages" / "ingest.json").write_text(json.dumps(stage))
    assert "Samples are split by seen, the test begins at 2024-05-01 00:00:00." in report_text(run_dir)


def test_without_a_test_set_the_page_says_so(tmp_path):
    run_dir = make_run(tmp_path / "run")
    metrics = json.loads((run_dir / "metrics.json").read_text())
    measures: dict = dict.fromkeys(("log_loss", "auc", "group_auc", "calibration", "ece"))
    measures["unmeasured"] = dict.fromkeys(measures, "there are no test samples")
    (run_dir / "metrics.json").write_text(json.dumps([{**entry, **measures} for entry in metrics]))
    text = report_text(run_dir)
    assert "There were no test samples to measure it with." in text
    assert "log loss, AUC, group AUC, calibration, ECE: - because there are no test samples." in text
    assert not (run_dir / "bytes_loss.png").exists()
