"""Top-k, recall and NDCG against a naive ranking."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.sparse import csr_array

from graphhash.metrics.ranking import (
    Hits,
    capped_recall_at_k,
    coverage,
    hit_rate_at_k,
    mrr_at_k,
    ndcg_at_k,
    recall_at_k,
    thirds_of_interactions,
    top_k,
)


def naive_top_k(scores, k, seen):
    ranked = []
    for row, left_out in zip(scores, seen, strict=True):
        items = [i for i in range(len(row)) if not left_out[i] and row[i] > -np.inf]
        items.sort(key=lambda i, row=row: (-row[i], i))
        ranked.append((items + [-1] * k)[:k])
    return np.array(ranked, np.int32).reshape(len(scores), k)


def naive_metrics(ranked, relevant, k):
    """Recall, capped recall, NDCG, hit rate and reciprocal rank, a row a user."""
    rows = []
    for row, held_out in zip(ranked, relevant, strict=True):
        wanted = set(np.flatnonzero(held_out))
        if not wanted:
            rows.append([math.nan] * 5)
            continue
        reachable = min(k, len(wanted))
        ranks = [place + 1 for place, item in enumerate(row) if item in wanted]
        gain, best = (sum(1 / math.log2(rank + 1) for rank in some) for some in (ranks, range(1, reachable + 1)))
        first = 1 / ranks[0] if ranks else 0
        rows.append([len(ranks) / len(wanted), len(ranks) / reachable, gain / best, bool(ranks), first])
    return np.array(rows)


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
    measures = (recall_at_k, capped_recall_at_k, ndcg_at_k, hit_rate_at_k, mrr_at_k)
    ours = [measure(ranked, csr_array(relevant)) for measure in measures]
    assert_allclose(np.transpose(ours), naive_metrics(ranked, relevant, k))
    assert coverage(ranked, n_items) == len(set(ranked.ravel().tolist()) - {-1}) / n_items


def test_fewer_slots_and_fewer_relevant_items_give_the_naive_figures():
    rng = np.random.default_rng(0)
    ranked = np.argsort(rng.random((40, 12)), axis=1)[:, :8].astype(np.int32)
    relevant, is_member = rng.random((40, 12)) < 0.3, rng.random(12) < 0.5
    whole = Hits.of(ranked, csr_array(relevant))
    for hits, wanted in (
        (whole, relevant),
        (whole.among(is_member, ranked, csr_array(relevant)), relevant & is_member),
    ):
        ours = [hits.recall(3), hits.capped_recall(3), hits.ndcg(3), hits.hit_rate(3), hits.mrr(3)]
        assert_allclose(np.transpose(ours), naive_metrics(ranked[:, :3], wanted, 3))


def test_ties_go_to_the_lower_item():
    assert top_k(np.zeros((1, 5), np.float32), 3).tolist() == [[0, 1, 2]]


def test_a_perfect_ranking_scores_one_and_nothing_held_out_is_nan():
    relevant = csr_array(np.array([[0, 1, 1], [0, 0, 0]]))
    ranked = np.array([[2, 1], [0, 1]], np.int32)
    assert recall_at_k(ranked, relevant)[0] == ndcg_at_k(ranked, relevant)[0] == 1
    assert np.isnan(recall_at_k(ranked, relevant)[1])
    assert np.isnan(ndcg_at_k(ranked, relevant)[1])


def test_capped_recall_of_a_perfect_ranking_is_one_and_recall_is_not():
    relevant = csr_array(np.ones((1, 4)))
    ranked = top_k(np.zeros((1, 4), np.float32), 2)
    assert (recall_at_k(ranked, relevant)[0], capped_recall_at_k(ranked, relevant)[0]) == (0.5, 1.0)


def test_every_third_of_the_ids_holds_a_third_of_the_interactions():
    degrees = np.array([1, 4, 0, 2, 2, 1, 1, 1])
    thirds = thirds_of_interactions(degrees)
    assert thirds.tolist() == [2, 0, 2, 1, 1, 2, 2, 2]
    assert [degrees[thirds == third].sum() for third in range(3)] == [4, 4, 4]
    rng = np.random.default_rng(0)
    degrees = rng.zipf(1.5, 10_000).clip(max=1000)
    thirds = thirds_of_interactions(degrees)
    # An id is never split, so a third misses its mark by at most one id.
    for third in range(3):
        assert abs(degrees[thirds == third].sum() - degrees.sum() / 3) <= degrees.max()
    assert degrees[thirds == 0].min() >= degrees[thirds == 1].max() >= degrees[thirds == 2].max()
    assert thirds_of_interactions(np.zeros(3)).tolist() == [2, 2, 2]


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        top_k(np.zeros((1, 2), np.float32), 0)
    with pytest.raises(ValueError, match="hold NaN"):
        top_k(np.full((1, 2), np.nan, np.float32), 1)
    with pytest.raises(ValueError, match=r"seen is \(2, 2\)"):
        top_k(np.zeros((1, 2), np.float32), 1, csr_array((2, 2)))
    with pytest.raises(ValueError, match="topk holds 1 users, relevant 2"):
        recall_at_k(np.zeros((1, 1), np.int32), csr_array((2, 2)))
