"""Columns of labelled samples, checked: labels, raw ids, numbers and multi-valued ids of any file format.

**Ids** are int64 or text, one of them in the whole log: parquet says which, and in text the first 1,000 decide (int64 where more than half
are plain whole numbers, as in `pipeline.logs.columns`). A value of the other kind later is an error. Null and the empty text are *missing*;
`NA` is a text like any other. **Numbers** are finite; null, empty and NaN are missing. **Labels** are 0 and 1, or true and false, and never
missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from graphhash.errors import DataError, did_you_mean, first_line
from pipeline.ctr.schema import TIME_PARTS, Category, CtrSchema, MultiValued
from pipeline.logs.columns import NUMBER, PLAIN_INTEGER, is_number, text_kind
from pipeline.logs.tables import Rows, listed_names

LABELS = ("label", "click", "clicked", "is_click", "is_clicked")
GUESS_ROWS = 10_000
# Fewer rows than this do not tell a row's number from an id.
ENOUGH_ROWS = 1000


def guess_schema(head: Rows, label: str | None, user: str, item: str) -> tuple[CtrSchema, dict[str, str]]:
    """The schema of a log by the types of its first rows.

    Numbers with a fraction are dense, lists are multi-valued, times and what differs in every row are left out, all else is categorical.

    Args:
        label: its column; None: the one that is named like one.
        user, item: each other's partners, where both are there.

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
        if name != label:
            part, reason = _guess(values.slice(0, GUESS_ROWS), keep=name in (user, item))
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


def _guess(values: pa.Array, *, keep: bool) -> tuple[str, str]:
    """Part of a column, and why it is left out (else empty)."""
    kind = values.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return "multi_valued", ""
    if pa.types.is_temporal(kind):
        return "", "a time"
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "dense", ""
    given = values.drop_null()
    if not keep and len(values) >= ENOUGH_ROWS and pc.count_distinct(given).as_py() == len(values):
        return "", "it differs in every row"
    if _is_text(kind) and len(given):
        n_numbers = pc.sum(pc.match_substring_regex(given, NUMBER)).as_py() or 0
        n_whole = pc.sum(pc.match_substring_regex(given, PLAIN_INTEGER)).as_py() or 0
        if 2 * n_numbers > len(given) and n_whole < n_numbers:
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
            values = split_values(values, column.separator).flatten()
        return replace(column, kind=_kind(values))

    return replace(
        schema, categories=tuple(map(decided, schema.categories)), multi_valued=tuple(map(decided, schema.multi_valued))
    )


def _kind(values: pa.Array) -> str:
    if pa.types.is_integer(values.type):
        return "int64"
    if pa.types.is_floating(values.type):
        return "int64"  # Whole numbers beside nulls, as pandas writes them.
    return text_kind(values) if _is_text(values.type) else "string"


def labels_of(rows: Rows, schema: CtrSchema) -> NDArray[np.uint8]:
    """0 or 1 of every row, shape (n,).

    Raises:
        DataError: a label is missing, or is another value.
    """
    values = rows.columns[schema.label]
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int64())
    numbers = _numbers(rows, schema.label, values)
    if np.isnan(numbers).any():
        raise DataError(
            f"{rows.where(np.isnan(numbers))}: label {schema.label!r} is missing; drop the row, or give it a label"
        )
    if schema.label_from is not None:
        return (numbers >= schema.label_from).astype(np.uint8)
    wrong = ~np.isin(numbers, (0, 1))
    if wrong.any():
        raise DataError(
            f"{rows.where(wrong)}: label {schema.label!r} is {numbers[wrong][0]:g}, labels are 0 and 1; "
            "give label_from in the schema to cut numbers in two"
        )
    return numbers.astype(np.uint8)


def dense_of(rows: Rows, name: str) -> NDArray[np.float64]:
    """Numbers of a column, shape (n,), NaN where missing.

    Raises:
        DataError: a value is no number, or infinite.
    """
    numbers = _numbers(rows, name, rows.columns[name])
    if np.isinf(numbers).any():
        raise DataError(
            f"{rows.where(np.isinf(numbers))}: column {name!r} is infinite; dense columns hold finite numbers, or nothing"
        )
    return numbers


def ids_of(rows: Rows, column: Category) -> pa.Array:
    """Raw ids of a categorical column, int64 or large_string, null where missing.

    Raises:
        DataError: a value is of another kind.
    """
    return checked_ids(rows, column.name, rows.columns[column.name], column.kind)


