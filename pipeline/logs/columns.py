"""Columns of a log, checked: raw ids of one type, weights above zero, and the rows that had to be rejected.

**Type of the ids.** A user or item column is int64 or string in the whole log. Parquet says which; in text
the first 1,000 ids of the first file decide: int64 when more than half of them are whole numbers in their
plain form (`7`, `-7`; not `07`, `+7` or `7.0`), else string. Each other file has to come out the same. In an
int64 column any other value is a bad row; in a string column every value is an id as it stands (spaces and
case count).

**Weights.** Without a weight column every row weighs 1, MovieLens ratings included: their stars become
weights only with weight_column="rating". A weight is a finite number above zero, within float32; a zero is a
bad row.

**Bad rows.** A null id, an id of another type, a bad weight, a row with too few or too many fields.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

SAMPLE_IDS = 1000
PLAIN_INTEGER = r"^(0|-?[1-9][0-9]*)$"
NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$|^[+-]?(?i:nan|inf|infinity)$"
REJECTED_SCHEMA = pa.schema(
    [("source", pa.int32()), ("row", pa.int64()), ("reason", pa.string()), ("raw", pa.string())]
)

Reject = Callable[[NDArray[np.bool_], str], None]


@dataclass(frozen=True)
class Columns:
    """What to read, the same for every file of a log.

    Attributes:
        user, item: column names; LightGCN and MovieLens have none, there they name the ids in messages.
        weight: column of weights, or None for weight 1; "rating" is the only one of MovieLens, LightGCN has
            none.
        user_kind, item_kind: "int64" or "string", from `find_kinds`.
    """

    user: str = "user_id"
    item: str = "item_id"
    weight: str | None = None
    user_kind: str = "int64"
    item_kind: str = "int64"


@dataclass(frozen=True)
class Batch:
    """Checked rows, in file order.

    Attributes:
        users, items: raw ids, int64 or large_string, shape (n,), no nulls.
        weights: float64, positive and finite, shape (n,); None when every row weighs 1.
        rows: 1-based row numbers, int64, shape (n,); from the chunk's first line in byte-range chunks (see
            `read_chunk`).
        rejected: REJECTED_SCHEMA, empty with bad_rows="error".
    """

    users: pa.Array
    items: pa.Array
    weights: NDArray[np.float64] | None
    rows: NDArray[np.int64]
    rejected: pa.Table


@dataclass(frozen=True)
class RawColumns:
    """Unchecked columns: ids as text or int64, weights as text or numbers, nulls too; and malformed rows."""

    users: pa.Array
    items: pa.Array
    weights: pa.Array | None
    rows: NDArray[np.int64]
    malformed: list[tuple[int, str, str]]


def text_kind(ids: pa.Array) -> str:
    """ "int64" or "string", from the first ids of a text file."""
    sample = ids.drop_null().slice(0, SAMPLE_IDS)
    n_integers = pc.sum(pc.match_substring_regex(sample, PLAIN_INTEGER)).as_py() or 0
    return "int64" if 2 * n_integers > len(sample) else "string"


def check_columns(raw: RawColumns, columns: Columns, source: int) -> Batch:
    """Good rows as a `Batch`, bad ones in its `rejected`; `source` is the number of the file in the log."""
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
    bad = code > 0
    rejected = REJECTED_SCHEMA.empty_table()
    if bad.any() or raw.malformed:
        rejected = _rejected_rows(raw, source, columns, bad, pa.array(reasons).take(pa.array(code[bad] - 1)))
    if not bad.any():
        return Batch(users, items, weights, raw.rows, rejected)
    keep = pa.array(~bad)
    return Batch(
        users.filter(keep),
        items.filter(keep),
        None if weights is None else weights[~bad],
        raw.rows[~bad],
        rejected,
    )


def _rejected_rows(raw: RawColumns, source: int, columns: Columns, bad: NDArray, reasons: pa.Array) -> pa.Table:
    mask = pa.array(bad)
    parts = []
    for name, values in ((columns.user, raw.users), (columns.item, raw.items), (columns.weight, raw.weights)):
        if values is not None:
            text = values.filter(mask).cast(pa.string()).fill_null("")
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


def _checked_ids(ids: pa.Array, name: str, kind: str, reject: Reject) -> pa.Array:
    """int64 or large_string; rejected places hold anything."""
    reject(ids.is_null().to_numpy(zero_copy_only=False), f"column {name!r} is null")
    if kind == "string":
        return ids.cast(pa.large_string()).fill_null("")
    if pa.types.is_uint64(ids.type):
        too_large = pc.greater(ids, pa.scalar(2**63 - 1, pa.uint64())).fill_null(False)
        reject(too_large.to_numpy(zero_copy_only=False), f"column {name!r} does not fit int64")
        return ids.cast(pa.int64(), safe=False).fill_null(0)
    if pa.types.is_integer(ids.type):
        return ids.cast(pa.int64()).fill_null(0)
    numbers, plain = _integers(ids.fill_null("0"))
    reject(~plain, f"column {name!r} holds int64 ids, this value is another type")
    return numbers


def _integers(text: pa.Array) -> tuple[pa.Array, NDArray[np.bool_]]:
    """The int64 values of plain whole numbers, and which of the texts are; the others come out as 0."""
    try:
        numbers = text.cast(pa.int64())
        plain = pc.equal(numbers.cast(text.type), text)
        if pc.all(plain).as_py() or len(text) == 0:
            return numbers, np.ones(len(text), bool)
    except pa.ArrowException:
        pass
    plain = pc.match_substring_regex(text, PLAIN_INTEGER).to_numpy(zero_copy_only=False).copy()
    # Eighteen digits always fit; longer ones are looked at one by one.
    for i in np.flatnonzero(plain & (pc.binary_length(text).to_numpy() > 18)):
        plain[i] = -(2**63) <= int(text[int(i)].as_py()) < 2**63
    return pc.if_else(pa.array(plain), text, "0").cast(pa.int64()), plain


def _checked_weights(weights: pa.Array, name: str, reject: Reject) -> NDArray[np.float64]:
    reject(weights.is_null().to_numpy(zero_copy_only=False), f"column {name!r} is null")
    if is_number(weights.type):
        values = weights.cast(pa.float64(), safe=False).fill_null(1.0).to_numpy()
    else:
        text = pc.ascii_trim_whitespace(weights.fill_null("1"))
        matches = pc.match_substring_regex(text, NUMBER)
        reject(~matches.to_numpy(zero_copy_only=False), f"column {name!r} is not a number")
        values = pc.if_else(matches, text, "1").cast(pa.float64()).to_numpy()
    with np.errstate(over="ignore", under="ignore"):
        single = values.astype(np.float32)
    reject(~np.isfinite(values), f"column {name!r} is not finite")
    reject(~(values > 0), f"column {name!r} is not above zero")
    reject(~np.isfinite(single) | (single == 0), f"column {name!r} does not fit float32")
    return values


def is_number(dtype: pa.DataType) -> bool:
    return pa.types.is_integer(dtype) or pa.types.is_floating(dtype) or pa.types.is_decimal(dtype)
