"""Matrix factorisation over bucket embeddings, and the BPR loss.

The score of an item for a user is the inner product of their vectors, plus the item's own bias where the model has one.
Without the bias, items of one bucket tie (unless the map mixes several buckets).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from graphhash.buckets import BucketMap
from graphhash.embedding import BucketEmbedding


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
        self.user_embedding = BucketEmbedding(users, dim, generator=generator)
        self.item_embedding = BucketEmbedding(items, dim, generator=generator)
        self.item_bias = nn.Parameter(torch.zeros(items.n_ids)) if item_bias else None

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Scores of user-item pairs: rows of shape (n,) each in, shape (n,) out."""
        scores = (self.user_embedding(users) * self.item_embedding(items)).sum(-1)
        return scores if self.item_bias is None else scores + self.item_bias[items]

    def scores(self, users: Tensor) -> Tensor:
        """Scores of every item for each user: rows (batch,) in, shape (batch, n_items) out."""
        scores = self.user_embedding(users) @ self.item_embedding.all().T
        return scores if self.item_bias is None else scores + self.item_bias

    def n_bytes(self, maps_bytes: int) -> int:
        """Bytes of tables and bias in float32 and of the stored maps."""
        return 4 * sum(parameter.numel() for parameter in self.parameters()) + maps_bytes


def bpr_loss(positive: Tensor, negative: Tensor) -> Tensor:
    """Bayesian personalised ranking: ``mean(-log sigmoid(positive - negative))`` (Rendle et al., UAI 2009, eq. 5)."""
    return -functional.logsigmoid(positive - negative).mean()
