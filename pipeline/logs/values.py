"""Columns of a log as ids and numbers, by the rules of `serving.values`, at the speed of whole columns.

What a rule says of a common value (a plain whole number, a text) is done for all of them at once; every other distinct value goes
through the rule itself.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from serving.values import (
    BOOLEAN_TEXTS,
    EXACT,
    MISSING_TEXTS,
    WHOLE,
    TimeFormat,
    category_text,
    number,
    text_of,
    whole_number,
)

SAMPLE_IDS = 1000
# Below, loading the compiled loop takes longer than the expression.
LEAST_COMPILED = 100_000
# Digits that always fit int64.
_SAFE_DIGITS = r"0|-?[1-9][0-9]{0,17}"
# Dates that Arrow reads.
_PLAIN_DATE = r"[0-9]{4}-[0-9]{2}-[0-9]{2}(?:[ T][0-9]{2}:[0-9]{2}:[0-9]{2})?"
# Microseconds per unit, as a fraction.
_PER_UNIT = {"s": (10**6, 1), "ms": (1000, 1), "us": (1, 1), "ns": (1, 1000)}
# The years 1 to 9999.
LEAST_MICROSECONDS, MOST_MICROSECONDS = -62_135_596_800 * 10**6, 253_402_300_800 * 10**6 - 1
_PLAIN_NUMBER = r"-?[0-9]{1,200}(?:\.[0-9]{0,100})?"


def is_text(dtype: pa.DataType) -> bool:
    return pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or pa.types.is_string_view(dtype)


def is_number(dtype: pa.DataType) -> bool:
    return pa.types.is_integer(dtype) or pa.types.is_floating(dtype) or pa.types.is_decimal(dtype)


def is_id(dtype: pa.DataType) -> bool:
    """Whether values of a type can be ids: numbers, texts and booleans."""
    return is_number(dtype) or is_text(dtype) or pa.types.is_boolean(dtype) or pa.types.is_null(dtype)


def matches(text: pa.Array, pattern: str) -> NDArray[np.bool_]:
    """Which texts are all of a pattern, shape (n,); nulls are not."""
    return pc.match_substring_regex(text, f"^(?:{pattern})$").fill_null(False).to_numpy(zero_copy_only=False)


def kind_of(values: pa.Array, *, booleans: bool = False) -> str:
    """ "int64" or "string", by the first ids of a column.

    Text is int64 where more than half of the first 1,000 are whole numbers. Where a third of the numbers or more leave int64, as half of
    random unsigned ones do, they are text. Floats are int64, decimals are text.

    Args:
        booleans: take true and false, where there is nothing else, as int64.
    """
    sample = plain(values.drop_null().slice(0, SAMPLE_IDS))
    if pa.types.is_boolean(sample.type):
        return "int64" if booleans else "string"
    if pa.types.is_uint64(sample.type):
        return "string" if 3 * sum(number >= 2**63 for number in sample.to_pylist()) > len(sample) else "int64"
    if pa.types.is_integer(sample.type) or pa.types.is_floating(sample.type):
        return "int64"
    if not is_text(sample.type):
        return "string"
    whole = matches(sample, WHOLE)
    if booleans and len(sample):
        given = sample.filter(pc.invert(pc.is_in(sample, pa.array(sorted(MISSING_TEXTS), sample.type))))
        if len(given) and pc.all(pc.is_in(given, pa.array(list(BOOLEAN_TEXTS), sample.type))).as_py():
            return "int64"
        sample, whole = given, matches(given, WHOLE)
    if 2 * whole.sum() <= len(sample):
        return "string"
    n_too_large = sum(whole_number(text) is None for text in sample.filter(pa.array(whole)).to_pylist())
    return "string" if 3 * n_too_large > whole.sum() else "int64"


def plain(values: pa.Array) -> pa.Array:
    """The same without dictionary encoding, and without views, which lack many functions."""
    values = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
    return values.cast(pa.large_string()) if pa.types.is_string_view(values.type) else values


def whole_numbers(values: pa.Array, *, booleans: bool = False) -> tuple[pa.Array, NDArray[np.bool_]]:
    """int64 of a column of any type, null where it is null, and which values are no whole numbers (null as well), shape (n,)."""
    values = plain(values)
    if pa.types.is_signed_integer(values.type):
        return values.cast(pa.int64()), np.zeros(len(values), bool)
    if pa.types.is_unsigned_integer(values.type):
        too_large = pc.greater(values.cast(pa.uint64()), pa.scalar(2**63 - 1, pa.uint64())).fill_null(False)
        kept = pc.if_else(too_large, pa.scalar(None, values.type), values)
        return kept.cast(pa.int64()), too_large.to_numpy(zero_copy_only=False)
    if pa.types.is_floating(values.type):
        numbers = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
        missing = np.isnan(numbers)
        with np.errstate(invalid="ignore"):
            wrong = ~missing & ((numbers != np.floor(numbers)) | (np.abs(numbers) > EXACT))
        whole = np.where(missing | wrong, 0, numbers).astype(np.int64)
        return pa.array(whole, mask=missing | wrong), wrong
    if is_text(values.type):
        if booleans:
            values = _without(values, MISSING_TEXTS)
        if len(values) < LEAST_COMPILED:
            safe = matches(values, _SAFE_DIGITS)
            fast = pc.if_else(pa.array(safe), values, pa.scalar(None, values.type)).cast(pa.int64())
        else:
            from graphhash.graph.id_columns import read_integers

            whole, safe = read_integers(values)
            fast = pa.array(whole) if safe.all() else pa.array(whole, mask=~safe)
        if safe.all():
            return fast, np.zeros(len(values), bool)
        others = ~safe & values.is_valid().to_numpy(zero_copy_only=False)
        return _by_rule(values, fast, others, pa.int64(), lambda value: whole_number(value, booleans=booleans))
    if pa.types.is_null(values.type):
        return values.cast(pa.int64()), np.zeros(len(values), bool)
    others = values.is_valid().to_numpy(zero_copy_only=False)
    none = pa.nulls(len(values), pa.int64())
    return _by_rule(values, none, others, pa.int64(), lambda value: whole_number(value, booleans=booleans))


def texts(values: pa.Array, *, categories: bool = False) -> tuple[pa.Array, NDArray[np.bool_]]:
    """large_string of a column of any type, null where it is null, and which values are no texts (null as well), shape (n,).

    Args:
        categories: of a categorical column: missing texts are null, and booleans are the same in any spelling.
    """
    values, none_wrong = plain(values), np.zeros(len(values), bool)
    if is_text(values.type):
        text = values.cast(pa.large_string())
        if not categories:
            return text, none_wrong
        text = _without(text, MISSING_TEXTS)
        spelt = pc.is_in(text, pa.array(list(BOOLEAN_TEXTS), pa.large_string()))
        return pc.if_else(spelt, pc.ascii_lower(text), text) if pc.any(spelt).as_py() else text, none_wrong
    if pa.types.is_integer(values.type) or pa.types.is_null(values.type):
        return values.cast(pa.large_string()), none_wrong
    others = values.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_floating(values.type):
        others = others & ~np.isnan(values.cast(pa.float64()).to_numpy(zero_copy_only=False))
    if pa.types.is_boolean(values.type) and not categories:
        return pa.nulls(len(values), pa.large_string()), others
    rule = category_text if categories else text_of
    return _by_rule(values, pa.nulls(len(values), pa.large_string()), others, pa.large_string(), rule)


def numbers(values: pa.Array) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """float64 of a column of any type, NaN where it is missing, and which values are no numbers (NaN as well), shape (n,)."""
    values, none_wrong = plain(values), np.zeros(len(values), bool)
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int8())
    if is_number(values.type) or pa.types.is_null(values.type):
        return values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False).astype(np.float64), none_wrong
    fast, others = pa.nulls(len(values), pa.float64()), values.is_valid().to_numpy(zero_copy_only=False)
    if is_text(values.type):
        simple = matches(values, _PLAIN_NUMBER)
        fast = pc.if_else(pa.array(simple), values, pa.scalar(None, values.type)).cast(pa.float64())
        others = others & ~simple
    found, wrong = _by_rule(values, fast, others, pa.float64(), number)
    return found.to_numpy(zero_copy_only=False).astype(np.float64), wrong


def hours_and_weekdays(values: pa.Array, form: TimeFormat) -> tuple[pa.Array, pa.Array, NDArray[np.bool_]]:
    """Hour, 0 to 23, and weekday, 0 for Monday, int64, null where missing; and which values are no times, shape (n,)."""
    values = plain(values)
    none_wrong = np.zeros(len(values), bool)
    if pa.types.is_timestamp(values.type) or pa.types.is_date(values.type):
        if pa.types.is_date(values.type):
            values = values.cast(pa.timestamp("ms"))
        elif values.type.tz is not None:
            values = values.cast(pa.timestamp(values.type.unit, "UTC"))
        return pc.hour(values), pc.day_of_week(values), none_wrong
    if is_text(values.type):
        values = _without(values, MISSING_TEXTS)
    others = values.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_floating(values.type):
        others = others & ~np.isnan(values.cast(pa.float64()).to_numpy(zero_copy_only=False))

    def both(value: Any) -> int | None:
        try:
            time = form.parse(value)
        except ValueError:
            return None
        return 7 * time.hour + time.weekday()

    found, wrong = _by_rule(values, pa.nulls(len(values), pa.int64()), others, pa.int64(), both)
    return pc.divide(found, 7), pc.subtract(found, pc.multiply(pc.divide(found, 7), 7)), wrong


def microseconds(values: pa.Array, unit: str | None) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Microseconds since 1970-01-01 in UTC, shape (n,), rounded down; and which values are missing or no times, shape (n,).

    Args:
        unit: "s", "ms", "us" or "ns" of numbers; None: texts are dates as in ISO 8601, without an offset taken in UTC.
    """
    values = plain(values)
    if pa.types.is_timestamp(values.type) or pa.types.is_date(values.type):
        found = values.cast(pa.timestamp("ms")) if pa.types.is_date(values.type) else values
        found = _counted(found.cast(pa.int64()), found.type.unit)
    elif unit is None:
        found = _dates(values)
    else:
        found = _scaled(values, unit)
    missing = found.is_null().to_numpy(zero_copy_only=False)
    return found.fill_null(0).to_numpy(zero_copy_only=False), missing


