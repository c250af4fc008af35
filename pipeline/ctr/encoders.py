"""Encoders of a CTR data set: raw ids of a feature -> entries of its vocabulary.

Entries are the ids that are frequent enough, ascending; then *missing*, where train has it often enough; the last entry is
out-of-vocabulary (OOV).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from graphhash.errors import DataError
from graphhash.graph.vocabulary import Vocabulary
from pipeline.ctr.counts import Counts, IdCounts, Moments
from pipeline.ctr.schema import Category, CtrSchema, MultiValued

# Most values of a multi-valued feature in a sample.
MAX_WIDTH = 256


@dataclass(frozen=True)
class Encoder:
    """Raw ids of one column -> entries."""

    name: str
    number: int
    column: Category | MultiValued
    vocabulary: Vocabulary
    has_missing: bool
    counts: NDArray[np.int64]

    @property
    def n_ids(self) -> int:
        return len(self.vocabulary) + self.has_missing

    def entries(self, ids: pa.Array) -> NDArray[np.int32]:
        """Entries of raw ids, shape (n,)."""
        missing = ids.is_null().to_numpy(zero_copy_only=False)
        known = self.vocabulary.rows(ids.drop_null(), missing="fallback")
        entries = np.full(len(ids), len(self.vocabulary) if self.has_missing else self.n_ids, np.int32)
        entries[~missing] = np.where(known == len(self.vocabulary), self.n_ids, known)
        return entries

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.column.kind,
            "n_ids": self.n_ids,
            "has_missing": self.has_missing,
            "vocabulary": f"vocabularies/{self.number:02d}.parquet",
            "counts": f"counts/{self.number:02d}.npy",
            "hash": self.vocabulary.content_hash,
        }


@dataclass(frozen=True)
class Encoders:
    """All columns that are kept."""

    columns: list[Encoder]
    multi_valued: list[Encoder]
    widths: list[int]
    dense: dict[str, Moments]
    groups: Vocabulary


def make_encoders(schema: CtrSchema, counts: Counts, out: Path) -> tuple[Encoders, dict[str, str]]:
    """Encoders of what is kept, their vocabularies and counts written, and why other columns are dropped."""
    dropped: dict[str, str] = {}
    encoders: dict[type, list[Encoder]] = {Category: [], MultiValued: []}
    for folder in ("vocabularies", "counts"):
        (out / folder).mkdir()
    number = 0
    found = {**counts.ids, **counts.multi_valued}
    features: list[Category | MultiValued] = [*schema.categories, *schema.multi_valued]
    for column in features:
        encoder = _encoder(column, number, found[column.name])
        if not encoder.n_ids:
            dropped[column.name] = (
                "no id of train is frequent enough" if column.min_count else "it has no value in train"
            )
            continue
        if np.count_nonzero(encoder.counts) == 1 and isinstance(column, Category):
            dropped[column.name] = "it has one value in all of train"
            continue
        encoder.vocabulary.save(out / "vocabularies" / f"{number:02d}.parquet")
        np.save(out / "counts" / f"{number:02d}.npy", encoder.counts)
        encoders[type(column)].append(encoder)
        number += 1
    for name, moments in counts.dense.items():
        if not moments.n:
            dropped[name] = "it has no number in train"
        elif moments.low == moments.high:
            dropped[name] = f"it is {moments.low:g} in all of train"
    if not encoders[Category] and not encoders[MultiValued]:
        raise DataError("no column has an entry: every id of train is rarer than min_count; lower data.min_count")
    widths = [counts.widths[encoder.name] for encoder in encoders[MultiValued]]
    for encoder, width in zip(encoders[MultiValued], widths, strict=True):
        if width > MAX_WIDTH:
            raise DataError(
                f"column {encoder.name!r} has a row of {width} values, of at most {MAX_WIDTH}; shorten the lists"
            )
    dense = {name: moments for name, moments in counts.dense.items() if name not in dropped}
    groups = Vocabulary(counts.groups.counted()[0])
    return Encoders(encoders[Category], encoders[MultiValued], widths, dense, groups), dropped


def _encoder(column: Category | MultiValued, number: int, found: IdCounts) -> Encoder:
    ids, n = found.counted()
    enough = n >= (column.min_count or 1)
    has_missing = isinstance(column, Category) and found.n_missing >= (column.min_count or 1)
    n_oov = int(n[~enough].sum()) + (0 if has_missing or isinstance(column, MultiValued) else found.n_missing)
    vocabulary = Vocabulary(ids.filter(pa.array(enough)))
    counts = np.concatenate([n[enough], [found.n_missing] if has_missing else [], [n_oov]]).astype(np.int64)
    return Encoder(column.name, number, column, vocabulary, has_missing, counts)
