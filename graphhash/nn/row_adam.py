"""Adam for tables of which a step reads few rows: a row that is not read waits, and is brought up to date when it is.

Every row moves in every step of Adam, read or not: its moments decay, and so do its numbers where there is weight decay. Here the
same steps are carried out with the same arithmetic, but those of a waiting row all at once, while the row is in the cache. A step
then costs what its batch touches and not what the table holds. This is not PyTorch's SparseAdam, which leaves the waiting rows'
steps out.

The waiting rows are looked after by forward hooks: whatever reads a table through its :class:`BucketEmbedding` finds it up to date.
Whoever looks at ``table`` itself calls :meth:`RowAdam.finish` first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray
from torch import Tensor, nn

from graphhash.nn.embedding import BucketEmbedding
from graphhash.nn.plain_adam import PlainAdam
from graphhash.nn.table_reads import threads_for, wide_rows

# Rows of one number that are brought up to date side by side, as many as some vector registers hold.
LANES = 64


@dataclass
class _Waiting:
    """What a table's rows have missed since the last :meth:`RowAdam.finish`.

    Args:
        done: steps that each row has taken, int32, shape (n_buckets,).
        slots: scratch of the kernels, int32, -1, same shape.
        step_sizes, scales: of every step: ``lr / (1 - beta1^t)`` and ``1 / sqrt(1 - beta2^t)``, float32.
    """

    done: NDArray[np.int32]
    slots: NDArray[np.int32]
    step_sizes: NDArray[np.float32] = field(default_factory=lambda: np.empty(64, np.float32))
    scales: NDArray[np.float32] = field(default_factory=lambda: np.empty(64, np.float32))
    n_steps: int = 0

    def add_step(self, step_size: float, scale: float) -> None:
        if self.n_steps == len(self.scales):
            self.step_sizes, self.scales = (np.concatenate([a, a]) for a in (self.step_sizes, self.scales))
        self.step_sizes[self.n_steps], self.scales[self.n_steps] = step_size, scale
        self.n_steps += 1


class RowAdam(PlainAdam):
    """Adam; the state it saves is that of ``torch.optim.Adam``, and either takes the other's.

    Args:
        parameters: all that is trained; or groups of them, as Adam takes them, some with a ``weight_decay`` of their own.
        waiting: embeddings on a CPU, in float32, whose rows may wait; their tables, among ``parameters``, get sparse gradients until
            :meth:`close`. Embeddings that share a table are all here, or none of them is. None at all: this is plain Adam.
        lr, weight_decay: as in Adam.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | list[dict[str, Any]],
        waiting: Sequence[BucketEmbedding],
        *,
        lr: float,
        weight_decay: float,
    ):
        super().__init__(parameters, lr=lr, weight_decay=weight_decay, fused=True)
        self._embeddings = list(waiting)
        self._waiting: dict[nn.Parameter, _Waiting] = {}
        self._hooks = []
        for embedding in self._embeddings:
            n_rows = len(embedding.table)
            self._waiting[embedding.table] = _Waiting(np.zeros(n_rows, np.int32), np.full(n_rows, -1, np.int32))
            embedding.sparse = True
            self._hooks.append(embedding.register_forward_pre_hook(self._before_reading, with_kwargs=True))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # A closure's loss is never returned.
        """One step of Adam; rows without a gradient take it later."""
        assert closure is None, "a closure would read rows in the middle of a step"
        gradients = {table: table.grad for table in self._waiting}
        for table in gradients:
            # Skipped by Adam, as what has no gradient is.
            table.grad = None
        super().step()
        for table, gradient in gradients.items():
            if gradient is not None:
                self._step_rows(table, gradient)
                table.grad = gradient

    @torch.no_grad()
    def finish(self) -> None:
        """Let all rows take the steps that they have missed."""
        for table, waiting in self._waiting.items():
            self._catch_up(table, np.arange(len(table), dtype=np.int32))
            waiting.done[:] = waiting.n_steps = 0

    def close(self) -> None:
        """Finish, and leave the embeddings as they were found."""
        self.finish()
        for hook in self._hooks:
            hook.remove()
        for embedding in self._embeddings:
            embedding.sparse = False
        self._hooks, self._embeddings, self._waiting = [], [], {}

    def held_bytes(self) -> int:
        """Bytes of the optimiser's state in memory, and of what is noted for the rows that wait."""
        return tensor_bytes(self.state) + sum(w.done.nbytes + w.slots.nbytes for w in self._waiting.values())

    def state_dict(self) -> dict:
        self.finish()
        return super().state_dict()

    @torch.no_grad()
    def _before_reading(
        self, embedding: BucketEmbedding, arguments: tuple[Tensor, ...], named: dict[str, Tensor]
    ) -> None:
        read = embedding.entries(*arguments, **named)
        # Ids out of range are refused by the embedding itself.
        last = len(embedding.table if read.rows is None else read.rows) - 1
        rows = wide_rows(read._replace(entries=read.entries.clamp(0, last)))
        self._catch_up(embedding.table, rows.reshape(-1).numpy())

    def _catch_up(self, table: nn.Parameter, rows: NDArray[np.integer]) -> None:
        waiting, state = self._waiting[table], self.state.get(table)
        if not waiting.n_steps:
            return
        assert state is not None
        late = _late_rows(rows, waiting.done, waiting.n_steps)
        n_missed = waiting.n_steps - waiting.done[late]
        if is_column := table.shape[1] == 1:
            # Neighbours take about as many steps.
            late = late[np.argsort(n_missed, kind="stable")]
        with threads_for(int(n_missed.sum()) * table.shape[1]):
            (_replay_column if is_column else _replay)(
                late, waiting.done, waiting.n_steps, waiting.step_sizes, waiting.scales, kernel_constants(self._group_of(table)),
                table.numpy(), state["exp_avg"].numpy(), state["exp_avg_sq"].numpy(),
            )  # fmt: skip
        waiting.done[late] = waiting.n_steps

    def _group_of(self, table: nn.Parameter) -> dict[str, Any]:
        if len(self.param_groups) == 1:
            return self.param_groups[0]
        return next(group for group in self.param_groups if any(own is table for own in group["params"]))

    def _step_rows(self, table: nn.Parameter, gradient: Tensor) -> None:
        state, waiting = self.state[table], self._waiting[table]
        rows, values = gradient._indices()[0].numpy(), gradient._values().numpy()
        # Those that this process has read are up to date; those that another worker of the training has read may not be.
        self._catch_up(table, rows)
        if not state:
            state |= {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(table),
                "exp_avg_sq": torch.zeros_like(table),
            }
        state["step"] += 1
        group = self._group_of(table)
        (beta1, beta2), number = group["betas"], int(state["step"])
        waiting.add_step(group["lr"] / (1 - beta1**number), 1 / math.sqrt(1 - beta2**number))
        unique, sums = sum_rows(rows, values, waiting.slots)
        with threads_for(sums.size):
            step_rows(
                unique, sums, waiting.step_sizes[waiting.n_steps - 1], waiting.scales[waiting.n_steps - 1], kernel_constants(group),
                table.numpy(), state["exp_avg"].numpy(), state["exp_avg_sq"].numpy(),
            )  # fmt: skip
        waiting.done[unique] = waiting.n_steps


