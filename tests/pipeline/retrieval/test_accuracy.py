"""The figures of a test, for all ids and for parts of them, on a ranking with known answers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_array

from pipeline.retrieval.accuracy import Parts, figures
from pipeline.retrieval.defaults import metric_keys

# Item 0 has a third of the interactions, items 1 and 2 the next, the others the rest; user 0 is the most active.
TRAIN = csr_array(np.array([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0], [1, 0, 0, 0, 1, 1]]) > 0)
RELEVANT = csr_array(np.array([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0]]) > 0)
USERS = np.array([0, 2, 3])
TOPK = np.array([[4, 5], [1, 5], [2, -1]], np.int32)


def test_parts_are_thirds_of_the_interactions():
    parts = Parts.of(TRAIN)
    assert parts.items.tolist() == [0, 1, 1, 2, 2, 2]
    assert parts.users.tolist() == [0, 2, 2, 1]


def test_figures_are_means_over_the_users_that_have_something_relevant():
    found = figures(TOPK, USERS, RELEVANT, Parts.of(TRAIN), (2, 1))
    assert set(found) == {*metric_keys((2, 1)), "parts"}
    known = {
        "recall@2": (1 + 1 / 3 + 0) / 3,
        "capped_recall@2": (1 + 1 / 2 + 0) / 3,
        "recall@1": (1 / 2 + 1 / 3 + 0) / 3,
        "capped_recall@1": (1 + 1 + 0) / 3,
        "hit_rate@2": 2 / 3,
        "mrr@2": 2 / 3,
        "coverage@2": 4 / 6,
        "coverage@1": 3 / 6,
        # Users 2 and 3 have a middle item, and users 0 and 2 tail items.
        "recall@2_middle_items": (1 + 0) / 2,
        "ndcg@2_middle_items": (1 + 0) / 2,
        "recall@2_tail_items": (1 + 0) / 2,
        "recall@2_most_active_users": 1.0,
        "recall@2_middle_users": 0.0,
        "recall@2_least_active_users": 1 / 3,
    }
    assert {key: found[key] for key in known} == pytest.approx(known)
    assert found["recall@2_head_items"] is None
    assert found["parts"]["tail_items"] == {"n_ids": 3, "n_test_users": 2}
    assert found["parts"]["most_active_users"] == {"n_ids": 1, "n_test_users": 1}


def test_without_a_test_every_figure_is_missing():
    found = figures(np.empty((0, 2), np.int32), USERS[:0], csr_array(TRAIN.shape), Parts.of(TRAIN), (2,))
    assert all(found[key] is None for key in metric_keys((2,)))


def test_blocks_of_users_change_nothing(monkeypatch):
    whole = figures(TOPK, USERS, RELEVANT, Parts.of(TRAIN), (2,))
    monkeypatch.setattr("pipeline.retrieval.accuracy.BLOCK_USERS", 2)
    assert figures(TOPK, USERS, RELEVANT, Parts.of(TRAIN), (2,)) == whole
