"""The retrieval models of a run by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from scipy.sparse import csr_array

from graphhash.errors import ArgumentError
from graphhash.maps.bucket_map import BucketMap
from graphhash.maps.embedding_spec import BUCKET, EmbeddingSpec
from graphhash.models.lightgcn import LightGCN
from graphhash.models.mf import INITIAL_STD, MatrixFactorization, RetrievalModel
from graphhash.models.neumf import NeuMF
from pipeline.task import TRAIN_PARTS


@dataclass(frozen=True)
class ModelSpec:
    """What a model is, before it is made.

    Args:
        kind: one of MODELS.
        dim: length of an embedding.
        item_bias: train a scalar per item.
        n_layers: of LightGCN.
        seed: draws the initial values.
        embedding: kind of the embeddings; read through the bucket maps alone by default.
        cosine: score by cosines; not of NeuMF.
        std: standard deviation of the initial values.
        parts: of the log whose interactions it is trained on, and LightGCN propagates over.
    """

    kind: str
    dim: int
    item_bias: bool
    n_layers: int
    seed: int
    embedding: EmbeddingSpec = BUCKET
    cosine: bool = False
    std: float = INITIAL_STD
    parts: tuple[str, ...] = TRAIN_PARTS

    def build(self, users: BucketMap, items: BucketMap, graph: csr_array | None) -> RetrievalModel:
        """The model with its initial weights.

        Args:
            graph: training interactions; LightGCN alone reads them.

        Raises:
            ArgumentError: the model does not support this kind of embedding.
        """
        if self.kind != "mf" and self.embedding.kind != "bucket":
            raise ArgumentError(f"embedding {self.embedding.kind!r} needs model mf, got {self.kind!r}")
        return MODELS[self.kind](self, users, items, graph)


def _mf(spec: ModelSpec, users: BucketMap, items: BucketMap, graph: csr_array | None) -> MatrixFactorization:
    return MatrixFactorization(
        users,
        items,
        spec.dim,
        item_bias=spec.item_bias,
        seed=spec.seed,
        embedding=spec.embedding,
        cosine=spec.cosine,
        std=spec.std,
    )


def _neumf(spec: ModelSpec, users: BucketMap, items: BucketMap, graph: csr_array | None) -> NeuMF:
    return NeuMF(users, items, spec.dim, item_bias=spec.item_bias, seed=spec.seed, std=spec.std)


def _lightgcn(spec: ModelSpec, users: BucketMap, items: BucketMap, graph: csr_array | None) -> LightGCN:
    assert graph is not None, "LightGCN needs the training graph"
    return LightGCN(
        users,
        items,
        spec.dim,
        graph=graph,
        n_layers=spec.n_layers,
        item_bias=spec.item_bias,
        seed=spec.seed,
        cosine=spec.cosine,
        std=spec.std,
    )


MODELS: dict[str, Callable[[ModelSpec, BucketMap, BucketMap, csr_array | None], RetrievalModel]] = {
    "mf": _mf,
    "neumf": _neumf,
    "lightgcn": _lightgcn,
}


def name_of(model: RetrievalModel) -> str:
    """The model's name in MODELS."""
    return {MatrixFactorization: "mf", NeuMF: "neumf", LightGCN: "lightgcn"}[type(model)]
