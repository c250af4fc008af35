"""Embeddings of all columns of a CTR model: full columns in one table, the others with an embedding each.

A column is a *field*: a categorical column has one entry per sample, a multi-valued (multi-hot) column any number of them. The vectors of
all fields are made at once, float32, shape (batch, n_fields, dim).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graphhash.errors import ArgumentError
from graphhash.maps.bucket_map import BucketMap, full_map
from graphhash.maps.embedding_spec import EmbeddingSpec
from graphhash.maps.folded_map import FoldedMap
from graphhash.nn.compressed import CompressedEmbedding
from graphhash.nn.embedding import BucketEmbedding
from graphhash.nn.kinds import Side, make_embedding
from graphhash.nn.residual import ResidualEmbedding
from graphhash.nn.robe import RobeEmbedding, read_together
from graphhash.nn.table_reads import wide_rows, wide_weights

# Full columns of at most this many rows lie in one table and are read at once.
JOINT_ROWS = 10_000


@dataclass(frozen=True, eq=False)
class TableSlice:
    """The rows of one full column in the table that full columns share, with the interface of a :class:`BucketEmbedding`.

    Args:
        joint: the embedding that holds the table.
        start: the column's first row.
        n_ids: ids of the vocabulary; row ``start + n_ids`` is the OOV row.
    """

    joint: BucketEmbedding
    start: int
    n_ids: int

    @property
    def n_buckets(self) -> int:
        return self.n_ids + 1

    @property
    def oov_row(self) -> int:
        return self.n_ids

    @property
    def table(self) -> Tensor:
        """A view of the column's rows, shape (n_ids + 1, dim)."""
        return self.joint.table[self.start : self.start + self.n_ids + 1]

    def all(self) -> Tensor:
        """Vectors of all ids, shape (n_ids, dim)."""
        return self.table[:-1]

    @torch.no_grad()
    def fill_oov(self, frequencies: Tensor) -> None:
        """As :meth:`BucketEmbedding.fill_oov`."""
        self.table[-1] = (frequencies / frequencies.sum()).to(self.table) @ self.all()


