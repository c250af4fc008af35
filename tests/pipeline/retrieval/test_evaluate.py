"""Scores that tell users or items apart by nothing are said."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.retrieval.evaluate import constant_warnings

RNG = np.random.default_rng(0)
POPULARITY = RNG.normal(0, 1, (1, 50))
OWN = RNG.normal(0, 1, (20, 50))


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (np.zeros((20, 50)), "gives all items nearly the same score"),
        (3.0 + 1e-6 * OWN, "gives all items nearly the same score"),
        (POPULARITY + 1e-6 * OWN, "ranks items nearly alike for all users"),
    ],
    ids=["zero", "equal", "popularity"],
)
def test_scores_that_hardly_differ_are_said(scores, words):
    (warning,) = constant_warnings(scores.astype(np.float32))
    assert warning.startswith(words)


@pytest.mark.parametrize("scores", [OWN, 1e-20 * OWN, POPULARITY + 0.01 * OWN, POPULARITY])
def test_other_scores_and_those_of_one_user_are_not(scores):
    assert constant_warnings(scores[:1].astype(np.float32) if scores is POPULARITY else scores.astype(np.float32)) == []
