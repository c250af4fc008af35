"""The training loop: a page of straight code over tensors on one device, for every model and loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphhash.errors import DataError
from graphhash.retrieval import RetrievalModel
from graphhash.row_adam import RowAdam
from pipeline.evaluate import K
from pipeline.models import Sample, objective, seldom_read


@dataclass(frozen=True)
class FitSettings:
    """What :func:`fit` needs to know; as in ``pipeline.config.TrainConfig``, every default decided."""

    lr: float
    weight_decay: float
    epochs: int
    eval_every: int
    patience: int
    batch_size: int | None
    seed: int
    loss: str = "bpr"
    gamma: float = 1.0
    unobserved_weight: float = 0.01


def fit(
    model: RetrievalModel,
    users: Tensor,
    items: Tensor,
    settings: FitSettings,
    validate: Callable[[RetrievalModel], dict[str, float]] | None,
    *,
    sample: Sample | None = None,
    state: dict[str, Any] | None = None,
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
    on_evaluation: Callable[[dict[str, Any]], None] = lambda state: None,
    lap: Callable[[str], None] = lambda phase: None,
) -> dict[str, Any]:
    """Train with Adam, the learning rate falling to 0 over the epochs. BPR draws one negative per interaction.

    Args:
        model: on the device to train on; left with the last epoch's weights.
        users, items: rows of the training interactions, int64, shape (n_interactions,), on the same device.
        settings: see there; ``patience`` counts evaluations, and with ``batch_size`` None an epoch is one step.
        validate: metrics of a model, ``recall@20`` among them, which is the one to raise; None: no validation, the last epoch
            is the best.
        sample: draws an item for each of some users, as a :class:`NegativeSampler`; None: uniformly, not rejected.
        state: what an earlier call handed to ``on_evaluation``; training goes on from there.
        on_epoch: told the number and loss of every epoch.
        on_evaluation: told the state after every evaluation: ``model``, ``optimizer``, ``generator``, ``epoch``, ``best``
            (weights), ``best_recall``, ``best_epoch``, ``n_worse``, ``history``.
        lap: told the name of every phase of a step when it is over: batches, negatives, forward, backward, step.

    Returns: the last state.

    Raises:
        DataError: the loss is no longer finite.
    """
    device = users.device
    n_items = model.item_embedding.n_ids
    optimizer = RowAdam(
        model.parameters(),
        seldom_read(model, settings.loss, settings.batch_size),
        lr=settings.lr,
        weight_decay=settings.weight_decay,
    )
    generator = torch.Generator(device).manual_seed(settings.seed)
    loss_of = objective(
        settings.loss,
        whole=settings.batch_size is None,
        gamma=settings.gamma,
        unobserved_weight=settings.unobserved_weight,
    )

    def negatives(batch_users: Tensor) -> Tensor:
        lap("batches")
        if sample is None:
            drawn = torch.randint(n_items, batch_users.shape, generator=generator, device=device)
        else:
            drawn = sample(batch_users, generator)
        lap("negatives")
        return drawn

    if state is None:
        state = {"epoch": 0, "best_recall": -math.inf, "best_epoch": 0, "n_worse": 0, "history": []}
    else:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"].cpu())
    started = time.perf_counter()
    with closing(optimizer):
        for epoch in range(state["epoch"] + 1, settings.epochs + 1):
            if state["n_worse"] >= settings.patience:
                break
            # A half cosine from lr to 0 (Loshchilov and Hutter, ICLR 2017): the same recall in half the epochs of a constant rate.
            progress = (epoch - 1) / settings.epochs
            optimizer.param_groups[0]["lr"] = settings.lr * (1 + math.cos(math.pi * progress)) / 2
            total = torch.zeros((), device=device)
            for batch_users, batch_items in _batches(users, items, settings.batch_size, generator):
                loss = loss_of(model, batch_users, batch_items, negatives)
                lap("forward")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                lap("backward")
                optimizer.step()
                total += loss.detach() * len(batch_users)
                lap("step")
            optimizer.finish()
            mean = float(total) / len(users)
            lap("step")
            if not math.isfinite(mean):
                raise DataError(f"the loss is {mean} in epoch {epoch}: training diverged; lower train.lr ({settings.lr:g})")
            on_epoch(epoch, mean)
            if epoch % settings.eval_every and epoch < settings.epochs:
                continue
            metrics = validate(model) if validate is not None else {}
            recall = metrics.get(f"recall@{K}", math.inf)
            weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
            if recall > state["best_recall"] or validate is None:
                state |= {"best": weights, "best_recall": recall, "best_epoch": epoch, "n_worse": 0}
            else:
                state["n_worse"] += 1
            entry = {"epoch": epoch, "loss": mean, **metrics, "seconds": round(time.perf_counter() - started, 2)}
            state |= {
                "epoch": epoch,
                "model": weights,
                "optimizer": optimizer.state_dict(),
                "generator": generator.get_state(),
                "history": [*state["history"], entry],
            }
            on_evaluation(state)
    return state


def _batches(
    users: Tensor, items: Tensor, batch_size: int | None, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Users and items of each step: all of them, or as many as ``batch_size`` in an order drawn anew."""
    if batch_size is None:
        yield users, items
        return
    order = torch.randperm(len(users), generator=generator, device=generator.device)
    yield from zip(users[order].split(batch_size), items[order].split(batch_size), strict=True)
