"""The loop of ``pipeline.training.loop`` for retrieval: interactions as examples, negatives drawn, recall as the score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphhash.models.mf import RetrievalModel
from graphhash.nn.workers import Workers
from pipeline.retrieval.evaluate import K
from pipeline.retrieval.models import Sample, objective, seldom_read
from pipeline.training.loop import Callbacks, FitSettings, Objective, fit

# Recall over min(K, relevant): the same weight for users of many relevant items as for the others.
SCORE = f"capped_recall@{K}"


@dataclass(frozen=True)
class RetrievalSettings(FitSettings):
    """Those of the loop, and of the loss."""

    loss: str = "bpr"
    gamma: float = 1.0
    unobserved_weight: float = 0.01


def fit_retrieval(
    model: RetrievalModel,
    users: Tensor,
    items: Tensor,
    settings: RetrievalSettings,
    validate: Callable[[RetrievalModel], dict[str, float]] | None,
    *,
    sample: Sample | None = None,
    callbacks: Callbacks = Callbacks(),
    state: dict[str, Any] | None = None,
    workers: Workers | None = None,
) -> dict[str, Any]:
    """Train a retrieval model; BPR draws one negative per interaction.

    Args:
        users, items: rows of the training interactions of all workers, int64, shape (n_interactions,).
        validate: metrics, :data:`SCORE` among them, which is the one to raise.
        sample: draws an item for each of some users, as a :class:`NegativeSampler`; None: uniformly, not rejected.
        callbacks, state, workers: as for :func:`pipeline.training.loop.fit`; there is one more phase, negatives.

    Returns, Raises: as :func:`pipeline.training.loop.fit`.
    """
    workers = Workers.from_process_group() if workers is None else workers
    n_items = model.item_embedding.n_ids
    loss_of_batch = objective(
        settings.loss,
        whole=settings.batch_size is None,
        gamma=settings.gamma,
        unobserved_weight=settings.unobserved_weight,
        workers=workers,
    )

    def loss_of(model: nn.Module, batch: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        assert isinstance(model, RetrievalModel)
        batch_users, batch_items = batch

        def negatives(of_users: Tensor) -> Tensor:
            if sample is None:
                drawn = torch.randint(n_items, of_users.shape, generator=generator, device=of_users.device)
            else:
                drawn = sample(of_users, generator)
            callbacks.on_phase("negatives")
            return drawn

        return loss_of_batch(model, batch_users, batch_items, negatives)

    rarely_read = seldom_read(model, settings.loss, settings.batch_size)
    aim = Objective(loss_of, SCORE, validate, rarely_read)
    return fit(model, (users, items), settings, aim, callbacks=callbacks, state=state, workers=workers)