def microseconds_in(values: pa.Array, form: TimeFormat) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """As `microseconds`, of times in a format of strptime."""
    values = plain(values)
    if pa.types.is_timestamp(values.type) or pa.types.is_date(values.type):
        return microseconds(values, None)
    if is_text(values.type):
        values = _without(values, MISSING_TEXTS)

    def since_1970(value: Any) -> int | None:
        try:
            return (form.parse(value) - datetime(1970, 1, 1)) // timedelta(microseconds=1)
        except ValueError:
            return None

    others = values.is_valid().to_numpy(zero_copy_only=False)
    found, _ = _by_rule(values, pa.nulls(len(values), pa.int64()), others, pa.int64(), since_1970)
    return found.fill_null(0).to_numpy(zero_copy_only=False), found.is_null().to_numpy(zero_copy_only=False)


def _dates(values: pa.Array) -> pa.Array:
    """int64 microseconds of texts, null where they are no dates."""
    nothing = pa.nulls(len(values), pa.int64())
    if not is_text(values.type):
        return nothing
    simple = matches(values, _PLAIN_DATE)
    try:
        fast = (
            pc.if_else(pa.array(simple), values, pa.scalar(None, values.type)).cast(pa.timestamp("us")).cast(pa.int64())
        )
    except pa.ArrowInvalid:  # One of them is no date of the calendar.
        simple, fast = np.zeros(len(values), bool), nothing
    others = values.is_valid().to_numpy(zero_copy_only=False) & ~simple
    return _by_rule(values, fast, others, pa.int64(), _iso_microseconds)[0]


