"""Data of the GPU check: a graph with planted communities, and a CTR batch over the same users and items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor

from graphhash.clustering.labels import Labels
from graphhash.graph.bipartite import biadjacency
from graphhash.maps.bucket_map import BucketMap, full_map
from graphhash.maps.soft_maps import soft_maps
from graphhash.models.ctr import FeatureBatch

# Part of a user's interactions that leads to items of any community.
MIXING = 0.2
INDICES_PER_ID = 8
MULTI_VALUED_WIDTH = 4


@dataclass(frozen=True)
class Scale:
    """Sizes of the data, and time of a measurement.

    Args:
        n_draws: interactions that are drawn; repeated ones count once.
        n_communities: planted ones, which are the rows of the soft maps.
        dim: length of an embedding.
        n_samples: rows of the CTR data.
        seconds: of a timed training.
        copy_mib: of the array whose copies give the memory bandwidth.
    """

    n_users: int
    n_items: int
    n_draws: int
    n_communities: int
    dim: int
    n_samples: int
    seconds: float
    copy_mib: int


# Of parity, and of a machine without a GPU.
SMALL = Scale(300, 200, 6_000, 40, 16, 2_000, 0.1, 8)
FULL = Scale(400_000, 200_000, 8_000_000, 20_000, 64, 4_000_000, 6.0, 2_048)


@dataclass(frozen=True, eq=False)
class Data:
    """Interactions as a graph and as pairs, and their planted communities.

    Args:
        graph: shape (n_users, n_items), every entry 1.
        labels: communities of users and items.
        users, items: rows of the interactions in random order, int64, shape (n_interactions,).
    """

    graph: csr_array
    labels: Labels
    users: Tensor
    items: Tensor

    @classmethod
    def draw(cls, scale: Scale, seed: int = 0) -> Data:
        """Items of a community are drawn by popularity, and the first of them most often."""
        rng = np.random.default_rng(seed)
        users = rng.integers(0, scale.n_users, scale.n_draws)
        own = rng.random(scale.n_draws) > MIXING
        community = np.where(own, users % scale.n_communities, rng.integers(0, scale.n_communities, scale.n_draws))
        places = (scale.n_items // scale.n_communities) * rng.random(scale.n_draws) ** 2
        items = community + scale.n_communities * places.astype(np.int64)
        graph = biadjacency(users, items, n_users=scale.n_users, n_items=scale.n_items)
        graph.data[:] = 1
        of_users, of_items = (np.arange(n, dtype=np.int32) % scale.n_communities for n in graph.shape)
        labels = Labels(of_users, of_items, resolution=1.0, modularity=0.0)
        order = rng.permutation(graph.nnz)
        rows = np.repeat(np.arange(scale.n_users), np.diff(graph.indptr))[order]
        return cls(graph, labels, torch.from_numpy(rows), torch.from_numpy(graph.indices[order].astype(np.int64)))

    def maps(self, name: str) -> tuple[BucketMap, BucketMap]:
        """Maps of users and items: ``full`` or ``soft``."""
        if name == "full":
            return full_map(self.graph.shape[0]), full_map(self.graph.shape[1])
        return soft_maps(self.graph, self.labels, indices_per_id=INDICES_PER_ID)


@dataclass(frozen=True, eq=False)
class CtrData:
    """Samples of a CTR log: a user, an item, a small categorical column, a multi-valued one, and three numbers.

    Args:
        batch: features of all samples.
        labels: 0 or 1, float32, shape (n_samples,).
        n_values: ids of the small columns.
    """

    batch: FeatureBatch
    labels: Tensor
    n_values: int = 50

    @classmethod
    def draw(cls, data: Data, n_samples: int, *, n_folds: int = 0, seed: int = 0) -> CtrData:
        """Samples of random interactions of ``data``, with random other features, labels and folds."""
        rng = np.random.default_rng(seed)
        chosen = torch.from_numpy(rng.integers(0, len(data.users), n_samples))
        small = torch.from_numpy(rng.integers(0, cls.n_values, n_samples))
        batch = FeatureBatch(
            torch.stack([data.users[chosen], data.items[chosen], small], 1),
            torch.from_numpy(rng.normal(size=(n_samples, 3)).astype(np.float32)),
            (torch.from_numpy(rng.integers(-1, cls.n_values, (n_samples, MULTI_VALUED_WIDTH))),),
            torch.from_numpy(rng.integers(0, n_folds, n_samples)) if n_folds else None,
        )
        return cls(batch, torch.from_numpy(rng.integers(0, 2, n_samples).astype(np.float32)))

    def maps(self, users: BucketMap, items: BucketMap) -> list[BucketMap]:
        """Of all columns, with those of the first two."""
        return [users, items, full_map(self.n_values), full_map(self.n_values)]


def halves(graph: csr_array, rng: np.random.Generator) -> list[csr_array]:
    """The graph twice, each time without a half of its entries: the folds of cross-fitted maps."""
    first: NDArray[np.bool_] = rng.random(graph.nnz) < 0.5
    rows = np.repeat(np.arange(graph.shape[0]), np.diff(graph.indptr))
    n_users, n_items = graph.shape
    return [biadjacency(rows[kept], graph.indices[kept], n_users=n_users, n_items=n_items) for kept in (first, ~first)]
