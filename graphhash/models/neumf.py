"""NeuMF over bucket embeddings: a product and a small network, side by side (He et al., WWW 2017, section 3.4).

One vector per id serves both halves, so that a table of ``dim`` numbers a row has the bytes of any other model's: the first half is
for generalised matrix factorisation, the second for the network. The paper keeps two tables instead.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from graphhash.errors import ArgumentError
from graphhash.maps.bucket_map import BucketMap
from graphhash.models.mf import INITIAL_STD, AllItemScores, PairScores, RetrievalModel, embeddings

# Pairs whose hidden units are held at once while all items are scored: 128 MiB at 32 units.
PAIRS_AT_ONCE = 2**20


def layer_numbers(dim: int) -> int:
    """Numbers that the network's layers hold, beside tables and biases."""
    half = dim // 2
    return half * half + (half + 1) * half + (half + 1) * (half // 2) + half + half // 2


class NeuMF(RetrievalModel):
    """``score = h^T [p_u * q_i ; network(p'_u, q'_i)] + b_i`` (eq. 12, as a logit).

    The network has two hidden layers, of ``dim / 2`` and ``dim / 4`` units.

    Args:
        users, items: bucket maps.
        dim: numbers of a table row, both halves together; a multiple of 4.
        item_bias: train a scalar per item.
        seed: draws the initial values.
        std: standard deviation of the tables' initial values.

    Raises:
        ArgumentError: ``dim`` is no multiple of 4.
    """

    def __init__(
        self, users: BucketMap, items: BucketMap, dim: int, *, item_bias: bool, seed: int, std: float = INITIAL_STD
    ):
        super().__init__()
        if dim % 4:
            raise ArgumentError(f"NeuMF needs a dim that is a multiple of 4, got {dim}")
        self.user_embedding, self.item_embedding = embeddings(users, items, dim, seed, std)
        self.item_bias = nn.Parameter(torch.zeros(items.n_ids)) if item_bias else None
        self.half_dim = dim // 2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # The first layer is a sum of a term of the user and one of the item, which all users' scores share.
            self.of_user = nn.Linear(self.half_dim, self.half_dim, bias=False)
            self.of_item = nn.Linear(self.half_dim, self.half_dim)
            self.hidden = nn.Linear(self.half_dim, self.half_dim // 2)
            self.out = nn.Linear(self.half_dim + self.half_dim // 2, 1, bias=False)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Scores of user-item pairs: rows of shape (n,) each in, shape (n,) out."""
        return self._score(self.user_embedding(users), self.item_embedding(items), items)

    def score_differences(
        self, users: Tensor, positives: Tensor, negatives: Tensor, *, read_all: bool = False
    ) -> Tensor:
        """Pairwise score differences as in :class:`RetrievalModel`, shape (n,)."""
        score = self.all_pairs() if read_all else self
        return score(users, positives) - score(users, negatives)

    def all_pairs(self) -> PairScores:
        """Scores of many pairs, every id's vector read from the table once."""
        user_vectors, item_vectors = self.user_embedding.all(), self.item_embedding.all()
        return lambda users, items: self._score(user_vectors[users], item_vectors[items], items)

    def score_all_items(self) -> AllItemScores:
        """Scores of every item for each user: rows (batch,) in, shape (batch, n_items) out."""
        products, network = self.item_embedding.all().split(self.half_dim, dim=1)
        item_part = self.of_item(network)
        of_product, of_network = self.out.weight.squeeze(0).split([self.half_dim, self.half_dim // 2])

        def scores(users: Tensor) -> Tensor:
            user_products, user_network = self.user_embedding(users).split(self.half_dim, dim=1)
            result = (user_products * of_product) @ products.T
            if self.item_bias is not None:
                result = result + self.item_bias
            user_part = self.of_user(user_network)
            step = max(1, PAIRS_AT_ONCE // len(item_part))
            deep = [
                functional.relu(self.hidden(functional.relu(part[:, None] + item_part))) @ of_network
                for part in user_part.split(step)
            ]
            return result + torch.cat(deep) if deep else result

        return scores

    def _score(self, users: Tensor, items: Tensor, rows: Tensor) -> Tensor:
        products = users[:, : self.half_dim] * items[:, : self.half_dim]
        network = functional.relu(self.of_user(users[:, self.half_dim :]) + self.of_item(items[:, self.half_dim :]))
        network = functional.relu(self.hidden(network))
        scores = self.out(torch.cat([products, network], dim=1)).squeeze(1)
        return scores if self.item_bias is None else scores + self.item_bias[rows]
