"""How long a training lasts on a log of a given size, how often it is validated, and how strong its weight decay is.

All follow from sizes and never from a clock, so that a training that was resumed, or that another machine does, is the same.
"""

from __future__ import annotations

import math

from pipeline.config.choices import SHARED_LOSSES
from pipeline.config.run_config import TrainConfig
from pipeline.retrieval.budget import GraphSize

# Interactions from which on full-batch BPR has the epochs and the decay of its preset, which were chosen on Gowalla and MovieLens-1M.
# Validation capped recall@20 of full tables by decay, 1, 4 and 10 or 15 times the preset's: MovieLens-100K .326, .340, .310; the log of
# `graphhash demo` .467, .494, .506; of `graph` .331, .340, .314 and .348, .337, .315.
LARGE, FEWEST_EPOCHS, MOST_DECAY = 800_000, 100, 4.0
# Evaluations take this share of the time of the epochs, unless that is fewer of them than the preset's.
EVALUATION_SHARE = 0.1
# What an interaction of a step costs, in scores of an evaluation. Matrix factorization, 64 dimensions, a thread: 0.35 microseconds against
# 10 nanoseconds with their ranking. A negative that a batch shares, and an interaction beside others in DirectAU, is a product of vectors,
# forward and backward. NeuMF scores by a network.
PAIRWISE, PRODUCT, NETWORK = 36, 3, 30


def fits_the_log(train: TrainConfig) -> bool:
    """Whether epochs and decay depend on the size of the log: those of matrix factorization with BPR, where an epoch is a step."""
    return train.model == "mf" and train.loss == "bpr"


def fitted_epochs(epochs: int, n_interactions: int) -> int:
    """Epochs of a full-batch training: fewer on a small log, which is learnt, and then over-learnt, in fewer steps."""
    return min(epochs, max(FEWEST_EPOCHS, round(epochs * (n_interactions / LARGE) ** (1 / 3))))


def fitted_decay(l2_total: float, n_interactions: int) -> float:
    """Weight decay of a full-batch training: more on a small log, whose rows are each read by fewer interactions."""
    return l2_total * min(MOST_DECAY, max(1.0, (LARGE / max(n_interactions, 1)) ** 0.5))


def interaction_cost(train: TrainConfig, negatives: int, batch_size: int | None, n_steps: int) -> float:
    """What an interaction of an epoch costs, in scores of an evaluation.

    Args:
        negatives: that a batch shares.
        batch_size: None: all interactions.
        n_steps: of an epoch.
    """
    cost = float(PAIRWISE)
    if train.loss in SHARED_LOSSES:
        cost += PRODUCT * negatives
    if train.loss == "directau":
        cost += PRODUCT * (batch_size or 0)
    if train.model == "neumf":
        cost += 6 * NETWORK
    if train.model == "lightgcn":
        # Every step propagates over all edges, forward and backward, of both sides.
        cost += PAIRWISE * train.n_layers * n_steps
    return cost


def evaluation_interval(train: TrainConfig, size: GraphSize, cost: float, epochs: int, evaluations: int) -> int:
    """Epochs between two evaluations: EVALUATION_SHARE of the time of the epochs, and at least ``evaluations`` in all.

    Args:
        size: of the train graph.
        cost: of an interaction (:func:`interaction_cost`).
    """
    n_users = min(size.n_users, train.eval_users or size.n_users)
    of_one = n_users * size.n_items * (NETWORK if train.model == "neumf" else 1)
    affordable = math.ceil(of_one / (EVALUATION_SHARE * cost * max(size.n_edges, 1)))
    return max(1, min(affordable, epochs // evaluations))
