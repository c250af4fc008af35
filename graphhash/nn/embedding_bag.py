"""BucketEmbeddingBag: sums and means of bucket embeddings, for columns with several values."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from graphhash.errors import ArgumentError
from graphhash.maps.bucket_map import BucketMap
from graphhash.nn.compressed import checked_ids
from graphhash.nn.embedding import BucketEmbedding

MODES = ("mean", "sum")


class BucketEmbeddingBag(nn.Module):
    """Sums or means of the vectors of bags of ids: ``torch.nn.EmbeddingBag`` over a compressed table.

    Args:
        bucket_map: rows and weights of ``n_ids`` ids and the OOV entry.
        dim: length of a vector.
        mode: "mean", as in ``torch.nn.EmbeddingBag``, or "sum".
        padding_idx: an id that counts in no sum and no mean; None: no such id.
        include_last_offset: ``offsets`` has one more number, the number of ids.
        table: of another embedding, to read the same one; None: a new one.

    Raises:
        ArgumentError: the mode is none of these, or as in :class:`BucketEmbedding`.

    Attributes:
        embedding: the :class:`BucketEmbedding` of the ids.
        weight: its vectors of all ids, shape (n_ids, dim).
    """

    def __init__(
        self,
        bucket_map: BucketMap,
        dim: int,
        *,
        mode: Literal["mean", "sum"] = "mean",
        padding_idx: int | None = None,
        include_last_offset: bool = False,
        table: nn.Parameter | None = None,
    ):
        super().__init__()
        if mode not in MODES:
            raise ArgumentError(f"mode is {mode!r}; use 'mean' or 'sum'")
        self.embedding = BucketEmbedding(bucket_map, dim, padding_idx=padding_idx, table=table)
        self.mode, self.include_last_offset = mode, include_last_offset

    @property
    def weight(self) -> Tensor:
        """Vectors of all ids, shape (n_ids, dim); see :class:`BucketEmbedding`."""
        return self.embedding.weight

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Sums or means of bags, shape (n_bags, dim); those of empty bags are zero.

        Args:
            input: ids, any integer type. Shape (n_bags, n): a bag per row. Shape (n,): the ids of all bags, one after the other.
            offsets: where every bag begins in ``input`` of shape (n,), int64, shape (n_bags,), ascending from 0.
            per_sample_weights: factors of the vectors, a float type, in the shape of ``input``; with mode "sum".

        Raises:
            TypeError: ``input`` is no tensor of integers.
            ValueError: offsets are missing, or given with rows; weights have another shape, or the mode is "mean".
            IndexError: an id is out of range.
        """
        ids = checked_ids(input)
        self._check(ids, offsets, per_sample_weights)
        vectors = self.embedding(ids)
        if per_sample_weights is not None:
            vectors = vectors * per_sample_weights.unsqueeze(-1)
        counted = (
            torch.ones_like(ids) if self.embedding.padding_idx is None else (ids != self.embedding.padding_idx).long()
        )
        if offsets is None:
            sums, counts = vectors.sum(1), counted.sum(1)
        else:
            starts = offsets[:-1] if self.include_last_offset else offsets
            bags = torch.bucketize(torch.arange(len(ids), device=ids.device), starts, right=True) - 1
            sums = vectors.new_zeros(len(starts), vectors.shape[1]).index_add(0, bags, vectors)
            counts = counted.new_zeros(len(starts)).index_add(0, bags, counted)
        return sums if self.mode == "sum" else sums / counts.clamp_min(1).unsqueeze(1)

    def _check(self, ids: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None) -> None:
        if ids.ndim == 2 and offsets is not None:
            raise ValueError("offsets are for ids of shape (n,); leave them out for ids of shape (n_bags, n)")
        if ids.ndim == 1 and offsets is None:
            raise ValueError("ids of shape (n,) need offsets; pass them, or ids of shape (n_bags, n)")
        if ids.ndim not in (1, 2):
            raise ValueError(f"ids have {ids.ndim} dimensions; pass 1 or 2")
        if per_sample_weights is None:
            return
        if self.mode != "sum":
            raise ValueError(f"per_sample_weights need mode 'sum', this is {self.mode!r}")
        if per_sample_weights.shape != ids.shape:
            raise ValueError(
                f"per_sample_weights have shape {tuple(per_sample_weights.shape)}, ids {tuple(ids.shape)}; pass one per id"
            )

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}"
