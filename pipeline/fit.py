"""The training loop: a page of straight code over tensors on one device, for every task, model and loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphhash.embedding import BucketEmbedding
from graphhash.errors import DataError
from graphhash.row_adam import RowAdam

# Loss of a batch, the mean over its examples: the model, the batch, and where what is random is drawn from.
LossOf = Callable[[nn.Module, Sequence[Tensor], torch.Generator], Tensor]
# Examples of at most this many numbers are put in a new order all at once, larger ones batch by batch.
SMALL_EXAMPLE = 4


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


def fit(
    model: nn.Module,
    examples: Sequence[Tensor],
    settings: FitSettings,
    loss_of: LossOf,
    validate: Callable[[Any], dict[str, float]] | None,
    *,
    score: str,
    seldom: Sequence[BucketEmbedding] = (),
    state: dict[str, Any] | None = None,
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
    on_evaluation: Callable[[dict[str, Any]], None] = lambda state: None,
    lap: Callable[[str], None] = lambda phase: None,
) -> dict[str, Any]:
    """Train with Adam, the learning rate falling to 0 over the epochs.

    Args:
        model: on the device to train on; left with the last epoch's weights.
        examples: what is learned from, tensors of equal length on the same device; a batch takes the same rows of each.
        settings: see there; ``patience`` counts evaluations, and with ``batch_size`` None an epoch is one step.
        loss_of: see :data:`LossOf`.
        validate: metrics of a model; None: no validation, the last epoch is the best.
        score: the metric to raise.
        seldom: embeddings of which a step reads few rows (:class:`RowAdam`).
        state: what an earlier call handed to ``on_evaluation``; training goes on from there.
        on_epoch: told the number and loss of every epoch.
        on_evaluation: told the state after every evaluation: ``model``, ``optimizer``, ``generator``, ``epoch``, ``best``
            (weights), ``best_score``, ``best_epoch``, ``n_worse``, ``history``.
        lap: told the name of every phase of a step when it is over: batches, forward, backward, step.

    Returns: the last state.

    Raises:
        DataError: the loss is no longer finite.
    """
    device, n_examples = examples[0].device, len(examples[0])
    optimizer = RowAdam(model.parameters(), list(seldom), lr=settings.lr, weight_decay=settings.weight_decay)
    generator = torch.Generator(device).manual_seed(settings.seed)
    if state is None:
        state = {"epoch": 0, "best_score": -math.inf, "best_epoch": 0, "n_worse": 0, "history": []}
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
            model.train()
            total = torch.zeros((), device=device)
            for batch in _batches(examples, settings.batch_size, generator):
                lap("batches")
                loss = loss_of(model, batch, generator)
                lap("forward")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                lap("backward")
                optimizer.step()
                total += loss.detach() * len(batch[0])
                lap("step")
            optimizer.finish()
            mean = float(total) / n_examples
            lap("step")
            if not math.isfinite(mean):
                raise DataError(f"the loss is {mean} in epoch {epoch}: training diverged; lower train.lr ({settings.lr:g})")
            on_epoch(epoch, mean)
            if epoch % settings.eval_every and epoch < settings.epochs:
                continue
            model.eval()
            metrics = validate(model) if validate is not None else {}
            weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
            if validate is None or metrics[score] > state["best_score"]:
                reached = metrics[score] if validate is not None else math.inf
                state |= {"best": weights, "best_score": reached, "best_epoch": epoch, "n_worse": 0}
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


def _batches(examples: Sequence[Tensor], batch_size: int | None, generator: torch.Generator) -> Iterator[Sequence[Tensor]]:
    """The examples of each step: all of them, or as many as ``batch_size`` in an order drawn anew."""
    if batch_size is None:
        yield examples
        return
    order = torch.randperm(len(examples[0]), generator=generator, device=generator.device)
    if sum(tensor[0].numel() for tensor in examples) <= SMALL_EXAMPLE:
        # Cheaper in one piece, and no second copy to speak of.
        yield from zip(*(tensor[order].split(batch_size) for tensor in examples), strict=True)
        return
    for rows in order.split(batch_size):
        yield [tensor.index_select(0, rows) for tensor in examples]
