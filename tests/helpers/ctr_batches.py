"""Bucket maps of a small CTR model's columns, random batches of them, and the obvious way to read their vectors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import graphhash
from graphhash.maps.bucket_map import BucketMap, full_map
from graphhash.maps.hashes import double_map, modulo_map
from graphhash.models.ctr import FeatureBatch
from graphhash.models.ctr_fields import FieldEmbeddings
from graphhash.models.ctr_layers import BatchNorm
from tests.helpers import graphs

GRAPH = graphs.planted(0, 3, 12, 0.4, 0.05)[0]
N_USERS, N_ITEMS = GRAPH.shape
N_SMALL = (2, 7)
N_GENRES = 5
KINDS = ("full", "modulo", "double", "graph", "soft", "double_soft")


def pair_maps(kind: str) -> tuple[BucketMap, BucketMap]:
    """Maps of the users and items of GRAPH."""
    labels = graphhash.cluster(GRAPH, resolution=1.0)
    return {
        "full": lambda: (full_map(N_USERS), full_map(N_ITEMS)),
        "modulo": lambda: (modulo_map(N_USERS, 4), modulo_map(N_ITEMS, 4)),
        "double": lambda: (double_map(N_USERS, 5, seed=0), double_map(N_ITEMS, 5, seed=1)),
        "graph": lambda: graphhash.graph_maps(labels),
        "double_graph": lambda: graphhash.double_graph_maps(labels, seed=0),
        "soft": lambda: graphhash.soft_maps(GRAPH, labels, indices_per_id=3),
        "double_soft": lambda: graphhash.double_soft_maps(GRAPH, labels, indices_per_id=3, seed=0),
    }[kind]()


def all_maps(kind: str) -> list[BucketMap]:
    """User, a small column, item, another small one, and a bag: what belongs together does not stand together."""
    users, items = pair_maps(kind)
    return [users, full_map(N_SMALL[0]), items, full_map(N_SMALL[1]), full_map(N_GENRES)]


def random_batch(n: int, seed: int = 0, n_dense: int = 2) -> FeatureBatch:
    rng = np.random.default_rng(seed)
    sizes = (N_USERS, N_SMALL[0], N_ITEMS, N_SMALL[1])
    categorical = np.stack([rng.integers(0, size + 1, n) for size in sizes], 1)
    bag = rng.integers(-1, N_GENRES + 1, (n, 3))
    bag[0] = -1
    dense = rng.normal(size=(n, n_dense)).astype(np.float32)
    return FeatureBatch(torch.from_numpy(categorical), torch.from_numpy(dense), (torch.from_numpy(bag),))


def naive_vector(bucket_map: BucketMap, table: Tensor, entry: int) -> np.ndarray:
    total = np.zeros(table.shape[1])
    for row, weight in zip(bucket_map.rows[entry], bucket_map.weights[entry], strict=True):
        total += float(weight) * table[row].detach().numpy().astype(np.float64)
    return total


def naive_fields(fields: FieldEmbeddings, maps: list[BucketMap], batch: FeatureBatch) -> np.ndarray:
    """Vectors in the order of the maps, one lookup at a time."""
    result = np.zeros((len(batch), len(maps), fields.dim))
    n_categorical = batch.categorical.shape[1]
    for row in range(len(batch)):
        for column, bucket_map in enumerate(maps):
            table = fields.columns[column].table
            if column < n_categorical:
                result[row, column] = naive_vector(bucket_map, table, int(batch.categorical[row, column]))
                continue
            values = [v for v in batch.multi_valued[column - n_categorical][row].tolist() if v >= 0]
            if values:
                result[row, column] = np.mean([naive_vector(bucket_map, table, v) for v in values], axis=0)
    return result


@torch.no_grad()
def draw_statistics(model, generator):
    """Means and variances of all batch normalizations, as training would have found them."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.mean.normal_(std=0.3, generator=generator)
            module.variance.uniform_(0.2, 2, generator=generator)


def noisy(model):
    """Every parameter and statistic drawn anew, so that no part is silent."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    draw_statistics(model, generator)
    return model
