"""The retrieval models and losses of a run by name, and the preset that each is trained with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.sparse import csr_array
from torch import Tensor

from graphhash.errors import ArgumentError
from graphhash.maps.bucket_map import BucketMap
from graphhash.maps.embedding_spec import BUCKET, EmbeddingSpec
from graphhash.models.lightgcn import LightGCN
from graphhash.models.losses import directau_loss, ials_loss, pairwise_logistic_loss
from graphhash.models.mf import MatrixFactorization, RetrievalModel, VectorModel
from graphhash.models.neumf import NeuMF
from graphhash.nn.embedding import BucketEmbedding
from graphhash.nn.workers import Workers
from pipeline.config.run_config import TrainConfig
from pipeline.maps.methods import Method
from pipeline.training.seldom import seldom_embeddings

Sample = Callable[[Tensor, torch.Generator], Tensor]
# Loss of a batch of interactions: model, users, items, and what draws negatives.
Objective = Callable[[RetrievalModel, Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]


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
    """

    kind: str
    dim: int
    item_bias: bool
    n_layers: int
    seed: int
    embedding: EmbeddingSpec = BUCKET

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
        users, items, spec.dim, item_bias=spec.item_bias, seed=spec.seed, embedding=spec.embedding
    )


def _neumf(spec: ModelSpec, users: BucketMap, items: BucketMap, graph: csr_array | None) -> NeuMF:
    return NeuMF(users, items, spec.dim, item_bias=spec.item_bias, seed=spec.seed)


def _lightgcn(spec: ModelSpec, users: BucketMap, items: BucketMap, graph: csr_array | None) -> LightGCN:
    assert graph is not None, "LightGCN needs the training graph"
    return LightGCN(
        users, items, spec.dim, graph=graph, n_layers=spec.n_layers, item_bias=spec.item_bias, seed=spec.seed
    )


MODELS: dict[str, Callable[[ModelSpec, BucketMap, BucketMap, csr_array | None], RetrievalModel]] = {
    "mf": _mf,
    "neumf": _neumf,
    "lightgcn": _lightgcn,
}


def name_of(model: RetrievalModel) -> str:
    """The model's name in MODELS."""
    return {MatrixFactorization: "mf", NeuMF: "neumf", LightGCN: "lightgcn"}[type(model)]


def objective(
    loss: str, *, whole: bool, gamma: float, unobserved_weight: float, workers: Workers = Workers()
) -> Objective:
    """The loss of a batch by its name.

    Args:
        loss: "bpr", "directau" or "ials".
        whole: a batch is all interactions; every id's vector is then read from its table once.
        gamma: weight of DirectAU's uniformity.
        unobserved_weight: of implicit ALS.
        workers: those that have the other parts of a batch.
    """

    def bpr(model: RetrievalModel, users: Tensor, items: Tensor, negatives: Callable[[Tensor], Tensor]) -> Tensor:
        return pairwise_logistic_loss(model.score_differences(users, items, negatives(users), read_all=whole))

    def directau(model: RetrievalModel, users: Tensor, items: Tensor, negatives: Callable[[Tensor], Tensor]) -> Tensor:
        assert isinstance(model, VectorModel)
        return directau_loss(*model.pair_vectors(users, items), gamma=gamma, workers=workers)

    def ials(model: RetrievalModel, users: Tensor, items: Tensor, negatives: Callable[[Tensor], Tensor]) -> Tensor:
        assert isinstance(model, VectorModel)
        user_vectors, item_vectors = model.vectors()
        # The sum over all pairs weighs a batch's interactions as it weighs all of them.
        return ials_loss(
            user_vectors,
            item_vectors,
            model(users, items),
            unobserved_weight=unobserved_weight,
            item_bias=model.item_bias,
            workers=workers,
        )

    return {"bpr": bpr, "directau": directau, "ials": ials}[loss]


def seldom_read(model: RetrievalModel, loss: str, batch_size: int | None) -> list[BucketEmbedding]:
    """Embeddings of which a training step reads few rows, so that :class:`RowAdam` is faster than Adam; none off the CPU.

    Args:
        loss, batch_size: as in ``pipeline.training.loop.FitSettings``.
    """
    if batch_size is None or loss == "ials" or isinstance(model, LightGCN):
        return []  # Every vector is read.
    # A user, an item and, for BPR, another item; both sides may have one table.
    n_items = (2 if loss == "bpr" else 1) * batch_size
    users, items = model.user_embedding, model.item_embedding
    if not (isinstance(users, BucketEmbedding) and isinstance(items, BucketEmbedding)):
        return []
    return seldom_embeddings([(users, batch_size), (items, n_items)])


@dataclass(frozen=True)
class TrainingPreset:
    """How a model is trained with a loss, unless told otherwise.

    Args:
        lr, l2_total: None: the method's own, which are those of matrix factorisation with BPR.
        epochs, batch_size: as in ``pipeline.config.run_config.TrainConfig``.
    """

    lr: float | None = None
    epochs: int = 300
    batch_size: int | None = None
    l2_total: float | None = None


# DirectAU's gamma where ids have SPARSE_NEIGHBOURS on average, and how it falls with more. Validation recall of full tables: Gowalla (21
# neighbours) with 0.5 .109, 1 .131, 2 .135; MovieLens-1M (164) with 0.2 .001, 0.3 .025, 0.4 .170, 0.5 .162, 1 .137. Below 0.4 all vectors
# fall into one.
SPARSE_NEIGHBOURS, GAMMA_THERE, GAMMA_POWER, LEAST_GAMMA = 20, 2.0, 0.75, 0.4


def default_gamma(n_neighbours: float) -> float:
    """DirectAU's gamma for ids with so many neighbours on average: dense graphs need less to keep vectors apart."""
    return max(LEAST_GAMMA, GAMMA_THERE * min(1.0, (SPARSE_NEIGHBOURS / max(n_neighbours, 1.0)) ** GAMMA_POWER))


PRESETS: dict[tuple[str, str], TrainingPreset] = {
    ("mf", "bpr"): TrainingPreset(),
    # The loss looks at directions alone, and larger steps leave more of an id's popularity in the length of its vector. Validation recall
    # after 4 epochs of full tables: MovieLens-1M with 1e-3 .168, 5e-3 .194, 1e-2 .208, 3e-2 .220; Gowalla with 2e-3 .135, 1e-2 .131.
    ("mf", "directau"): TrainingPreset(lr=1e-2, epochs=8, batch_size=1024),
    ("mf", "ials"): TrainingPreset(),
    ("neumf", "bpr"): TrainingPreset(lr=5e-3, epochs=20, batch_size=8192),
    # Propagation averages gradients, too, and wants larger steps: on MovieLens-1M .249 at 5e-2, .153 at 1e-2.
    # It smooths by itself: with full tables validation recall is .279 for l2_total of 0.003 and .232 for 0.02.
    ("lightgcn", "bpr"): TrainingPreset(lr=1e-1, l2_total=3e-3),
    ("lightgcn", "directau"): TrainingPreset(lr=5e-3, epochs=20, batch_size=16384),
    ("lightgcn", "ials"): TrainingPreset(lr=1e-1),
}


def default_settings(train: TrainConfig, method: Method) -> dict[str, float]:
    """What `train.lr` and `train.l2_total` are unless they are set."""
    preset = PRESETS[train.model, train.loss]
    return {
        "train.lr": method.lr if preset.lr is None else preset.lr,
        "train.l2_total": method.l2_total if preset.l2_total is None else preset.l2_total,
    }
