"""ResidualEmbedding: table rows mixed by a bucket map, plus a short vector of the id's own, times one matrix for all ids.

A mixture of the communities around an id says what the id shares with others, and a few numbers of its own say the rest::

    embedding(id) = sum_j weights[id, j] * table[rows[id, j]]  +  own[id] @ projection

Without a projection an id has as many own numbers as a vector has: full tables that begin where the graph puts them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from graphhash.errors import ArgumentError
from graphhash.maps.bucket_map import BucketMap, full_map
from graphhash.maps.folded_map import FoldedMap
from graphhash.nn.compressed import CompressedEmbedding, StoredTable
from graphhash.nn.embedding import BucketEmbedding, read_both

# Standard deviation of the initial own numbers, as a share of that of the table: ids begin as their mixtures.
OWN_STD = 0.1
OWN_BITS = (8, 4)


class ResidualEmbedding(CompressedEmbedding):
    """``embedding(id) = sum_j weights[id, j] * table[rows[id, j]] + own[id] @ projection``.

    Args:
        bucket_map: rows and weights of ``n_ids`` ids and the OOV entry.
        dim: length of a vector.
        own_dim: numbers of an id's own.
        projected: multiply own numbers with a projection; otherwise ``own_dim`` is ``dim``.
        own_bits: in which these are stored where the table is stored in int8 or int4: 8 or 4.
        std: standard deviation of the initial values of the table; own numbers start at :data:`OWN_STD` of it.
        generator: draws the initial values.
        users: the embedding of the users, where this is the items': both have one projection, and one table where their maps share it.

    Raises:
        ArgumentError: ``dim`` or ``own_dim`` is below 1, ``own_bits`` is none of these, or ``own_dim`` is not ``dim`` without a projection.

    Attributes:
        mixture: the table behind the map.
        own: one row of ``own_dim`` numbers per id; that of the OOV id is zero.
        projection: trained parameter, float32, shape (own_dim, dim), or None.
    """

    def __init__(
        self,
        bucket_map: BucketMap,
        dim: int,
        *,
        own_dim: int,
        own_bits: int = 8,
        projected: bool = True,
        std: float = 0.1,
        generator: torch.Generator | None = None,
        users: ResidualEmbedding | None = None,
    ):
        super().__init__()
        if own_bits not in OWN_BITS:
            raise ArgumentError(f"own_bits must be 8 or 4, got {own_bits}")
        if own_dim < 1:
            raise ArgumentError(f"own_dim must be at least 1, got {own_dim}")
        if not projected and own_dim != dim:
            raise ArgumentError(f"own_dim={own_dim} must be dim={dim} without a projection")
        self.n_ids, self.dim, self.own_bits = bucket_map.n_ids, dim, own_bits
        table: nn.Parameter | None = users.mixture.table if users is not None and bucket_map.shared else None
        self.mixture: BucketEmbedding = BucketEmbedding(bucket_map, dim, std=std, generator=generator, table=table)
        self.own = BucketEmbedding(full_map(bucket_map.n_ids), own_dim, std=OWN_STD * std, generator=generator)
        self.projection: nn.Parameter | None = None
        if projected and users is None:
            self.projection = nn.Parameter(torch.randn(own_dim, dim, generator=generator) / math.sqrt(own_dim))
        elif users is not None:
            self.projection = users.projection

    @property
    def rows(self) -> Tensor:
        """Table rows of every id, int32, shape (n_ids + 1, indices_per_id)."""
        return self.mixture.rows

    @property
    def map_bytes(self) -> int:
        """Bytes of the stored bucket map."""
        return self.mixture.map_bytes

    def stored_tables(self, precision: str) -> list[StoredTable]:
        """The table in ``precision``, own numbers in :func:`own_precision`, and the projection in :func:`projection_precision`."""
        tables = [
            StoredTable(self.mixture.table, precision),
            StoredTable(self.own.table, own_precision(precision, self.own_bits)),
        ]
        if self.projection is not None:
            tables.append(StoredTable(self.projection, projection_precision(precision)))
        return tables

    def bucket_parts(self) -> list[BucketEmbedding]:
        """The mixture and the own numbers."""
        return [self.mixture, self.own]

    def use_folds(self, folded: BucketMap | FoldedMap) -> None:
        """Read mixtures of ids that are given with a fold through a cross-fitted map; as :meth:`BucketEmbedding.use_folds`."""
        self.mixture.use_folds(folded)

    def forward(self, input: Tensor, fold: Tensor | None = None) -> Tensor:
        """Vectors of ids, shape (*input.shape, dim); ``fold`` as in :meth:`BucketEmbedding.forward`."""
        return self.mixture(input, fold) + self._residuals(input)

    def _residuals(self, ids: Tensor) -> Tensor:
        own = self.own(ids)
        return own if self.projection is None else own @ self.projection

    def read_with(self, ids: Tensor, other: CompressedEmbedding, other_ids: Tensor) -> tuple[Tensor, Tensor]:
        """``self(ids), other(other_ids)``; a table that both share is read once."""
        if not isinstance(other, ResidualEmbedding):
            return self(ids), other(other_ids)
        mixture, other_mixture = read_both(self.mixture, ids, other.mixture, other_ids)
        return mixture + self._residuals(ids), other_mixture + other._residuals(other_ids)

    @torch.no_grad()
    def fill_oov(self, frequencies: Tensor) -> None:
        """Set the table's OOV row to the mean vector of the ids, own numbers included."""
        self.own.table[self.own.oov_row] = 0
        shares = (frequencies / frequencies.sum()).to(self.mixture.table)
        self.mixture.table[self.mixture.oov_row] = shares @ self.all()

    def extra_repr(self) -> str:
        return f"n_ids={self.n_ids}, dim={self.dim}, own_dim={self.own.dim}, own_bits={self.own_bits}"


def own_precision(precision: str, own_bits: int) -> str:
    """Type in which own numbers are stored beside a table in ``precision``: that of float tables, else ``own_bits``."""
    return precision if precision in ("float32", "float16") else f"int{own_bits}"


def projection_precision(precision: str) -> str:
    """Type in which the projection is stored beside a table in ``precision``: it is small, and never less than float16."""
    return "float32" if precision == "float32" else "float16"
