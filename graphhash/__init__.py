"""GraphHash: small embedding tables for recommender systems, by clustering the graph of who used what.

    labels = graphhash.cluster(biadjacency, resolution=200)
    users, items = graphhash.soft_maps(biadjacency, labels, indices_per_id=8)
    user_layer = graphhash.BucketEmbedding(users, dim=64)
    item_layer = graphhash.BucketEmbedding(items, dim=64, table=user_layer.table)

Clustering and bucket maps work without PyTorch; names that need it are imported when first used.
"""

from __future__ import annotations

from importlib import import_module

from graphhash.clustering.api import cluster
from graphhash.clustering.balanced import balanced_labels
from graphhash.clustering.hierarchy import Hierarchy, hierarchy
from graphhash.clustering.labels import Labels
from graphhash.clustering.modularity import modularity
from graphhash.errors import DataError
from graphhash.graph.bipartite import biadjacency
from graphhash.graph.vocabulary import Vocabulary
from graphhash.maps.balanced_maps import balanced_maps
from graphhash.maps.bucket_map import BucketMap, full_map
from graphhash.maps.community_maps import double_graph_maps, double_soft_maps, graph_maps, multilevel_maps, soft_maps
from graphhash.maps.hashes import (
    double_frequency_map,
    double_map,
    frequency_map,
    lsh_map,
    lsh_structure_map,
    modulo_map,
    quotient_remainder_map,
)

_TORCH_NAMES = {
    "BucketEmbedding": "graphhash.nn.embedding",
    "MatrixFactorization": "graphhash.models.mf",
    "bpr_loss": "graphhash.models.mf",
}

__all__ = [
    "BucketEmbedding",
    "BucketMap",
    "DataError",
    "Hierarchy",
    "Labels",
    "MatrixFactorization",
    "Vocabulary",
    "balanced_labels",
    "balanced_maps",
    "biadjacency",
    "bpr_loss",
    "cluster",
    "double_frequency_map",
    "double_graph_maps",
    "double_map",
    "double_soft_maps",
    "frequency_map",
    "full_map",
    "graph_maps",
    "hierarchy",
    "lsh_map",
    "lsh_structure_map",
    "modularity",
    "modulo_map",
    "multilevel_maps",
    "quotient_remainder_map",
    "soft_maps",
]


def __getattr__(name: str):
    if name in _TORCH_NAMES:
        return getattr(import_module(_TORCH_NAMES[name]), name)
    raise AttributeError(f"module 'graphhash' has no attribute {name!r}")
