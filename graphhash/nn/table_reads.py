"""Weighted sums of table rows, read through a bucket map: compiled kernels on a CPU, PyTorch's operations everywhere else.

The kernels take plain float32 tensors on a CPU and know their own gradient. What records operations (``torch.export``,
``torch.compile``, ``torch.jit.trace``), transforms them (``torch.func``) or replaces them (dispatch modes, tensor subclasses)
gets PyTorch's operations, and so does a second derivative.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from graphhash.graph.threads import numba_threads
from graphhash.nn import _kernels

# Below this many multiplications, waking other threads takes longer than the work.
SMALL_WORK = 1_000_000


class MapRead(NamedTuple):
    """A batch of reads through a bucket map, which is held as it is stored.

    Attributes:
        rows: of :func:`held_rows`, shape (n_entries, indices_per_entry) or twice as many columns; None: an entry reads the table row of
            its own number.
        codebook: rows of weights, a float type, shape (n_codes, indices_per_entry); None: every weight is 1.
        codes: codebook row of every entry, uint8, shape (n_entries,); given with ``codebook``.
        entries: entries of the map that are read, int64, shape (n,).
    """

    rows: Tensor | None
    codebook: Tensor | None
    codes: Tensor | None
    entries: Tensor


# What the kernels get of a map that has no rows, or no weights.
_NO_ROWS, _NO_CODES, _ONES = np.empty((0, 1), np.uint16), np.empty(0, np.uint8), np.ones((1, 1), np.float32)


def held_rows(rows: NDArray[np.integer]) -> Tensor:
    """Rows of a map as a tensor: int32 as they are, uint16 as uint8 of twice as many columns. Nothing is copied.

    PyTorch has few operations on 16-bit integers, and its collectives have none.

    Args:
        rows: int32 or uint16, shape (n_entries, indices_per_entry).
    """
    return torch.from_numpy(rows.view(np.uint8) if rows.dtype == np.uint16 else rows)


def wide_rows(read: MapRead) -> Tensor:
    """Table rows of the entries that are read, int32 or int64, shape (n, indices_per_entry)."""
    if read.rows is None:
        return read.entries.unsqueeze(1)
    rows = read.rows.index_select(0, read.entries)
    if rows.dtype == torch.uint8:
        halves = rows.int()
        rows = halves[:, 0::2] + 256 * halves[:, 1::2]
    return rows


def wide_weights(read: MapRead) -> Tensor | None:
    """Weights of the entries that are read, of the codebook's type, shape (n, indices_per_entry); None: all are 1."""
    if read.codebook is None or read.codes is None:
        return None
    return read.codebook.index_select(0, read.codes.index_select(0, read.entries).int())


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
    """Weighted sums of table rows: ``sum_j codebook[codes[entry], j] * table[rows[entry, j]]``, shape (n, dim).

    Args:
        table: a float type, shape (n_rows, dim).
        weighted: False: all weights are 1, whatever the codebook says.
        untrained: table rows without a gradient. Several of them are those that the map's last entry reads, and no other does.
        sparse: the gradient of the table is a sparse tensor, with rows that are not summed.

    Raises:
        IndexError: an entry is not in the map.
    """
    if table.dtype == torch.float32 and may_use_kernels(*[t for t in (table, *read) if t is not None]):
        return _CpuRead.apply(table, read, weighted and read.codebook is not None, sparse, tuple(untrained))
    padding = untrained[0] if len(untrained) else None
    vectors = functional.embedding(wide_rows(read), table, padding, sparse=sparse)
    if len(untrained) > 1 and read.rows is not None:
        is_last = (read.entries == len(read.rows) - 1)[:, None, None]
        vectors = torch.where(is_last, vectors.detach(), vectors)
    weights = wide_weights(read) if weighted else None
    return vectors.sum(1) if weights is None else (vectors * weights.unsqueeze(-1)).sum(1)


