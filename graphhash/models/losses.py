"""Losses of retrieval models: BPR on scores, softmax, BSL and CCL on scores and sums over negatives, DirectAU on vectors, implicit ALS on
vectors and interactions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from graphhash.errors import ArgumentError
from graphhash.nn.workers import Workers


def bpr_loss(positive: Tensor, negative: Tensor) -> Tensor:
    """Bayesian personalised ranking: ``mean(-log sigmoid(positive - negative))`` (Rendle et al., UAI 2009, eq. 5).

    Args:
        positive: scores of interactions, shape (n,).
        negative: scores of the same users' sampled negatives, shape (n,).

    Returns: scalar.
    """
    return pairwise_logistic_loss(positive - negative)


def pairwise_logistic_loss(differences: Tensor) -> Tensor:
    """:func:`bpr_loss` of pairwise score differences, positive less negative, shape (n,)."""
    return -functional.logsigmoid(differences).mean()


def softmax_loss(positives: Tensor, log_sums: Tensor) -> Tensor:
    """Sampled softmax: ``mean(-log(exp(p) / (exp(p) + sum_j exp(n_j))))`` (Wu et al., TOIS 2024).

    Args:
        positives: logits p of interactions, their scores over the temperature, shape (n,).
        log_sums: ``log sum_j exp(n_j)`` over the logits of each interaction's negatives, shape (n,);
            :func:`graphhash.models.shared_negatives.log_sum_exp`.

    Returns: scalar.
    """
    return functional.softplus(log_sums - positives).mean()


def bsl_loss(positives: Tensor, log_means: Tensor, *, negative_weight: float) -> Tensor:
    """BSL with one positive at a time: ``mean(-p + negative_weight * log mean_j exp(n_j))`` (Wu et al., ICDE 2024).

    The weight is the ratio of the temperatures of positives and negatives. The interaction itself is not in the sum, as it is in
    :func:`softmax_loss`.

    Args:
        positives: as for :func:`softmax_loss`.
        log_means: ``log mean_j exp(n_j)``, shape (n,); -inf where an interaction has no negative, whose term is then 0.

    Returns: scalar.
    """
    log_means = torch.where(log_means > -torch.inf, log_means, 0.0)
    return (negative_weight * log_means - positives).mean()


def ccl_loss(positives: Tensor, excess: Tensor, *, negative_weight: float) -> Tensor:
    """Cosine contrastive loss: ``mean(1 - p + negative_weight * mean_j max(0, n_j - margin))`` (SimpleX, Mao et al., CIKM 2021).

    Args:
        positives: cosines p of interactions, shape (n,).
        excess: ``mean_j max(0, n_j - margin)`` over the cosines of each interaction's negatives, shape (n,);
            :func:`graphhash.models.shared_negatives.mean_excess`.

    Returns: scalar.
    """
    return ((1 - positives).relu() + negative_weight * excess).mean()


def directau_loss(
    user_vectors: Tensor, item_vectors: Tensor, *, gamma: float = 1.0, workers: Workers = Workers()
) -> Tensor:
    """DirectAU (Wang et al., KDD 2022, eqs. 1 to 3): alignment of pairs plus ``gamma`` times the mean uniformity of both sides.

    Args:
        user_vectors, item_vectors: the two ends of a batch of interactions, shape (n, dim); scaled to unit length here.
        gamma: weight of the uniformity.
        workers: those that have the other parts of the batch. Uniformity is over all of it, so the loss is that of one worker with
            the whole batch once parts weigh as ``pipeline.training.loop`` weighs them.

    Raises:
        ArgumentError: shapes differ, or the batch holds fewer than two interactions.
    """
    if user_vectors.shape != item_vectors.shape or workers.total(len(user_vectors)) < 2:
        raise ArgumentError(
            f"DirectAU needs two or more pairs of vectors of one shape, got {tuple(user_vectors.shape)} and {tuple(item_vectors.shape)}"
        )
    users, items = functional.normalize(user_vectors, dim=-1), functional.normalize(item_vectors, dim=-1)
    alignment = (users - items).square().sum(-1).mean()
    return alignment + gamma * (uniformity(users, workers) + uniformity(items, workers)) / 2


def uniformity(vectors: Tensor, workers: Workers = Workers()) -> Tensor:
    """``log mean exp(-2 |a - b|^2)`` over pairs of different rows (Wang and Isola, ICML 2020).

    Args:
        vectors: rows of unit length, shape (n, dim). With ``|a - b|^2 = 2 - 2<a, b>`` the largest intermediate is (n, n of all workers).
        workers: each has some of the rows, two or more in all; the value is that of all rows. The gradient is by the own rows, and
            grown by n of all over n, which a mean over the parts of a batch undoes.
    """
    everyone, first = (vectors, 0) if workers.size == 1 else workers.gather_rows(vectors)
    n, n_own = len(everyone), len(vectors)
    distances = (2 - 2 * vectors @ everyone.T).clamp_min(0)
    # Every pair stands twice off the diagonal, each row once on it.
    diagonal = torch.zeros(n_own, n, dtype=torch.bool, device=vectors.device)
    diagonal[:, first : first + n_own].fill_diagonal_(True)
    own = torch.logsumexp((-2 * distances).masked_fill(diagonal, -torch.inf).flatten(), 0)
    n_pairs = torch.log(torch.tensor(float(n * (n - 1)), dtype=vectors.dtype, device=vectors.device))
    if workers.size == 1:
        return own - n_pairs
    # The kernel is above exp(-8), so the sum needs no logarithms. A pair stands in the sums of both its ends, and the other end's
    # worker knows nothing of this one's gradient: hence twice.
    total = workers.sum(own.detach().exp())
    gradient = 2 * (n / n_own) * own.exp() / total
    return torch.log(total) - n_pairs + (gradient - gradient.detach())


def ials_loss(
    user_vectors: Tensor,
    item_vectors: Tensor,
    positives: Tensor,
    *,
    unobserved_weight: float,
    item_bias: Tensor | None = None,
    workers: Workers = Workers(),
) -> Tensor:
    """Implicit ALS (Hu et al., ICDM 2008): squared error to 1 on interactions plus weighted squared scores of *all* pairs.

    The sum over all pairs comes from the Gram matrices of both sides, so nothing of the size users x items is made.

    Args:
        user_vectors, item_vectors: of every id, shapes (n_users, dim) and (n_items, dim).
        positives: scores of the interactions, the bias in them, shape (n,).
        unobserved_weight: weight of a pair's squared score; an interaction weighs 1 on top of it.
        item_bias: added to the scores, shape (n_items,).
        workers: those that have the other interactions of the batch; all of them together count the sum over all pairs once.

    Returns: the total, divided by the number of interactions.

    Raises:
        ArgumentError: a negative weight, or no interactions.
    """
    if unobserved_weight < 0 or len(positives) == 0:
        raise ArgumentError(
            f"unobserved_weight={unobserved_weight} must be at least 0, and interactions above 0 ({len(positives)})"
        )
    if item_bias is not None:
        # A bias is one more coordinate, against which every user's is 1.
        item_vectors = torch.cat([item_vectors, item_bias[:, None]], 1)
        user_vectors = torch.cat([user_vectors, torch.ones_like(user_vectors[:, :1])], 1)
    all_pairs = ((user_vectors.T @ user_vectors) * (item_vectors.T @ item_vectors)).sum()
    own_part = len(positives) / workers.total(len(positives))
    return ((1 - positives).square().sum() + unobserved_weight * own_part * all_pairs) / len(positives)