def kernel_constants(group: dict[str, Any]) -> NDArray[np.float32]:
    """Of a parameter group of Adam: weight decay, 1 - beta1, beta2, 1 - beta2, epsilon."""
    beta1, beta2 = group["betas"]
    return np.array([group["weight_decay"], 1 - beta1, beta2, 1 - beta2, group["eps"]], np.float32)


def tensor_bytes(state: Mapping[Any, dict[str, Any]]) -> int:
    """Bytes of the tensors in an optimizer's state."""
    tensors = [value for values in state.values() for value in values.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@njit(cache=True)
def _late_rows(rows, done, n_steps):
    """Those of ``rows`` that have taken fewer than ``n_steps`` steps, each once."""
    late = np.empty(len(rows), np.int32)
    n = 0
    for row in rows:
        if 0 <= done[row] < n_steps:
            # Marked by a negative number while the others are looked at, so that it is found once.
            done[row] = -1 - done[row]
            late[n] = row
            n += 1
    for place in range(n):
        done[late[place]] = -1 - done[late[place]]
    return late[:n]


@njit(cache=True)
def sum_rows(rows, values, slots):
    """The different rows, in order of appearance, and the sum of the values of each; ``slots`` is all -1, before and after."""
    unique = np.empty(len(rows), np.int32)
    sums = np.zeros(values.shape, np.float32)
    n = 0
    for place in range(len(rows)):
        row = rows[place]
        if slots[row] < 0:
            slots[row] = n
            unique[n] = row
            n += 1
        target, source = sums[slots[row]], values[place]
        for d in range(len(source)):
            target[d] += source[d]
    for place in range(n):
        slots[unique[place]] = -1
    return unique[:n], sums[:n]


@njit(cache=True, parallel=True, error_model="numpy")
def _replay(rows, done, n_steps, step_sizes, scales, constants, table, first, second):
    """Let each of ``rows``, all different, take the steps ``done[row]`` to ``n_steps`` without a gradient of its own."""
    decay, rate1, keep2, rate2, epsilon = constants
    dim = table.shape[1]
    for place in prange(len(rows)):
        row = rows[place]
        p, m, v = table[row], first[row], second[row]
        for step in range(done[row], n_steps):
            step_size, scale = step_sizes[step], scales[step]
            for d in range(dim):
                gradient = decay * p[d]
                m[d] += rate1 * (gradient - m[d])
                v[d] = keep2 * v[d] + rate2 * gradient * gradient
                p[d] -= step_size * m[d] / (np.sqrt(v[d]) * scale + epsilon)


@njit(cache=True, parallel=True, error_model="numpy")
def _replay_column(rows, done, n_steps, step_sizes, scales, constants, table, first, second):
    """:func:`_replay` of rows of one number: LANES of them take a step at a time, each from its own first step on.

    A number that is 0 and has never had a gradient stays so, step by step.
    """
    decay, rate1, keep2, rate2, epsilon = constants
    for group in prange((len(rows) + LANES - 1) // LANES):
        own = rows[group * LANES : (group + 1) * LANES]
        p, m, v = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
        begin, earliest = np.full(LANES, n_steps, np.int32), n_steps
        for lane in range(len(own)):
            row = own[lane]
            p[lane], m[lane], v[lane] = table[row, 0], first[row, 0], second[row, 0]
            if p[lane] != 0 or m[lane] != 0 or v[lane] != 0:
                begin[lane] = done[row]
                earliest = min(earliest, begin[lane])
        for step in range(earliest, n_steps):
            step_size, scale = step_sizes[step], scales[step]
            for lane in range(LANES):
                gradient = decay * p[lane]
                next_m = m[lane] + rate1 * (gradient - m[lane])
                next_v = keep2 * v[lane] + rate2 * gradient * gradient
                next_p = p[lane] - step_size * next_m / (np.sqrt(next_v) * scale + epsilon)
                begun = begin[lane] <= step
                m[lane] = next_m if begun else m[lane]
                v[lane] = next_v if begun else v[lane]
                p[lane] = next_p if begun else p[lane]
        for lane in range(len(own)):
            row = own[lane]
            table[row, 0], first[row, 0], second[row, 0] = p[lane], m[lane], v[lane]


@njit(cache=True, parallel=True, error_model="numpy")
def step_rows(rows, gradients, step_size, scale, constants, table, first, second):
    """One step of each of ``rows``, all different, with its gradient."""
    decay, rate1, keep2, rate2, epsilon = constants
    dim = table.shape[1]
    for place in prange(len(rows)):
        row = rows[place]
        p, m, v = table[row], first[row], second[row]
        for d in range(dim):
            gradient = gradients[place, d] + decay * p[d]
            m[d] += rate1 * (gradient - m[d])
            v[d] = keep2 * v[d] + rate2 * gradient * gradient
            p[d] -= step_size * m[d] / (np.sqrt(v[d]) * scale + epsilon)
