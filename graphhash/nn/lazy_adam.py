"""Adam that moves the rows of a table that a step reads, and leaves the others and their moments as they are.

In Adam a row that a step does not read still moves along its first moment. With batches that read few rows of a table, most of a row's
steps are such. Lazy updates were proposed for sparse gradients as PyTorch's SparseAdam and TensorFlow Addons' LazyAdam do them: the bias
correction counts all steps of the training, not those of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graphhash.nn.embedding import BucketEmbedding
from graphhash.nn.plain_adam import PlainAdam
from graphhash.nn.row_adam import kernel_constants, step_rows, sum_rows, tensor_bytes
from graphhash.nn.table_reads import threads_for


class LazyAdam(PlainAdam):
    """Adam; of a table's rows, those with a gradient other than zero take a step.

    The state it saves has the layout of ``torch.optim.Adam``. Weight decay, too, is applied to the rows that take a step alone.

    Args:
        parameters: all that is trained.
        tables: those of the parameters, of shape (n_rows, dim), whose rows are left alone unless a step reads them.
        rarely_read: embeddings on a CPU, in float32, whose tables, among ``tables``, get sparse gradients until :meth:`close`. Embeddings
            that share a table are all here, or none of them is.
        lr, weight_decay: as in Adam.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        tables: Sequence[nn.Parameter],
        rarely_read: Sequence[BucketEmbedding] = (),
        *,
        lr: float,
        weight_decay: float,
    ):
        super().__init__(parameters, lr=lr, weight_decay=weight_decay, fused=True)
        # Tables that are shared are here once; a dictionary keeps their order.
        self._tables = list(dict.fromkeys(tables))
        self._rarely_read = list(rarely_read)
        self._slots = {
            part.table: np.full(len(part.table), -1, np.int32) for part in self._rarely_read
        }  # Scratch of the kernel.
        for embedding in self._rarely_read:
            embedding.sparse = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # A closure's loss is never returned.
        """One step of Adam; of the tables' rows, for those with a gradient."""
        assert closure is None, "gradients are taken away from Adam in the middle of a step"
        gradients = {table: table.grad for table in self._tables}
        for table in gradients:
            # Skipped by Adam, as what has no gradient is.
            table.grad = None
        super().step()
        for table, gradient in gradients.items():
            if gradient is not None:
                self._step_table(table, gradient)
                table.grad = gradient

    def finish(self) -> None:
        """Nothing: no row has missed a step."""

    def close(self) -> None:
        """Leave the embeddings as they were found."""
        for embedding in self._rarely_read:
            embedding.sparse = False
        self._rarely_read = []

    def held_bytes(self) -> int:
        """Bytes of the optimizer's state in memory, and of its scratch."""
        return tensor_bytes(self.state) + sum(slots.nbytes for slots in self._slots.values())

    def _step_table(self, table: nn.Parameter, gradient: Tensor) -> None:
        state = self.state[table]
        if not state:
            state |= {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(table),
                "exp_avg_sq": torch.zeros_like(table),
            }
        state["step"] += 1
        group = self.param_groups[0]
        (beta1, beta2), number = group["betas"], int(state["step"])
        step_size, scale = group["lr"] / (1 - beta1**number), 1 / math.sqrt(1 - beta2**number)
        step = self._step_rows_of_table if table.device.type == "cpu" else self._step_masked
        step(table, gradient, step_size, scale)

    def _step_rows_of_table(self, table: nn.Parameter, gradient: Tensor, step_size: float, scale: float) -> None:
        group, state = self.param_groups[0], self.state[table]
        rows, sums = _rows_and_sums(gradient, self._slots.get(table))
        with threads_for(sums.size):
            step_rows(
                rows, sums, np.float32(step_size), np.float32(scale), kernel_constants(group),
                table.numpy(), state["exp_avg"].numpy(), state["exp_avg_sq"].numpy(),
            )  # fmt: skip

    def _step_masked(self, table: nn.Parameter, gradient: Tensor, step_size: float, scale: float) -> None:
        """The same without knowing how many rows there are, for which a GPU would have to be waited for."""
        group, state = self.param_groups[0], self.state[table]
        beta1, beta2 = group["betas"]
        first, second = state["exp_avg"], state["exp_avg_sq"]
        read = (gradient != 0).any(1, keepdim=True)
        gradient = gradient.add(table, alpha=group["weight_decay"]) if group["weight_decay"] else gradient
        first.copy_(torch.where(read, first.lerp(gradient, 1 - beta1), first))
        second.copy_(torch.where(read, second.mul(beta2).addcmul_(gradient, gradient, value=1 - beta2), second))
        change = first / (second.sqrt().mul_(scale).add_(group["eps"]))
        table.sub_(torch.where(read, change, 0.0), alpha=step_size)


def _rows_and_sums(gradient: Tensor, slots: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Rows with a gradient other than zero, int32, shape (n,), and these gradients, float32, shape (n, dim)."""
    if gradient.is_sparse:
        assert slots is not None
        rows, sums = sum_rows(gradient._indices()[0].numpy(), gradient._values().numpy(), slots)
        read = sums.any(1)
        return (rows, sums) if read.all() else (rows[read], sums[read])
    dense = gradient.numpy()
    rows = np.flatnonzero(dense.any(1)).astype(np.int32)
    return rows, dense[rows]
