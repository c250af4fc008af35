"""Top-k, recall and NDCG against a naive ranking."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.sparse import csr_array

from graphhash.metrics.ranking import ndcg_at_k, recall_at_k, top_k


def naive_top_k(scores, k, seen):
    ranked = []
    for row, left_out in zip(scores, seen, strict=True):
        items = [i for i in range(len(row)) if not left_out[i] and row[i] > -np.inf]
        items.sort(key=lambda i, row=row: (-row[i], i))
        ranked.append((items + [-1] * k)[:k])
    return np.array(ranked, np.int32).reshape(len(scores), k)


def naive_metrics(ranked, relevant, k):
    recall, ndcg = [], []
    for row, held_out in zip(ranked, relevant, strict=True):
        wanted = set(np.flatnonzero(held_out))
        if not wanted:
            recall.append(math.nan)
            ndcg.append(math.nan)
            continue
        reachable = min(k, len(wanted))
        recall.append(sum(item in wanted for item in row) / reachable)
        gain = sum(1 / math.log2(place + 2) for place, item in enumerate(row) if item in wanted)
        ndcg.append(gain / sum(1 / math.log2(place + 2) for place in range(reachable)))
    return recall, ndcg


@given(seed=st.integers(0, 10_000), n_items=st.integers(1, 30), k=st.integers(1, 25), n_levels=st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_ranking_and_metrics_equal_the_naive_ones(seed, n_items, k, n_levels):
    rng = np.random.default_rng(seed)
    # Few distinct scores, so that ties are everywhere.
    scores = rng.integers(0, n_levels, (6, n_items)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.05] = -np.inf
    seen, relevant = rng.random(scores.shape) < 0.2, rng.random(scores.shape) < 0.2
    before = scores.copy()
    ranked = top_k(scores, k, csr_array(seen))
    assert_array_equal(ranked, naive_top_k(scores, k, seen))
    assert_array_equal(scores, before)
    recall, ndcg = naive_metrics(ranked, relevant, k)
    assert_allclose(recall_at_k(ranked, csr_array(relevant)), recall)
    assert_allclose(ndcg_at_k(ranked, csr_array(relevant)), ndcg)


def test_ties_go_to_the_lower_item():
    assert top_k(np.zeros((1, 5), np.float32), 3).tolist() == [[0, 1, 2]]


def test_a_perfect_ranking_scores_one_and_nothing_held_out_is_nan():
    relevant = csr_array(np.array([[0, 1, 1], [0, 0, 0]]))
    ranked = np.array([[2, 1], [0, 1]], np.int32)
    assert recall_at_k(ranked, relevant)[0] == ndcg_at_k(ranked, relevant)[0] == 1
    assert np.isnan(recall_at_k(ranked, relevant)[1])
    assert np.isnan(ndcg_at_k(ranked, relevant)[1])


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        top_k(np.zeros((1, 2), np.float32), 0)
    with pytest.raises(ValueError, match="hold NaN"):
        top_k(np.full((1, 2), np.nan, np.float32), 1)
    with pytest.raises(ValueError, match=r"seen is \(2, 2\)"):
        top_k(np.zeros((1, 2), np.float32), 1, csr_array((2, 2)))
    with pytest.raises(ValueError, match="topk holds 1 users, relevant 2"):
        recall_at_k(np.zeros((1, 1), np.int32), csr_array((2, 2)))
