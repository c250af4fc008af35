"""The workers of a data-parallel training: their shares of the examples, and their collectives over ``torch.distributed``.

Every worker holds the whole model and a share of the examples. A step is over the batch of *all* workers: each computes the gradient of
its part, the parts are summed, and every worker makes the same step. A batch size therefore means the same for any number of workers, and
the weights stay equal, bit for bit. Gradients are summed after the backward pass by :meth:`Workers.sum_gradients` and not by
``DistributedDataParallel``: an all-reduce gives every worker the same bits, parts of different sizes get their proper weights, and a
row-wise optimiser gets its rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graphhash.errors import DataError

# Gradients below this many numbers are sent together; a call for each would wait longer than it sends.
SMALL_GRADIENT = 2**20


@dataclass(frozen=True)
class Workers:
    """This worker and the number of workers; a single one by default, for which all collectives cost nothing.

    Args:
        rank: number of this worker, 0 .. ``size - 1``.
        size: number of workers.
        control: process group over CPUs, for numbers and objects; None: the default group.
    """

    rank: int = 0
    size: int = 1
    control: Any = None

    @classmethod
    def from_process_group(cls) -> Workers:
        """The workers of the default process group, all of which have to call this; a single worker where there is none."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        control = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        return cls(dist.get_rank(), dist.get_world_size(), control)

    def share(self, n: int) -> slice:
        """This worker's share of ``n`` examples, in an order that all workers have: every ``size``-th, so that shares are alike."""
        return slice(self.rank, n, self.size)

    def steps(self, n_examples: int, batch_size: int | None) -> list[tuple[int, int]]:
        """How many examples each step of an epoch takes from this worker's share, and from all shares together.

        Every worker has the same number of steps, none of them empty. All batches hold ``batch_size`` but the last, which holds the
        rest; a rest too small for a part to every worker goes with the batch before it.

        Args:
            n_examples: of all workers.
            batch_size: of all workers; None: one step.

        Raises:
            DataError: there are fewer examples, in all or in a batch, than workers.
        """
        if min(n_examples, n_examples if batch_size is None else batch_size) < self.size > 1:
            what = f"{n_examples} examples" if n_examples < self.size else f"batches of {batch_size}"
            raise DataError(f"{what} have no part for each of {self.size} workers; use fewer workers")
        ends = [n_examples] if batch_size is None else [*range(batch_size, n_examples, batch_size), n_examples]
        if len(ends) > 1 and ends[-1] - ends[-2] < self.size:
            del ends[-2]
        own = [len(range(self.rank, end, self.size)) for end in ends]
        return list(zip(_differences(own), _differences(ends), strict=True))

    def seed(self, seed: int, epoch: int = 0) -> int:
        """The seed of this worker's random draws from ``epoch`` on; ``seed`` itself for the first worker from epoch 0."""
        if self.rank == 0 and epoch == 0:
            return seed
        import numpy as np

        return int(np.random.SeedSequence([seed, self.rank, epoch]).generate_state(1, np.uint64)[0] >> 1)

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over all workers; the same parameters must have one on every worker.

        Sparse gradients are gathered: every worker gets the entries of all, by rank.
        """
        if self.size == 1:
            return
        small = []
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.is_sparse:
                parameter.grad = self._gather_sparse(gradient)
            elif gradient.numel() >= SMALL_GRADIENT:
                parameter.grad = self.sum(gradient.contiguous())
            else:
                small.append(gradient)
        if small:
            flat = self.sum(torch.cat([gradient.reshape(-1) for gradient in small]))
            for gradient, summed in zip(small, flat.split([gradient.numel() for gradient in small]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all workers, written to ``tensor``, which has one shape on all of them."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite every worker's tensors with the first worker's."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def gather_rows(self, rows: Tensor, counts: Sequence[int] | None = None) -> tuple[Tensor, int]:
        """The rows of all workers by rank, without a gradient, and the position of this worker's first row.

        Args:
            rows: shape (n, ...), where n may differ between workers, but not the rest of the shape or the dtype.
            counts: every worker's n, where they are known.
        """
        if self.size == 1:
            return rows.detach(), 0
        counts = self._counts(len(rows)) if counts is None else counts
        # gloo gathers tensors of one size.
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows.detach()
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:n] for part, n in zip(gathered, counts, strict=True)]), sum(counts[: self.rank])

    def total(self, n: int) -> int:
        """The sum of every worker's ``n``."""
        return n if self.size == 1 else sum(self._counts(n))

    def broadcast(self, numbers: Sequence[int]) -> list[int]:
        """The first worker's ``numbers`` on all workers; of the same length on each."""
        if self.size == 1:
            return list(numbers)
        sent = torch.tensor(numbers, dtype=torch.int64)
        dist.broadcast(sent, 0, group=self.control)
        return sent.tolist()

    def broadcast_object(self, value: Any) -> Any:
        """The first worker's ``value`` on all workers; it is pickled."""
        if self.size == 1:
            return value
        sent = [value]
        dist.broadcast_object_list(sent, 0, group=self.control)
        return sent[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every worker's ``value``, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def _counts(self, n: int) -> list[int]:
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([n]), group=self.control)
        return [int(count) for count in counts]

    def _gather_sparse(self, gradient: Tensor) -> Tensor:
        rows, _ = self.gather_rows(gradient._indices()[0])
        values, _ = self.gather_rows(gradient._values())
        return torch.sparse_coo_tensor(rows[None], values, gradient.shape, check_invariants=False)


def _differences(ends: Sequence[int]) -> list[int]:
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
