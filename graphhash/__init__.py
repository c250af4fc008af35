"""GraphHash: small embedding tables for recommender systems, by clustering the graph of who used what.

    labels = graphhash.cluster(biadjacency, resolution=200)
    users, items = graphhash.soft_maps(biadjacency, labels, indices_per_id=8)
    user_layer = graphhash.BucketEmbedding(users, dim=64)
    item_layer = graphhash.BucketEmbedding(items, dim=64, table=user_layer.table)

The names below are imported when first used, so ``import graphhash`` is quick and PyTorch is loaded only for what needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
    from graphhash.maps.community_maps import double_graph_maps, graph_maps, multilevel_maps
    from graphhash.maps.hashes import (
        double_frequency_map,
        double_map,
        frequency_map,
        lsh_map,
        lsh_structure_map,
        modulo_map,
        quotient_remainder_map,
    )
    from graphhash.maps.soft_maps import double_soft_maps, soft_maps
    from graphhash.models.losses import bpr_loss
    from graphhash.models.mf import MatrixFactorization
    from graphhash.nn.embedding import BucketEmbedding
    from graphhash.nn.embedding_bag import BucketEmbeddingBag

__all__ = [
    "BucketEmbedding",
    "BucketEmbeddingBag",
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

__version__ = "0.1.0"

_MODULE_OF = {
    "BucketEmbedding": "graphhash.nn.embedding",
    "BucketEmbeddingBag": "graphhash.nn.embedding_bag",
    "BucketMap": "graphhash.maps.bucket_map",
    "DataError": "graphhash.errors",
    "Hierarchy": "graphhash.clustering.hierarchy",
    "Labels": "graphhash.clustering.labels",
    "MatrixFactorization": "graphhash.models.mf",
    "Vocabulary": "graphhash.graph.vocabulary",
    "balanced_labels": "graphhash.clustering.balanced",
    "balanced_maps": "graphhash.maps.balanced_maps",
    "biadjacency": "graphhash.graph.bipartite",
    "bpr_loss": "graphhash.models.losses",
    "cluster": "graphhash.clustering.api",
    "double_frequency_map": "graphhash.maps.hashes",
    "double_graph_maps": "graphhash.maps.community_maps",
    "double_map": "graphhash.maps.hashes",
    "double_soft_maps": "graphhash.maps.soft_maps",
    "frequency_map": "graphhash.maps.hashes",
    "full_map": "graphhash.maps.bucket_map",
    "graph_maps": "graphhash.maps.community_maps",
    "hierarchy": "graphhash.clustering.hierarchy",
    "lsh_map": "graphhash.maps.hashes",
    "lsh_structure_map": "graphhash.maps.hashes",
    "modularity": "graphhash.clustering.modularity",
    "modulo_map": "graphhash.maps.hashes",
    "multilevel_maps": "graphhash.maps.community_maps",
    "quotient_remainder_map": "graphhash.maps.hashes",
    "soft_maps": "graphhash.maps.soft_maps",
}

# What brings packages that only some names need.
_EXTRAS = {"torch": "train", "pyarrow": "storage"}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'graphhash' has no attribute {name!r}")
    try:
        value = getattr(import_module(_MODULE_OF[name]), name)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        raise ModuleNotFoundError(
            f"graphhash.{name} needs {error.name}, which is not installed; pip install 'graphhash[{extra}]'",
            name=error.name,
        ) from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
