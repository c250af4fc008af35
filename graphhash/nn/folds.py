"""Reads of a folded map (:class:`graphhash.maps.folded_map.FoldedMap`) in PyTorch."""

from __future__ import annotations

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from graphhash.maps.folded_map import RANKS, FoldedMap
from graphhash.nn.table_reads import MapRead, held_rows


class FoldReads(nn.Module):
    """Rows and weights of ids as they look in the folds of a cross-fitted training; nothing of it is trained or saved.

    Args:
        folded: of ``n_ids`` ids. Its arrays are not copied, and may be memory maps.
        n_ids: ids of the layer.

    Attributes:
        n_folds: folds of the map.
    """

    rows: Tensor
    codebook: Tensor
    codes: Tensor
    starts: Tensor | None
    masks: Tensor | None
    ranks: Tensor | None

    def __init__(self, folded: FoldedMap, n_ids: int):
        super().__init__()
        index = folded.index
        self.n_ids = n_ids
        self.n_folds = folded.n_entries // n_ids if index is None else index.n_folds
        self.register_buffer("rows", held_rows(folded.rows), persistent=False)
        arrays: dict[str, NDArray] = {"codebook": folded.codebook, "codes": folded.codes}
        if index is not None:
            arrays |= {"starts": index.starts, "masks": index.masks, "ranks": RANKS}
        for name in ("codebook", "codes", "starts", "masks", "ranks"):
            buffer = torch.from_numpy(arrays[name]) if name in arrays else None
            self.register_buffer(name, buffer, persistent=False)

    def read(self, ids: Tensor, fold: Tensor) -> MapRead:
        """The entries of ids, flat.

        Args:
            ids: int64, values 0..n_ids.
            fold: int64, of a shape that spreads to that of ``ids``.

        Raises:
            IndexError: an id has no entry in its fold; checked on a CPU only.
        """
        fold, ids = fold.expand_as(ids).reshape(-1), ids.reshape(-1)
        is_oov = ids >= self.n_ids
        entries = torch.where(is_oov, len(self.rows) - 1, self._entries(ids, fold, is_oov))
        return MapRead(self.rows, self.codebook, self.codes, entries)

    def _entries(self, ids: Tensor, fold: Tensor, is_oov: Tensor) -> Tensor:
        """Entries of known ids, int64, shape (n,); anything for OOV ids."""
        if self.starts is None or self.masks is None or self.ranks is None:
            return ids + fold * self.n_ids
        known = ids.clamp(max=self.n_ids - 1)
        masks = self.masks.index_select(0, known).long()
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            missing = ((masks >> fold) & 1 == 0) & ~is_oov
            if missing.any():
                first = int(missing.nonzero()[0])
                raise IndexError(f"id {int(ids[first])} has no entry in fold {int(fold[first])} of the folded map")
        return self.starts.index_select(0, known).long() + self.ranks[masks, fold]
