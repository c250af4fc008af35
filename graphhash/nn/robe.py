"""RobeEmbedding: blocks out of one flat array, placed by a hash (ROBE-Z: Desai, Chou and Shrivastava, MLSys 2022, arXiv 2108.02191).

A vector is made of ``dim / block`` blocks of ``block`` numbers. A universal hash of (id, block number) gives the place where a block
begins, anywhere in the array, which has no end: after its last number comes the first. A second hash gives the sign of a block. Users and
items read one array. No map is stored: the hashes are two seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from graphhash.errors import ArgumentError
from graphhash.maps.hashes import universal_hash
from graphhash.nn.compressed import CompressedEmbedding, OovVectorEmbedding, StoredTable


class RobeEmbedding(OovVectorEmbedding):
    """``embedding(id)[c * block + j] = sign(id, c) * array[(start(id, c) + j) mod len(array)]``.

    Args:
        n_ids: ids of the vocabulary.
        dim: length of a vector.
        n_rows: rows of ``dim`` numbers in the array.
        block: numbers read in one piece; divides ``dim``.
        seed: of the hash functions.
        std: standard deviation of the normal initial values.
        generator: draws them; torch's global generator when None.
        array: of another embedding, to read the same one; None: a new one.

    Raises:
        ArgumentError: ``block`` does not divide ``dim``, there are no rows, or ``array`` has another shape.

    Attributes:
        array: trained parameter, float32, shape (n_rows, dim), read as if it were flat.
        starts: buffer, int32, shape (n_ids, dim / block); follows from the seed and is not stored.
        signs: buffer, float32, 1 or -1, same shape; follows from the seed as well.
    """

    starts: Tensor
    signs: Tensor

    def __init__(
        self,
        n_ids: int,
        dim: int,
        *,
        n_rows: int,
        block: int,
        seed: int,
        std: float = 0.1,
        generator: torch.Generator | None = None,
        array: nn.Parameter | None = None,
    ):
        super().__init__(n_ids, dim)
        if block < 1 or dim % block:
            raise ArgumentError(f"a block of {block} numbers does not divide the dim {dim}; use a divisor of it")
        if n_rows < 1 or (array is not None and array.shape != (n_rows, dim)):
            shape = None if array is None else tuple(array.shape)
            raise ArgumentError(f"the array needs at least 1 row and shape ({n_rows}, {dim}), got {shape}")
        self.block = block
        n_blocks, rng = dim // block, np.random.default_rng(seed)
        places = np.arange(n_ids * n_blocks)
        starts = universal_hash(places, n_rows * dim, rng).reshape(n_ids, n_blocks)
        signs = 2 * universal_hash(places, 2, rng).reshape(n_ids, n_blocks) - 1
        self.register_buffer("starts", torch.from_numpy(starts.astype(np.int32)), persistent=False)
        self.register_buffer("signs", torch.from_numpy(signs.astype(np.float32)), persistent=False)
        self.array = nn.Parameter(torch.empty(n_rows, dim)) if array is None else array
        if array is None:
            with torch.no_grad():
                self.array.normal_(std=std, generator=generator)

    def stored_tables(self, precision: str) -> list[StoredTable]:
        """The array, row by row in ``precision``."""
        return [StoredTable(self.array, precision)]

    def vectors(self, ids: Tensor) -> Tensor:
        """Vectors of known ids: shape (n, dim)."""
        return read_array([self], [ids])[0]

    def places(self, ids: Tensor) -> Tensor:
        """Where the numbers of known ids' vectors are in the flat array: int64, shape (n, dim / block, block)."""
        within = torch.arange(self.block, device=self.device)
        places = self.starts.index_select(0, ids).unsqueeze(-1).long() + within
        return places.remainder(self.array.numel())

    def read_with(self, ids: Tensor, other: CompressedEmbedding, other_ids: Tensor) -> tuple[Tensor, Tensor]:
        """``self(ids), other(other_ids)``; one read of the array where both have the same one."""
        if not isinstance(other, RobeEmbedding) or other.array is not self.array:
            return super().read_with(ids, other, other_ids)
        vectors, others = read_together([self, other], [ids, other_ids])
        return vectors, others

    def extra_repr(self) -> str:
        return f"n_ids={self.n_ids}, dim={self.dim}, n_numbers={self.array.numel()}, block={self.block}"


def read_together(embeddings: Sequence[RobeEmbedding], ids: Sequence[Tensor]) -> list[Tensor]:
    """``embedding(i)`` of every embedding and its ids, in one read of the array that all of them have.

    The gradient of a read has the size of the array, so that of 26 columns read one by one is made and added up 26 times.

    Args:
        embeddings: one or more, with one array.
        ids: of each, any shape; ``n_ids`` is the OOV id.

    Raises:
        TypeError, IndexError: as in :meth:`OovVectorEmbedding.forward`.
    """
    flat = [embedding.flat_ids(own) for embedding, own in zip(embeddings, ids, strict=True)]
    known = [own.clamp(max=embedding.n_ids - 1) for embedding, own in zip(embeddings, flat, strict=True)]
    return [
        embedding.with_oov(vectors, own).reshape(*asked.shape, embedding.dim)
        for embedding, vectors, own, asked in zip(embeddings, read_array(embeddings, known), flat, ids, strict=True)
    ]


def read_array(embeddings: Sequence[RobeEmbedding], ids: Sequence[Tensor]) -> list[Tensor]:
    """Vectors of known ids of every embedding, shape (n, dim) each, in one read; see :func:`read_together`."""
    places = [embedding.places(own) for embedding, own in zip(embeddings, ids, strict=True)]
    numbers = embeddings[0].array.reshape(-1).index_select(0, torch.cat([own.reshape(-1) for own in places]))
    return [
        (blocks.reshape(own.shape) * embedding.signs.index_select(0, asked).unsqueeze(-1)).reshape(
            len(asked), embedding.dim
        )
        for embedding, blocks, own, asked in zip(
            embeddings, numbers.split([own.numel() for own in places]), places, ids, strict=True
        )
    ]
