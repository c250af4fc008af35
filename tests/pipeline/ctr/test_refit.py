"""The refit of CTR: a training on train and validation, whose model is tested and exported, without anything of the test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.run_config import RunConfig
from pipeline.ctr.data import Features
from pipeline.ctr.refit import refit_ctr
from pipeline.ctr.train import train_ctr
from pipeline.runs.run import run
from pipeline.task import REFIT_PARTS, StageContext
from pipeline.training.job import TrainingSession
from tests.helpers.ctr_log import columns, write_csv, write_schema

WEIGHTS = Path("checkpoint") / "model.npz"
# The same learning rate in every epoch, so that fewer epochs are a part of more of them.
SETTINGS = {
    "run.task": "ctr",
    "run.mlflow": False,
    "run.methods": ("soft",),
    "cluster.resolution": 1.0,
    "map.indices_per_id": 4,
    "train.dim": 8,
    "train.hidden": ("16",),
    "train.epochs": 6,
    "train.schedule": "constant",
    "train.lr": 0.05,
    "train.batch_size": 128,
    "train.weight_decay": 1e-6,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[RunConfig, Path]:
    """A whole run of `soft`, and its folder."""
    folder = tmp_path_factory.mktemp("refit")
    write_csv(folder / "log.csv", columns(4000))
    data = {"data.path": str(folder / "log.csv"), "data.schema": str(write_schema(folder))}
    config = RunConfig.from_flat(SETTINGS | data | {"run.out": str(folder / "out")})
    run(config)
    return config, folder / "out"


def test_the_model_is_that_of_a_training_on_train_and_validation(whole, tmp_path):
    config, before = whole
    out = Path(shutil.copytree(before, tmp_path / "out"))
    best = json.loads((out / "methods" / "soft" / "history.json").read_text())["best_epoch"]
    features = Features.open(out / "ingest")
    union, n_validation = features.rows_of(REFIT_PARTS), len(features.part("validation"))
    assert len(union) == len(features.part("train")) + n_validation > n_validation > 0
    labels, categorical, dense, *multi_valued = (tensor.numpy() for tensor in union.tensors())
    arrays = {"labels": labels, "categorical": categorical, "dense": dense}
    arrays |= {f"multi_valued_{i}": values for i, values in enumerate(multi_valued)}
    for name, values in arrays.items():
        np.save(out / "ingest" / "train" / f"{name}.npy", values)
        np.save(out / "ingest" / "validation" / f"{name}.npy", values[:0])
    context = StageContext(RunConfig.from_flat(config.flat() | {"train.epochs": best}), out)
    (tmp_path / "trained").mkdir()
    facts = train_ctr(context, "soft", tmp_path / "trained", TrainingSession())
    assert facts["validation_auc"] is None
    ours, theirs = (np.load(folder / WEIGHTS) for folder in (before / "refit" / "soft", tmp_path / "trained"))
    assert ours.files == theirs.files
    for name in ours.files:
        if name != "calibration":
            assert ours[name].tobytes() == theirs[name].tobytes(), name
    # The calibration is that of the training which had validation rows.
    assert np.array_equal(ours["calibration"], np.load(before / "methods" / "soft" / WEIGHTS)["calibration"])
    assert not np.array_equal(ours["calibration"], theirs["calibration"])


def test_nothing_of_the_test_is_read(whole, tmp_path):
    config, before = whole
    out = Path(shutil.copytree(before, tmp_path / "out"))
    shutil.rmtree(out / "ingest" / "test")
    (tmp_path / "again").mkdir()
    refit_ctr(StageContext(config, out), "soft", tmp_path / "again", TrainingSession())
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (before / "refit" / "soft" / WEIGHTS).read_bytes()


def test_it_is_the_model_that_is_tested_and_exported(whole, tmp_path):
    config, out = whole
    (metrics,) = json.loads((out / "metrics.json").read_text())
    manifest = json.loads((out / "bundle" / "manifest.json").read_text())
    assert metrics["trained_on"] == manifest["metrics"]["trained_on"] == ["train", "validation"]
    copy = Path(shutil.copytree(out, tmp_path / "out"))
    switched_off = RunConfig.from_flat(config.flat() | {"run.out": str(copy), "train.refit": False})
    (before,) = run(switched_off, until="evaluate").metrics
    assert before["trained_on"] == ["train"]
    assert before["log_loss"] != metrics["log_loss"]
