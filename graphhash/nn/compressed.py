"""CompressedEmbedding: what a model, its training and its storage need of an embedding layer, however it is compressed.

To add an embedding:

1. Write a module in ``graphhash/nn/`` with a class that derives from :class:`CompressedEmbedding`. It sets ``n_ids`` and ``dim`` and
   implements the abstract methods; :class:`OovVectorEmbedding` does most of it. Id ``n_ids`` is the out-of-vocabulary (OOV) id.
2. Add a function that makes it to ``KINDS`` in ``graphhash/nn/kinds.py``. It gets a ``Side``: the bucket map, the dim, the sizes of the
   :class:`~graphhash.maps.embedding_spec.EmbeddingSpec`, and the generator of the initial values.
3. Add the method to ``METHODS`` in ``pipeline/maps/methods.py``, with ``embedding=`` the kind, and its sizes at a number of bytes to
   ``SIZES`` in ``pipeline/maps/sizes.py``.
4. Test it against a naive second implementation.

Training, checkpoints, the count of the bytes, rounding to the stored precision and the evaluation then need no change. Parameters are
stored by their names in the module; buffers that training changes are named in :attr:`CompressedEmbedding.stored_buffers`. The export
writes the vectors of all ids, unless ``pipeline.retrieval.onnx_parts`` knows the kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from graphhash.errors import ArgumentError
from graphhash.maps.quantization import row_bytes

if TYPE_CHECKING:
    from graphhash.nn.embedding import BucketEmbedding


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
    def forward(self, input: Tensor) -> Tensor:
        """Vectors of ids, shape (*input.shape, dim).

        Args:
            input: ids, any integer type and shape, values 0..n_ids; n_ids is the OOV id.

        Raises:
            TypeError: ``input`` is no tensor of integers.
            IndexError: an id is out of range.
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

    def learned_buffers(self) -> dict[str, Tensor]:
        """The buffers that are stored with the weights, by name in the module."""
        return {name: getattr(self, name) for name in self.stored_buffers}

    def before_epoch(self, epoch: int, n_epochs: int) -> None:
        """Called by the training before every epoch, which is numbered from 1: clusterings are renewed here."""

    def bucket_parts(self) -> list[BucketEmbedding]:
        """Bucket embeddings that this one reads through, if any: those whose rows a training step may read seldom."""
        return []

    def read_with(self, ids: Tensor, other: CompressedEmbedding, other_ids: Tensor) -> tuple[Tensor, Tensor]:
        """``self(ids), other(other_ids)``; ids of shapes (n,) and (m,)."""
        return self(ids), other(other_ids)

    @property
    def map_bytes(self) -> int:
        """Bytes stored beside the parameters: row numbers, codes, weights of a map."""
        return 0

    @property
    def num_embeddings(self) -> int:
        """``n_ids``, as ``torch.nn.Embedding`` calls it; the OOV id is not counted."""
        return self.n_ids

    @property
    def embedding_dim(self) -> int:
        """``dim``, as ``torch.nn.Embedding`` calls it."""
        return self.dim

    @property
    def weight(self) -> Tensor:
        """The table that ``torch.nn.Embedding`` would hold: :meth:`all`, computed at every access; it cannot be set."""
        return self.all()

    @weight.setter
    def weight(self, value: object) -> None:
        raise AttributeError(
            f"{type(self).__name__}.weight is computed from fewer numbers and cannot be set; use from_pretrained or load_state_dict"
        )

    def __setattr__(self, name: str, value: object) -> None:
        # nn.Module registers parameters and buffers without a look at properties.
        if name == "weight":
            object.__setattr__(self, name, value)
        super().__setattr__(name, value)  # type: ignore[arg-type]  # Any attribute may be set.

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


class OovVectorEmbedding(CompressedEmbedding):
    """An embedding whose OOV id has a vector of its own, which is not trained.

    Attributes:
        oov: buffer, float32, shape (dim,).
    """

    oov: Tensor
    stored_buffers: ClassVar[tuple[str, ...]] = ("oov",)

    def __init__(self, n_ids: int, dim: int):
        super().__init__()
        if n_ids < 1 or dim < 1:
            raise ArgumentError(f"ids and dim must be at least 1, got {n_ids} and {dim}")
        self.n_ids, self.dim = n_ids, dim
        self.register_buffer("oov", torch.zeros(dim))

    @abstractmethod
    def vectors(self, ids: Tensor) -> Tensor:
        """Vectors of known ids, int64, shape (n,): shape (n, dim)."""

    @property
    def map_bytes(self) -> int:
        """Bytes of the OOV vector."""
        return 4 * self.dim

    def forward(self, input: Tensor) -> Tensor:
        """Vectors of ids, shape (*input.shape, dim)."""
        flat = self.flat_ids(input)
        vectors = self.vectors(flat.clamp(max=self.n_ids - 1))
        return self.with_oov(vectors, flat).reshape(*input.shape, self.dim)

    def flat_ids(self, input: Tensor) -> Tensor:
        """The ids, checked: int64, shape (n,).

        Raises:
            TypeError, IndexError: as :meth:`forward`.
        """
        flat = checked_ids(input).reshape(-1)
        # On a GPU the check would wait for all that is under way.
        if flat.device.type == "cpu" and len(flat) and (flat.min() < 0 or flat.max() > self.n_ids):
            raise IndexError(f"ids span {flat.min()}..{flat.max()}, the embedding has 0..{self.n_ids}")
        return flat

    def with_oov(self, vectors: Tensor, ids: Tensor) -> Tensor:
        """``vectors``, shape (n, dim), with that of the OOV id where ``ids``, shape (n,), are it."""
        return torch.where((ids < self.n_ids)[:, None], vectors, self.oov)

    @torch.no_grad()
    def fill_oov(self, frequencies: Tensor) -> None:
        """Set the OOV vector to the mean vector of the ids."""
        self.oov.copy_((frequencies / frequencies.sum()).to(self.oov) @ self.all())


def checked_ids(input: object) -> Tensor:
    """Ids as int64.

    Raises:
        TypeError: ``input`` is no tensor, or not one of integers.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"ids must be a tensor of integers, got {type(input).__name__}; pass torch.tensor(ids)")
    if input.dtype.is_floating_point or input.dtype.is_complex or input.dtype == torch.bool:
        raise TypeError(f"ids must be integers, got a tensor of {input.dtype}; pass ids.long()")
    return input if input.dtype == torch.int64 else input.long()
