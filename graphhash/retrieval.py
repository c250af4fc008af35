"""Matrix factorisation over bucket embeddings, and the BPR loss.

The score of an item for a user is the inner product of their vectors, plus the item's own bias where the model has one.
Without the bias, items of one bucket tie (unless the map mixes several buckets).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from graphhash import _embedding_kernels
from graphhash.buckets import BucketMap
from graphhash.embedding import BucketEmbedding, gradient_slices, threads_for

# Directions that training does not use keep their initial noise where weight decay is small. On Gowalla's full table 0.01
# gives a tenth more validation recall than 0.1.
INITIAL_STD = 0.01


class MatrixFactorization(nn.Module):
    """``score(user, item) = <p_user, q_item> + b_item`` (Koren et al., Computer 2009, without user terms).

    Args:
        users: bucket map of the users.
        items: bucket map of the items.
        dim: length of the vectors.
        item_bias: train a scalar per item.
        seed: draws the initial values.
    """

    def __init__(self, users: BucketMap, items: BucketMap, dim: int, *, item_bias: bool, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.user_embedding = BucketEmbedding(users, dim, std=INITIAL_STD, generator=generator)
        self.item_embedding = BucketEmbedding(items, dim, std=INITIAL_STD, generator=generator)
        self.item_bias = nn.Parameter(torch.zeros(items.n_ids)) if item_bias else None

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Scores of user-item pairs: rows of shape (n,) each in, shape (n,) out."""
        scores = (self.user_embedding(users) * self.item_embedding(items)).sum(-1)
        return scores if self.item_bias is None else scores + self.item_bias[items]

    def all_pairs(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Scores as :meth:`forward` gives them, for many pairs of all ids: every id's vector is read from the table once."""
        user_vectors, item_vectors = self.user_embedding.all(), self.item_embedding.all()

        def scores(users: Tensor, items: Tensor) -> Tensor:
            products = dot_pairs(user_vectors, item_vectors, users, items)
            return products if self.item_bias is None else products + self.item_bias[items]

        return scores

    def scores(self, users: Tensor) -> Tensor:
        """Scores of every item for each user: rows (batch,) in, shape (batch, n_items) out."""
        scores = self.user_embedding(users) @ self.item_embedding.all().T
        return scores if self.item_bias is None else scores + self.item_bias


def dot_pairs(left: Tensor, right: Tensor, left_rows: Tensor, right_rows: Tensor) -> Tensor:
    """``<left[left_rows[e]], right[right_rows[e]]>`` for every pair e.

    Args:
        left, right: float32, shapes (n_left, dim) and (n_right, dim).
        left_rows, right_rows: int64, shape (n_pairs,).

    Returns: shape (n_pairs,).
    """
    if left.device.type == "cpu" and left.dtype == right.dtype == torch.float32:
        return _CpuDotPairs.apply(left, right, left_rows, right_rows)
    return (left.index_select(0, left_rows) * right.index_select(0, right_rows)).sum(-1)


class _CpuDotPairs(torch.autograd.Function):
    """:func:`dot_pairs` on a CPU, without the (n_pairs, dim) intermediate arrays that make torch's gathers slow there."""

    @staticmethod
    def forward(ctx, left, right, left_rows, right_rows):
        ctx.save_for_backward(left, right, left_rows, right_rows)
        products = torch.empty(len(left_rows))
        with threads_for(len(left_rows) * left.shape[1]):
            _embedding_kernels.dot_pairs(
                left.detach().numpy(), right.detach().numpy(), left_rows.numpy(), right_rows.numpy(), products.numpy()
            )
        return products

    @staticmethod
    def backward(ctx, gradients):
        left, right, left_rows, right_rows = ctx.saved_tensors
        left_gradient, right_gradient = torch.zeros_like(left), torch.zeros_like(right)
        with threads_for(len(left_rows) * left.shape[1]):
            _embedding_kernels.add_dot_gradients(
                left.numpy(), right.numpy(), left_rows.numpy(), right_rows.numpy(), gradients.contiguous().numpy(),
                gradient_slices(left.shape[1]), left_gradient.numpy(), right_gradient.numpy(),
            )  # fmt: skip
        return left_gradient, right_gradient, None, None


def bpr_loss(positive: Tensor, negative: Tensor) -> Tensor:
    """Bayesian personalised ranking: ``mean(-log sigmoid(positive - negative))`` (Rendle et al., UAI 2009, eq. 5)."""
    return -functional.logsigmoid(positive - negative).mean()
