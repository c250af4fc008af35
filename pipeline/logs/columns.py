"""Columns of a log, checked: raw ids of one type, weights above zero, and the rows that had to be rejected.

**Type of the ids.** A user or item column is int64 or string in the whole log (`pipeline.logs.kinds`). In an int64 column any value that
is no whole number (`serving.values`) is a bad row; in a string column every value is an id as it stands (spaces and case count).

**Weights.** Without a weight column every row weighs 1, MovieLens ratings included: their stars become
weights only with weight_column="rating". A weight is a finite number above zero, within float32; a zero is a
bad row.

**Ratings.** With `positive_from`, a row whose rating is below it is left out before it is checked any further. A rating that is missing or
no number is a bad row.

**Times.** Read for splits by time and weights by age. A time that is missing, or is none, is a bad row.

**Bad rows.** A null id, an id of another type, a bad weight, a row with too few or too many fields.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.logs.values import microseconds, numbers, texts, whole_numbers

if TYPE_CHECKING:
    from pipeline.config.run_config import DataConfig

REJECTED_SCHEMA = pa.schema(
    [("source", pa.int32()), ("row", pa.int64()), ("reason", pa.string()), ("raw", pa.string())]
)

NOT_WHOLE = "int64 ids, this value is another type"

Reject = Callable[[NDArray[np.bool_], str], None]


@dataclass(frozen=True)
class Columns:
    """What to read, the same for every file of a log.

    Attributes:
        user, item: column names; LightGCN and MovieLens have none, there they name the ids in messages.
        weight: column of weights, or None for weight 1; "rating" is the only one of MovieLens, LightGCN has
            none.
        user_kind, item_kind: "int64" or "string", of the settings or from `find_kinds`.
        rating: column of ratings, read only with `positive_from`.
        positive_from: the least rating of a row that is kept; None keeps all rows.
        time: column of times, or None where they are not read.
        time_unit: of times that are numbers: "s", "ms", "us" or "ns"; None for dates.
    """

    user: str = "user_id"
    item: str = "item_id"
    weight: str | None = None
    user_kind: str = "int64"
    item_kind: str = "int64"
    rating: str | None = None
    positive_from: float | None = None
    time: str | None = None
    time_unit: str | None = None

    @classmethod
    def of(cls, data: DataConfig) -> Columns:
        """What the settings say, without the types of the ids."""
        rating = None if data.positive_from is None else data.rating_column or data.weight_column or "rating"
        return cls(
            data.user_column,
            data.item_column,
            data.weight_column,
            rating=rating,
            positive_from=data.positive_from,
        )

    @property
    def names(self) -> list[str]:
        """The columns to read, each once."""
        names = (self.user, self.item, self.weight, self.rating, self.time)
        return list(dict.fromkeys(name for name in names if name))


@dataclass(frozen=True)
class Batch:
    """Checked rows, in file order.

    Attributes:
        users, items: raw ids, int64 or large_string, shape (n,), no nulls.
        weights: float64, positive and finite, shape (n,); None when every row weighs 1.
        rows: 1-based row numbers, int64, shape (n,); from the chunk's first line in byte-range chunks (see
            `read_chunk`).
        rejected: REJECTED_SCHEMA, empty with bad_rows="error".
        n_below: rows left out because of their rating.
        times: microseconds since 1970 in UTC, int64, shape (n,); None where they are not read.
    """

    users: pa.Array
    items: pa.Array
    weights: NDArray[np.float64] | None
    rows: NDArray[np.int64]
    rejected: pa.Table
    n_below: int = 0
    times: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class RawColumns:
    """Unchecked columns: ids as text or int64, weights, ratings and times of any type, nulls too; and malformed rows."""

    users: pa.Array
    items: pa.Array
    weights: pa.Array | None
    rows: NDArray[np.int64]
    malformed: list[tuple[int, str, str]]
    ratings: pa.Array | None = None
    times: pa.Array | None = None

    def filtered(self, keep: NDArray[np.bool_]) -> RawColumns:
        """The marked rows, and all malformed ones."""
        mask = pa.array(keep)
        return RawColumns(
            self.users.filter(mask),
            self.items.filter(mask),
            None if self.weights is None else self.weights.filter(mask),
            self.rows[keep],
            self.malformed,
            None if self.ratings is None else self.ratings.filter(mask),
            None if self.times is None else self.times.filter(mask),
        )


def check_columns(raw: RawColumns, columns: Columns, source: int) -> Batch:
    """Good rows as a `Batch`, bad ones in its `rejected`; `source` is the number of the file in the log."""
    n_read = len(raw.rows)
    if raw.ratings is not None and columns.positive_from is not None:
        # A rating that is missing or no number is NaN, which is not below.
        raw = raw.filtered(~(numbers(raw.ratings)[0] < columns.positive_from))
    n_rows = len(raw.rows)
    reasons: list[str] = []
    # 0 is a good row, i + 1 the first of the reasons that holds.
    code = np.zeros(n_rows, np.int8)

    def reject(mask: NDArray[np.bool_], reason: str) -> None:
        reasons.append(reason)
        code[mask & (code == 0)] = len(reasons)

    users = _checked_ids(raw.users, columns.user, columns.user_kind, reject)
    items = _checked_ids(raw.items, columns.item, columns.item_kind, reject)
    weights = None if raw.weights is None else _checked_weights(raw.weights, str(columns.weight), reject)
    if raw.ratings is not None:
        _check_ratings(raw.ratings, str(columns.rating), reject)
    times = None if raw.times is None else _checked_times(raw.times, columns, reject)
    bad = code > 0
    rejected = REJECTED_SCHEMA.empty_table()
    if bad.any() or raw.malformed:
        rejected = _rejected_rows(raw, source, columns, bad, pa.array(reasons).take(pa.array(code[bad] - 1)))
    if not bad.any():
        return Batch(users, items, weights, raw.rows, rejected, n_read - n_rows, times)
    keep = pa.array(~bad)
    return Batch(
        users.filter(keep),
        items.filter(keep),
        None if weights is None else weights[~bad],
        raw.rows[~bad],
        rejected,
        n_read - n_rows,
        None if times is None else times[~bad],
    )


def _rejected_rows(raw: RawColumns, source: int, columns: Columns, bad: NDArray, reasons: pa.Array) -> pa.Table:
    mask = pa.array(bad)
    parts = []
    read = {columns.user: raw.users, columns.item: raw.items, columns.weight: raw.weights}
    read |= {columns.rating: raw.ratings, columns.time: raw.times}
    for name, values in read.items():
        if name is not None and values is not None:
            text = pa.array([_shown(value) for value in values.filter(mask)], pa.string())
            parts.append(pc.binary_join_element_wise(f"{name}=", text, ""))
    rows = np.concatenate([raw.rows[bad], np.array([row for row, _, _ in raw.malformed], np.int64)])
    return pa.table(
        [
            pa.array(np.full(len(rows), source, np.int32)),
            pa.array(rows),
            pa.concat_arrays([reasons.cast(pa.string()), pa.array([m[1] for m in raw.malformed], pa.string())]),
            pa.concat_arrays(
                [
                    pc.binary_join_element_wise(*parts, ", "),
                    pa.array([m[2] for m in raw.malformed], pa.string()),
                ]
            ),
        ],
        schema=REJECTED_SCHEMA,
    ).sort_by("row")


def _shown(value: pa.Scalar) -> str:
    return "" if value.as_py() is None else str(value.as_py())


def _checked_ids(ids: pa.Array, name: str, kind: str, reject: Reject) -> pa.Array:
    """int64 or large_string; rejected places hold anything."""
    missing = ids.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_floating(ids.type):
        missing = missing | np.isnan(ids.cast(pa.float64()).to_numpy(zero_copy_only=False))
    reject(missing, f"column {name!r} is null")
    found, wrong = texts(ids) if kind == "string" else whole_numbers(ids)
    if kind == "string":
        reject(wrong, f"column {name!r} holds string ids, this value is another type")
        return found.fill_null("")
    reject(wrong, f"column {name!r} holds {NOT_WHOLE}")
    return found.fill_null(0)


def _checked_times(times: pa.Array, columns: Columns, reject: Reject) -> NDArray[np.int64]:
    values, wrong = microseconds(times, columns.time_unit)
    reject(times.is_null().to_numpy(zero_copy_only=False), f"column {columns.time!r} is null")
    like = "a date as in ISO 8601" if columns.time_unit is None else f"a time in {columns.time_unit} since 1970"
    reject(wrong, f"column {columns.time!r} is not {like}")
    return values


def _check_ratings(ratings: pa.Array, name: str, reject: Reject) -> None:
    values, wrong = numbers(ratings)
    reject(ratings.is_null().to_numpy(zero_copy_only=False), f"column {name!r} is null")
    reject(wrong | np.isnan(values), f"column {name!r} is not a number")


def _checked_weights(weights: pa.Array, name: str, reject: Reject) -> NDArray[np.float64]:
    values, wrong = numbers(weights)
    reject(weights.is_null().to_numpy(zero_copy_only=False), f"column {name!r} is null")
    reject(wrong, f"column {name!r} is not a number")
    reject(np.isnan(values) & ~wrong, f"column {name!r} is not finite")
    values = np.where(np.isnan(values), 1.0, values)
    with np.errstate(over="ignore", under="ignore"):
        single = values.astype(np.float32)
    reject(~np.isfinite(values), f"column {name!r} is not finite")
    reject(~(values > 0), f"column {name!r} is not above zero")
    reject(~np.isfinite(single) | (single == 0), f"column {name!r} does not fit float32")
    return values
