"""The training loop: a page of straight code over tensors on one device, for every task, model and loss.

Where the process has joined a process group (``torch.distributed``), as in a Ray Train worker, it trains with the others: see
``graphhash.nn.workers``. One process alone gives the same bits in every run on a CPU; several give the same as several.
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
from graphhash.nn.embedding import BucketEmbedding
from graphhash.nn.row_adam import RowAdam
from graphhash.nn.workers import Workers
from pipeline.training.speedups import compiled, reduced_precision

_log = logging.getLogger(__name__)

# Loss of a batch, the mean over its examples: the model, the batch, and where what is random is drawn from.
LossOf = Callable[[nn.Module, Sequence[Tensor], torch.Generator], Tensor]
# Examples of at most this many numbers are put in a new order all at once, larger ones batch by batch.
SMALL_EXAMPLE = 4
# What `ask` answers: nothing is wanted; hand the state to `on_save`; the same, and return.
CONTINUE, SAVE, STOP = 0, 1, 2
# About how often it is asked.
ASK_S = 0.2


@dataclass(frozen=True)
class FitSettings:
    """What :func:`fit` needs to know; as in ``pipeline.config.run_config.TrainConfig``, every default decided."""

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
    on_save: Callable[[dict[str, Any]], None] = lambda state: None,
    ask: Callable[[], int] = lambda: CONTINUE,
    lap: Callable[[str], None] = lambda phase: None,
    note: Callable[[str], None] = _log.warning,
    workers: Workers | None = None,
    n_examples: int | None = None,
) -> dict[str, Any]:
    """Train with Adam, the learning rate falling to 0 over the epochs.

    Args:
        model: on the device to train on; left with the last epoch's weights.
        examples: what is learned from, tensors of equal length; a batch takes the same rows of each. Each worker takes its share and
            moves it to the model's device.
        settings: see there; ``patience`` counts evaluations, and with ``batch_size`` None an epoch is one step. A batch is that of all
            workers together.
        loss_of: see :data:`LossOf`; several workers call it for their parts of a batch, at the same time. A term that is no mean over
            examples has to take care of this (see ``pipeline.retrieval.models``).
        validate: metrics of a model; None: no validation, the last epoch is the best. All workers call it at the same time, and may
            share the work; the first worker's metrics count.
        score: the metric to raise.
        seldom: embeddings of which a step reads few rows (:class:`RowAdam`). Several workers pass on these rows alone with
            ``settings.sparse_gradients``, and whole gradients without.
        state: what an earlier call handed to ``on_evaluation`` or ``on_save``, or returned; training goes on from there. With another
            number of workers it goes on with other draws.
        on_epoch: told the number and loss of every epoch.
        on_evaluation: told the state after every evaluation: ``model``, ``optimizer``, ``epoch`` (done), ``step`` (done in the next
            one), ``workers`` (draws of each), ``best`` (weights), ``best_score``, ``best_epoch``, ``n_worse``, ``history``, ``seconds``,
            ``resumed`` (epochs that were gone on with). It is valid until the next step.
        on_save: told the state when ``ask`` wanted it.
        ask: asked between steps, some times a second and on the first worker alone: CONTINUE, SAVE or STOP.
        lap: told the name of every phase of a step when it is over: batches, forward, backward, step.
        note: told in a line what was asked for and cannot be had.
        workers: None: those of the process group that this process has joined, or it alone.
        n_examples: of all workers, where ``examples`` are this worker's share already, which is ``workers.share``.

    Returns: the last state, and in it whether it was ``stopped``.

    Raises:
        DataError: the loss is no longer finite, or there are more workers than examples.
    """
    workers = Workers.from_process_group() if workers is None else workers
    device = next(model.parameters()).device
    if n_examples is None:
        n_examples = len(examples[0])
        examples = [tensor[workers.share(n_examples)] for tensor in examples] if workers.size > 1 else examples
    examples = [tensor.to(device) for tensor in examples]
    steps = workers.steps(n_examples, settings.batch_size)
    assert len(examples[0]) == sum(own for own, _ in steps), "examples are not this worker's share"
    if settings.sparse_gradients and not seldom:
        note(
            "train.sparse_gradients=true is for CPUs and batches that read few rows of a table, which is not so here: they are dense"
        )
    waiting = list(seldom) if workers.size == 1 or settings.sparse_gradients else []
    workers.copy_from_first(model.state_dict().values())
    optimizer = RowAdam(model.parameters(), waiting, lr=settings.lr, weight_decay=settings.weight_decay)
    generator = torch.Generator(device).manual_seed(workers.seed(settings.seed))
    done, loss_sum, order_drawn_from = 0, 0.0, None
    if state is None:
        state = {"epoch": 0, "step": 0, "best_score": -math.inf, "best_epoch": 0, "n_worse": 0, "history": [], "seconds": 0.0,
                 "resumed": []}  # fmt: skip
    else:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if len(state["workers"]) == workers.size:
            draws = state["workers"][workers.rank]
            done, loss_sum, order_drawn_from = state["step"], draws["loss_sum"], draws["order_drawn_from"].cpu()
            generator.set_state(draws["generator"].cpu())
        else:
            # The epoch is begun anew: its order was that of other shares.
            note(
                f"this training was begun by {len(state['workers'])} and goes on with {workers.size} workers: other draws from here on"
            )
            generator.manual_seed(workers.seed(settings.seed, state["epoch"] + 1))
        state = state | {"resumed": [*state["resumed"], state["epoch"]]}
    started = time.perf_counter() - state["seconds"]
    control = _Control(ask, workers)
    with closing(optimizer), reduced_precision(settings.amp, device, note) as precision:
        loss_of = compiled(loss_of, device, note) if settings.compile else loss_of

        def snapshot(step: int, total: Tensor) -> dict[str, Any]:
            optimizer.finish()
            # The position in the examples comes from the generator of the epoch's start, and what the losses draw from that of now.
            draws = {"generator": generator.get_state(), "order_drawn_from": order_drawn_from, "loss_sum": float(total)}
            return {
                "model": {name: value.detach().clone() for name, value in model.state_dict().items()},
                "optimizer": optimizer.state_dict(),
                "workers": workers.gather_objects(draws),
                "step": step,
                "seconds": time.perf_counter() - started,
            }

        for epoch in range(state["epoch"] + 1, settings.epochs + 1):
            if state["n_worse"] >= settings.patience:
                break
            # A half cosine from lr to 0 (Loshchilov and Hutter, ICLR 2017): the same recall in half the epochs of a constant rate.
            progress = (epoch - 1) / settings.epochs
            optimizer.param_groups[0]["lr"] = settings.lr * (1 + math.cos(math.pi * progress)) / 2
            model.train()
            total = torch.full((), loss_sum, device=device)
            if done:
                drawn_so_far = generator.get_state()
                generator.set_state(order_drawn_from)
            else:
                order_drawn_from = generator.get_state()
            batches = _batches(examples, steps, generator, whole=settings.batch_size is None)
            for _ in range(done):
                next(batches)
            if done:
                generator.set_state(drawn_so_far)
            for step, batch in enumerate(batches, done):
                lap("batches")
                with precision():
                    loss = loss_of(model, batch, generator)
                lap("forward")
                optimizer.zero_grad(set_to_none=True)
                own, of_all = steps[step]
                # Of the mean over the batch of all workers, the own part.
                (loss if workers.size == 1 else loss * (own / of_all)).backward()
                lap("backward")
                workers.sum_gradients(model.parameters())
                optimizer.step()
                total += loss.detach() * own
                lap("step")
                if (answer := control()) != CONTINUE:
                    state |= snapshot(step + 1, total)
                    on_save(state)
                    if answer == STOP:
                        return state | {"stopped": True}
            optimizer.finish()
            mean = float(workers.sum(total)) / n_examples
            done, loss_sum = 0, 0.0
            lap("step")
            if not math.isfinite(mean):
                raise DataError(
                    f"the loss is {mean} in epoch {epoch}: training diverged; lower train.lr ({settings.lr:g})"
                )
            on_epoch(epoch, mean)
            state |= {"epoch": epoch, "step": 0}
            if epoch % settings.eval_every and epoch < settings.epochs:
                continue
            model.eval()
            metrics = workers.broadcast_object(validate(model) if validate is not None else {})
            state |= snapshot(0, torch.zeros(()))
            if validate is None or metrics[score] > state["best_score"]:
                reached = metrics[score] if validate is not None else math.inf
                state |= {"best": state["model"], "best_score": reached, "best_epoch": epoch, "n_worse": 0}
            else:
                state["n_worse"] += 1
            entry = {"epoch": epoch, "loss": mean, **metrics, "seconds": round(state["seconds"], 2)}
            state["history"] = [*state["history"], entry]
            on_evaluation(state)
    return state | {"stopped": False}


class _Control:
    """Asks the first worker, and tells all of them in the same step; every so many steps that ASK_S goes by between two times."""

    def __init__(self, ask: Callable[[], int], workers: Workers) -> None:
        self._ask, self._workers = ask, workers
        self._n, self._until, self._since = 0, 1, time.monotonic()

    def __call__(self) -> int:
        self._n += 1
        if self._n < self._until:
            return CONTINUE
        now = time.monotonic()
        per_step = max(now - self._since, 1e-9) / self._n
        own = (self._ask() if self._workers.rank == 0 else CONTINUE, max(1, min(10_000, int(ASK_S / per_step))))
        answer, self._until = self._workers.broadcast(own)
        self._n, self._since = 0, now
        return answer


def _batches(
    examples: Sequence[Tensor], steps: Sequence[tuple[int, int]], generator: torch.Generator, *, whole: bool
) -> Iterator[Sequence[Tensor]]:
    """The own examples of each step, in an order drawn anew; with ``whole`` all of them in one, as they are."""
    if whole:
        yield examples
        return
    sizes = [own for own, _ in steps]
    order = torch.randperm(len(examples[0]), generator=generator, device=generator.device)
    if sum(tensor[0].numel() for tensor in examples) <= SMALL_EXAMPLE:
        # Cheaper in one piece, and no second copy to speak of.
        yield from zip(*(tensor[order].split(sizes) for tensor in examples), strict=True)
        return
    for rows in order.split(sizes):
        yield [tensor.index_select(0, rows) for tensor in examples]
