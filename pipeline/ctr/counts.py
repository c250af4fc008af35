"""What the first pass over a CTR data set counts: samples, ids, and mean and deviation of numbers, added up batch by batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from graphhash.errors import DataError
from graphhash.graph.interactions import TEST, TRAIN, VALIDATION

if TYPE_CHECKING:
    from pipeline.config.run_config import DataConfig

PARTS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
# Counts that wait to be added up: one more value_counts costs less than to hold them.
PENDING = 2_000_000


@dataclass
class IdCounts:
    """How often every id occurred; missing ones apart."""

    kind: str
    n_missing: int = 0
    _parts: list[pa.Table] = field(default_factory=list)
    _pending: int = 0

    def add(self, ids: pa.Array) -> None:
        self.n_missing += ids.null_count
        counted = ids.drop_null().value_counts()
        self._parts.append(pa.table({"id": counted.field("values"), "n": counted.field("counts")}))
        self._pending += len(counted)
        if self._pending > PENDING + 2 * len(self._parts[0]):
            self._merge()

    def include(self, other: IdCounts) -> None:
        """Add the counts of other rows."""
        self.n_missing += other.n_missing
        self._parts += other._parts
        self._merge()

    def counted(self) -> tuple[pa.Array, NDArray[np.int64]]:
        """Distinct ids, ascending, and their counts."""
        self._merge()
        if not self._parts:
            return pa.array([], pa.int64() if self.kind == "int64" else pa.large_string()), np.zeros(0, np.int64)
        table = self._parts[0].sort_by("id")
        ids, n = (table[name].combine_chunks() for name in ("id", "n"))
        return (pa.concat_arrays(ids.chunks) if isinstance(ids, pa.ChunkedArray) else ids), n.to_numpy(
            zero_copy_only=False
        )

    def _merge(self) -> None:
        if self._parts:
            table = pa.concat_tables(self._parts).group_by("id").aggregate([("n", "sum")]).rename_columns(["id", "n"])
            self._parts, self._pending = [table.combine_chunks()], 0


@dataclass
class OovCounts:
    """Values of the test that are out of vocabulary, by feature."""

    n_values: dict[str, int] = field(default_factory=dict)
    n_oov: dict[str, int] = field(default_factory=dict)
    ids: dict[str, IdCounts] = field(default_factory=dict)

    def add(self, name: str, kind: str, values: pa.Array, is_oov: NDArray[np.bool_]) -> None:
        """Count values of a feature in the test.

        Args:
            is_oov: shape (n_values,).
        """
        self.n_values[name] = self.n_values.get(name, 0) + len(values)
        self.n_oov[name] = self.n_oov.get(name, 0) + int(is_oov.sum())
        self.ids.setdefault(name, IdCounts(kind)).add(values.filter(pa.array(is_oov)))

    def include(self, other: OovCounts) -> None:
        """Add the counts of other rows."""
        for name, n in other.n_values.items():
            self.n_values[name] = self.n_values.get(name, 0) + n
            self.n_oov[name] = self.n_oov.get(name, 0) + other.n_oov[name]
            self.ids.setdefault(name, IdCounts(other.ids[name].kind)).include(other.ids[name])

    def rates(self) -> dict[str, float]:
        """Share of the values, by feature."""
        return {name: round(n / max(1, self.n_values[name]), 6) for name, n in self.n_oov.items()}

    def n_different(self) -> dict[str, int]:
        """Number of different values, by feature; missing ones are none."""
        return {name: len(ids.counted()[0]) for name, ids in self.ids.items()}


@dataclass
class Moments:
    """Mean and deviation of numbers seen so far, without NaN (Chan, Golub and LeVeque, 1979)."""

    n: int = 0
    mean: float = 0.0
    squares: float = 0.0
    low: float = np.inf
    high: float = -np.inf
    # Of every batch, so that those of other rows are added as if they had come here.
    _batches: list[tuple[int, float, float, float, float]] = field(default_factory=list)

    def add(self, numbers: NDArray[np.float64]) -> None:
        numbers = numbers[~np.isnan(numbers)]
        if len(numbers):
            mean = float(numbers.mean())
            squares = float(((numbers - mean) ** 2).sum())
            self._add((len(numbers), mean, squares, float(numbers.min()), float(numbers.max())))

    def include(self, other: Moments) -> None:
        """Add the batches of rows that come behind these."""
        for batch in other._batches:
            self._add(batch)

    def _add(self, batch: tuple[int, float, float, float, float]) -> None:
        self._batches.append(batch)
        n, mean, squares, low, high = batch
        gap, total = mean - self.mean, self.n + n
        self.squares += squares + gap**2 * self.n * n / total
        self.mean += gap * n / total
        self.n, self.low, self.high = total, min(self.low, low), max(self.high, high)

    @property
    def std(self) -> float:
        return (self.squares / max(1, self.n)) ** 0.5


@dataclass
class Counts:
    """What the first pass finds; ids, multi-valued and dense are of the training rows."""

    ids: dict[str, IdCounts]
    multi_valued: dict[str, IdCounts]
    dense: dict[str, Moments]
    groups: IdCounts
    widths: dict[str, int]
    n_rows: list[int] = field(default_factory=lambda: [0, 0, 0])
    n_positive: list[int] = field(default_factory=lambda: [0, 0, 0])

    def include(self, other: Counts) -> None:
        """Add the counts of rows that come behind these."""
        for name, ids in other.ids.items():
            self.ids[name].include(ids)
        for name, ids in other.multi_valued.items():
            self.multi_valued[name].include(ids)
            self.widths[name] = max(self.widths[name], other.widths[name])
        for name, moments in other.dense.items():
            self.dense[name].include(moments)
        self.groups.include(other.groups)
        for part in PARTS.values():
            self.n_rows[part] += other.n_rows[part]
            self.n_positive[part] += other.n_positive[part]

    def check(self, data: DataConfig) -> None:
        """Raise DataError for a part that lacks a class, or for no training rows."""
        for part, number in PARTS.items():
            n, positive = self.n_rows[number], self.n_positive[number]
            share = {"validation": data.validation, "test": data.test}.get(part, 1.0)
            if not n and (part == "train" or (share and part not in data.bounds)):
                raise DataError(
                    f"{data.path}: {part} has no rows of {sum(self.n_rows)}; give more data, or other shares"
                )
            if n and positive in (0, n):
                what = "no positive labels" if not positive else "positive labels alone"
                remedy = "other dates or shares" if data.by_time else "shares or another seed"
                raise DataError(
                    f"{data.path}: {part} has {what} in {n} rows, and needs labels 0 and 1; give more data, {remedy}"
                )
