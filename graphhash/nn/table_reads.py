"""Weighted sums of table rows, read through a bucket map: compiled kernels on a CPU, PyTorch's operations everywhere else.

The kernels take plain float32 tensors on a CPU and know their own gradient. What records operations (``torch.export``,
``torch.compile``, ``torch.jit.trace``), transforms them (``torch.func``) or replaces them (dispatch modes, tensor subclasses)
gets PyTorch's operations, and so does a second derivative.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from graphhash.graph.threads import numba_threads
from graphhash.nn import _kernels

# Below this many multiplications, waking other threads takes longer than the work.
SMALL_WORK = 1_000_000


class MapRead(NamedTuple):
    """A batch of reads through a bucket map.

    Attributes:
        rows, weights: of the map: int32 and a float type, shape (n_entries, indices_per_entry) each.
        entries: entries of the map that are read, int64, shape (n,).
    """

    rows: Tensor
    weights: Tensor
    entries: Tensor


@contextmanager
def threads_for(work: int) -> Iterator[None]:
    """Kernels in the block take torch's number of threads, or one where ``work``, in multiplications, is small."""
    with numba_threads(1 if work < SMALL_WORK else torch.get_num_threads()):
        yield


def gradient_slices(dim: int) -> int:
    """Pieces of parallel work on vectors of ``dim`` floats; 16 floats are a cache line, which threads must not share."""
    return max(1, min(dim // 16, torch.get_num_threads()))


def may_use_kernels(*tensors: Tensor) -> bool:
    """Whether compiled kernels can read these tensors: all on a CPU, and nothing traces, transforms or replaces operations."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    plain = all(type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" for tensor in tensors)
    return (
        plain
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and forward_ad._current_level < 0
    )


def read_table(
    table: Tensor, read: MapRead, *, weighted: bool, untrained: Sequence[int] = (), sparse: bool = False
) -> Tensor:
    """Weighted sums of table rows: ``sum_j weights[entry, j] * table[rows[entry, j]]``, shape (n, dim).

    Args:
        table: a float type, shape (n_rows, dim).
        weighted: False: all weights are 1.
        untrained: table rows without a gradient. Several of them are those that the map's last entry reads, and no other does.
        sparse: the gradient of the table is a sparse tensor, with rows that are not summed.

    Raises:
        IndexError: an entry is not in the map.
    """
    rows, weights, entries = read
    if table.dtype == torch.float32 and may_use_kernels(table, weights, entries):
        return _CpuRead.apply(table, rows, weights, weighted, sparse, tuple(untrained), entries)
    padding = untrained[0] if len(untrained) else None
    vectors = functional.embedding(rows.index_select(0, entries), table, padding, sparse=sparse)
    if len(untrained) > 1:
        is_last = (entries == len(rows) - 1)[:, None, None]
        vectors = torch.where(is_last, vectors.detach(), vectors)
    if not weighted:
        return vectors.sum(1)
    return (vectors * weights.index_select(0, entries).unsqueeze(-1)).sum(1)


def read_table_twice(
    table: Tensor, first: MapRead, second: MapRead, *, weighted: bool, untrained: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """:func:`read_table` through two maps at once, where :func:`may_use_kernels`; the table is float32."""
    return _CpuReadTwice.apply(table, weighted, tuple(untrained), *first, *second)


class _CpuRead(torch.autograd.Function):
    """Weighted sums of table rows on a CPU, several times faster than torch's gather and scatter of several rows per id."""

    @staticmethod
    def forward(ctx, table, rows, weights, weighted, sparse, untrained, entries):
        _check_entries(entries, rows)
        ctx.save_for_backward(rows, weights, entries)
        ctx.weighted, ctx.sparse, ctx.untrained, ctx.shape = weighted, sparse, untrained, table.shape
        vectors = torch.empty(len(entries), table.shape[1])
        with threads_for(vectors.numel() * rows.shape[1]):
            _kernels.read_rows(
                rows.numpy(), weights.numpy(), weighted, entries.numpy(), table.detach().numpy(), vectors.numpy()
            )
        return vectors

    @staticmethod
    def backward(ctx, gradients):
        rows, weights, entries = ctx.saved_tensors
        read, nothing = MapRead(rows, weights, entries), 6 * (None,)
        if ctx.sparse:
            return _sparse_gradient(ctx, read, gradients), *nothing
        # Somebody will differentiate the gradient itself.
        if torch.is_grad_enabled() and gradients.requires_grad:
            return _differentiable_gradient(ctx, read, gradients), *nothing
        table_gradient = torch.zeros(ctx.shape)
        with threads_for(gradients.numel() * rows.shape[1]):
            _kernels.add_to_rows(
                rows.numpy(), weights.numpy(), ctx.weighted, entries.numpy(), gradients.detach().contiguous().numpy(),
                gradient_slices(ctx.shape[1]), table_gradient.numpy(),
            )  # fmt: skip
        return _without(table_gradient, ctx.untrained), *nothing


class _CpuReadTwice(torch.autograd.Function):
    """Two reads of one table at once: one parallel section, and one gradient of the table instead of a sum of two."""

    @staticmethod
    def forward(ctx, table, weighted, untrained, rows, weights, entries, rows_2, weights_2, entries_2):
        _check_entries(entries, rows)
        _check_entries(entries_2, rows_2)
        maps = rows, weights, entries, rows_2, weights_2, entries_2
        ctx.save_for_backward(*maps)
        ctx.weighted, ctx.untrained, ctx.shape = weighted, untrained, table.shape
        vectors, vectors_2 = (torch.empty(len(i), table.shape[1]) for i in (entries, entries_2))
        first, second = (m.numpy() for m in maps[:3]), (m.numpy() for m in maps[3:])
        with threads_for((len(entries) + len(entries_2)) * rows.shape[1] * table.shape[1]):
            _kernels.read_rows_twice(
                *first, vectors.numpy(), *second, vectors_2.numpy(), weighted, table.detach().numpy()
            )
        return vectors, vectors_2

    @staticmethod
    def backward(ctx, gradients, gradients_2):
        maps, nothing = ctx.saved_tensors, 8 * (None,)
        if torch.is_grad_enabled() and (gradients.requires_grad or gradients_2.requires_grad):
            both = (MapRead(*maps[:3]), gradients), (MapRead(*maps[3:]), gradients_2)
            return sum(_differentiable_gradient(ctx, read, values) for read, values in both), *nothing
        table_gradient = torch.zeros(ctx.shape)
        first, second = (m.numpy() for m in maps[:3]), (m.numpy() for m in maps[3:])
        with threads_for((len(gradients) + len(gradients_2)) * maps[0].shape[1] * ctx.shape[1]):
            _kernels.add_to_rows_twice(
                *first, gradients.detach().contiguous().numpy(), *second, gradients_2.detach().contiguous().numpy(),
                ctx.weighted, gradient_slices(ctx.shape[1]), table_gradient.numpy(),
            )  # fmt: skip
        return _without(table_gradient, ctx.untrained), *nothing


def _check_entries(entries: Tensor, rows: Tensor) -> None:
    if entries.numel() and (entries.min() < 0 or entries.max() >= len(rows)):
        raise IndexError(
            f"ids span {entries.min()}..{entries.max()}, the bucket map has entries 0..{len(rows) - 1}; "
            "map out-of-vocabulary ids to the last one"
        )


def _without(table_gradient: Tensor, untrained: Sequence[int]) -> Tensor:
    for row in untrained:
        table_gradient[row] = 0
    return table_gradient


def _terms(ctx, read: MapRead, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Table rows that were read, int64, shape (n * indices,), and the gradient of each, shape (n * indices, dim)."""
    rows, weights, entries = read
    if ctx.weighted:
        values = gradients.unsqueeze(1) * weights.index_select(0, entries).unsqueeze(2)
    else:
        values = gradients.unsqueeze(1).expand(-1, rows.shape[1], -1)
    found, values = rows.index_select(0, entries).reshape(-1).long(), values.reshape(-1, ctx.shape[1])
    for row in ctx.untrained:
        hits = (found == row).nonzero().squeeze(1)
        if len(hits):
            values = values.index_fill(0, hits, 0)
    return found, values


def _sparse_gradient(ctx, read: MapRead, gradients: Tensor) -> Tensor:
    """The gradient of the table as a sparse tensor with an entry per row read, rows not summed."""
    found, values = _terms(ctx, read, gradients)
    return torch.sparse_coo_tensor(found.unsqueeze(0), values, ctx.shape, check_invariants=False)


def _differentiable_gradient(ctx, read: MapRead, gradients: Tensor) -> Tensor:
    """The gradient of the table by PyTorch's operations, which have a derivative."""
    found, values = _terms(ctx, read, gradients)
    return torch.zeros(ctx.shape, dtype=values.dtype).index_add(0, found, values)
