"""Predictions that tell samples apart by nothing are said."""

from __future__ import annotations

import numpy as np

from pipeline.ctr.evaluate import constant_warnings


def test_a_constant_prediction_is_said_with_its_value():
    logits = np.random.default_rng(0).normal(0.0, 1e-3, 1000).astype(np.float32)
    (warning,) = constant_warnings(logits)
    assert warning.startswith("predicts nearly a constant, 0.49")
    assert "try a lower --weight-decay" in warning


def test_predictions_of_a_rare_label_that_differ_are_none():
    assert constant_warnings(np.random.default_rng(0).normal(-8.0, 0.1, 1000).astype(np.float32)) == []
