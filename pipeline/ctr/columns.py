"""Columns of labelled samples, checked: labels, raw ids, numbers and multi-valued ids of any file format.

What a value is, `serving.values` decides, for training and serving alike. **Ids** are int64 or text, one of them in the whole log: the
schema, the settings or the first 1,000 say which (`pipeline.logs.values.kind_of`). A value of the other kind later is an error. Null, and
the texts that pandas reads as missing, are *missing*. **Numbers** are finite; null and NaN are missing. **Labels** are 0 and 1, or true and
false, and never missing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from graphhash.errors import DataError, did_you_mean
from pipeline.ctr.schema import TIME_PARTS, Category, CtrSchema, MultiValued
from pipeline.logs.tables import Rows, listed_names
from pipeline.logs.values import (
    hours_and_weekdays,
    is_id,
    is_text,
    kind_of,
    matches,
    numbers,
    texts,
    whole_numbers,
)
from serving.values import MISSING_TEXTS, NUMBER, WHOLE, log_square_buckets, time_format

LABELS = ("label", "click", "clicked", "is_click", "is_clicked")
GUESS_ROWS = 10_000
# Fewer rows than this do not tell a row's number from an id.
ENOUGH_ROWS = 1000
# Names that pandas gives to an index that was written as a column.
INDEX_NAME = re.compile(r"Unnamed: [0-9]+|__index_level_[0-9]+__|__null_dask_index__")
# Dates, with a time or without, in the orders that are common.
_DATE = r"(?:[0-9]{4}[-/][0-9]{1,2}[-/][0-9]{1,2}|[0-9]{1,2}[./][0-9]{1,2}[./][0-9]{4})"
_CLOCK = r"[0-9]{1,2}:[0-9]{2}(?::[0-9.]+)?(?: ?(?:[+-][0-9:]+|Z|UTC))?"
TIME = rf"{_DATE}(?:[ T]{_CLOCK})?"
A_TIME = "a time; [times] of a schema makes its hour and weekday columns"


def guess_schema(
    head: Rows, label: str | None, user: str, item: str, time: str | None = None
) -> tuple[CtrSchema, dict[str, str]]:
    """The schema of a log by the types of its first rows.

    Numbers with a fraction are dense, lists are multi-valued; times, nested values, indices and what differs in every row are left out;
    all else is categorical.

    Args:
        label: its column; None: the one that is named like one.
        user, item: each other's partners, where both are there.
        time: the column that the split is by, which is no feature: its values in the test are none of train.

    Returns: the schema, and the columns left out with the reason.

    Raises:
        DataError: there is no such label.
    """
    names = list(head.columns)
    if label is None:
        found = [name for name in names if name.lower() in LABELS]
        if len(found) != 1:
            raise DataError(
                f"{head.file.path}: no column is plainly the label (columns: {listed_names(names)}); name it with label_column"
            )
        label = found[0]
    elif label not in names:
        hint = did_you_mean(label, names, cutoff=0.5)
        raise DataError(
            f"{head.file.path}: no column {label!r} for the label; {hint}the columns are {listed_names(names)}"
        )
    parts: dict[str, list[str]] = {"categorical": [], "dense": [], "multi_valued": []}
    left_out: dict[str, str] = {}
    for name, values in head.columns.items():
        if name == time:
            left_out[name] = "the time of the split"
        elif name != label:
            part, reason = _guess(name, values.slice(0, GUESS_ROWS), keep=name in (user, item))
            if reason:
                left_out[name] = reason
            else:
                parts[part].append(name)
    known = parts["categorical"]
    schema = CtrSchema(
        label,
        tuple(map(Category, known)),
        tuple(parts["dense"]),
        tuple(map(MultiValued, parts["multi_valued"])),
        group=user if user in known else None,
    )
    return (schema.with_pair(user, item) if user in known and item in known else schema), left_out


def _guess(name: str, values: pa.Array, *, keep: bool) -> tuple[str, str]:
    """Part of a column, and why it is left out (else empty)."""
    kind = values.type
    if not keep and INDEX_NAME.fullmatch(name):
        return "", "the index of a pandas frame"
    if pa.types.is_temporal(kind):
        return "", A_TIME
    if _is_list(kind):
        return ("multi_valued", "") if is_id(kind.value_type) else ("", f"it is {kind}; lists hold ids")
    if not is_id(kind):
        return "", f"it is {kind}, which is neither id nor number; cast it"
    given = values.drop_null()
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        # Of a column that is named as ids, whole numbers beside nulls are ids, as pandas writes them.
        is_ids = keep and len(given) and not whole_numbers(given)[1].any()
        return ("categorical" if is_ids or (keep and pa.types.is_decimal(kind)) else "dense"), ""
    if is_text(kind):
        given = given.filter(pc.invert(pc.is_in(given, pa.array(sorted(MISSING_TEXTS), kind))))
        if 2 * matches(given, TIME).sum() > len(given):
            return "", A_TIME
    if not keep and len(values) >= ENOUGH_ROWS and pc.count_distinct(given).as_py() == len(values):
        return "", "it differs in every row"
    if is_text(kind) and len(given):
        n_numbers, n_whole = matches(given, NUMBER).sum(), matches(given, WHOLE).sum()
        # Written by pandas, whole numbers beside missing ones have a fraction of zero: `7.0`.
        n_plain = n_whole if keep else n_whole - matches(given, r".*\.0*[ \t]*").sum()
        if 2 * n_numbers > len(given) and n_plain < n_numbers:
            return "dense", ""
    return "categorical", ""


def with_kinds(schema: CtrSchema, head: Rows) -> CtrSchema:
    """The schema with every kind of id decided by the first rows."""

    def decided(column):
        if column.kind != "auto":
            return column
        values = head.columns.get(column.name)
        if values is None:
            return replace(column, kind="int64")  # A part of a time.
        if hasattr(column, "separator"):
            values = split_values(head, column.name, column.separator).flatten()
        return replace(column, kind=kind_of(values, booleans=True))

    return replace(
        schema, categories=tuple(map(decided, schema.categories)), multi_valued=tuple(map(decided, schema.multi_valued))
    )


def labels_of(rows: Rows, name: str, label_from: float | None = None) -> NDArray[np.uint8]:
    """0 or 1 of every row, shape (n,); with ``label_from`` whether a number is so large.

    Raises:
        DataError: a label is missing, or is another value.
    """
    found = _numbers(rows, name)
    if np.isnan(found).any():
        raise DataError(f"{rows.where(np.isnan(found))}: label {name!r} is missing; drop the row, or give it a label")
    if label_from is not None:
        return (found >= label_from).astype(np.uint8)
    wrong = ~np.isin(found, (0, 1))
    if wrong.any():
        raise DataError(
            f"{rows.where(wrong)}: label {name!r} is {found[wrong][0]:g}, labels are 0 and 1; "
            "give label_from in the schema to cut numbers in two"
        )
    return found.astype(np.uint8)


def dense_of(rows: Rows, name: str) -> NDArray[np.float64]:
    """Numbers of a column, shape (n,), NaN where missing.

    Raises:
        DataError: a value is no number, or infinite.
    """
    found = _numbers(rows, name)
    if np.isinf(found).any():
        raise DataError(
            f"{rows.where(np.isinf(found))}: column {name!r} is infinite; dense columns hold finite numbers, or nothing"
        )
    return found


def ids_of(rows: Rows, column: Category) -> pa.Array:
    """Raw ids of a categorical column, int64 or large_string, null where missing.

    Raises:
        DataError: a value is of another kind.
    """
    return checked_ids(rows, column.name, rows.columns[column.name], column.kind)


def multi_valued_of(rows: Rows, name: str, separator: str, kind: str) -> tuple[NDArray[np.int64], pa.Array]:
    """Number of values of every row, shape (n,), and all values in order; missing ones are left out, and repeated ones stay."""
    lists = split_values(rows, name, separator)
    owners = pc.list_parent_indices(lists).to_numpy()
    values = checked_ids(rows, name, lists.flatten(), kind, owners)
    there = values.is_valid()
    counts = np.bincount(owners[there.to_numpy(zero_copy_only=False)], minlength=len(rows))
    return counts, values.filter(there)


def with_made_columns(rows: Rows, schema: CtrSchema) -> Rows:
    """The rows with the hour, 0 to 23, and the weekday, 0 for Monday, of every time, and the bucket of every number that is read so.

    Raises:
        DataError: a text is no time of its format, or a value is no number.
    """
    if not schema.times and not schema.buckets:
        return rows
    columns = dict(rows.columns)
    for name, form in schema.times:
        hours, weekdays, wrong = hours_and_weekdays(columns[name], time_format(form))
        if wrong.any():
            value = columns[name][int(np.argmax(wrong))].as_py()
            raise DataError(f"{rows.where(wrong)}: column {name!r} is {value!r:.60}, no time like {form!r}")
        columns |= {f"{name}_{part}": values for part, values in zip(TIME_PARTS, (hours, weekdays), strict=True)}
    for name in schema.buckets:
        columns[f"{name}_bucket"] = pa.array(log_square_buckets(dense_of(rows, name)))
    return replace(rows, columns=columns)


def split_values(rows: Rows, name: str, separator: str) -> pa.Array:
    """Lists of values: what a list column holds, or the parts of a text; none of a missing one."""
    values = rows.columns[name]
    if _is_list(values.type):
        return values.cast(pa.large_list(values.type.value_type))
    text, wrong = texts(values, categories=True)
    if wrong.any():
        raise DataError(
            f"{rows.where(wrong)}: column {name!r} is {values.type}, multi-valued columns are lists, or texts between {separator!r}; "
            "cast it"
        )
    return pc.split_pattern(text, separator)


def checked_ids(rows: Rows, name: str, values: pa.Array, kind: str, owners: Sequence[int] | None = None) -> pa.Array:
    """Ids as int64 or large_string, null for missing; `owners` are the rows of the values where these are not one a row."""
    if not is_id(values.type):
        remedy = "name it in [times]" if pa.types.is_temporal(values.type) else "cast it"
        raise DataError(f"{rows.file.path}: column {name!r} is {values.type}, ids are whole numbers or texts; {remedy}")
    ids, wrong = texts(values, categories=True) if kind == "string" else whole_numbers(values, booleans=True)
    if wrong.any():
        row = int(np.argmax(wrong))
        place = f"{rows.file.path}: row {rows.first + int(row if owners is None else owners[row])}"
        value = values[row].as_py()
        if kind == "string":
            raise DataError(
                f"{place}: column {name!r} is {value!r:.60}, which may have been rounded; write ids as text"
            )
        if isinstance(value, (float, Decimal)):
            raise DataError(
                f"{place}: column {name!r} is {value:g}, ids are whole numbers up to 2^53; name it in 'dense', or write it as text"
            )
        raise DataError(
            f"{place}: column {name!r} is {value!r:.60}, the first ids are whole numbers of int64; write all of them alike, name it in "
            f"'dense', or set kind = \"string\" in [columns.{name}] of the schema (--user-kind, --item-kind)"
        )
    return ids


def _numbers(rows: Rows, name: str) -> NDArray[np.float64]:
    values = rows.columns[name]
    if not is_id(values.type):
        raise DataError(f"{rows.file.path}: column {name!r} is {values.type}, and no number; cast it")
    found, wrong = numbers(values)
    if wrong.any():
        value = values[int(np.argmax(wrong))].as_py()
        raise DataError(f"{rows.where(wrong)}: column {name!r} is {value!r:.60}, and no number; fix or empty it")
    return found


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
