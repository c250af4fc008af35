"""ProductEmbedding: trained vectors that were product-quantized afterwards (``graphhash.maps.product``)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from graphhash.errors import ArgumentError
from graphhash.maps.product import ProductCodes, encode, product_quantize
from graphhash.nn.compressed import CompressedEmbedding, StoredTable


class ProductEmbedding(CompressedEmbedding):
    """Vectors decoded from one codeword per chunk, times a rotation if there is one.

    Args:
        n_ids: ids of the vocabulary.
        dim: length of a vector.
        n_chunks: codes per id; divides ``dim``.
        n_codewords: of every chunk, at most 256.
        rotated: decoded vectors are multiplied with a rotation.

    Raises:
        ArgumentError: ``n_chunks`` does not divide ``dim``.

    Attributes:
        codes: buffer, uint8, shape (n_ids + 1, n_chunks); the last entry is for OOV ids.
        codebooks: parameter, float32, shape (n_chunks * n_codewords, dim / n_chunks); stored in float16.
        rotation: parameter, float32, shape (dim, dim), or None; stored in float16.
    """

    codes: Tensor
    stored_buffers: ClassVar[tuple[str, ...]] = ("codes",)

    def __init__(self, n_ids: int, dim: int, *, n_chunks: int, n_codewords: int, rotated: bool = False):
        super().__init__()
        if n_chunks < 1 or dim % n_chunks:
            raise ArgumentError(f"{n_chunks} codes per id do not divide the dim {dim}; use a divisor of it")
        self.n_ids, self.dim, self.n_chunks, self.n_codewords = n_ids, dim, n_chunks, n_codewords
        self.register_buffer("codes", torch.zeros(n_ids + 1, n_chunks, dtype=torch.uint8))
        self.codebooks = nn.Parameter(torch.zeros(n_chunks * n_codewords, dim // n_chunks))
        self.rotation = nn.Parameter(torch.eye(dim)) if rotated else None

    @classmethod
    def quantized(
        cls, trained: CompressedEmbedding, n_chunks: int, *, rotated: bool, cosine: bool, seed: int
    ) -> ProductEmbedding:
        """The vectors of a trained embedding, its OOV vector among them, product-quantized.

        Args:
            n_chunks: codes per id.
            rotated: learn a rotation as well.
            cosine: the model looks at directions alone, so vectors are scaled to length 1 first.
            seed: of the k-means.

        Raises:
            ArgumentError: ``n_chunks`` does not divide the dim, or FAISS is not installed.
        """
        with torch.no_grad():
            vectors = trained(torch.arange(trained.n_ids + 1, device=trained.device)).cpu()
            vectors = nn.functional.normalize(vectors, dim=-1) if cosine else vectors
        codes = product_quantize(vectors.numpy(), n_chunks, rotated=rotated, n_trained=trained.n_ids, seed=seed)
        n_codewords = codes.codebooks.shape[1]
        made = cls(trained.n_ids, trained.dim, n_chunks=n_chunks, n_codewords=n_codewords, rotated=rotated)
        made.codes.copy_(torch.from_numpy(codes.codes))
        with torch.no_grad():
            made.codebooks.copy_(torch.from_numpy(codes.codebooks.reshape(made.codebooks.shape)))
            if made.rotation is not None and codes.rotation is not None:
                made.rotation.copy_(torch.from_numpy(codes.rotation))
        return made

    @property
    def map_bytes(self) -> int:
        """Bytes of the codes."""
        return self.codes.numel()

    def stored_tables(self, precision: str) -> list[StoredTable]:
        """Codebooks and rotation, in float16 whatever ``precision`` is."""
        return [StoredTable(weight, "float16") for weight in (self.codebooks, self.rotation) if weight is not None]

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors of ids, shape (*ids.shape, dim)."""
        first = torch.arange(self.n_chunks, device=self.device) * self.n_codewords
        words = self.codes.index_select(0, ids.reshape(-1)).long() + first
        vectors = nn.functional.embedding(words, self.codebooks).reshape(-1, self.dim)
        vectors = vectors if self.rotation is None else vectors @ self.rotation
        return vectors.reshape(*ids.shape, self.dim)

    def product_codes(self) -> ProductCodes:
        """What is stored, as arrays; codebooks and rotation in float32."""
        books = self.codebooks.detach().cpu().numpy().reshape(self.n_chunks, self.n_codewords, -1)
        rotation = None if self.rotation is None else self.rotation.detach().cpu().numpy()
        return ProductCodes(self.codes.cpu().numpy(), books, rotation)

    @torch.no_grad()
    def fill_oov(self, frequencies: Tensor) -> None:
        """Give the OOV id the codes nearest to the mean vector of the ids."""
        shares = (frequencies / frequencies.sum()).to(self.codebooks)
        mean = (shares @ self.all())[None]
        mean = mean if self.rotation is None else mean @ self.rotation.T
        codes = encode(mean.cpu().numpy(), self.product_codes().codebooks)
        self.codes[-1] = torch.from_numpy(np.ascontiguousarray(codes[0]))
