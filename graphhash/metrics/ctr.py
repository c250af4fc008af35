"""Metrics of predicted click-through rates: AUC, log loss and calibration, in numpy; and the calibration itself.

Log loss and calibration are sums, and :class:`CtrTotals` adds them up batch by batch. AUC needs all scores, and sorts them once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from graphhash.errors import ArgumentError, DataError

N_BINS = 20


def auc(labels: NDArray, scores: NDArray) -> float:
    """Area under the ROC curve: the share of pairs of a positive and a negative that are ranked correctly, where a tie counts half.

    Exact, by one sort (Mann and Whitney, 1947).

    Args:
        labels: 0 or 1, shape (n,).
        scores: any increasing function of the probability, shape (n,).

    Raises:
        DataError: a label is neither 0 nor 1, a class is missing, or a score is NaN.
    """
    positive = check_labels(labels)
    n_positive = int(positive.sum())
    if n_positive in (0, len(positive)):
        raise DataError(
            f"AUC needs positives and negatives, all {len(positive)} labels are {int(n_positive > 0)}; take a larger or another split"
        )
    in_order, pairs = _ordered_pairs(positive, scores, np.zeros(len(positive), np.int64))
    return float(in_order[0] / pairs[0])


def group_auc(labels: NDArray, scores: NDArray, groups: NDArray) -> float:
    """Mean of the groups' AUC, each weighing as many as its rows (Zhu et al., KDD 2017, eq. 7); groups of one class are left out.

    Args:
        labels, scores: as for :func:`auc`.
        groups: group of each sample, such as its user, any sortable values, shape (n,).

    Raises:
        DataError: as :func:`auc`; no group has both classes.
    """
    positive = check_labels(labels)
    _, numbers = np.unique(groups, return_inverse=True)
    in_order, pairs = _ordered_pairs(positive, scores, numbers.ravel())
    both = pairs > 0
    if not both.any():
        raise DataError(
            f"no group has positives and negatives: {len(pairs)} groups of {len(positive)} rows; take a larger split"
        )
    return float(np.average(in_order[both] / pairs[both], weights=np.bincount(numbers.ravel())[both]))


def _ordered_pairs(positive: NDArray[np.bool_], scores: NDArray, groups: NDArray[np.int64]) -> tuple[NDArray, NDArray]:
    """Per group, pairs in order and all pairs, float64; groups are numbered from 0 without a gap."""
    scores = np.asarray(scores)
    if scores.shape != positive.shape:
        raise ArgumentError(f"{positive.shape} labels and {scores.shape} scores")
    if np.isnan(scores).any():
        raise DataError(
            f"{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN; training diverged, lower the learning rate"
        )
    order = np.lexsort((scores, groups))
    scores, groups, positive = scores[order], groups[order], positive[order]
    new_group = np.diff(groups, prepend=-1) > 0
    # Samples of one group and score are a tie; its positives beat all negatives before it, and half of its own.
    new_tie = new_group.copy()
    new_tie[1:] |= scores[1:] != scores[:-1]
    tie = np.cumsum(new_tie) - 1
    n_positive = np.bincount(tie, positive)
    n_negative = np.bincount(tie, ~positive)
    before = np.cumsum(n_negative) - n_negative
    group_of_tie = groups[new_tie]
    before -= before[tie[new_group]][group_of_tie]
    in_order = np.bincount(group_of_tie, n_positive * (before + n_negative / 2))
    return in_order, np.bincount(group_of_tie, n_positive) * np.bincount(group_of_tie, n_negative)


def losses(labels: NDArray, logits: NDArray) -> NDArray[np.float64]:
    """Log loss of every sample in nats, ``log(1 + exp(-z))`` for a positive and ``log(1 + exp(z))`` for a negative; no logit overflows.

    Raises:
        DataError: a label is neither 0 nor 1.
    """
    return np.logaddexp(0, np.where(check_labels(labels), -1.0, 1.0) * np.asarray(logits, np.float64))


def log_loss(labels: NDArray, logits: NDArray) -> float:
    """Mean of :func:`losses`."""
    return float(losses(labels, logits).mean())


def fit_calibration(labels: NDArray, logits: NDArray) -> tuple[float, float]:
    """Slope and offset of the logits whose probabilities fit the labels best (Platt, 1999).

    A model that fits its training rows too closely is too sure of other rows: its logits are too far from 0. A positive slope changes
    no ranking, so AUC stays as it is. The log loss is minimised with Platt's targets, (n_positive + 1) / (n_positive + 2) and
    1 / (n_negative + 2), which keep the slope finite where logits separate the labels.

    Args:
        labels: 0 or 1, shape (n,), of rows that the model was not trained on.
        logits: shape (n,).

    Returns: slope and offset; (1.0, 0.0), which change nothing, where the slope would not be positive, a class is missing, or the log
        losses of all rows together fall by 2 nats at most, which two free numbers do by chance (Akaike, 1974).

    Raises:
        DataError: a label is neither 0 nor 1, or training diverged: a logit is not finite.
    """
    positive, logits = check_labels(labels), np.asarray(logits, np.float64)
    if not np.isfinite(logits).all():
        raise DataError(
            f"{int((~np.isfinite(logits)).sum())} of {len(logits)} logits are not finite; training diverged, lower the learning rate"
        )
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if not n_positive or not n_negative:
        return 1.0, 0.0
    targets = np.where(positive, (n_positive + 1) / (n_positive + 2), 1 / (n_negative + 2))

    def loss(line: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        z = line[0] * logits + line[1]
        errors = probability(z) - targets
        return float((np.logaddexp(0, z) - targets * z).mean()), np.array([(errors * logits).mean(), errors.mean()])

    slope, offset = map(float, minimize(loss, np.array([1.0, 0.0]), jac=True, method="BFGS").x)
    gain = losses(labels, logits).sum() - losses(labels, slope * logits + offset).sum()
    return (slope, offset) if slope > 0 and gain > 2 else (1.0, 0.0)


@dataclass
class CtrTotals:
    """Sums over all batches so far, for log loss and calibration.

    Args:
        n_bins: bins of equal width that predicted probabilities fall into.
    """

    n_bins: int = N_BINS
    loss: float = 0.0
    counts: NDArray[np.int64] = field(init=False)
    predicted: NDArray[np.float64] = field(init=False)
    clicked: NDArray[np.float64] = field(init=False)

    def __post_init__(self):
        self.counts = np.zeros(self.n_bins, np.int64)
        self.predicted, self.clicked = np.zeros(self.n_bins), np.zeros(self.n_bins)

    def add(self, labels: NDArray, logits: NDArray) -> None:
        """Add a batch: labels 0 or 1 and logits, shape (n,) each; DataError for another label."""
        self.loss += float(losses(labels, logits).sum())
        probabilities = probability(logits)
        bins = np.minimum((probabilities * self.n_bins).astype(np.int64), self.n_bins - 1)
        self.counts += np.bincount(bins, minlength=self.n_bins)
        self.predicted += np.bincount(bins, probabilities, self.n_bins)
        self.clicked += np.bincount(bins, np.asarray(labels, np.float64), self.n_bins)

    @property
    def n_rows(self) -> int:
        return int(self.counts.sum())

    @property
    def log_loss(self) -> float:
        """Mean log loss, in nats."""
        return self.loss / self._rows()

    @property
    def calibration(self) -> float:
        """Mean prediction over mean label; DataError without a positive."""
        clicks = float(self.clicked.sum())
        if not clicks:
            raise DataError(f"calibration needs a positive, there is none in {self._rows()} rows; take a larger split")
        return float(self.predicted.sum()) / clicks

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: mean over rows of ``|mean prediction - mean label|`` of the row's bin (Naeini et al., AAAI 2015)."""
        return float(np.abs(self.predicted - self.clicked).sum()) / self._rows()

    def curve(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        """Mean prediction, mean label and rows of every bin that has any, by rising prediction."""
        filled = self.counts > 0
        counts = self.counts[filled]
        return self.predicted[filled] / counts, self.clicked[filled] / counts, counts

    def _rows(self) -> int:
        if not self.n_rows:
            raise DataError("there is no row to evaluate; take a larger split")
        return self.n_rows


def probability(logits: NDArray) -> NDArray[np.float64]:
    """``1 / (1 + exp(-z))`` without overflow, float64."""
    return np.exp(-np.logaddexp(0, -np.asarray(logits, np.float64)))


def check_labels(labels: NDArray) -> NDArray[np.bool_]:
    """Whether each label is positive, bool, shape (n,); DataError for a label that is neither 0 nor 1."""
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise ArgumentError(f"labels must be 1-D, got shape {labels.shape}")
    wrong = ~np.isin(labels, (0, 1))
    if wrong.any():
        raise DataError(
            f"labels must be 0 or 1, row {int(np.argmax(wrong))} has {labels[wrong][0]}; make them binary first"
        )
    return labels.astype(bool)
