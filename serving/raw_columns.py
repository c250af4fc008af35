"""Raw values of columns, checked, as the tensors that a CTR model takes; no value is converted that could mean another one.

What a value is, `serving.values` decides, for training and serving alike. Every error is an InputError of one line that names the column,
the row and the value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.errors import InputError
from serving.values import (
    EXACT,
    category_text,
    is_missing,
    log_square_buckets,
    number,
    text_of,
    time_format,
    whole_number,
)


def as_ids(values: Any, kind: str, missing: int | str, name: str, *, text_only: bool = False) -> NDArray:
    """Ids of a categorical column: int64, or object holding str, shape (n,), missing ones as `missing`.

    Args:
        text_only: numbers are refused, because some trained ids are numbers in another form than the plain one, such as 007.

    Raises:
        InputError: a value is of another type, leaves int64, may have been rounded, or is the one that stands for missing ones.
    """
    array = _one_axis(values, name)
    ids = _int64(array, missing, name) if kind == "int64" else _strings(array, name, text_only)
    if isinstance(missing, int):
        given = np.flatnonzero((ids == missing) & ~_is_missing(array))
        if len(given):
            raise InputError(
                f"{name}[{given[0]}] is {missing}, which stands for a missing value here; pass None for one"
            )
    return ids


def as_numbers(values: Any, mean: float, std: float, name: str) -> NDArray[np.float64]:
    """Numbers of a dense column, shape (n,), NaN where missing.

    Args:
        mean, std: of training.

    Raises:
        InputError: a value is no number, or infinite, or would be once it is ``(value - mean) / std`` in float32.
    """
    array = _one_axis(values, name)
    if array.dtype.kind in "biuf":
        numbers = array.astype(np.float64)
    else:
        numbers = _by_rule(array, number, name, "this column takes numbers").astype(np.float64)
    if np.isinf(numbers).any():
        raise InputError(
            f"{name}[{np.argmax(np.isinf(numbers))}] is infinite; this column takes finite numbers, or None"
        )
    with np.errstate(over="ignore"):
        far = np.abs((numbers - mean) / std) > np.finfo(np.float32).max
    if far.any():
        raise InputError(
            f"{name}[{np.argmax(far)}] is {numbers[np.argmax(far)]:g}, too far from training's for float32; fix it, or pass None"
        )
    return numbers


def as_multi_valued(
    values: Any, kind: str, missing: int | str, width: int, separator: str, name: str, *, text_only: bool = False
) -> NDArray:
    """Ids of a multi-valued column, shape (n, 1 to width), filled up with `missing`.

    Args:
        values: of every row a list of ids, a text of ids between separators, or None; or an array of two axes. Values that are missing, or
            `missing`, are left out, and those behind the first `width` do not count.

    Raises:
        InputError: as :func:`as_ids`.
    """
    if isinstance(values, np.ndarray) and values.ndim == 2:
        rows: list[Sequence[Any] | NDArray] = list(values)
    else:
        array = _one_axis(values, name)
        rows = [_row(value, separator, text_only, f"{name}[{i}]") for i, value in enumerate(array)]
    flat = np.fromiter((value for row in rows for value in row), object, sum(map(len, rows)))
    owners = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    try:
        ids = _int64(flat, missing, name) if kind == "int64" else _strings(flat, name, text_only)
    except InputError:
        # Which row it is takes a look at every row.
        for i, row in enumerate(rows):
            one = np.fromiter(row, object, len(row))
            _int64(one, missing, f"{name}[{i}]") if kind == "int64" else _strings(one, f"{name}[{i}]", text_only)
        raise
    there = ids != missing
    ids, owners = ids[there], owners[there]
    lengths = np.bincount(owners, minlength=len(rows))
    places = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    shape = (len(rows), max(1, min(width, int(lengths.max(initial=0)))))
    table = np.full(shape, missing, np.int64 if kind == "int64" else object)
    fits = places < shape[1]
    table[owners[fits], places[fits]] = ids[fits]
    return table


def part_of_times(values: Any, form: str, part: str, missing: int | str, name: str) -> NDArray[np.int64]:
    """The hour, 0 to 23, or the weekday, 0 for Monday, of times, shape (n,), `missing` where there is none.

    Args:
        values: datetimes, or texts or whole numbers that are written as `form`, of strptime, says.

    Raises:
        InputError: a value is no such time.
    """
    array = _one_axis(values, name)
    if array.dtype.kind == "M":
        array = array.astype("datetime64[us]").astype(object)
    times = time_format(form)
    found: dict[Any, int | str] = {}
    parts = np.empty(len(array), np.int64)
    for i, value in enumerate(array.tolist()):
        if not (is_missing(value) or text_of(value) is not None or isinstance(value, date)):
            raise InputError(f"{name}[{i}] is {value!r:.60}, no time like {form!r}")
        if value not in found:
            try:
                time = None if is_missing(value) else times.parse(value)
            except ValueError:
                raise InputError(f"{name}[{i}] is {value!r:.60}, no time like {form!r}") from None
            found[value] = missing if time is None else time.hour if part == "hour" else time.weekday()
        parts[i] = found[value]
    return parts


def buckets_of(values: Any, name: str) -> NDArray[np.int64]:
    """The bucket of every number (`serving.values.log_square_buckets`), shape (n,).

    Raises:
        InputError: a value is no number, or infinite.
    """
    return log_square_buckets(as_numbers(values, 0.0, 1.0, name))


def _one_axis(values: Any, name: str) -> NDArray:
    """Values as an array of one axis; a list goes in value by value, so that numpy makes no texts of numbers."""
    array = None
    if hasattr(values, "__array__"):
        # Of pandas's own types, numpy would make floats where a value is missing.
        array = np.asarray(values, None if isinstance(getattr(values, "dtype", None), np.dtype) else object)
    if (
        isinstance(values, (str, bytes, dict))
        or not (hasattr(values, "__len__") or array is not None)
        or (array is not None and array.ndim != 1)
    ):
        raise InputError(f"{name} is {values!r:.60}; pass a list of values, one a row")
    return np.fromiter(values, object, len(values)) if array is None else array


def _row(value: Any, separator: str, text_only: bool, name: str) -> Sequence[Any] | NDArray:
    if is_missing(value):
        return ()
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim == 1):
        return value
    # A number is the text of one value, as pandas reads it.
    text = None if text_only and _is_number(value) else category_text(value)
    if text is None:
        raise InputError(f"{name} is {value!r:.60}; pass a list of ids")
    return text.split(separator)


def _int64(array: NDArray, missing: int | str, name: str) -> NDArray[np.int64]:
    kind = array.dtype.kind
    if not len(array):
        return np.empty(0, np.int64)
    gone = _is_missing(array)
    if kind == "f":
        wrong = ~gone & ((array != np.floor(array)) | (np.abs(array) > EXACT))
        if wrong.any():
            raise InputError(
                f"{name}[{np.argmax(wrong)}] is {array[np.argmax(wrong)].item()!r}; this column takes int64 ids"
            )
    elif kind not in "biu":
        given = _by_rule(
            array[~gone], lambda value: whole_number(value, booleans=True), name, "this column takes int64 ids", gone
        )
        ids = np.full(len(array), missing, np.int64)
        ids[~gone] = given.astype(np.int64)
        return ids
    given = array[~gone]
    if len(given) and (int(given.min()) < -(2**63) or int(given.max()) > 2**63 - 1):
        raise InputError(f"{name} spans {given.min()}..{given.max()}, which leaves int64; ids are -2^63..2^63-1")
    ids = np.full(len(array), missing, np.int64)
    ids[~gone] = given.astype(np.int64)
    return ids


def _strings(array: NDArray, name: str, text_only: bool) -> NDArray[np.object_]:
    if not len(array):
        return np.empty(0, object)
    gone = _is_missing(array)
    given = array[~gone] if array.dtype.kind in "biuf" else array[~gone].astype(object)
    if text_only:
        numbers = [i for i, value in enumerate(given) if _is_number(value)]
        if numbers:
            row = int(np.flatnonzero(~gone)[numbers[0]])
            raise InputError(
                f"{name}[{row}] is {given[numbers[0]]!r:.60}; this column takes string ids, some of them numbers such as 007 that lose "
                "their form as numbers; pass str values (pandas: dtype=str)"
            )
    texts = np.full(len(array), "", object)
    texts[~gone] = _by_rule(given, category_text, name, "this column takes string ids, pass str values", gone)
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{name}: {error.object[error.start]!a} cannot be written as UTF-8; pass valid text") from None
    return texts


def _by_rule(
    array: NDArray, rule: Callable[[Any], Any], name: str, takes: str, gone: NDArray[np.bool_] | None = None
) -> NDArray[np.object_]:
    """What a rule says of every value, shape (n,).

    Args:
        gone: which values were left out of `array`, for the number of a row.

    Raises:
        InputError: it says None of one.
    """
    found = np.empty(len(array), object)
    for i, value in enumerate(array):
        decided = rule(value)
        if decided is None:
            row = i if gone is None else int(np.flatnonzero(~gone)[i])
            if isinstance(value, int) and "int64" in takes:
                raise InputError(f"{name}[{row}] is {value}, which leaves int64; ids are -2^63..2^63-1")
            raise InputError(f"{name}[{row}] is {value!r:.60}; {takes}")
        found[i] = decided
    return found


def _is_number(value: Any) -> bool:
    return not isinstance(value, (str, bytes, bool, np.bool_, Decimal)) and text_of(value) is not None


def _is_missing(array: NDArray) -> NDArray[np.bool_]:
    if array.dtype.kind == "f":
        return np.isnan(array)
    if array.dtype.kind in "OUSM":
        return np.fromiter((is_missing(value) for value in array.tolist()), np.bool_, len(array))
    return np.zeros(len(array), np.bool_)
