"""The training loop: a page of straight code over tensors on one device, for every task, model and loss.

In a process group (``torch.distributed``), as in a Ray Train worker, it trains together with the other workers: see
``graphhash.nn.workers``. One worker gives the same bits in every run on a CPU; several give the same bits as the same number before.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphhash.errors import DataError
from graphhash.models.ctr_layers import BatchNorm
from graphhash.nn.embedding import BucketEmbedding
from graphhash.nn.row_adam import RowAdam
from graphhash.nn.workers import Workers
from pipeline.training.examples import StreamedExamples, batches_in_memory
from pipeline.training.groups import parameter_groups
from pipeline.training.memory import tensor_bytes
from pipeline.training.speedups import compiled, reduced_precision

_log = logging.getLogger(__name__)

# Mean loss over the examples of a batch: the model, the batch, and the generator for whatever is random.
LossOf = Callable[[nn.Module, Sequence[Tensor], torch.Generator], Tensor]
# What `Callbacks.poll` returns: go on; hand the state to `on_save`; the same, and return.
CONTINUE, SAVE, STOP = 0, 1, 2
# About how often it is polled.
POLL_S = 0.2


@dataclass(frozen=True)
class FitSettings:
    """Settings of :func:`fit`, as in ``pipeline.config.run_config.TrainConfig``, every default resolved.

    Args:
        patience: evaluations without a better score before training stops.
        batch_size: examples per step, of all workers together; None: an epoch is one step.
        schedule: of the learning rate, "cosine" or "constant".
        last_epoch: where training ends, with the learning rates of a training of ``epochs``; None: ``epochs``.
        table_decay: weight decay of ``Objective.tables``; None: ``weight_decay``.
    """

    lr: float
    weight_decay: float
    epochs: int
    eval_every: int
    patience: int
    batch_size: int | None
    seed: int
    amp: str | None = None
    compile: bool = False
    sparse_gradients: bool = False
    schedule: str = "cosine"
    last_epoch: int | None = None
    table_decay: float | None = None

    @property
    def n_epochs(self) -> int:
        """Epochs that are trained at most."""
        return self.epochs if self.last_epoch is None else self.last_epoch

    def lr_of(self, epoch: int) -> float:
        """The learning rate of an epoch, from 1: ``lr``, or a half cosine from it to 0 (Loshchilov and Hutter, ICLR 2017).

        The half cosine reaches the recall of a constant rate in half the epochs.
        """
        if self.schedule == "constant":
            return self.lr
        progress = (epoch - 1) / self.epochs
        return self.lr * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Objective:
    """What a training minimises, and what it is validated by.

    Args:
        loss_of: see :data:`LossOf`; several workers call it for their parts of a batch, at the same time. A term that is not a mean over
            examples has to take care of this (see ``pipeline.retrieval.models``).
        score: the metric to raise.
        validate: metrics of a model; None: no validation, the last epoch is the best. All workers call it at the same time, and may
            share the work; the first worker's metrics count.
        rarely_read: embeddings of which a step reads few rows (:class:`RowAdam`). Several workers exchange only these rows with
            ``settings.sparse_gradients``, and whole gradients without.
        before_epoch: called with the number of every epoch, from 1, and how many there are at most, before its first step.
        tables: parameters with ``settings.table_decay``.
    """

    loss_of: LossOf
    score: str
    validate: Callable[[Any], dict[str, float]] | None = None
    rarely_read: Sequence[BucketEmbedding] = ()
    before_epoch: Callable[[int, int], None] = lambda epoch, n_epochs: None
    tables: Sequence[nn.Parameter] = ()


@dataclass(frozen=True)
class Callbacks:
    """Functions that :func:`fit` calls.

    Args:
        on_epoch: with number and mean loss of every epoch.
        on_evaluation: with the state after every evaluation: ``model`` (weights), ``optimizer``, ``epoch`` (done), ``step`` (done in the
            next one), ``workers`` (generators of each), ``best`` (weights), ``best_score``, ``best_epoch``, ``n_worse``, ``history``,
            ``seconds``, ``resumed`` (epochs at which the training was resumed). It is valid until the next step.
        on_save: with the state, when ``poll`` returned SAVE or STOP.
        poll: between steps, some times a second, on the first worker: returns CONTINUE, SAVE or STOP.
        on_phase: with the name of every phase of a step when it ends: batches, forward, backward, step.
        warn: with a line on what is unavailable.
    """

    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None
    on_evaluation: Callable[[dict[str, Any]], None] = lambda state: None
    on_save: Callable[[dict[str, Any]], None] = lambda state: None
    poll: Callable[[], int] = lambda: CONTINUE
    on_phase: Callable[[str], None] = lambda phase: None
    warn: Callable[[str], None] = _log.warning


def fit(
    model: nn.Module,
    examples: Sequence[Tensor] | StreamedExamples,
    settings: FitSettings,
    objective: Objective,
    *,
    callbacks: Callbacks = Callbacks(),
    state: dict[str, Any] | None = None,
    workers: Workers | None = None,
) -> dict[str, Any]:
    """Train with Adam.

    Args:
        model: on the device to train on; left with the last epoch's weights.
        examples: tensors of equal length, or what is read from disk; a batch takes the same rows of each. Each worker trains on its share.
        state: what an earlier call handed to a callback, or returned; training resumes from there. With another number of workers it
            resumes with other random numbers.
        workers: None: those of this process group, or this process alone.

    Returns: the last state, and in it whether it was ``stopped``.

    Raises:
        DataError: the loss is no longer finite, or there are more workers than examples.
    """
    training = _Training(model, examples, settings, objective, callbacks, workers or Workers.from_process_group())
    state = training.begin() if state is None else training.resume(state)
    optimizer, generator, on_phase = training.optimizer, training.generator, callbacks.on_phase
    with closing(optimizer), reduced_precision(settings.amp, training.device, callbacks.warn) as precision:
        loss_of = objective.loss_of
        loss_of = compiled(loss_of, training.device, callbacks.warn) if settings.compile else loss_of
        for epoch in range(state["epoch"] + 1, settings.n_epochs + 1):
            if state["n_worse"] >= settings.patience:
                break
            for group in optimizer.param_groups:
                group["lr"] = settings.lr_of(epoch)
            model.train()
            objective.before_epoch(epoch, settings.epochs)
            for step, batch in training.batches():
                on_phase("batches")
                optimizer.zero_grad(set_to_none=True)
                with precision():
                    loss = loss_of(model, batch, generator)
                on_phase("forward")
                training.weighted(loss, step).backward()
                on_phase("backward")
                training.step(loss, step)
                on_phase("step")
                if (answer := training.poll()) != CONTINUE:
                    state |= training.snapshot(step + 1)
                    callbacks.on_save(state)
                    if answer == STOP:
                        return state | {"stopped": True}
            loss_of_epoch = training.end_epoch(epoch)
            on_phase("step")
            callbacks.on_epoch(epoch, loss_of_epoch)
            state |= {"epoch": epoch, "step": 0, "training_bytes": training.held_bytes()}
            if epoch % settings.eval_every == 0 or epoch == settings.n_epochs:
                state |= training.evaluate(state, loss_of_epoch)
                callbacks.on_evaluation(state)
    return state | {"stopped": False}


class _Training:
    """The moving parts of one training: optimiser, generator, and the place in the epoch."""

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[Tensor] | StreamedExamples,
        settings: FitSettings,
        objective: Objective,
        callbacks: Callbacks,
        workers: Workers,
    ) -> None:
        self._model, self._settings, self._objective, self._workers = model, settings, objective, workers
        self._warn = callbacks.warn
        self.device = next(model.parameters()).device
        if isinstance(examples, StreamedExamples):
            self._n_examples = len(examples)
            self._examples: list[Tensor] | StreamedExamples = examples.share(workers, self.device)
        else:
            self._n_examples = len(examples[0])
            share = workers.share(self._n_examples)
            own = [tensor[share] for tensor in examples] if workers.size > 1 else examples
            self._examples = [tensor.to(self.device) for tensor in own]
        self._steps = workers.steps(self._n_examples, settings.batch_size)
        self._batch_statistics = batch_statistics(model) if workers.size > 1 else []
        if settings.sparse_gradients and not objective.rarely_read:
            self._warn(
                "train.sparse_gradients=true is for CPUs and batches that read few rows of a table, which is not so here: "
                "they are dense"
            )
        workers.copy_from_first(model.state_dict().values())
        # Several workers exchange sparse gradients where that is asked for.
        sparse = list(objective.rarely_read) if workers.size == 1 or settings.sparse_gradients else []
        groups = parameter_groups(model, objective.tables, settings.table_decay)
        self.optimizer = RowAdam(groups, sparse, lr=settings.lr, weight_decay=settings.weight_decay)
        self.generator = torch.Generator(self.device).manual_seed(workers.seed(settings.seed))
        # Steps of this epoch that are done, the sum of their losses, and the generator from which the epoch's order was drawn.
        self._n_done, self._loss_sum, self._order_drawn_from = 0, 0.0, self.generator.get_state()
        self._total = torch.zeros((), device=self.device)
        self._started = time.perf_counter()
        self.poll = _Poll(callbacks.poll, workers)

    def begin(self) -> dict[str, Any]:
        """The state before the first step."""
        return {
            "epoch": 0,
            "step": 0,
            "best_score": -math.inf,
            "best_epoch": 0,
            "n_worse": 0,
            "history": [],
            "seconds": 0.0,
            "resumed": [],
            "training_bytes": 0,
        }

    def resume(self, state: dict[str, Any]) -> dict[str, Any]:
        """Put weights, optimiser and generator where a state has them."""
        self._model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if len(state["workers"]) == self._workers.size:
            own = state["workers"][self._workers.rank]
            self._n_done, self._loss_sum = state["step"], own["loss_sum"]
            self._order_drawn_from = own["order_drawn_from"].cpu()
            self.generator.set_state(own["generator"].cpu())
        else:
            # The epoch begins anew: its order was that of other shares.
            self._warn(
                f"this training was begun by {len(state['workers'])} and goes on with {self._workers.size} workers: "
                "other draws from here on"
            )
            self.generator.manual_seed(self._workers.seed(self._settings.seed, state["epoch"] + 1))
        self._started = time.perf_counter() - state["seconds"]
        return state | {"resumed": [*state["resumed"], state["epoch"]]}

    def batches(self) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """Numbers and own examples of the epoch's steps that are not done, in an order drawn anew for every epoch."""
        self._total = torch.full((), self._loss_sum, device=self.device)
        whole = self._settings.batch_size is None
        drawn_so_far = self.generator.get_state()
        if self._n_done:
            self.generator.set_state(self._order_drawn_from)
        else:
            self._order_drawn_from = drawn_so_far
        if isinstance(self._examples, StreamedExamples):
            batches: Iterator[Sequence[Tensor]] = self._examples.batches(
                [own for own, _ in self._steps], self.generator, self._n_done
            )
        else:
            batches = batches_in_memory(self._examples, self._steps, self.generator, whole=whole)
            for _ in range(self._n_done):
                next(batches)
        if self._n_done:
            self.generator.set_state(drawn_so_far)
        yield from enumerate(batches, self._n_done)

    def weighted(self, loss: Tensor, step: int) -> Tensor:
        """The own part of the mean over the batch of all workers."""
        n_own, n_all = self._steps[step]
        return loss if self._workers.size == 1 else loss * (n_own / n_all)

    def step(self, loss: Tensor, step: int) -> None:
        """One step of the optimiser with the gradients of all workers."""
        self._workers.sum_gradients(self._model.parameters())
        self.optimizer.step()
        self._total += loss.detach() * self._steps[step][0]

    def end_epoch(self, epoch: int) -> float:
        """The mean loss of the epoch over the examples of all workers, whose batch statistics are averaged.

        Raises:
            DataError: it is not finite.
        """
        self.optimizer.finish()
        for statistic in self._batch_statistics:
            self._workers.sum(statistic).div_(self._workers.size)
        mean = float(self._workers.sum(self._total)) / self._n_examples
        self._n_done, self._loss_sum, self._total = 0, 0.0, torch.zeros(())
        if not math.isfinite(mean):
            raise DataError(
                f"the loss is {mean} in epoch {epoch}: training diverged; lower train.lr ({self._settings.lr:g})"
            )
        return mean

    def held_bytes(self) -> int:
        """Bytes of the model and its optimiser as they are in memory: parameters, gradients, buffers and the optimiser's state."""
        parameters = list(self._model.parameters())
        tensors = [*parameters, *self._model.buffers(), *(p.grad for p in parameters if p.grad is not None)]
        return sum(tensor_bytes(tensor) for tensor in tensors) + self.optimizer.held_bytes()

    def snapshot(self, step: int) -> dict[str, Any]:
        """Weights, optimiser and generators after ``step`` steps of an epoch. All workers call it."""
        self.optimizer.finish()
        # The place in the examples comes from the generator of the epoch's start, and what the losses draw from that of now.
        own = {
            "generator": self.generator.get_state(),
            "order_drawn_from": self._order_drawn_from,
            "loss_sum": float(self._total),
        }
        fixed = _map_buffers(self._model)
        return {
            # Bucket maps are not trained, and may take more than all that is.
            "model": {
                name: value.detach() if name in fixed else value.detach().clone()
                for name, value in self._model.state_dict().items()
            },
            "optimizer": self.optimizer.state_dict(),
            "workers": self._workers.gather_objects(own),
            "step": step,
            "seconds": time.perf_counter() - self._started,
        }

    def evaluate(self, state: dict[str, Any], loss: float) -> dict[str, Any]:
        """Validate, and return what this changes of the state: the weights, the best ones so far, and the history."""
        validate, score = self._objective.validate, self._objective.score
        self._model.eval()
        metrics = self._workers.broadcast_object(validate(self._model) if validate is not None else {})
        now = self.snapshot(0)
        if validate is None or metrics[score] > state["best_score"]:
            reached = metrics[score] if validate is not None else math.inf
            now |= {"best": now["model"], "best_score": reached, "best_epoch": state["epoch"], "n_worse": 0}
        else:
            now["n_worse"] = state["n_worse"] + 1
        entry = {"epoch": state["epoch"], "loss": loss, **metrics, "seconds": round(now["seconds"], 2)}
        return now | {"history": [*state["history"], entry]}


