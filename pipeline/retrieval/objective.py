"""The loop of ``pipeline.training.loop`` for retrieval: interactions as examples, negatives drawn, recall as the score."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor, nn

from graphhash.errors import ArgumentError
from graphhash.models.lightgcn import LightGCN
from graphhash.models.losses import (
    bsl_loss,
    ccl_loss,
    directau_loss,
    ials_loss,
    pairwise_logistic_loss,
    softmax_loss,
)
from graphhash.models.mf import RetrievalModel, VectorModel, dot_pairs
from graphhash.models.samplers import NegativeSampler
from graphhash.models.shared_negatives import accidental_hits, log_sum_exp, mean_excess
from graphhash.nn.embedding import BucketEmbedding
from graphhash.nn.workers import Workers
from pipeline.config.choices import SHARED_LOSSES
from pipeline.training.loop import Callbacks, FitSettings, Objective, fit
from pipeline.training.seldom import seldom_embeddings

# Cut-off of validation; the test has its own.
K = 20
# Recall over min(K, relevant): the same weight for users of many relevant items as for the others.
SCORE = f"capped_recall@{K}"
# Loss of this worker's part of a batch of interactions: model, users, items, and a generator for whatever is random.
LossOfBatch = Callable[[RetrievalModel, Tensor, Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class LossSettings:
    """A loss and its numbers, as in ``pipeline.config.run_config.TrainConfig``, every default resolved.

    Args:
        name: one of ``pipeline.config.choices.LOSSES``.
        negatives: drawn for a batch of all workers, of the losses whose negatives a batch shares.
    """

    name: str = "bpr"
    gamma: float = 1.0
    unobserved_weight: float = 0.01
    temperature: float = 0.1
    negatives: int = 1024
    negative_weight: float = 1.0
    margin: float = 0.9
    dropout: float = 0.0
    mask_same_row: bool = False


@dataclass(frozen=True)
class RetrievalSettings(FitSettings):
    """Those of the loop, and of the loss."""

    loss: LossSettings = LossSettings()


@dataclass(frozen=True, eq=False)
class TrainingPairs:
    """The interactions of a training, of all workers, and what draws negatives for them.

    Args:
        users, items: rows, int64, shape (n_interactions,).
        sample: None: negatives are uniform, and not rejected.
    """

    users: Tensor
    items: Tensor
    sample: NegativeSampler | None = None

    @classmethod
    def of(
        cls, graph: csr_array, sample: NegativeSampler | None = None, device: torch.device | None = None
    ) -> TrainingPairs:
        """The pairs of a graph, in the order of its rows."""
        users = torch.from_numpy(np.repeat(np.arange(graph.shape[0]), np.diff(graph.indptr)))
        items = torch.from_numpy(graph.indices.astype(np.int64))
        return cls(users.to(device), items.to(device), sample)


def fit_retrieval(
    model: RetrievalModel,
    pairs: TrainingPairs,
    settings: RetrievalSettings,
    validate: Callable[[RetrievalModel], dict[str, float]] | None,
    *,
    callbacks: Callbacks = Callbacks(),
    state: dict[str, Any] | None = None,
    workers: Workers | None = None,
) -> dict[str, Any]:
    """Train a retrieval model.

    Args:
        validate: metrics, :data:`SCORE` among them, which is the one to raise.
        callbacks, state, workers: as for :func:`pipeline.training.loop.fit`; there is one more phase, negatives.

    Returns, Raises: as :func:`pipeline.training.loop.fit`.
    """
    workers = Workers.from_process_group() if workers is None else workers
    sample = pairs.sample
    if sample is None:
        sample = NegativeSampler(csr_array((1, model.item_embedding.n_ids)))
    whole = settings.batch_size is None
    loss_of_batch = objective(settings.loss, sample, whole=whole, workers=workers, on_phase=callbacks.on_phase)

    def loss_of(model: nn.Module, batch: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        assert isinstance(model, RetrievalModel)
        batch_users, batch_items = batch
        return loss_of_batch(model, batch_users, batch_items, generator)

    def before_epoch(epoch: int, n_epochs: int) -> None:
        for embedding in (model.user_embedding, model.item_embedding):
            embedding.before_epoch(epoch, n_epochs)

    rarely_read = seldom_read(model, settings.loss, settings.batch_size)
    aim = Objective(loss_of, SCORE, validate, rarely_read, before_epoch)
    return fit(model, (pairs.users, pairs.items), settings, aim, callbacks=callbacks, state=state, workers=workers)


def objective(
    settings: LossSettings,
    sample: NegativeSampler,
    *,
    whole: bool,
    workers: Workers = Workers(),
    on_phase: Callable[[str], None] = lambda phase: None,
) -> LossOfBatch:
    """The loss of a batch by its name.

    Args:
        sample: draws negatives.
        whole: a batch is all interactions; every id's vector is then read from its table once.
        workers: those that have the other parts of a batch.
        on_phase: told when negatives are drawn.
    """

    def bpr(model: RetrievalModel, users: Tensor, items: Tensor, generator: torch.Generator) -> Tensor:
        negatives = sample(users, generator)
        on_phase("negatives")
        return pairwise_logistic_loss(model.score_differences(users, items, negatives, read_all=whole))

    def directau(model: RetrievalModel, users: Tensor, items: Tensor, generator: torch.Generator) -> Tensor:
        assert isinstance(model, VectorModel)
        return directau_loss(*model.pair_vectors(users, items), gamma=settings.gamma, workers=workers)

    def ials(model: RetrievalModel, users: Tensor, items: Tensor, generator: torch.Generator) -> Tensor:
        assert isinstance(model, VectorModel)
        user_vectors, item_vectors = model.vectors()
        # The sum over all pairs weighs a batch's interactions as it weighs all of them.
        return ials_loss(
            user_vectors,
            item_vectors,
            model(users, items),
            unobserved_weight=settings.unobserved_weight,
            item_bias=model.item_bias,
            workers=workers,
        )

    def shared(model: RetrievalModel, users: Tensor, items: Tensor, generator: torch.Generator) -> Tensor:
        assert isinstance(model, VectorModel)
        negatives, log_weights = sample.shared(items, settings.negatives, generator, workers)
        on_phase("negatives")
        return shared_loss(settings, model, users, items, negatives, log_weights, generator)

    losses: dict[str, LossOfBatch] = {"bpr": bpr, "directau": directau, "ials": ials}
    return losses.get(settings.name, shared)


def shared_loss(
    settings: LossSettings,
    model: VectorModel,
    users: Tensor,
    items: Tensor,
    negatives: Tensor,
    log_weights: Tensor | None,
    generator: torch.Generator,
) -> Tensor:
    """Softmax, BSL or CCL of interactions against negatives that they share.

    Args:
        users, items: of the interactions, int64, shape (n,).
        negatives: items, int64, shape (m,).
        log_weights: of the negatives, shape (m,), as ``graphhash.models.samplers.Shared`` has them.
        generator: draws the numbers that dropout sets to 0.

    Raises:
        ArgumentError: ``mask_same_row`` where an id has no table rows.
    """
    n = len(users)
    user_vectors, item_vectors = model.pair_vectors(users, torch.cat([items, negatives]))
    if settings.dropout:
        user_vectors = model.scaled(_dropped(user_vectors, settings.dropout, generator))
    places = torch.arange(n, device=users.device)
    positives = dot_pairs(user_vectors, item_vectors, places, places).float()
    bias = None
    if model.item_bias is not None:
        positives = positives + model.item_bias.index_select(0, items)
        bias = model.item_bias.index_select(0, negatives)
    keys = _first_rows(model) if settings.mask_same_row else None
    hits = accidental_hits(items, negatives) if keys is None else accidental_hits(keys[items], keys[negatives])
    if settings.name == "ccl":
        excess = mean_excess(user_vectors, item_vectors[n:], margin=settings.margin, offsets=bias, hits=hits)
        return ccl_loss(positives, excess, negative_weight=settings.negative_weight)
    offsets = None if bias is None else bias / settings.temperature
    if log_weights is not None:
        offsets = log_weights if offsets is None else offsets + log_weights
    log_sums = log_sum_exp(user_vectors, item_vectors[n:], temperature=settings.temperature, offsets=offsets, hits=hits)
    positives = positives / settings.temperature
    if settings.name == "softmax":
        return softmax_loss(positives, log_sums)
    log_means = log_sums - math.log(len(negatives))
    return bsl_loss(positives, log_means, negative_weight=settings.negative_weight)


def _dropped(vectors: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Dropout with an own generator."""
    kept = torch.rand(vectors.shape, generator=generator, device=vectors.device) >= rate
    return vectors * kept / (1 - rate)


def _first_rows(model: VectorModel) -> Tensor:
    """The first table row that every item reads, which is the one of its own community, int32, shape (n_items + 1,)."""
    rows = getattr(model.item_embedding, "rows", None)
    if rows is None:
        raise ArgumentError("train.mask_same_row=true needs items that read rows of a table; leave it out")
    return rows[:, 0]


def seldom_read(model: RetrievalModel, loss: LossSettings, batch_size: int | None) -> list[BucketEmbedding]:
    """Embeddings of which a training step reads few rows, so that :class:`RowAdam` is faster than Adam; none off the CPU.

    Args:
        batch_size: as in ``pipeline.training.loop.FitSettings``.
    """
    if batch_size is None or loss.name == "ials" or isinstance(model, LightGCN):
        return []  # Every vector is read.
    of_users, of_items = model.user_embedding, model.item_embedding
    # A user, an item and negatives; both sides may have one table.
    n_negatives = batch_size if loss.name == "bpr" else loss.negatives if loss.name in SHARED_LOSSES else 0
    reads = ((of_users, batch_size), (of_items, batch_size + n_negatives))
    return seldom_embeddings((part, n_ids) for embedding, n_ids in reads for part in embedding.bucket_parts())