class FieldEmbeddings(nn.Module):
    """The vectors of all fields of a batch.

    Full columns of at most JOINT_ROWS rows are read from one table, the others by a :class:`BucketEmbedding` each, or by an embedding of
    another kind. Two columns whose maps are ``shared`` read one table: such a map is paired with the next one of as many rows and another
    OOV row. All columns of ROBE read one array.

    Args:
        maps: of the categorical columns, then of the multi-valued ones.
        dim: length of a vector.
        n_multi_valued: how many of the maps are of multi-valued columns.
        std: standard deviation of the normal initial values; OOV rows start at zero.
        generator: draws them.
        specs: kind and sizes of the columns, by number, whose embedding is no bucket map alone (``graphhash.nn.kinds``). Their maps are the
            identity, except for kind "residual".
        n_trained: ids of every column at the training, whose number tells in which order the fields come; None: those of the maps.

    Raises:
        ArgumentError: there is no map, ``n_multi_valued`` is out of range, a shared map has no partner, or a spec lacks a size.

    Attributes:
        columns: an embedding or a TableSlice for every map, in the order of ``maps``.
        order: the number of the map behind every field that comes out. Columns with a spec stand where full ones would.
    """

    joint_columns: Tensor
    joint_starts: Tensor
    last_entries: Tensor
    arrangement: Tensor | None

    def __init__(
        self,
        maps: Sequence[BucketMap],
        dim: int,
        *,
        n_multi_valued: int = 0,
        std: float,
        generator: torch.Generator | None = None,
        specs: Mapping[int, EmbeddingSpec] | None = None,
        n_trained: Sequence[int] | None = None,
    ):
        super().__init__()
        specs, n_trained = specs or {}, n_trained or [m.n_ids for m in maps]
        if not maps or not 0 <= n_multi_valued <= len(maps):
            raise ArgumentError(
                f"a model needs one column or more, got {len(maps)} maps, {n_multi_valued} of them of multi-valued columns"
            )
        self.n_ids = [m.n_ids for m in maps]
        self.n_categorical, self.dim = len(maps) - n_multi_valued, dim
        small = [c for c, m in enumerate(maps) if (m.identity or c in specs) and n_trained[c] < JOINT_ROWS]
        starts, n_rows = {}, 0
        for column in (c for c in small if c not in specs):
            starts[column], n_rows = n_rows, n_rows + maps[column].n_buckets
        self.joint = BucketEmbedding(full_map(n_rows - 1), dim, std=std, generator=generator) if starts else None
        self.joint_multi_valued = [(c, start) for c, start in starts.items() if c >= self.n_categorical]
        in_joint = [c for c in starts if c < self.n_categorical]
        for name, numbers in (
            ("joint_columns", in_joint),
            ("joint_starts", [starts[c] for c in in_joint]),
            ("last_entries", self.n_ids[: self.n_categorical]),
        ):
            self.register_buffer(name, torch.tensor(numbers, dtype=torch.int64), persistent=False)
        rest = {c: m for c, m in enumerate(maps) if c not in starts}
        own = _own_embeddings(rest, shared_tables(maps), dim, std=std, generator=generator, specs=specs)
        self.own_columns, self.own = list(own), nn.ModuleList(own.values())
        # Values that training has seen too seldom for an id of their own read the OOV row, and train it.
        own_parts = [part for embedding in own.values() for part in embedding.bucket_parts()]
        for part in (*own_parts, *([] if self.joint is None else [self.joint])):
            part.trains_oov = True
        self.folded: set[int] = set()
        made = in_joint + [c for c, _ in self.joint_multi_valued] + self.own_columns
        # What reads the fields does not depend on how a column is stored.
        self.order = [
            *(c for c in small if c < self.n_categorical),
            *(c for c in small if c >= self.n_categorical),
            *(c for c in range(len(maps)) if c not in small),
        ]
        places = None if made == self.order else torch.tensor([made.index(c) for c in self.order])
        self.register_buffer("arrangement", places, persistent=False)
        self.columns = [
            TableSlice(self.joint, starts[c], m.n_ids) if self.joint is not None and c in starts else own[c]
            for c, m in enumerate(maps)
        ]
        with torch.no_grad():
            for embedding in self.columns:
                if isinstance(embedding, TableSlice):
                    embedding.table[-1] = 0

    def forward(self, categorical: Tensor, multi_valued: Sequence[Tensor], fold: Tensor | None = None) -> Tensor:
        """Vectors of every row's fields, shape (batch, n_fields, dim), in the order of ``order``.

        Args:
            categorical: int64, shape (batch, n_categorical); a column's ``n_ids`` stands for an OOV id.
            multi_valued: int64, shape (batch, width) each, -1 for an empty slot; the vector is the mean of the values', zero without any.
            fold: of every sample, int64, shape (batch,), for the maps of :meth:`use_folds`.

        Raises:
            IndexError: an entry is out of its column's range; checked on a CPU only, where this needs no synchronisation.
        """
        if categorical.device.type == "cpu":
            self._check(categorical, multi_valued)
        fields = []
        if self.joint is not None:
            entries = [categorical.index_select(1, self.joint_columns) + self.joint_starts]
            entries += [
                multi_valued[c - self.n_categorical].clamp_min(0) + start for c, start in self.joint_multi_valued
            ]
            vectors = self.joint(torch.cat(entries, 1) if self.joint_multi_valued else entries[0])
            first, *others = vectors.split([part.shape[1] for part in entries], 1)
            fields = [first] + [
                multi_valued_mean(part, multi_valued[c - self.n_categorical])
                for (c, _), part in zip(self.joint_multi_valued, others, strict=True)
            ]
        ids = {
            c: categorical[:, c : c + 1]
            if c < self.n_categorical
            else multi_valued[c - self.n_categorical].clamp_min(0)
            for c in self.own_columns
        }
        robe = {c: e for c, e in zip(self.own_columns, self.own, strict=True) if isinstance(e, RobeEmbedding)}
        of_array = (
            dict(zip(robe, read_together(list(robe.values()), [ids[c] for c in robe]), strict=True)) if robe else {}
        )
        for column, embedding in zip(self.own_columns, self.own, strict=True):
            of_ids = (fold.unsqueeze(1),) if fold is not None and column in self.folded else ()
            own = of_array[column] if column in of_array else embedding(ids[column], *of_ids)
            fields.append(
                own
                if column < self.n_categorical
                else multi_valued_mean(own, multi_valued[column - self.n_categorical])
            )
        vectors = torch.cat(fields, 1) if len(fields) > 1 else fields[0]
        return vectors if self.arrangement is None else vectors.index_select(1, self.arrangement)

    def use_folds(self, folded: Mapping[int, BucketMap | FoldedMap]) -> None:
        """:meth:`BucketEmbedding.use_folds` of categorical columns, by their numbers.

        Raises:
            ArgumentError: as there, or the column lies in the joint table.
        """
        for number, bucket_map in folded.items():
            column = self.columns[number]
            if not isinstance(column, (BucketEmbedding, ResidualEmbedding)) or number >= self.n_categorical:
                raise ArgumentError(
                    f"column {number} has no table of its own, or is multi-valued: it has no cross-fitted map"
                )
            column.use_folds(bucket_map)
            self.folded.add(number)

    def readers(self) -> list[tuple[BucketEmbedding, list[int]]]:
        """Every bucket embedding, and the numbers of the columns that it reads for."""
        found = [] if self.joint is None else [(self.joint, [c for c in self.order if c not in self.own_columns])]
        for column, embedding in zip(self.own_columns, self.own, strict=True):
            assert isinstance(embedding, CompressedEmbedding)
            found += [(part, [column]) for part in embedding.bucket_parts()]
        return found

    @torch.no_grad()
    def fill_oov(self, counts: Sequence[Tensor]) -> None:
        """Set the OOV row to the mean vector of the ids, in every column where training did not read it.

        Args:
            counts: of every column, how often each entry occurred in training, shape (n_ids + 1,), OOV last.
        """
        for column, seen in zip(self.columns, counts, strict=True):
            if seen[:-1].sum() > 0 and not _reads_oov(column, seen > 0):
                column.fill_oov(seen[:-1])

    def _check(self, categorical: Tensor, multi_valued: Sequence[Tensor]) -> None:
        if categorical.shape[1] != self.n_categorical or len(multi_valued) != len(self.n_ids) - self.n_categorical:
            raise ArgumentError(
                f"the model has {self.n_categorical} categorical columns and {len(self.n_ids) - self.n_categorical} multi-valued ones, "
                f"the batch {categorical.shape[1]} and {len(multi_valued)}"
            )
        if categorical.numel() and ((categorical < 0) | (categorical > self.last_entries)).any():
            wrong = ((categorical < 0) | (categorical > self.last_entries)).nonzero()[0].tolist()
            raise IndexError(
                f"column {wrong[1]} has entries 0..{self.n_ids[wrong[1]]}, the last for OOV ids; "
                f"row {wrong[0]} has {int(categorical[*wrong])}"
            )
        for number, values in enumerate(multi_valued):
            last = self.n_ids[self.n_categorical + number]
            if values.numel() and not -1 <= int(values.min()) <= int(values.max()) <= last:
                raise IndexError(
                    f"multi-valued column {number} has entries 0..{last} and -1 for an empty slot; it spans {values.min()}..{values.max()}"
                )