class _Poll:
    """Polls on the first worker and broadcasts the answer to all of them in the same step, about every POLL_S.

    A GPU takes its first steps much later than they are given to it, so pauses at most double.
    """

    def __init__(self, poll: Callable[[], int], workers: Workers) -> None:
        self._poll, self._workers = poll, workers
        self._n, self._until, self._since = 0, 1, time.monotonic()

    def __call__(self) -> int:
        self._n += 1
        if self._n < self._until:
            return CONTINUE
        now = time.monotonic()
        per_step = max(now - self._since, 1e-9) / self._n
        steps = max(1, min(10_000, 2 * self._n, int(POLL_S / per_step)))
        own = (self._poll() if self._workers.rank == 0 else CONTINUE, steps)
        answer, self._until = self._workers.broadcast(own)
        self._n, self._since = 0, now
        return answer


def batch_statistics(model: nn.Module) -> list[Tensor]:
    """Means and variances that batch normalization takes over batches, shape (units,) each; a worker has those of its own parts."""
    norms = [module for module in model.modules() if isinstance(module, BatchNorm | nn.BatchNorm1d)]
    return [buffer for norm in norms for buffer in norm.buffers() if buffer.is_floating_point()]


def _map_buffers(model: nn.Module) -> set[str]:
    """Names of the buffers that hold bucket maps."""
    return {
        f"{name}.{buffer}".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, BucketEmbedding)
        for buffer in ("held_rows", "codebook", "codes")
    }