def read_table_twice(
    table: Tensor, first: MapRead, second: MapRead, *, weighted: bool, untrained: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """:func:`read_table` through two maps at once, where :func:`may_use_kernels`; the table is float32."""
    return _CpuReadTwice.apply(table, first, second, weighted, tuple(untrained))


class _CpuRead(torch.autograd.Function):
    """Weighted sums of table rows on a CPU, several times faster than torch's gather and scatter of several rows per id."""

    @staticmethod
    def forward(ctx, table, read, weighted, sparse, untrained):
        _check_entries(read, table)
        ctx.map, ctx.arrays = read[:-1], _arrays(read)
        ctx.save_for_backward(read.entries)
        ctx.weighted, ctx.sparse, ctx.untrained, ctx.shape = weighted, sparse, untrained, table.shape
        vectors = torch.empty(len(read.entries), table.shape[1])
        with threads_for(vectors.numel() * ctx.arrays[0].shape[1]):
            _kernels.read_rows(*ctx.arrays, weighted, read.entries.numpy(), table.detach().numpy(), vectors.numpy())
        return vectors

    @staticmethod
    def backward(ctx, gradients):
        (entries,), nothing = ctx.saved_tensors, 4 * (None,)
        if ctx.sparse:
            return _sparse_gradient(ctx, _read_of(ctx.map, entries), gradients), *nothing
        # Somebody will differentiate the gradient itself.
        if torch.is_grad_enabled() and gradients.requires_grad:
            return _differentiable_gradient(ctx, _read_of(ctx.map, entries), gradients), *nothing
        table_gradient = torch.zeros(ctx.shape)
        with threads_for(gradients.numel() * ctx.arrays[0].shape[1]):
            _kernels.add_to_rows(
                *ctx.arrays, ctx.weighted, entries.numpy(), gradients.detach().contiguous().numpy(),
                gradient_slices(ctx.shape[1]), table_gradient.numpy(),
            )  # fmt: skip
        return _without(table_gradient, ctx.untrained), *nothing


class _CpuReadTwice(torch.autograd.Function):
    """Two reads of one table at once: one parallel section, and one gradient of the table instead of a sum of two."""

    @staticmethod
    def forward(ctx, table, first, second, weighted, untrained):
        _check_entries(first, table)
        _check_entries(second, table)
        ctx.maps, ctx.arrays = (first[:-1], second[:-1]), (_arrays(first), _arrays(second))
        ctx.save_for_backward(first.entries, second.entries)
        ctx.weighted, ctx.untrained, ctx.shape = weighted, untrained, table.shape
        vectors, vectors_2 = (torch.empty(len(read.entries), table.shape[1]) for read in (first, second))
        with threads_for((len(vectors) + len(vectors_2)) * ctx.arrays[0][0].shape[1] * table.shape[1]):
            _kernels.read_rows_twice(
                *ctx.arrays[0], first.entries.numpy(), vectors.numpy(),
                *ctx.arrays[1], second.entries.numpy(), vectors_2.numpy(), weighted, table.detach().numpy(),
            )  # fmt: skip
        return vectors, vectors_2

    @staticmethod
    def backward(ctx, gradients, gradients_2):
        (entries, entries_2), nothing = ctx.saved_tensors, 4 * (None,)
        if torch.is_grad_enabled() and (gradients.requires_grad or gradients_2.requires_grad):
            first, second = _read_of(ctx.maps[0], entries), _read_of(ctx.maps[1], entries_2)
            both = (first, gradients), (second, gradients_2)
            return sum(_differentiable_gradient(ctx, read, values) for read, values in both), *nothing
        table_gradient = torch.zeros(ctx.shape)
        with threads_for((len(gradients) + len(gradients_2)) * ctx.arrays[0][0].shape[1] * ctx.shape[1]):
            _kernels.add_to_rows_twice(
                *ctx.arrays[0], entries.numpy(), gradients.detach().contiguous().numpy(),
                *ctx.arrays[1], entries_2.numpy(), gradients_2.detach().contiguous().numpy(),
                ctx.weighted, gradient_slices(ctx.shape[1]), table_gradient.numpy(),
            )  # fmt: skip
        return _without(table_gradient, ctx.untrained), *nothing


def _read_of(map_: tuple[Tensor | None, ...], entries: Tensor) -> MapRead:
    rows, codebook, codes = map_
    return MapRead(rows, codebook, codes, entries)


def _arrays(read: MapRead) -> tuple[NDArray, NDArray[np.float32], NDArray[np.uint8]]:
    """Rows, codebook and codes for the kernels."""
    rows = _NO_ROWS if read.rows is None else read.rows.numpy()
    if rows.dtype == np.uint8:
        rows = rows.view(np.uint16)
    if read.codebook is None or read.codes is None:
        return rows, _ONES, _NO_CODES
    return rows, read.codebook.numpy(), read.codes.numpy()


def _check_entries(read: MapRead, table: Tensor) -> None:
    entries, n_entries = read.entries, len(table if read.rows is None else read.rows)
    if entries.numel() and (entries.min() < 0 or entries.max() >= n_entries):
        raise IndexError(
            f"ids span {entries.min()}..{entries.max()}, the bucket map has entries 0..{n_entries - 1}; "
            "map out-of-vocabulary ids to the last one"
        )


def _without(table_gradient: Tensor, untrained: Sequence[int]) -> Tensor:
    for row in untrained:
        table_gradient[row] = 0
    return table_gradient


def _terms(ctx, read: MapRead, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Table rows that were read, int64, shape (n * indices,), and the gradient of each, shape (n * indices, dim)."""
    found = wide_rows(read)
    weights = wide_weights(read) if ctx.weighted else None
    values = gradients.unsqueeze(1)
    values = values.expand(-1, found.shape[1], -1) if weights is None else values * weights.unsqueeze(2)
    found, values = found.reshape(-1).long(), values.reshape(-1, ctx.shape[1])
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