def _iso_microseconds(text: str) -> int | None:
    try:
        time = datetime.fromisoformat(text.strip())
        time = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return (time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def _scaled(values: pa.Array, unit: str) -> pa.Array:
    """int64 microseconds of numbers and of their texts, null where they are none or leave int64."""
    if not (is_number(values.type) or is_text(values.type)):
        return pa.nulls(len(values), pa.int64())
    times, over = _PER_UNIT[unit]
    broken = np.floor(numbers(values)[0] * (times / over))
    with np.errstate(invalid="ignore"):
        fits = (broken >= LEAST_MICROSECONDS) & (broken <= MOST_MICROSECONDS)
    # What is no whole number may be one with a fraction.
    return pc.coalesce(
        _counted(whole_numbers(values)[0], unit), pa.array(np.where(fits, broken, 0).astype(np.int64), mask=~fits)
    )


def _counted(whole: pa.Array, unit: str) -> pa.Array:
    """int64 microseconds of whole numbers of a unit, null where they are missing or outside of the years 1 to 9999."""
    times, over = _PER_UNIT[unit]
    counts = whole.fill_null(0).to_numpy(zero_copy_only=False)
    least, most = (bound * over // times for bound in (LEAST_MICROSECONDS, MOST_MICROSECONDS))
    fits = whole.is_valid().to_numpy(zero_copy_only=False)
    fits = fits & (counts >= max(least, -(2**63))) & (counts <= min(most, 2**63 - 1))
    return pa.array(np.where(fits, counts, 0) * times // over, mask=~fits)


def _by_rule(
    values: pa.Array, found: pa.Array, others: NDArray[np.bool_], dtype: pa.DataType, rule: Callable[[Any], Any]
) -> tuple[pa.Array, NDArray[np.bool_]]:
    """`found`, and in the marked places what a rule says of the value; and where it says None."""
    if not others.any():
        return found, np.zeros(len(values), bool)
    if not (is_id(values.type) or pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)):
        return found, others
    given = values.filter(pa.array(others))
    is_half = pa.types.is_float16(values.type)  # Arrow cannot encode these.
    encoded = (given.cast(pa.float32()) if is_half else given).dictionary_encode()
    scalars = [_scalar(value) for value in encoded.dictionary]
    decided = pa.array([rule(np.float16(scalar) if is_half else scalar) for scalar in scalars], dtype)
    chosen = decided.take(encoded.indices)
    result = pc.replace_with_mask(found, pa.array(others), chosen)
    wrong = others.copy()
    wrong[others] = chosen.is_null().to_numpy(zero_copy_only=False)
    return result, wrong


def _scalar(value: pa.Scalar) -> Any:
    """A value as Python has it; float32 stays one, because its shortest text is another than a float64's."""
    if pa.types.is_float32(value.type):
        return np.float32(value.as_py())
    return value.as_py()


def _without(text: pa.Array, missing: frozenset[str]) -> pa.Array:
    """Null where the text stands for a missing value."""
    gone = pc.is_in(text, pa.array(sorted(missing), text.type))
    return pc.if_else(gone, pa.scalar(None, text.type), text) if pc.any(gone).as_py() else text
