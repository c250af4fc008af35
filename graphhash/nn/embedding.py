"""BucketEmbedding: an embedding layer whose compressed table is read through a bucket map.

A drop-in for ``torch.nn.Embedding``: ids in, vectors out, trained by any optimiser. The map is a buffer, so it moves with
``.to()`` and is saved with the weights. ``docs/guides/embedding.md`` compares the two behaviour by behaviour.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graphhash.errors import ArgumentError
from graphhash.maps.bucket_map import BucketMap
from graphhash.maps.folded_map import FoldedMap
from graphhash.nn.compressed import CompressedEmbedding, StoredTable, checked_ids
from graphhash.nn.folds import FoldReads
from graphhash.nn.pretrained import fitted_table
from graphhash.nn.table_reads import MapRead, may_use_kernels, read_table, read_table_twice


class BucketEmbedding(CompressedEmbedding):
    """``embedding(id) = sum_j row_weights[id, j] * table[rows[id, j]]``.

    Args:
        bucket_map: rows and weights of ``n_ids`` ids and the OOV entry.
        dim: length of a vector.
        std: standard deviation of the normal initial values; the OOV row starts at zero.
        generator: draws the initial values; torch's global generator when None.
        table: of another embedding, to read the same one; None: a new one. Maps with ``shared`` are made for this:
            ``items = BucketEmbedding(item_map, dim, table=users.table)``.
        padding_idx: an id whose vector is zero and trains nothing; negative numbers count from ``n_ids``. None: no such id.
        device, dtype: of the table and the map's weights; None: those of ``table``, or PyTorch's defaults.

    Raises:
        ArgumentError: ``dim`` is below 1, ``table`` has another shape, or ``padding_idx`` is no id.

    Attributes:
        table: trained parameter, shape (n_buckets, dim).
        weight: the vectors of all ids, shape (n_ids, dim), computed from the table at every access; gradients flow through it. Writing into
            it changes nothing: set ``table``, or use :meth:`from_pretrained`.
        rows: buffer, int32, shape (n_ids + 1, indices_per_id).
        row_weights: buffer, of the table's dtype, same shape.
        num_embeddings, embedding_dim: ``n_ids`` and ``dim``, as ``torch.nn.Embedding`` calls them. Id ``n_ids``, the OOV id, can be read as
            well and has no row in ``weight``.
        sparse: as in ``torch.nn.Embedding``: the gradient of the table is sparse. ``graphhash.nn.row_adam`` can use it.
        trains_oov: the OOV row is trained where a batch reads it. False: it has no gradient.
        oov_row: table row of out-of-vocabulary ids.
        n_folds: folds of :meth:`use_folds`, 0 without; their maps are not saved.
    """

    rows: Tensor
    row_weights: Tensor

    def __init__(
        self,
        bucket_map: BucketMap,
        dim: int,
        *,
        std: float = 0.1,
        generator: torch.Generator | None = None,
        table: nn.Parameter | None = None,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim < 1:
            raise ArgumentError(f"dim must be at least 1, got {dim}")
        self.n_ids = bucket_map.n_ids
        self.n_buckets = bucket_map.n_buckets
        self.dim, self.std = dim, std
        self.identity = bucket_map.identity
        self._map_bytes = bucket_map.nbytes
        self.padding_idx = _checked_padding(padding_idx, self.n_ids)
        self.weighted = bucket_map.codebook is not None or padding_idx is not None
        self.sparse, self.trains_oov = False, False
        self.oov_row = bucket_map.oov_row
        last_rows, last_weights = bucket_map.rows[-1], bucket_map.oov_weights
        self._oov_rows = tuple(dict.fromkeys(last_rows[last_weights != 0].tolist()))
        self._zero_rows = torch.from_numpy(last_rows).long()
        if table is not None and table.shape != (self.n_buckets, dim):
            raise ArgumentError(f"the table is {tuple(table.shape)}, the map and dim need ({self.n_buckets}, {dim})")
        self.table = (
            nn.Parameter(torch.empty(self.n_buckets, dim, device=device, dtype=dtype)) if table is None else table
        )
        device, dtype = self.table.device, self.table.dtype
        self.register_buffer("rows", torch.from_numpy(bucket_map.rows.copy()).to(device))
        self.register_buffer("row_weights", torch.from_numpy(bucket_map.weights).to(device, dtype))
        self.folds: FoldReads | None = None
        self._silence_padding()
        if table is None:
            self.reset_parameters(generator)
        else:
            self._zero_oov()

    @classmethod
    def from_pretrained(
        cls, embeddings: Tensor, bucket_map: BucketMap, *, freeze: bool = True, padding_idx: int | None = None
    ) -> BucketEmbedding:
        """An embedding whose vectors are as near to given ones as its table can hold: the least squares solution.

        Args:
            embeddings: the vectors of all ids, a float type, shape (n_ids, dim), such as the ``weight`` of a trained ``nn.Embedding``.
            bucket_map: how ids read the table. The identity (``graphhash.maps.bucket_map.full_map``) keeps the vectors as they are.
            freeze: the table is not trained.
            padding_idx: as in the class.

        Raises:
            ArgumentError: there is not one vector for every id of the map.
        """
        if embeddings.ndim != 2 or len(embeddings) != bucket_map.n_ids:
            raise ArgumentError(
                f"embeddings have shape {tuple(embeddings.shape)}, the map needs ({bucket_map.n_ids}, dim); pass a row for every id"
            )
        made = cls(
            bucket_map, embeddings.shape[1], padding_idx=padding_idx, device=embeddings.device, dtype=embeddings.dtype
        )
        fitted = fitted_table(bucket_map, embeddings.detach().double().cpu().numpy(), skipped=made.padding_idx)
        with torch.no_grad():
            made.table.copy_(torch.from_numpy(fitted))
        made.table.requires_grad_(not freeze)
        return made

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the table again: normal values of deviation ``std``, and a zero OOV row."""
        with torch.no_grad():
            self.table.normal_(std=self.std, generator=generator)
        self._zero_oov()

    @torch.no_grad()
    def _zero_oov(self) -> None:
        self.table[self._zero_rows.to(self.table.device)] = 0

    def _silence_padding(self) -> None:
        if self.padding_idx is not None:
            self.row_weights[self.padding_idx] = 0

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        # The buffer's name before 0.2; states that were saved with it are still read.
        former = f"{prefix}weights"
        if former in state_dict:
            state_dict[f"{prefix}row_weights"] = state_dict.pop(former)
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        # The state may be of a layer without padding.
        self._silence_padding()

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
        return 0 if self.folds is None else self.folds.n_folds

    def use_folds(self, folded: BucketMap | FoldedMap) -> None:
        """Read ids that are given with a fold through a cross-fitted map of the same table (:func:`graphhash.soft_maps`).

        Args:
            folded: a bucket map of ``n_folds * n_ids`` ids, where number ``fold * n_ids + id`` is ``id`` in that fold; or a
                ``graphhash.maps.folded_map.FoldedMap``, whose arrays are not copied.

        Raises:
            ArgumentError: the map has another number of ids, table rows or indices per id, or another OOV row.
        """
        folded = FoldedMap.of(folded) if isinstance(folded, BucketMap) else folded
        old = self.n_buckets, self.rows.shape[1], self.oov_row
        new = folded.n_buckets, folded.indices_per_id, folded.oov_row
        index, n_ids = folded.index, self.n_ids
        if old != new or (folded.n_entries % n_ids if index is None else index.n_ids != n_ids):
            raise ArgumentError(
                f"a map of {folded.n_entries if index is None else index.n_ids} ids, with {new} rows, indices per id and OOV row, "
                f"is none of folds of {n_ids} ids, {old}"
            )
        self.folds = FoldReads(folded, n_ids).to(self.row_weights.device)
        self.folds.codebook = self.folds.codebook.to(self.row_weights)

    def entries(self, input: Tensor, fold: Tensor | None = None) -> MapRead:
        """The map that is read, and its entries, flat, of ids; arguments and errors as in :meth:`forward`."""
        ids = checked_ids(input)
        if fold is None or self.folds is None:
            return MapRead(self.rows, self.row_weights, ids.reshape(-1))
        return self.folds.read(ids, fold, self.padding_idx)

    def forward(self, input: Tensor, fold: Tensor | None = None) -> Tensor:
        """Vectors of ids, shape (*input.shape, dim).

        Args:
            input: ids, any integer type and shape, values 0..n_ids; n_ids stands for an OOV id.
            fold: of each id, int64, a shape that spreads to that of ``input``; without :meth:`use_folds` it changes nothing.

        Raises:
            TypeError: ``input`` is no tensor of integers.
            IndexError: an id is out of range, or has no entry in its fold.
        """
        read = self.entries(input, fold)
        vectors = read_table(self.table, read, weighted=self.weighted, untrained=self._untrained, sparse=self.sparse)
        return vectors.reshape(*input.shape, self.dim)

    @property
    def _untrained(self) -> tuple[int, ...]:
        return () if self.trains_oov else self._oov_rows

    @torch.no_grad()
    def fill_oov(self, frequencies: Tensor) -> None:
        """Set the OOV row to the mean vector of the ids.

        Args:
            frequencies: weight of every id in the mean, shape (n_ids,), not negative, not all zero.
        """
        shares = (frequencies / frequencies.sum()).to(self.table)
        self.table[self.oov_row] = shares @ self.all()

    def extra_repr(self) -> str:
        text = f"n_ids={self.n_ids}, n_buckets={self.n_buckets}, indices_per_id={self.rows.shape[1]}, dim={self.dim}"
        return text if self.padding_idx is None else f"{text}, padding_idx={self.padding_idx}"


def _checked_padding(padding_idx: int | None, n_ids: int) -> int | None:
    if padding_idx is not None and not -n_ids <= padding_idx < n_ids:
        raise ArgumentError(f"padding_idx is {padding_idx}, ids are 0..{n_ids - 1}; use one of them, or None")
    return padding_idx if padding_idx is None or padding_idx >= 0 else padding_idx + n_ids


def read_both(
    left: BucketEmbedding, left_ids: Tensor, right: BucketEmbedding, right_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """``left(left_ids), right(right_ids)``, at once where both read one table on a CPU; ids of shapes (n,) and (m,)."""
    table = left.table
    plain = table.dtype == torch.float32 and not (left.sparse or right.sparse)
    alike = right.table is table and left.weighted == right.weighted and left_ids.ndim == right_ids.ndim == 1
    if not (plain and alike and may_use_kernels(table, left_ids, right_ids)):
        return left(left_ids), right(right_ids)
    return read_table_twice(
        table,
        left.entries(left_ids),
        right.entries(right_ids),
        weighted=left.weighted,
        untrained=left._untrained + right._untrained,
    )
