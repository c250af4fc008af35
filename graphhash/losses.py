"""Losses of retrieval models beyond BPR: DirectAU on vectors, implicit ALS on vectors and interactions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def directau_loss(user_vectors: Tensor, item_vectors: Tensor, *, gamma: float = 1.0) -> Tensor:
    """DirectAU (Wang et al., KDD 2022, eqs. 1 to 3): alignment of pairs plus ``gamma`` times the mean uniformity of both sides.

    Args:
        user_vectors, item_vectors: the two ends of a batch of interactions, shape (n, dim); scaled to unit length here.
        gamma: weight of the uniformity.

    Raises:
        ValueError: shapes differ, or the batch holds fewer than two interactions.
    """
    if user_vectors.shape != item_vectors.shape or len(user_vectors) < 2:
        raise ValueError(
            f"DirectAU needs two or more pairs of vectors of one shape, got {tuple(user_vectors.shape)} and {tuple(item_vectors.shape)}"
        )
    users, items = functional.normalize(user_vectors, dim=-1), functional.normalize(item_vectors, dim=-1)
    alignment = (users - items).square().sum(-1).mean()
    return alignment + gamma * (uniformity(users) + uniformity(items)) / 2


def uniformity(vectors: Tensor) -> Tensor:
    """``log mean exp(-2 |a - b|^2)`` over pairs of different rows (Wang and Isola, ICML 2020).

    Args:
        vectors: rows of unit length, shape (n, dim), n >= 2. With ``|a - b|^2 = 2 - 2<a, b>`` the largest intermediate is (n, n).
    """
    n = len(vectors)
    distances = (2 - 2 * vectors @ vectors.T).clamp_min(0)
    # Every pair stands twice off the diagonal, each row once on it.
    diagonal = torch.eye(n, dtype=torch.bool, device=vectors.device)
    return torch.logsumexp((-2 * distances).masked_fill(diagonal, -torch.inf).flatten(), 0) - torch.log(
        torch.tensor(float(n * (n - 1)), dtype=vectors.dtype, device=vectors.device)
    )


def ials_loss(
    user_vectors: Tensor,
    item_vectors: Tensor,
    positives: Tensor,
    *,
    unobserved_weight: float,
    item_bias: Tensor | None = None,
) -> Tensor:
    """Implicit ALS (Hu et al., ICDM 2008): squared error to 1 on interactions plus weighted squared scores of *all* pairs.

    The sum over all pairs comes from the Gram matrices of both sides, so nothing of the size users x items is made.

    Args:
        user_vectors, item_vectors: of every id, shapes (n_users, dim) and (n_items, dim).
        positives: scores of the interactions, the bias in them, shape (n,).
        unobserved_weight: weight of a pair's squared score; an interaction weighs 1 on top of it.
        item_bias: added to the scores, shape (n_items,).

    Returns: the total, divided by the number of interactions.

    Raises:
        ValueError: a negative weight, or no interactions.
    """
    if unobserved_weight < 0 or len(positives) == 0:
        raise ValueError(
            f"unobserved_weight={unobserved_weight} must be at least 0, and interactions above 0 ({len(positives)})"
        )
    if item_bias is not None:
        # A bias is one more coordinate, against which every user's is 1.
        item_vectors = torch.cat([item_vectors, item_bias[:, None]], 1)
        user_vectors = torch.cat([user_vectors, torch.ones_like(user_vectors[:, :1])], 1)
    all_pairs = ((user_vectors.T @ user_vectors) * (item_vectors.T @ item_vectors)).sum()
    return ((1 - positives).square().sum() + unobserved_weight * all_pairs) / len(positives)
