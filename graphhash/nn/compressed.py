"""CompressedEmbedding: what a model, its training and its storage need of an embedding layer, however it is compressed.

To add an embedding:

1. Write a module in ``graphhash/nn/`` with a class that derives from :class:`CompressedEmbedding`. It sets ``n_ids`` and ``dim`` and
   implements the abstract methods. Id ``n_ids`` is the out-of-vocabulary (OOV) id.
2. Add a function that makes it to ``KINDS`` in ``graphhash/nn/kinds.py``. It gets a ``Side``: the bucket map, the dim, the sizes of the
   :class:`~graphhash.maps.embedding_spec.EmbeddingSpec`, and the generator of the initial values.
3. Add the method to ``METHODS`` in ``pipeline/maps/methods.py``, with ``embedding=`` the kind, and its sizes at a number of bytes to
   ``SIZES`` in ``pipeline/retrieval/sizes.py``.
4. Test it against a naive second implementation.

Training, checkpoints, the count of the bytes, rounding to the stored precision and the evaluation then need no change. Parameters are
stored by their names in the module; buffers that training changes are named in :attr:`CompressedEmbedding.stored_buffers`. The export
writes the vectors of all ids, unless ``pipeline.retrieval.onnx_parts`` knows the kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from graphhash.maps.quantization import row_bytes


class StoredTable(NamedTuple):
    """A parameter that is stored row by row, shape (n_rows, row length), and the precision in which it is."""

    table: nn.Parameter
    precision: str

    @property
    def n_bytes(self) -> int:
        n_rows, length = self.table.shape
        return n_rows * row_bytes(length, self.precision)


class CompressedEmbedding(nn.Module, ABC):
    """Vectors of ``n_ids`` ids and of the OOV id, from fewer numbers than a full table has.

    Attributes:
        n_ids: ids of the vocabulary.
        dim: length of a vector.
        stored_buffers: names of the buffers that are stored with the weights, because training has changed them. Those that follow from
            the bucket map or the spec are not.
    """

    n_ids: int
    dim: int
    stored_buffers: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def forward(self, ids: Tensor) -> Tensor:
        """Vectors of ids, shape (*ids.shape, dim).

        Args:
            ids: any integer shape, values 0..n_ids; n_ids is the OOV id.
        """

    @abstractmethod
    def fill_oov(self, frequencies: Tensor) -> None:
        """Set the OOV vector to the mean vector of the ids, after training.

        Args:
            frequencies: weight of every id in the mean, shape (n_ids,), not negative, not all zero.
        """

    @abstractmethod
    def stored_tables(self, precision: str) -> list[StoredTable]:
        """The parameters that are stored in small types, row by row; all others are stored in float32.

        Args:
            precision: of the run's tables: "float32", "float16", "int8" or "int4".
        """

    @property
    def map_bytes(self) -> int:
        """Bytes stored beside the parameters: row numbers, codes, weights of a map."""
        return 0

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def all(self) -> Tensor:
        """Vectors of all ids, shape (n_ids, dim)."""
        return self(torch.arange(self.n_ids, device=self.device))

    def stored_bytes(self, precision: str) -> int:
        """Bytes of everything that this embedding stores: tables in ``precision``, other parameters in float32, and :attr:`map_bytes`."""
        tables = self.stored_tables(precision)
        in_tables = {id(stored.table) for stored in tables}
        others = sum(4 * weight.numel() for weight in self.parameters() if id(weight) not in in_tables)
        return sum(stored.n_bytes for stored in tables) + others + self.map_bytes
