"""AUC, log loss and calibration against scikit-learn and against loops over pairs and bins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphhash.errors import DataError
from graphhash.metrics.ctr import CtrTotals, auc, fit_calibration, group_auc, log_loss, probability


def sample(seed: int, n: int, n_scores: int | None = None):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=n) * 2 if n_scores is None else rng.integers(0, n_scores, n) - n_scores / 2
    labels = (rng.random(n) < probability(logits)).astype(np.int64)
    labels[:2] = 0, 1
    return labels, logits


@pytest.mark.parametrize("n_scores", [None, 1, 2, 7], ids=lambda n: f"{n} scores")
def test_auc_equals_scikit_learn(n_scores):
    from sklearn import metrics

    labels, logits = sample(0, 5000, n_scores)
    assert auc(labels, logits) == pytest.approx(metrics.roc_auc_score(labels, logits), abs=1e-12)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=2, max_size=40))
def test_auc_is_the_share_of_pairs_in_order(rows):
    clicks, others = [s for y, s in rows if y], [s for y, s in rows if not y]
    labels, scores = np.array([y for y, _ in rows]), np.array([s for _, s in rows])
    if not clicks or not others:
        with pytest.raises(DataError, match="AUC needs positives and negatives"):
            auc(labels, scores)
        return
    pairs = [(a > b) + (a == b) / 2 for a in clicks for b in others]
    assert auc(labels, scores) == pytest.approx(np.mean(pairs), abs=1e-12)


def test_infinite_scores_tie():
    assert auc(np.array([0, 1, 1, 0]), np.array([np.inf, np.inf, -np.inf, -np.inf])) == 0.5


def test_group_auc_weighs_groups_of_both_classes_by_their_rows():
    from sklearn import metrics

    labels, logits = sample(1, 3000, 9)
    users = np.random.default_rng(2).integers(0, 400, 3000)
    expected, weights = [], []
    for user in np.unique(users):
        of_user = users == user
        if 0 < labels[of_user].sum() < of_user.sum():
            expected.append(metrics.roc_auc_score(labels[of_user], logits[of_user]))
            weights.append(of_user.sum())
    assert 0 < len(expected) < 400
    assert group_auc(labels, logits, users) == pytest.approx(np.average(expected, weights=weights), abs=1e-12)
    names = np.array([f"user {u}" for u in users])
    assert group_auc(labels, logits, names) == pytest.approx(np.average(expected, weights=weights), abs=1e-12)


def test_group_auc_needs_a_group_with_both_classes():
    with pytest.raises(DataError, match="no group has positives and negatives: 2 groups"):
        group_auc(np.array([0, 0, 1]), np.zeros(3), np.array([5, 5, 9]))


def test_log_loss_equals_scikit_learn():
    from sklearn import metrics

    labels, logits = sample(3, 4000)
    assert log_loss(labels, logits) == pytest.approx(metrics.log_loss(labels, probability(logits)), rel=1e-12)


def test_log_loss_is_finite_and_right_at_large_logits():
    assert log_loss(np.array([1, 0, 1]), np.array([-1000.0, 1000, 1000])) == pytest.approx(2000 / 3)


@pytest.mark.parametrize("labels", [[0, 2], [0.5, 1], [-1, 1], [np.nan, 1]])
def test_other_labels_are_refused(labels):
    for measure in (auc, log_loss, CtrTotals().add):
        with pytest.raises(DataError, match=r"labels must be 0 or 1, row 0|labels must be 0 or 1, row 1"):
            measure(np.array(labels), np.zeros(2))


def test_scores_that_are_not_numbers_are_refused():
    with pytest.raises(DataError, match="1 of 2 scores are NaN"):
        auc(np.array([0, 1]), np.array([0.0, np.nan]))


def test_totals_do_not_depend_on_batches():
    labels, logits = sample(4, 1000)
    whole, parts = CtrTotals(), CtrTotals()
    whole.add(labels, logits)
    for start in range(0, 1000, 130):
        parts.add(labels[start : start + 130], logits[start : start + 130])
    assert parts.n_rows == 1000
    assert parts.log_loss == pytest.approx(log_loss(labels, logits), rel=1e-12)
    assert parts.calibration == pytest.approx(probability(logits).mean() / labels.mean(), rel=1e-12)
    np.testing.assert_array_equal(whole.counts, parts.counts)
    assert whole.calibration_error == pytest.approx(parts.calibration_error, rel=1e-12)


def test_calibration_error_is_the_mean_gap_of_the_bins():
    labels, logits = sample(5, 2000)
    totals = CtrTotals(n_bins=10)
    totals.add(labels, logits)
    p = 1 / (1 + np.exp(-logits))
    gaps, curve = 0.0, []
    for low in np.arange(10) / 10:
        of_bin = (p >= low) & (p < low + 0.1)
        if of_bin.any():
            gaps += of_bin.mean() * abs(p[of_bin].mean() - labels[of_bin].mean())
            curve.append((p[of_bin].mean(), labels[of_bin].mean(), of_bin.sum()))
    assert totals.calibration_error == pytest.approx(gaps)
    np.testing.assert_allclose(np.array(totals.curve()).T, curve)


def test_a_certain_prediction_falls_into_the_last_bin():
    totals = CtrTotals()
    totals.add(np.array([1, 0]), np.array([800.0, -800.0]))
    assert totals.counts[0] == totals.counts[-1] == 1
    assert totals.calibration_error == 0


def test_totals_without_rows_or_clicks_say_so():
    totals = CtrTotals()
    with pytest.raises(DataError, match="no row to evaluate"):
        _ = totals.log_loss
    totals.add(np.array([0, 0]), np.array([1.0, 2.0]))
    with pytest.raises(DataError, match="calibration needs a positive, there is none in 2 rows"):
        _ = totals.calibration


@pytest.mark.parametrize(("slope", "offset"), [(0.5, -0.3), (2.0, 1.0), (1.0, 0.4)])
def test_a_calibration_is_the_line_that_the_labels_were_drawn_from(slope, offset):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=200_000) * 3
    labels = (rng.random(len(logits)) < probability(slope * logits + offset)).astype(np.int64)
    assert fit_calibration(labels, logits) == pytest.approx((slope, offset), abs=0.03)


def test_a_calibration_is_the_logistic_regression_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    labels, logits = sample(0, 20_000)
    theirs = LogisticRegression(C=np.inf, tol=1e-10).fit(3 * logits[:, None] - 1, labels)
    ours = fit_calibration(labels, 3 * logits - 1)
    # Platt's targets are 1 / n away from the labels.
    assert ours == pytest.approx((theirs.coef_.item(), theirs.intercept_.item()), abs=2e-3)


@pytest.mark.parametrize("reason", ["calibrated", "worse than chance", "one class", "too few"])
def test_without_a_gain_beyond_chance_nothing_is_calibrated(reason):
    labels, logits = sample(1, 20_000)
    if reason == "worse than chance":
        logits = -logits
    elif reason == "one class":
        labels[:] = 1
    elif reason == "too few":
        labels, logits = labels[:6], 1.3 * logits[:6]
    assert fit_calibration(labels, logits) == (1.0, 0.0)


def test_logits_that_separate_the_labels_keep_a_finite_slope():
    slope, offset = fit_calibration(np.repeat([0, 1], 50), np.repeat([-0.1, 0.1], 50))
    assert 10 < slope < 100
    assert offset == pytest.approx(0, abs=1e-3)


def test_logits_of_a_diverged_training_are_refused():
    with pytest.raises(DataError, match="1 of 2 logits are not finite; training diverged"):
        fit_calibration(np.array([0, 1]), np.array([0.0, np.inf]))
