"""`graphhash.BucketEmbedding` in a PyTorch model of your own: in place of `torch.nn.Embedding`, in an ordinary training loop.

    python examples/pytorch_layer.py

A two-tower model learns from a synthetic log with planted communities. It reads two small tables instead of two full ones.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import graphhash

N_USERS, N_ITEMS, N_COMMUNITIES, N_INTERACTIONS = 2000, 1000, 20, 40_000
DIM, N_STEPS, BATCH_SIZE = 32, 200, 1024


def synthetic_log(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Users and items of the interactions, four of five inside the user's community: int64, shape (N_INTERACTIONS,) each."""
    users = rng.integers(0, N_USERS, N_INTERACTIONS)
    items = rng.integers(0, N_ITEMS, N_INTERACTIONS)
    inside = rng.random(N_INTERACTIONS) < 0.8
    own = users % N_COMMUNITIES + N_COMMUNITIES * rng.integers(0, N_ITEMS // N_COMMUNITIES, N_INTERACTIONS)
    return users, np.where(inside, own, items)


class TwoTowers(nn.Module):
    """A linear layer over the embedding of either side, and their inner product."""

    def __init__(self, user_embedding: nn.Module, item_embedding: nn.Module):
        super().__init__()
        self.user_embedding, self.item_embedding = user_embedding, item_embedding
        self.user_tower, self.item_tower = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Scores of pairs: int64 ids of shape (n,) each in, float32 of shape (n,) out."""
        return (self.user_tower(self.user_embedding(users)) * self.item_tower(self.item_embedding(items))).sum(-1)


def train(model: nn.Module, users: Tensor, items: Tensor) -> float:
    """Train by binary cross-entropy against one random item per interaction; returns the last loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(N_STEPS):
        batch = torch.randint(len(users), (BATCH_SIZE,), generator=generator)
        negatives = torch.randint(N_ITEMS, (BATCH_SIZE,), generator=generator)
        positive, negative = model(users[batch], items[batch]), model(users[batch], negatives)
        loss = functional.softplus(-positive).mean() + functional.softplus(negative).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    torch.manual_seed(0)
    users, items = synthetic_log(np.random.default_rng(0))

    # The five lines that replace two torch.nn.Embedding.
    biadjacency = graphhash.biadjacency(users, items, n_users=N_USERS, n_items=N_ITEMS)
    communities = graphhash.cluster(biadjacency, rows=300)
    user_map, item_map = graphhash.soft_maps(biadjacency, communities, indices_per_id=4)
    user_embedding = graphhash.BucketEmbedding(user_map, dim=DIM)
    item_embedding = graphhash.BucketEmbedding(
        item_map, dim=DIM, table=user_embedding.table
    )  # soft maps share one table

    model = TwoTowers(user_embedding, item_embedding)
    before = sum(parameter.numel() for parameter in model.parameters())
    loss = train(model, torch.from_numpy(users), torch.from_numpy(items))
    print(f"ids: {N_USERS + N_ITEMS:,}; table rows: {len(user_embedding.table):,}; trained parameters: {before:,}")
    print(f"loss after {N_STEPS} steps: {loss:.3f} (an untrained model: {2 * np.log(2):.3f})")


if __name__ == "__main__":
    main()
