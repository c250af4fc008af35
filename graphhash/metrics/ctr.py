"""How good predicted click probabilities are: AUC, log loss and calibration, in numpy.

Log loss and calibration are sums, and :class:`CtrTotals` adds them up batch by batch. AUC needs all scores, and sorts them once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from graphhash.errors import ArgumentError, DataError

N_BINS = 20


def auc(labels: NDArray, scores: NDArray) -> float:
    """Area under the ROC curve: the share of pairs of a click and no click that are in order, a tie being half of one.

    Exact, by one sort (Mann and Whitney, 1947).

    Args:
        labels: 0 or 1, shape (n,).
        scores: any increasing function of the probability, shape (n,).

    Raises:
        DataError: a label is neither 0 nor 1, a class is missing, or a score is NaN.
    """
    clicked = check_labels(labels)
    n_clicked = int(clicked.sum())
    if n_clicked in (0, len(clicked)):
        raise DataError(
            f"AUC needs clicks and rows without one, all {len(clicked)} labels are {int(n_clicked > 0)}; take a larger or another split"
        )
    in_order, pairs = _ordered_pairs(clicked, scores, np.zeros(len(clicked), np.int64))
    return float(in_order[0] / pairs[0])


def group_auc(labels: NDArray, scores: NDArray, groups: NDArray) -> float:
    """Mean of the groups' AUC, each weighing as many as its rows (Zhu et al., KDD 2017, eq. 7); groups of one class are left out.

    Args:
        labels, scores: as for :func:`auc`.
        groups: any values that sort, users say, shape (n,).

    Raises:
        DataError: as :func:`auc`; no group has both classes.
    """
    clicked = check_labels(labels)
    _, numbers = np.unique(groups, return_inverse=True)
    in_order, pairs = _ordered_pairs(clicked, scores, numbers.ravel())
    both = pairs > 0
    if not both.any():
        raise DataError(
            f"no group has clicks and rows without one: {len(pairs)} groups of {len(clicked)} rows; take a larger split"
        )
    return float(np.average(in_order[both] / pairs[both], weights=np.bincount(numbers.ravel())[both]))


def _ordered_pairs(clicked: NDArray[np.bool_], scores: NDArray, groups: NDArray[np.int64]) -> tuple[NDArray, NDArray]:
    """Per group, pairs in order and all pairs, float64; groups are numbered from 0 without a gap."""
    scores = np.asarray(scores)
    if scores.shape != clicked.shape:
        raise ArgumentError(f"{clicked.shape} labels and {scores.shape} scores")
    if np.isnan(scores).any():
        raise DataError(
            f"{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN; training diverged, lower the learning rate"
        )
    order = np.lexsort((scores, groups))
    scores, groups, clicked = scores[order], groups[order], clicked[order]
    new_group = np.diff(groups, prepend=-1) > 0
    # Rows of one group and score are a tie; its clicks beat all rows without one before it, and half of its own.
    new_tie = new_group.copy()
    new_tie[1:] |= scores[1:] != scores[:-1]
    tie = np.cumsum(new_tie) - 1
    clicks = np.bincount(tie, clicked)
    others = np.bincount(tie, ~clicked)
    before = np.cumsum(others) - others
    group_of_tie = groups[new_tie]
    before -= before[tie[new_group]][group_of_tie]
    in_order = np.bincount(group_of_tie, clicks * (before + others / 2))
    return in_order, np.bincount(group_of_tie, clicks) * np.bincount(group_of_tie, others)


def losses(labels: NDArray, logits: NDArray) -> NDArray[np.float64]:
    """Log loss of every row, ``log(1 + exp(-z))`` for a click and ``log(1 + exp(z))`` without, in nats; no overflow at any logit.

    Raises:
        DataError: a label is neither 0 nor 1.
    """
    return np.logaddexp(0, np.where(check_labels(labels), -1.0, 1.0) * np.asarray(logits, np.float64))


def log_loss(labels: NDArray, logits: NDArray) -> float:
    """Mean of :func:`losses`."""
    return float(losses(labels, logits).mean())


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
        """Mean prediction over mean label; DataError without a click."""
        clicks = float(self.clicked.sum())
        if not clicks:
            raise DataError(f"calibration needs a click, there is none in {self._rows()} rows; take a larger split")
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
    """Whether each label is a click; DataError for a label that is neither 0 nor 1."""
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise ArgumentError(f"labels must be 1-D, got shape {labels.shape}")
    wrong = ~np.isin(labels, (0, 1))
    if wrong.any():
        raise DataError(
            f"labels must be 0 or 1, row {int(np.argmax(wrong))} has {labels[wrong][0]}; make them binary first"
        )
    return labels.astype(bool)
