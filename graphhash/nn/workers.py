"""The workers of one training: what each of them learns from, and what they tell each other, over ``torch.distributed``.

Every worker holds the whole model and a share of the examples. A step is one over a batch of *all* workers: each takes the gradient
of its part, the parts are added up, and every worker makes the same step. So a batch means the same whatever the number of workers,
and the weights stay alike, bit for bit. Gradients are added after the backward pass, in a call of its own and not by
``DistributedDataParallel``: an all-reduce gives every worker the same bits, parts of different sizes weigh what they should, and a
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
    """This worker among the others of its process group; by itself by default, and all calls are then free.

    Args:
        rank: number of this worker, 0 .. ``size - 1``.
        size: number of workers.
        control: process group over CPUs, for what is no tensor of the training; None: the default group.
    """

    rank: int = 0
    size: int = 1
    control: Any = None

    @classmethod
    def joined(cls) -> Workers:
        """Those of the process group that this process has joined, all of which have to call this; by itself without one."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        control = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        return cls(dist.get_rank(), dist.get_world_size(), control)

    def share(self, n: int) -> slice:
        """The own ones of ``n`` examples in any order that all workers know: every ``size``-th, so that shares are alike."""
        return slice(self.rank, n, self.size)

    def steps(self, n_examples: int, batch_size: int | None) -> list[tuple[int, int]]:
        """How many examples each step of an epoch takes from the own share, and from all shares together.

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
            raise DataError(f"{what} have no part for each of {self.size} workers; use fewer with --workers")
        ends = [n_examples] if batch_size is None else [*range(batch_size, n_examples, batch_size), n_examples]
        if len(ends) > 1 and ends[-1] - ends[-2] < self.size:
            del ends[-2]
        own = [len(range(self.rank, end, self.size)) for end in ends]
        return list(zip(_differences(own), _differences(ends), strict=True))

    def seed(self, seed: int, epoch: int = 0) -> int:
        """The seed of this worker's own draws; the first worker of a training from the start has ``seed`` itself."""
        if self.rank == 0 and epoch == 0:
            return seed
        import numpy as np

        return int(np.random.SeedSequence([seed, self.rank, epoch]).generate_state(1, np.uint64)[0] >> 1)

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put the sum over all workers in the place of every gradient; the same parameters have one on every worker.

        Sparse ones are gathered: every worker has the entries of all, by rank.
        """
        if self.size == 1:
            return
        having = [parameter for parameter in parameters if parameter.grad is not None]
        small = [p.grad for p in having if not p.grad.is_sparse and p.grad.numel() < SMALL_GRADIENT]
        for parameter in having:
            if parameter.grad.is_sparse:
                parameter.grad = self._gather_sparse(parameter.grad)
            elif parameter.grad.numel() >= SMALL_GRADIENT:
                parameter.grad = self.sum(parameter.grad.contiguous())
        if small:
            flat = self.sum(torch.cat([gradient.reshape(-1) for gradient in small]))
            for gradient, summed in zip(small, flat.split([gradient.numel() for gradient in small]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all workers, in the place of ``tensor``, of one shape everywhere."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite every worker's tensors with the first worker's."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def gather_rows(self, rows: Tensor, counts: Sequence[int] | None = None) -> tuple[Tensor, int]:
        """The rows of all workers by rank, without a gradient, and the place of the first own one.

        Args:
            rows: shape (n, ...), n of each worker its own, the rest of the shape and the dtype alike.
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

    def tell(self, numbers: Sequence[int]) -> list[int]:
        """The first worker's ``numbers``, of one length everywhere."""
        if self.size == 1:
            return list(numbers)
        told = torch.tensor(numbers, dtype=torch.int64)
        dist.broadcast(told, 0, group=self.control)
        return told.tolist()

    def tell_object(self, value: Any) -> Any:
        """The first worker's ``value``."""
        if self.size == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, 0, group=self.control)
        return told[0]

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