def shared_tables(maps: Sequence[BucketMap]) -> dict[int, int]:
    """For every second map of a pair that shares a table, the number of the first; see :class:`FieldEmbeddings`.

    Raises:
        ArgumentError: a shared map has no partner.
    """
    first_of: dict[int, int] = {}
    waiting: list[int] = []
    for number, bucket_map in enumerate(maps):
        if not bucket_map.shared:
            continue
        size, row = bucket_map.n_buckets, bucket_map.oov_row
        partners = [n for n in waiting if maps[n].n_buckets == size and maps[n].oov_row != row]
        if partners:
            first_of[number] = partners[0]
            waiting.remove(partners[0])
        else:
            waiting.append(number)
    if waiting:
        raise ArgumentError(
            f"column {waiting[0]} shares its table with another one, which is not here: pass both maps of one call"
        )
    return first_of


def multi_valued_mean(vectors: Tensor, values: Tensor) -> Tensor:
    """Mean of the vectors, shape (batch, width, dim), whose value, shape (batch, width), is not -1; zero for none: (batch, 1, dim)."""
    there = (values >= 0).to(vectors.dtype)
    weights = there / there.sum(1, keepdim=True).clamp_min(1)
    return weights.unsqueeze(1) @ vectors


def _own_embeddings(
    maps: Mapping[int, BucketMap],
    tables: Mapping[int, int],
    dim: int,
    *,
    std: float,
    generator: torch.Generator | None,
    specs: Mapping[int, EmbeddingSpec],
) -> dict[int, CompressedEmbedding]:
    """The embeddings of the columns that have one of their own, by column.

    Args:
        maps: of these columns.
        tables: as :func:`shared_tables` finds them.
    """
    own: dict[int, CompressedEmbedding] = {}
    for column, bucket_map in maps.items():
        first = own.get(tables.get(column, -1))
        if column in specs:
            drawn = torch.Generator().manual_seed(specs[column].seed) if generator is None else generator
            side = Side(bucket_map, dim, specs[column], std, drawn, _partner(specs[column], first, own))
            own[column] = make_embedding(side)
        else:
            table = first.table if isinstance(first, BucketEmbedding) else None
            own[column] = BucketEmbedding(bucket_map, dim, std=std, generator=generator, table=table)
    return own


def _partner(
    spec: EmbeddingSpec, first: CompressedEmbedding | None, own: Mapping[int, CompressedEmbedding]
) -> CompressedEmbedding | None:
    """The embedding whose parameters one of a spec shares: of the column that has the same table, or of ROBE any other one."""
    return next((e for e in own.values() if isinstance(e, RobeEmbedding)), None) if spec.kind == "robe" else first


def _reads_oov(column: CompressedEmbedding | TableSlice, seen: Tensor) -> bool:
    """Whether one of the entries that occurred reads an OOV row."""
    if isinstance(column, TableSlice):
        return bool(seen[-1])
    for part in column.bucket_parts():
        read = part.entries(seen.nonzero().squeeze(1).to(part.device))
        of_oov, weights = wide_rows(read) == part.oov_row, wide_weights(read)
        if bool((of_oov if weights is None else of_oov & (weights != 0)).any()):
            return True
    return False
