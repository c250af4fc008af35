"""BucketEmbedding: an embedding layer whose compressed table is read through a bucket map.

A drop-in for ``torch.nn.Embedding``: ids in, vectors out, trained by any optimiser. The map is held in buffers, in the small types in
which it is stored: it moves with ``.to()`` and is saved with the weights. ``docs/guides/embedding.md`` compares the two behaviour by
behaviour.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from graphhash.errors import ArgumentError
from graphhash.maps.bucket_map import MAX_CODES, BucketMap
from graphhash.maps.folded_map import FoldedMap
from graphhash.nn.compressed import CompressedEmbedding, StoredTable, checked_ids
from graphhash.nn.folds import FoldReads
from graphhash.nn.pretrained import fitted_table
from graphhash.nn.table_reads import (
    MapRead,
    held_rows,
    may_use_kernels,
    read_table,
    read_table_twice,
    wide_rows,
    wide_weights,
)


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
        rows: table rows of every id, int32, shape (n_ids + 1, indices_per_id); computed from ``held_rows`` at every access.
        row_weights: their weights, of the table's dtype, same shape; computed from ``codebook`` and ``codes`` at every access.
        indices_per_id: table rows that are read per id.
        held_rows: buffer with ``rows``: uint16 as two uint8, the low one first, of a table of at most 65,536 rows, shape
            (n_ids + 1, 2 * indices_per_id); int32 of a larger one; None where ids read the rows of their own numbers.
        codebook: buffer, of the table's dtype, shape (256, indices_per_id): rows of weights, zeros behind those that the map has. None
            where all weights are 1.
        codes: buffer, uint8, shape (n_ids + 1,): codebook row of every id; None without a codebook.
        num_embeddings, embedding_dim: ``n_ids`` and ``dim``, as ``torch.nn.Embedding`` calls them. Id ``n_ids``, the OOV id, can be read as
            well and has no row in ``weight``.
        sparse: as in ``torch.nn.Embedding``: the gradient of the table is sparse. ``graphhash.nn.row_adam`` can use it.
        trains_oov: the OOV row is trained where a batch reads it. False: it has no gradient.
        oov_row: table row of out-of-vocabulary ids.
        n_folds: folds of :meth:`use_folds`, 0 without; their maps are not saved.
    """

    held_rows: Tensor | None
    codebook: Tensor | None
    codes: Tensor | None

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
        self.indices_per_id = bucket_map.indices_per_id
        self.dim, self.std = dim, std
        self.identity = bucket_map.identity
        self._map_bytes = bucket_map.nbytes
        self.padding_idx = _checked_padding(padding_idx, self.n_ids)
        self.weighted = bucket_map.codebook is not None
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
        # A shared table has one more OOV row.
        is_own_number = self.identity and not self.weighted and bucket_map.n_buckets == len(bucket_map.rows)
        rows = None if is_own_number else held_rows(bucket_map.rows.astype(bucket_map.rows_dtype)).to(device)
        codebook, codes = _held_weights(bucket_map.codebook, bucket_map.codes)
        self.register_buffer("held_rows", rows)
        self.register_buffer("codebook", None if codebook is None else codebook.to(device, dtype))
        self.register_buffer("codes", None if codes is None else codes.to(device))
        self.folds: FoldReads | None = None
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

    @property
    def rows(self) -> Tensor:
        return wide_rows(self._all_entries()).int()

    @property
    def row_weights(self) -> Tensor:
        weights = wide_weights(self._all_entries())
        if weights is None:
            weights = self.table.new_ones(self.n_ids + 1, self.indices_per_id)
        if self.padding_idx is not None:
            weights[self.padding_idx] = 0
        return weights

    def _all_entries(self) -> MapRead:
        return MapRead(self.held_rows, self.codebook, self.codes, torch.arange(self.n_ids + 1, device=self.device))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        try:
            self._narrow_state(state_dict, prefix)
        except ArgumentError as error:
            error_msgs.append(f"{prefix.rstrip('.') or 'BucketEmbedding'}: {error}")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _narrow_state(self, state: dict[str, Any], prefix: str) -> None:
        """Bring a state that an earlier version has saved, or a layer of another kind of map, into the form of this layer.

        Before 0.2 the state held ``rows`` and ``weights``, and then ``rows`` and ``row_weights``, as wide as the attributes are now.

        Raises:
            ArgumentError: it is of a map that this layer cannot hold.
        """
        rows = state.pop(f"{prefix}rows", None)
        wide = [state.pop(f"{prefix}{name}", None) for name in ("weights", "row_weights")]
        weights = next((tensor for tensor in wide if tensor is not None), None)
        held, codebook, codes = (f"{prefix}{name}" for name in ("held_rows", "codebook", "codes"))
        if rows is not None:
            self._narrow_rows(state, held, rows)
        if self.codes is None:
            # All of its weights are 1, but those of a padding id.
            state.pop(codebook, None)
            state.pop(codes, None)
        elif weights is not None:
            state[codebook], state[codes] = self._narrow_weights(weights)
        elif held in state and codebook not in state:
            ones = state[held].new_ones(len(state[held]), self.indices_per_id, dtype=self.table.dtype)
            state[codebook], state[codes] = self._narrow_weights(ones)

    def _narrow_rows(self, state: dict[str, Any], name: str, rows: Tensor) -> None:
        if self.held_rows is None:
            if not torch.equal(rows.cpu(), torch.arange(self.n_ids + 1, dtype=rows.dtype)[:, None]):
                raise ArgumentError("the state is of another map: this layer's ids read the rows of their own numbers")
            return
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < self.n_buckets:
            raise ArgumentError(f"the state is of another map: its rows span {rows.min()}..{rows.max()}")
        narrow = np.uint16 if self.held_rows.dtype == torch.uint8 else np.int32
        state[name] = held_rows(rows.cpu().numpy().astype(narrow)).to(rows.device)

    def _narrow_weights(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """A codebook of all distinct rows of weights, and the codes: nothing is lost."""
        if self.padding_idx is not None and self.padding_idx < len(weights) - 1:
            weights = weights.clone()
            weights[self.padding_idx] = weights[-1]
        distinct, codes = torch.unique(weights, dim=0, return_inverse=True)
        if len(distinct) > MAX_CODES:
            raise ArgumentError(f"the state has {len(distinct)} distinct rows of weights, of at most {MAX_CODES}")
        return functional.pad(distinct, (0, 0, 0, MAX_CODES - len(distinct))), codes.to(torch.uint8)

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
        old = self.n_buckets, self.indices_per_id, self.oov_row
        new = folded.n_buckets, folded.indices_per_id, folded.oov_row
        index, n_ids = folded.index, self.n_ids
        if old != new or (folded.n_entries % n_ids if index is None else index.n_ids != n_ids):
            raise ArgumentError(
                f"a map of {folded.n_entries if index is None else index.n_ids} ids, with {new} rows, indices per id and OOV row, "
                f"is none of folds of {n_ids} ids, {old}"
            )
        self.folds = FoldReads(folded, n_ids).to(self.device)
        self.folds.codebook = self.folds.codebook.to(self.table.dtype)

    def entries(self, input: Tensor, fold: Tensor | None = None) -> MapRead:
        """The map that is read, and its entries, flat, of ids; arguments and errors as in :meth:`forward`."""
        ids = checked_ids(input)
        if fold is None or self.folds is None:
            return MapRead(self.held_rows, self.codebook, self.codes, ids.reshape(-1))
        return self.folds.read(ids, fold)

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
        return self._silenced(vectors.reshape(*input.shape, self.dim), input)

    def _silenced(self, vectors: Tensor, ids: Tensor) -> Tensor:
        """The vectors, zero for the padding id."""
        if self.padding_idx is None:
            return vectors
        # In a small type, the comparison would wrap around.
        return vectors.masked_fill((checked_ids(ids) == self.padding_idx).unsqueeze(-1), 0)

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
        text = f"n_ids={self.n_ids}, n_buckets={self.n_buckets}, indices_per_id={self.indices_per_id}, dim={self.dim}"
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
    left_vectors, right_vectors = read_table_twice(
        table,
        left.entries(left_ids),
        right.entries(right_ids),
        weighted=left.weighted,
        untrained=left._untrained + right._untrained,
    )
    return left._silenced(left_vectors, left_ids), right._silenced(right_vectors, right_ids)


def _held_weights(
    codebook: NDArray[np.float32] | None, codes: NDArray[np.uint8] | None
) -> tuple[Tensor | None, Tensor | None]:
    """Copies of a map's codebook, as long as the longest, and of its codes: how much a layer holds does not depend on the weights."""
    if codebook is None or codes is None:
        return None, None
    longest = np.zeros((MAX_CODES, codebook.shape[1]), np.float32)
    longest[: len(codebook)] = codebook
    return torch.from_numpy(longest), torch.from_numpy(codes.copy())
