"""The calibration of a CTR training: fitted to the validation rows, and of product codes anew."""

from __future__ import annotations

import json

import numpy as np
import pytest

from graphhash.metrics.ctr import fit_calibration
from pipeline.config.run_config import RunConfig
from pipeline.ctr.evaluate import predict
from pipeline.ctr.weights import load_ctr
from pipeline.runs.run import run
from tests.helpers.ctr_log import columns, write_csv, write_schema

METHODS = ("full", "full_int4", "full_pq")


def config_of(folder, **settings) -> RunConfig:
    return RunConfig.from_flat(
        {
            "run.task": "ctr",
            "run.mlflow": False,
            "run.methods": METHODS,
            "run.out": str(folder / "out"),
            "data.path": str(folder / "log.csv"),
            "data.schema": str(write_schema(folder)),
            "cluster.ratio": 0.9,
            "train.dim": 8,
            "train.hidden": ("16",),
            "train.epochs": 6,
            "train.lr": 0.05,
            "train.weight_decay": 0.0,
            "train.batch_size": 128,
            "train.refit": False,
        }
        | settings
    )


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A folder with the run of a model that fits its rows too closely."""
    pytest.importorskip("faiss")
    folder = tmp_path_factory.mktemp("calibrated")
    write_csv(folder / "log.csv", columns(4000))
    run(config_of(folder))
    return folder


def facts_of(folder, method):
    return json.loads((folder / "out" / "methods" / method / "history.json").read_text())["facts"]


@pytest.mark.parametrize("method", ["full", "full_pq"])
def test_slope_and_offset_fit_the_validation_rows(method, calibrated):
    trained = load_ctr(calibrated / "out" / "methods" / method, calibrated / "out" / "ingest")
    slope, offset = trained.model.calibration.tolist()
    facts = facts_of(calibrated, method)
    assert (facts["calibration_slope"], facts["calibration_offset"]) == pytest.approx((slope, offset))
    assert slope < 0.95
    trained.model.calibrate(1.0, 0.0)
    validation = trained.features.part("validation")
    assert fit_calibration(np.asarray(validation.labels), predict(trained.model, validation)) == pytest.approx(
        (slope, offset), rel=1e-4
    )


def test_tables_in_small_types_have_the_calibration_of_full_ones_and_codes_their_own(calibrated):
    full, int4, codes = (facts_of(calibrated, method)["calibration_slope"] for method in METHODS)
    assert full == int4 != codes


def test_without_it_the_weights_and_the_ranking_are_the_same_and_the_log_loss_is_higher(calibrated, tmp_path):
    write_csv(tmp_path / "log.csv", columns(4000))
    (plain,) = run(
        config_of(tmp_path, **{"run.methods": METHODS[:1], "train.calibrate": False}), until="evaluate"
    ).metrics
    metrics = json.loads((calibrated / "out" / "metrics.json").read_text())[0]
    assert metrics["auc"] == pytest.approx(plain["auc"], abs=1e-9)
    assert metrics["log_loss"] < plain["log_loss"] - 0.01
    ours, theirs = (
        np.load(folder / "out" / "methods" / "full" / "checkpoint" / "model.npz") for folder in (calibrated, tmp_path)
    )
    assert theirs["calibration"].tolist() == [1.0, 0.0]
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours.files if name != "calibration")


def test_a_checkpoint_without_calibration_is_read_as_it_was(calibrated):
    method_dir = calibrated / "out" / "methods" / "full"
    file = method_dir / "checkpoint" / "model.npz"
    arrays = dict(np.load(file))
    calibration = arrays.pop("calibration")
    np.savez(file, **arrays)
    assert load_ctr(method_dir, calibrated / "out" / "ingest").model.calibration.tolist() == [1.0, 0.0]
    np.savez(file, calibration=calibration, **arrays)
