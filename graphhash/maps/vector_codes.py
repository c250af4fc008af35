"""Vectors stored as codes of one byte, each the number of a codeword in a codebook of its own.

The numbers of a vector are in groups of equal length, and so are its codes. A group of numbers is the sum of the codewords of its codes.
With one code per group this is product quantization (``graphhash.maps.product``), with one group additive quantization
(``graphhash.maps.additive_codes``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graphhash.errors import ArgumentError

# A code is stored in one byte.
MAX_CODEWORDS = 256


@dataclass(frozen=True, eq=False)
class VectorCodes:
    """Vectors as codes and codewords.

    Args:
        codes: number of a codeword of every codebook, uint8, shape (n_vectors, n_codes).
        codebooks: float32, shape (n_codes, n_codewords, dim / n_groups).
        n_groups: groups of numbers; the first ``n_codes / n_groups`` codebooks are those of the first group, and so on.
        rotation: what decoded vectors are multiplied with, orthogonal, float32, shape (dim, dim); None: nothing.
        precision: in which codebooks are stored: "float16", "int8" or "int4".
        shared: users and items have the same codebooks, which are stored once.

    Raises:
        ArgumentError: ``n_groups`` does not divide the number of codes.
    """

    codes: NDArray[np.uint8]
    codebooks: NDArray[np.float32]
    n_groups: int
    rotation: NDArray[np.float32] | None = None
    precision: str = "float16"
    shared: bool = False

    def __post_init__(self) -> None:
        if self.n_groups < 1 or len(self.codebooks) % self.n_groups:
            raise ArgumentError(f"n_groups={self.n_groups} does not divide the number of codes, {len(self.codebooks)}")

    @property
    def shape(self) -> tuple[int, int]:
        """Of the decoded vectors."""
        return len(self.codes), self.n_groups * self.codebooks.shape[2]

    def decoded(self) -> NDArray[np.float32]:
        """The vectors as they read, float32, shape (n_vectors, dim)."""
        n_codes, _, length = self.codebooks.shape
        vectors = np.zeros((len(self.codes), self.n_groups, length), np.float32)
        for number, book in enumerate(self.codebooks):
            vectors[:, number * self.n_groups // n_codes] += book[self.codes[:, number]]
        flat = vectors.reshape(self.shape)
        return flat if self.rotation is None else flat @ self.rotation