def multi_valued_of(rows: Rows, name: str, separator: str, kind: str) -> tuple[NDArray[np.int64], pa.Array]:
    """Number of values of every row, shape (n,), and all values in order; missing ones are left out, and repeated ones stay."""
    lists = split_values(rows.columns[name], separator)
    owners = pc.list_parent_indices(lists).to_numpy()
    values = checked_ids(rows, name, lists.flatten(), kind, owners)
    there = values.is_valid()
    counts = np.bincount(owners[there.to_numpy(zero_copy_only=False)], minlength=len(rows))
    return counts, values.filter(there)


def with_times(rows: Rows, schema: CtrSchema) -> Rows:
    """The rows with the hour, 0 to 23, and the weekday, 0 for Monday, of every time.

    Raises:
        DataError: a text is no time of its format.
    """
    if not schema.times:
        return rows
    columns = dict(rows.columns)
    for name, form in schema.times:
        values = columns[name]
        if not pa.types.is_timestamp(values.type):
            text = values.cast(pa.string())
            values = pc.strptime(text, format=form, unit="s", error_is_null=True)
            wrong = pc.and_(values.is_null(), text.is_valid()).to_numpy(zero_copy_only=False)
            if wrong.any():
                raise DataError(
                    f"{rows.where(wrong)}: column {name!r} is {text[int(np.argmax(wrong))].as_py()!r}, no time like {form!r}"
                )
        for part, take in zip(TIME_PARTS, (pc.hour, pc.day_of_week), strict=True):
            columns[f"{name}_{part}"] = take(values)
    return replace(rows, columns=columns)


def split_values(values: pa.Array, separator: str) -> pa.Array:
    """Lists of values: what a list column holds, or the parts of a text; none of a missing one."""
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        return values
    return pc.split_pattern(values.cast(pa.large_string()), separator)


def checked_ids(rows: Rows, name: str, values: pa.Array, kind: str, owners: Sequence[int] | None = None) -> pa.Array:
    """Ids as int64 or large_string, null for missing; `owners` are the rows of the values where these are not one a row."""

    def place(mask: NDArray[np.bool_]) -> str:
        row = int(np.argmax(mask))
        return f"{rows.file.path}: row {rows.first + int(row if owners is None else owners[row])}"

    if kind == "string":
        try:
            text = values.cast(pa.large_string())
        except pa.ArrowException:
            raise DataError(
                f"{rows.file.path}: column {name!r} is {values.type}, ids are whole numbers or texts; cast it"
            ) from None
        return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.large_string()), text)
    if pa.types.is_floating(values.type):
        numbers = values.to_numpy(zero_copy_only=False)
        wrong = (numbers != np.floor(numbers)) & ~np.isnan(numbers)
        if wrong.any():
            raise DataError(
                f"{place(wrong)}: column {name!r} is {numbers[wrong][0]:g}, ids are whole numbers; name it in 'dense'"
            )
        return pc.if_else(
            pa.array(np.isnan(numbers)), pa.scalar(None, pa.int64()), pa.array(np.nan_to_num(numbers).astype(np.int64))
        )
    if not _is_text(values.type):
        try:
            return values.cast(pa.int64())
        except pa.ArrowException as error:
            raise DataError(
                f"{rows.file.path}: column {name!r}: {first_line(error)}; ids fit int64, or are texts"
            ) from None
    text = pc.if_else(pc.equal(values, ""), pa.scalar(None, values.type), values)
    wrong = pc.invert(pc.match_substring_regex(text, PLAIN_INTEGER)).fill_null(False).to_numpy(zero_copy_only=False)
    if not wrong.any():
        try:
            return text.cast(pa.int64())
        except pa.ArrowException:
            wrong = pc.greater(pc.binary_length(text), 18).fill_null(False).to_numpy(zero_copy_only=False)
    value = text[int(np.argmax(wrong))].as_py()
    raise DataError(
        f"{place(wrong)}: column {name!r} is {value!r}, the first ids are whole numbers of int64; "
        f'write all of them alike, or set kind = "string" in [columns.{name}] of the schema'
    )


def _numbers(rows: Rows, name: str, values: pa.Array) -> NDArray[np.float64]:
    if is_number(values.type):
        return values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False).astype(np.float64)
    if not _is_text(values.type):
        raise DataError(f"{rows.file.path}: column {name!r} is {values.type}, and no number; cast it")
    text = pc.ascii_trim_whitespace(values)
    text = pc.if_else(pc.equal(text, ""), pa.scalar(None, text.type), text)
    wrong = pc.invert(pc.match_substring_regex(text, NUMBER)).fill_null(False).to_numpy(zero_copy_only=False)
    if wrong.any():
        raise DataError(
            f"{rows.where(wrong)}: column {name!r} is {text[int(np.argmax(wrong))].as_py()!r}, and no number; fix or empty it"
        )
    return text.cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
