"""BucketEmbedding: an embedding layer whose compressed table is read through a bucket map.

A drop-in for ``torch.nn.Embedding``: ids in, vectors out, trained by any optimiser. The map is a buffer, so it moves with
``.to()`` and is saved with the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from graphhash.errors import ArgumentError
from graphhash.graph.threads import numba_threads
from graphhash.maps.bucket_map import BucketMap
from graphhash.nn import _kernels
from graphhash.nn.compressed import CompressedEmbedding, StoredTable

# Below this many multiplications, waking other threads takes longer than the work.
SMALL_WORK = 1_000_000


@contextmanager
def threads_for(work: int) -> Iterator[None]:
    """Kernels in the block take torch's number of threads, or one where ``work``, in multiplications, is small."""
    with numba_threads(1 if work < SMALL_WORK else torch.get_num_threads()):
        yield


def gradient_slices(dim: int) -> int:
    """Pieces of parallel work on vectors of ``dim`` floats; 16 floats are a cache line, which threads must not share."""
    return max(1, min(dim // 16, torch.get_num_threads()))


class _CpuRead(torch.autograd.Function):
    """Weighted sums of table rows on a CPU, several times faster than torch's gather and scatter of several rows per id."""

    @staticmethod
    def forward(ctx, table, rows, weights, weighted, sparse, ids):
        _check_entries(ids, rows)
        ctx.save_for_backward(rows, weights, ids)
        ctx.weighted, ctx.sparse, ctx.shape = weighted, sparse, table.shape
        vectors = torch.empty(len(ids), table.shape[1])
        with threads_for(vectors.numel() * rows.shape[1]):
            _kernels.read_rows(
                rows.numpy(), weights.numpy(), weighted, ids.numpy(), table.detach().numpy(), vectors.numpy()
            )
        return vectors

    @staticmethod
    def backward(ctx, gradients):
        rows, weights, ids = ctx.saved_tensors
        if ctx.sparse:
            return _sparse_gradient(ctx, gradients), None, None, None, None, None
        table_gradient = torch.zeros(ctx.shape)
        with threads_for(gradients.numel() * rows.shape[1]):
            _kernels.add_to_rows(
                rows.numpy(), weights.numpy(), ctx.weighted, ids.numpy(), gradients.contiguous().numpy(),
                gradient_slices(ctx.shape[1]), table_gradient.numpy(),
            )  # fmt: skip
        return table_gradient, None, None, None, None, None


class _CpuReadTwice(torch.autograd.Function):
    """Two reads of one table at once: one parallel section, and one gradient of the table instead of a sum of two."""

    @staticmethod
    def forward(ctx, table, weighted, rows, weights, ids, rows_2, weights_2, ids_2):
        _check_entries(ids, rows)
        _check_entries(ids_2, rows_2)
        maps = rows, weights, ids, rows_2, weights_2, ids_2
        ctx.save_for_backward(*maps)
        ctx.weighted, ctx.shape = weighted, table.shape
        vectors, vectors_2 = (torch.empty(len(i), table.shape[1]) for i in (ids, ids_2))
        first, second = (m.numpy() for m in maps[:3]), (m.numpy() for m in maps[3:])
        with threads_for((len(ids) + len(ids_2)) * rows.shape[1] * table.shape[1]):
            _kernels.read_rows_twice(
                *first, vectors.numpy(), *second, vectors_2.numpy(), weighted, table.detach().numpy()
            )
        return vectors, vectors_2

    @staticmethod
    def backward(ctx, gradients, gradients_2):
        maps = ctx.saved_tensors
        table_gradient = torch.zeros(ctx.shape)
        first, second = (m.numpy() for m in maps[:3]), (m.numpy() for m in maps[3:])
        with threads_for((len(gradients) + len(gradients_2)) * maps[0].shape[1] * ctx.shape[1]):
            _kernels.add_to_rows_twice(
                *first, gradients.contiguous().numpy(), *second, gradients_2.contiguous().numpy(), ctx.weighted,
                gradient_slices(ctx.shape[1]), table_gradient.numpy(),
            )  # fmt: skip
        return table_gradient, *7 * (None,)


def _check_entries(ids: Tensor, rows: Tensor) -> None:
    if ids.numel() and (ids.min() < 0 or ids.max() >= len(rows)):
        raise IndexError(f"ids span {ids.min()}..{ids.max()}, the bucket map has entries 0..{len(rows) - 1}")


def _sparse_gradient(ctx, gradients: Tensor) -> Tensor:
    """The gradient of the table as a sparse tensor with an entry per index read, rows not summed."""
    rows, weights, ids = ctx.saved_tensors
    if ctx.weighted:
        values = gradients.unsqueeze(1) * weights.index_select(0, ids).unsqueeze(2)
    else:
        values = gradients.unsqueeze(1).expand(-1, rows.shape[1], -1)
    read = rows.index_select(0, ids).reshape(1, -1).long()
    return torch.sparse_coo_tensor(read, values.reshape(-1, ctx.shape[1]), ctx.shape, check_invariants=False)


class BucketEmbedding(CompressedEmbedding):
    """``embedding(id) = sum_j weights[id, j] * table[rows[id, j]]``.

    Args:
        bucket_map: rows and weights of ``n_ids`` ids and the OOV entry.
        dim: length of a vector.
        std: standard deviation of the normal initial values; the OOV row starts at zero.
        generator: draws the initial values; torch's global generator when None.
        table: of another embedding, to read the same one; None: a new one. Maps with ``shared`` are made for this:
            ``items = BucketEmbedding(item_map, dim, table=users.table)``.

    Raises:
        ArgumentError: ``dim`` is below 1, or ``table`` has another shape.

    Attributes:
        table: trained parameter, float32, shape (n_buckets, dim).
        rows: buffer, int32, shape (n_ids + 1, indices_per_id).
        weights: buffer, float32, same shape.
        sparse_gradient: as in ``torch.nn.Embedding(sparse=True)``, on a CPU; ``graphhash.nn.row_adam`` can use it.
        oov_row: table row of out-of-vocabulary ids.
        n_folds: folds of :meth:`use_folds`, 0 without; their maps are not saved.
    """

    rows: Tensor
    weights: Tensor
    fold_rows: Tensor | None
    fold_weights: Tensor | None

    def __init__(
        self,
        bucket_map: BucketMap,
        dim: int,
        *,
        std: float = 0.1,
        generator: torch.Generator | None = None,
        table: nn.Parameter | None = None,
    ):
        super().__init__()
        if dim < 1:
            raise ArgumentError(f"dim must be at least 1, got {dim}")
        self.n_ids = bucket_map.n_ids
        self.n_buckets = bucket_map.n_buckets
        self.dim = dim
        self.identity = bucket_map.identity
        self._map_bytes = bucket_map.nbytes
        self.weighted = bucket_map.codebook is not None
        self.sparse_gradient = False
        self.register_buffer("rows", torch.from_numpy(bucket_map.rows.copy()))
        self.register_buffer("weights", torch.from_numpy(bucket_map.weights))
        self.register_buffer("fold_rows", None, persistent=False)
        self.register_buffer("fold_weights", None, persistent=False)
        self.oov_row = bucket_map.oov_row
        if table is not None and table.shape != (self.n_buckets, dim):
            raise ArgumentError(f"the table is {tuple(table.shape)}, the map and dim need ({self.n_buckets}, {dim})")
        self.table = nn.Parameter(torch.empty(self.n_buckets, dim)) if table is None else table
        with torch.no_grad():
            if table is None:
                self.table.normal_(std=std, generator=generator)
            # A table of blocks has several that the OOV entry reads.
            self.table[self.rows[-1].long()] = 0

    @property
    def map_bytes(self) -> int:
        """Bytes of the stored bucket map."""
        return self._map_bytes

    def stored_tables(self, precision: str) -> list[StoredTable]:
        """The one table, in ``precision``."""
        return [StoredTable(self.table, precision)]

    def bucket_parts(self) -> list[BucketEmbedding]:
        """This embedding alone."""
        return [self]

    def read_with(self, ids: Tensor, other: CompressedEmbedding, other_ids: Tensor) -> tuple[Tensor, Tensor]:
        """``self(ids), other(other_ids)``; a table that both share is read once."""
        return (
            read_both(self, ids, other, other_ids)
            if isinstance(other, BucketEmbedding)
            else (self(ids), other(other_ids))
        )

    @property
    def n_folds(self) -> int:
        return 0 if self.fold_rows is None else (len(self.fold_rows) - 1) // self.n_ids

    def use_folds(self, folded: BucketMap) -> None:
        """Read ids that are given with a fold through a cross-fitted map of the same table (:func:`graphhash.soft_maps`).

        Args:
            folded: of ``n_folds * n_ids`` ids; number ``fold * n_ids + id`` is ``id`` in that fold.

        Raises:
            ArgumentError: the map has another number of ids, table rows or indices per id, or another OOV row.
        """
        old = self.n_buckets, self.rows.shape[1], self.oov_row
        new = folded.n_buckets, folded.indices_per_id, folded.oov_row
        if old != new or folded.n_ids % self.n_ids:
            raise ArgumentError(
                f"a map of {folded.n_ids} ids, with {new} rows, indices per id and OOV row, is none of folds of {self.n_ids} ids, {old}"
            )
        self.fold_rows = torch.from_numpy(folded.rows.copy()).to(self.rows.device)
        self.fold_weights = torch.from_numpy(folded.weights).to(self.rows.device)

    def entries(self, ids: Tensor, fold: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Rows and weights of the map that is read, and its entries, flat, of ``ids``; arguments as in :meth:`forward`."""
        if fold is None or self.fold_rows is None or self.fold_weights is None:
            return self.rows, self.weights, ids.reshape(-1)
        entries = torch.where(ids < self.n_ids, ids + fold * self.n_ids, len(self.fold_rows) - 1)
        return self.fold_rows, self.fold_weights, entries.reshape(-1)

    def forward(self, ids: Tensor, fold: Tensor | None = None) -> Tensor:
        """Vectors of ids, shape (*ids.shape, dim).

        Args:
            ids: any integer shape, values 0..n_ids; n_ids stands for an OOV id.
            fold: of each id, int64, a shape that spreads to that of ``ids``; without :meth:`use_folds` it changes nothing.
        """
        rows, weights, flat = self.entries(ids, fold)
        vectors = read_table(
            self.table, rows, weights, flat, weighted=self.weighted, sparse_gradient=self.sparse_gradient
        )
        return vectors.reshape(*ids.shape, self.dim)

    @torch.no_grad()
    def fill_oov(self, frequencies: Tensor) -> None:
        """Set the OOV row to the mean vector of the ids.

        Args:
            frequencies: weight of every id in the mean, shape (n_ids,), not negative, not all zero.
        """
        shares = (frequencies / frequencies.sum()).to(self.table)
        self.table[self.oov_row] = shares @ self.all()

    def extra_repr(self) -> str:
        return f"n_ids={self.n_ids}, n_buckets={self.n_buckets}, indices_per_id={self.rows.shape[1]}, dim={self.dim}"


def read_table(
    table: Tensor, rows: Tensor, weights: Tensor, entries: Tensor, *, weighted: bool, sparse_gradient: bool = False
) -> Tensor:
    """Weighted sums of table rows: ``sum_j weights[entry, j] * table[rows[entry, j]]``, shape (n, dim).

    Args:
        table: float32, shape (n_rows, dim).
        rows, weights: int32 and float32, shape (n_entries, indices_per_entry) each.
        entries: int64, shape (n,).
        weighted: False: all weights are 1.
        sparse_gradient: the gradient of the table is a sparse tensor, on a CPU.
    """
    if table.device.type == "cpu" and table.dtype == torch.float32:
        return _CpuRead.apply(table, rows, weights, weighted, sparse_gradient, entries)
    vectors = functional.embedding(rows.index_select(0, entries), table)
    return (vectors * weights.index_select(0, entries).unsqueeze(-1)).sum(1)


def read_both(
    left: BucketEmbedding, left_ids: Tensor, right: BucketEmbedding, right_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """``left(left_ids), right(right_ids)``, at once where both read one table on a CPU; ids of shapes (n,) and (m,)."""
    table = left.table
    plain = (
        table.device.type == "cpu"
        and table.dtype == torch.float32
        and not (left.sparse_gradient or right.sparse_gradient)
    )
    alike = right.table is table and left.weighted == right.weighted and left_ids.ndim == right_ids.ndim == 1
    if not (plain and alike):
        return left(left_ids), right(right_ids)
    return _CpuReadTwice.apply(
        table, left.weighted, left.rows, left.weights, left_ids, right.rows, right.weights, right_ids
    )
