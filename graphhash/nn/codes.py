"""CodeEmbedding: trained vectors that were stored as codes afterwards (``graphhash.maps.vector_codes``)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from graphhash.errors import ArgumentError
from graphhash.maps.additive_codes import encode
from graphhash.maps.vector_codes import MAX_CODEWORDS, VectorCodes
from graphhash.nn.compressed import CompressedEmbedding, StoredTable, checked_ids


class CodeEmbedding(CompressedEmbedding):
    """Vectors decoded from codewords: groups of numbers are sums of codewords, and all of them are multiplied with a rotation if there is
    one.

    Args:
        n_ids: ids of the vocabulary.
        dim: length of a vector.
        n_codes: codes per id.
        n_codewords: of every code, at most 256.
        n_groups: groups of numbers; None: one per code, as in product quantization.
        rotated: decoded vectors are multiplied with a rotation.
        precision: in which codebooks are stored.
        shared_with: an embedding of the same sizes, whose codebooks and rotation this one has; None: its own.

    Raises:
        ArgumentError: ``n_groups`` does not divide ``dim`` or ``n_codes``, ``n_codewords`` does not fit into a byte, or ``shared_with``
            has other sizes.

    Attributes:
        codes: buffer, uint8, shape (n_ids + 1, n_codes); the last entry is for OOV ids.
        codebooks: parameter, float32, shape (n_codes * n_codewords, dim / n_groups).
        rotation: parameter, float32, shape (dim, dim), or None; stored in float16.
    """

    codes: Tensor
    stored_buffers: ClassVar[tuple[str, ...]] = ("codes",)

    def __init__(
        self,
        n_ids: int,
        dim: int,
        *,
        n_codes: int,
        n_codewords: int,
        n_groups: int | None = None,
        rotated: bool = False,
        precision: str = "float16",
        shared_with: CodeEmbedding | None = None,
    ):
        super().__init__()
        n_groups = n_codes if n_groups is None else n_groups
        if n_codes < 1 or n_groups < 1 or dim % n_groups:
            what = f"{n_codes} codes per id" if n_groups == n_codes else f"{n_groups} groups of codes"
            raise ArgumentError(f"{what} do not divide the dim {dim}; use a divisor of it")
        if n_codes % n_groups:
            raise ArgumentError(f"{n_codes} codes per id are not a multiple of {n_groups} groups")
        if not 1 <= n_codewords <= MAX_CODEWORDS:
            raise ArgumentError(f"n_codewords={n_codewords} must be from 1 to {MAX_CODEWORDS}: a code is a byte")
        sizes = n_codes, n_codewords, n_groups, dim
        if shared_with is not None and sizes != shared_with.sizes:
            raise ArgumentError(
                f"codes, codewords, groups and dim are {sizes}, and {shared_with.sizes} of what is shared"
            )
        self.n_ids, self.dim, self.n_codes, self.n_codewords = n_ids, dim, n_codes, n_codewords
        self.n_groups, self.precision, self.shares_codebooks = n_groups, precision, shared_with is not None
        self.register_buffer("codes", torch.zeros(n_ids + 1, n_codes, dtype=torch.uint8))
        if shared_with is None:
            self.codebooks = nn.Parameter(torch.zeros(n_codes * n_codewords, dim // n_groups))
            self.rotation = nn.Parameter(torch.eye(dim)) if rotated else None
        else:
            self.codebooks, self.rotation = shared_with.codebooks, shared_with.rotation

    @torch.no_grad()
    def set_codes(self, stored: VectorCodes) -> None:
        """Take codes, codebooks and rotation of the vectors of all ids, that of the OOV id last.

        Raises:
            ArgumentError: one has a rotation and the other has none.
        """
        if (self.rotation is None) != (stored.rotation is None):
            raise ArgumentError("codes of rotated vectors need an embedding with rotated=True, and others one without")
        self.codes.copy_(torch.from_numpy(stored.codes))
        self.codebooks.copy_(torch.from_numpy(stored.codebooks.reshape(self.codebooks.shape)))
        if stored.rotation is not None:
            assert self.rotation is not None
            self.rotation.copy_(torch.from_numpy(stored.rotation))

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Codes per id, codewords of each, groups, and dim."""
        return self.n_codes, self.n_codewords, self.n_groups, self.dim

    @property
    def map_bytes(self) -> int:
        """Bytes of the codes."""
        return self.codes.numel()

    def stored_tables(self, precision: str) -> list[StoredTable]:
        """Codebooks, in their own precision, and the rotation, whatever ``precision`` is."""
        rotation = [] if self.rotation is None else [StoredTable(self.rotation, "float16")]
        return [StoredTable(self.codebooks, self.precision), *rotation]

    def forward(self, input: Tensor) -> Tensor:
        """Vectors of ids, shape (*input.shape, dim)."""
        ids = checked_ids(input)
        first = torch.arange(self.n_codes, device=self.device) * self.n_codewords
        words = self.codes.index_select(0, ids.reshape(-1)).long() + first
        terms = nn.functional.embedding(words, self.codebooks)
        n_terms = self.n_codes // self.n_groups
        vectors = terms if n_terms == 1 else terms.unflatten(1, (self.n_groups, n_terms)).sum(2)
        vectors = vectors.reshape(-1, self.dim)
        vectors = vectors if self.rotation is None else vectors @ self.rotation
        return vectors.reshape(*input.shape, self.dim)

    def vector_codes(self) -> VectorCodes:
        """What is stored, as arrays; codebooks and rotation in float32."""
        books = self.codebooks.detach().cpu().numpy().reshape(self.n_codes, self.n_codewords, -1)
        rotation = None if self.rotation is None else self.rotation.detach().cpu().numpy()
        return VectorCodes(
            self.codes.cpu().numpy(), books, self.n_groups, rotation, self.precision, self.shares_codebooks
        )

    @torch.no_grad()
    def fill_oov(self, frequencies: Tensor) -> None:
        """Give the OOV id codes that are near to the mean vector of the ids."""
        shares = (frequencies / frequencies.sum()).to(self.codebooks)
        self.codes[-1] = self.encoded((shares @ self.all())[None].cpu().numpy())[0]

    @torch.no_grad()
    def encoded(self, vectors: NDArray[np.float32]) -> Tensor:
        """Codes of other vectors, float32, shape (n, dim), by the codewords that are there: uint8, shape (n, n_codes)."""
        stored = self.vector_codes()
        rotated = vectors if stored.rotation is None else vectors @ stored.rotation.T
        return torch.from_numpy(encode(rotated, stored.codebooks, self.n_groups)).to(self.codes)
