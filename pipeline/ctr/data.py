"""An ingested CTR data set on disk, as `pipeline.ctr.ingest` leaves it: its columns, and its parts as memory maps."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from graphhash.errors import DataError
from graphhash.graph.vocabulary import Vocabulary
from graphhash.models.ctr import FeatureBatch
from pipeline.ctr.schema import CtrSchema
from pipeline.storage.mapped import load_array, read_slice

# Rows that are read at a time where all are looked through.
BLOCK_ROWS = 1 << 18


@dataclass(frozen=True)
class Column:
    """A categorical or multi-valued column that was kept.

    Args:
        name: in the log.  kind: of its raw ids, "int64" or "string".
        n_ids: known entries; entry ``n_ids`` is out of vocabulary (OOV).
        has_missing: whether entry ``n_ids - 1`` stands for a missing value.
        vocabulary, counts: files of raw ids and of their rows in train.
        hash: of the vocabulary.
        width: values of a multi-valued column's row at most; None for a categorical one.
    """

    name: str
    kind: str
    n_ids: int
    has_missing: bool
    vocabulary: str
    counts: str
    hash: str
    width: int | None = None


@dataclass(frozen=True)
class DenseColumn:
    """A dense column: ``(number - mean) / std`` goes into the model, and 0 for a missing one."""

    name: str
    mean: float
    std: float


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of train, validation or test; memory maps.

    Args:
        labels: uint8, shape (n,).  categorical: int32, shape (n, n_categorical).  dense: float32, shape (n, n_dense).
        multi_valued: int32, shape (n, width) each, -1 for nothing.
        groups: number of every row's group, int64, shape (n,); None for train, and where there is no group column.
    """

    labels: NDArray[np.uint8]
    categorical: NDArray[np.int32]
    dense: NDArray[np.float32]
    multi_valued: tuple[NDArray[np.int32], ...]
    groups: NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def arrays(self) -> list[NDArray]:
        """Labels, categorical, dense, multi-valued."""
        return [self.labels, self.categorical, self.dense, *self.multi_valued]

    def tensors(self, first: int = 0, last: int | None = None) -> list[torch.Tensor]:
        """Copies of the rows first, ..., last - 1 as tensors: labels, categorical, dense, multi-valued, in their own types."""
        last = len(self) if last is None else last
        return [torch.from_numpy(read_slice(array, first, last)) for array in self.arrays]

    def positive_entries(self, columns: Sequence[int]) -> NDArray[np.int32]:
        """Entries of some categorical columns in the positive rows, in order, shape (n_positive, n_columns)."""
        found = [np.empty((0, len(columns)), np.int32)]
        for start in range(0, len(self), BLOCK_ROWS):
            positive = np.asarray(self.labels[start : start + BLOCK_ROWS]) > 0
            found.append(read_slice(self.categorical, start, start + BLOCK_ROWS)[positive][:, columns])
        return np.concatenate(found)

    def entry_blocks(self, columns: Sequence[int]) -> Iterator[NDArray[np.int32]]:
        """Entries of some categorical columns in all rows, in order, block by block, shape (n, n_columns) each."""
        for start in range(0, len(self), BLOCK_ROWS):
            yield read_slice(self.categorical, start, start + BLOCK_ROWS)[:, columns]


@dataclass(frozen=True, eq=False)
class JoinedParts:
    """The rows of several parts, one after the other, where they lie; with the interface of a :class:`Part`, but for groups."""

    parts: tuple[Part, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def labels(self) -> NDArray[np.uint8]:
        """Shape (n,), in memory."""
        return np.concatenate([part.labels for part in self.parts])

    @property
    def pieces(self) -> list[list[NDArray]]:
        """Of every array of :attr:`Part.arrays`, those of the parts."""
        return [list(arrays) for arrays in zip(*(part.arrays for part in self.parts), strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for part in self.parts for array in part.arrays)

    def tensors(self) -> list[torch.Tensor]:
        """Copies of all rows, as :meth:`Part.tensors`."""
        first, *others = (part.tensors() for part in self.parts)
        return [torch.cat(tensors) for tensors in zip(first, *others, strict=True)] if others else first

    def positive_entries(self, columns: Sequence[int]) -> NDArray[np.int32]:
        """As :meth:`Part.positive_entries`."""
        return np.concatenate([part.positive_entries(columns) for part in self.parts])

    def entry_blocks(self, columns: Sequence[int]) -> Iterator[NDArray[np.int32]]:
        """As :meth:`Part.entry_blocks`."""
        return itertools.chain.from_iterable(part.entry_blocks(columns) for part in self.parts)


def batch_of(tensors: Sequence[torch.Tensor], n_multi_valued: int) -> FeatureBatch:
    """The features among what `Part.tensors` gives, on the same device; one tensor more is the fold of every row."""
    _labels, categorical, dense, *others = tensors
    multi_valued, fold = tuple(feature.long() for feature in others[:n_multi_valued]), others[n_multi_valued:]
    return FeatureBatch(categorical.long(), dense, multi_valued, fold[0].long() if fold else None)


@dataclass(frozen=True)
class Features:
    """An ingested CTR data set: its features, and where their files are.

    Args:
        folder: the ingest folder.
        schema: as it was read.
        columns, multi_valued, dense: those that were kept, in the order of the arrays.
        content_hash: of schema, vocabularies and statistics.
    """

    folder: Path
    schema: CtrSchema
    columns: tuple[Column, ...]
    multi_valued: tuple[Column, ...]
    dense: tuple[DenseColumn, ...]
    content_hash: str

    @classmethod
    def open(cls, folder: Path) -> Features:
        """Read `schema.json`.

        Raises:
            DataError: it is missing or damaged.
        """
        path = folder / "schema.json"
        try:
            tree: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                folder,
                CtrSchema.from_dict(tree["log"]),
                tuple(Column(**column) for column in tree["columns"]),
                tuple(Column(**feature) for feature in tree["multi_valued"]),
                tuple(DenseColumn(**dense) for dense in tree["dense"]),
                tree["content_hash"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: not a readable schema ({error}); run 'graphhash ingest --task ctr' again"
            ) from error

    @property
    def all_columns(self) -> tuple[Column, ...]:
        """Categorical columns, then multi-valued ones: the order of a model's maps."""
        return (*self.columns, *self.multi_valued)

    def vocabulary(self, column: Column) -> Vocabulary:
        """Raw ids of a column; a missing value's entry comes after them."""
        return Vocabulary.load(self.folder / column.vocabulary)

    def counts(self, column: Column) -> NDArray[np.int64]:
        """Rows of train of every entry, shape (n_ids + 1,), OOV last."""
        return _load(self.folder / column.counts)

    def rows_of(self, parts: Sequence[str]) -> JoinedParts:
        """The rows of several parts, one after the other.

        Raises:
            DataError: a file is missing or damaged.
        """
        return JoinedParts(tuple(map(self.part, parts)))

    def part(self, name: str) -> Part:
        """The rows of "train", "validation" or "test".

        Raises:
            DataError: a file is missing or damaged.
        """
        folder = self.folder / name
        labels, categorical, dense = (_load(folder / f"{array}.npy") for array in ("labels", "categorical", "dense"))
        multi_valued = tuple(_load(folder / f"multi_valued_{i}.npy") for i in range(len(self.multi_valued)))
        groups = folder / "groups.npy"
        return Part(labels, categorical, dense, multi_valued, _load(groups) if groups.exists() else None)


def _load(path: Path) -> NDArray:
    try:
        return load_array(path)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}); run 'graphhash ingest --task ctr' again") from error
