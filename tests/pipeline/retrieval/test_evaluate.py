"""Scores that tell users or items apart by nothing are said; a test of a large log ranks for a sample of the users."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_array

from pipeline.config.run_config import RunConfig
from pipeline.retrieval.evaluate import constant_warnings, users_to_rank

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


def test_users_are_drawn_where_there_are_more_than_asked_for():
    test = csr_array((np.ones(30), (np.arange(0, 60, 2), np.arange(30))), shape=(60, 40))
    everyone, drawn = (users_to_rank(RunConfig.from_flat({"evaluate.users": n}), test) for n in (0, 7))
    assert everyone.tolist() == list(range(0, 60, 2))
    assert len(set(drawn.tolist())) == 7
    assert set(drawn.tolist()) < set(everyone.tolist())
    assert np.array_equal(drawn, np.sort(drawn))
    assert np.array_equal(drawn, users_to_rank(RunConfig.from_flat({"evaluate.users": 7, "train.seed": 5}), test))


def test_a_large_catalogue_is_ranked_for_fewer_users(monkeypatch):
    monkeypatch.setattr("pipeline.retrieval.evaluate.FEWEST_USERS", 3)
    test = csr_array(np.ones((20, 50)))
    assert len(users_to_rank(RunConfig(), test)) == 20
    monkeypatch.setattr("pipeline.retrieval.evaluate.MOST_SCORES", 500)
    assert len(users_to_rank(RunConfig(), test)) == 10
    monkeypatch.setattr("pipeline.retrieval.evaluate.MOST_SCORES", 100)
    assert len(users_to_rank(RunConfig(), test)) == 3
