"""Patience, and what becomes of settings in a training and in a refit."""

from __future__ import annotations

import pytest

from pipeline.config.run_config import RunConfig
from pipeline.ctr.settings import ctr_settings
from pipeline.tracking.tracker import Tracker
from pipeline.training.resolved import patience, resolved_settings


class Listening(Tracker):
    """Keeps the parameters that it is told."""

    def log_params(self, params):
        self.params = params


@pytest.mark.parametrize(
    ("epochs", "eval_every", "expected"), [(1, 1, 5), (6, 1, 5), (15, 1, 5), (60, 1, 20), (60, 10, 5), (601, 20, 11)]
)
def test_patience_is_a_third_of_the_epochs_and_at_least_five_evaluations(epochs, eval_every, expected):
    assert patience(epochs, eval_every) == expected


@pytest.mark.parametrize("n_rows", [600, 6000, 10_000_000])
@pytest.mark.parametrize("model", ["dlrm", "dcnv2"])
def test_a_ctr_training_goes_through_all_epochs_of_its_preset(model, n_rows):
    """A default of 2 evaluations ended the trainings of small logs at epoch 3, where the score had dipped."""
    settings = ctr_settings(RunConfig.from_flat({"run.task": "ctr", "train.model": model}), n_rows)
    assert settings.patience >= settings.epochs - 1
    assert ctr_settings(RunConfig.from_flat({"run.task": "ctr", "train.patience": 2}), n_rows).patience == 2


def test_mlflow_is_told_what_the_configuration_leaves_open():
    config = RunConfig.from_flat({"run.task": "ctr", "train.lr": 0.5, "train.dropout": 0.25})
    settings, tracker = ctr_settings(config, 200_000), Listening()
    further = {"train.dropout": 0.25, "train.batch_size": settings.batch_size}
    assert resolved_settings(config, settings, further, tracker, None) == settings
    assert tracker.params == {
        "train.weight_decay": 5e-5,
        "train.epochs": 6,
        "train.eval_every": 1,
        "train.patience": 5,
        "train.batch_size": 2048,
    }


def test_a_refit_ends_at_its_epoch_without_evaluations_before():
    config, tracker = RunConfig.from_flat({"run.task": "ctr"}), Listening()
    settings = ctr_settings(config, 200_000)
    refit = resolved_settings(config, settings, {}, tracker, 3)
    assert (refit.n_epochs, refit.eval_every, refit.epochs) == (3, 3, 6)
    assert [refit.lr_of(epoch) for epoch in (1, 2, 3)] == [settings.lr_of(epoch) for epoch in (1, 2, 3)]
    assert not hasattr(tracker, "params")
