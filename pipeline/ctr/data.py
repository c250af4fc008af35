"""An ingested CTR data set on disk, as `pipeline.ctr.ingest` leaves it: its columns, and its parts as memory maps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from graphhash.errors import DataError
from graphhash.graph.vocabulary import Vocabulary
from graphhash.models.ctr import FeatureBatch
from pipeline.ctr.schema import CtrSchema


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

    def tensors(self, rows: slice = slice(None)) -> list[torch.Tensor]:
        """Copies of some rows as tensors: labels, categorical, dense, multi-valued, in their own types."""
        arrays: list[NDArray] = [self.labels, self.categorical, self.dense, *self.multi_valued]
        return [torch.from_numpy(np.array(array[rows])) for array in arrays]


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

    def rows_of(self, parts: Sequence[str]) -> Part:
        """The rows of several parts, one after the other, without groups; those of a single part are memory maps.

        Raises:
            DataError: a file is missing or damaged.
        """
        first, *others = (replace(self.part(name), groups=None) for name in parts)
        if not others:
            return first
        every = (first, *others)
        return Part(
            np.concatenate([part.labels for part in every]),
            np.concatenate([part.categorical for part in every]),
            np.concatenate([part.dense for part in every]),
            tuple(map(np.concatenate, zip(*(part.multi_valued for part in every), strict=True))),
            None,
        )

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
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        # An array without an element cannot be mapped.
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise DataError(f"{path}: cannot be read ({error}); run 'graphhash ingest --task ctr' again") from error
        if array.size:
            raise DataError(f"{path}: cannot be mapped ({error}); run 'graphhash ingest --task ctr' again") from error
    return array
