"""Raw values of columns, checked, as the tensors that a CTR model takes; no value is converted that could mean another one.

None and NaN are missing everywhere; so is the empty text. Every error is an InputError of one line that names the column, the row and
the value.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.errors import InputError

# Whole numbers above this may have been rounded on their way into a float.
_EXACT = 2**53
_INTEGER = re.compile(r"-?(0|[1-9]\d{0,18})")


def as_ids(values: Any, kind: str, missing: int | str, name: str) -> NDArray:
    """Ids of a categorical column: int64, or object holding str, shape (n,), missing ones as `missing`.

    An int64 column takes whole numbers, and arrays of floats that are whole, as pandas makes them of numbers beside missing ones.

    Raises:
        InputError: a value is of another type, leaves int64, or is the one that stands for missing ones.
    """
    array = _one_axis(values, name)
    ids = _int64(array, missing, name) if kind == "int64" else _strings(array, name)
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
    if array.dtype.kind == "O":
        gone = _is_missing(array)
        for i in np.flatnonzero(~gone):
            if isinstance(array[i], (bool, np.bool_)) or not isinstance(
                array[i], (int, float, np.integer, np.floating)
            ):
                raise InputError(f"{name}[{i}] is {array[i]!r:.60}; this column takes numbers")
        array = np.where(gone, np.nan, array)
    elif array.dtype.kind not in "iuf":
        raise InputError(f"{name}[0] is {array[0].item()!r:.60}; this column takes numbers")
    try:
        numbers = array.astype(np.float64)
    except OverflowError:
        raise InputError(f"{name} holds a number that is too large for float64; pass None, or a smaller one") from None
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


def as_multi_valued(values: Any, kind: str, missing: int | str, width: int, separator: str, name: str) -> NDArray:
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
        rows = [_row(value, kind, separator, f"{name}[{i}]") for i, value in enumerate(array)]
    flat = np.fromiter((value for row in rows for value in row), object, sum(map(len, rows)))
    owners = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    try:
        ids = _int64(flat, missing, name) if kind == "int64" else _strings(flat, name)
    except InputError:
        # Which row it is takes a look at every row.
        for i, row in enumerate(rows):
            one = np.fromiter(row, object, len(row))
            _int64(one, missing, f"{name}[{i}]") if kind == "int64" else _strings(one, f"{name}[{i}]")
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
    found: dict[Any, int | str] = {}
    parts = np.empty(len(array), np.int64)
    for i, value in enumerate(array.tolist()):
        if not (_none(value) or isinstance(value, (str, int, float, datetime))):
            raise InputError(f"{name}[{i}] is {value!r:.60}, no time like {form!r}")
        if value not in found:
            found[value] = missing if _none(value) or value == "" else _part(value, form, part, f"{name}[{i}]")
        parts[i] = found[value]
    return parts


def _part(value: Any, form: str, part: str, name: str) -> int:
    if not isinstance(value, datetime):
        text = value
        # A float where pandas had missing ones beside it.
        if not isinstance(value, (bool, str)) and float(value).is_integer():
            text = str(int(value))
        if not isinstance(text, str):
            raise InputError(f"{name} is {value!r:.60}, no time like {form!r}")
        try:
            value = datetime.strptime(text, form)
        except ValueError:
            raise InputError(f"{name} is {text!r:.60}, no time like {form!r}") from None
    return value.hour if part == "hour" else value.weekday()


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


def _row(value: Any, kind: str, separator: str, name: str) -> Sequence[Any] | NDArray:
    if _none(value):
        return ()
    if isinstance(value, str):
        parts = value.split(separator)
        if kind == "string":
            return parts
        wrong = [part for part in parts if part and not _INTEGER.fullmatch(part)]
        if wrong:
            raise InputError(f"{name} has {wrong[0]!r:.60}; this column takes int64 ids")
        return [int(part) if part else None for part in parts]
    if not isinstance(value, (list, tuple, np.ndarray)) or (isinstance(value, np.ndarray) and value.ndim != 1):
        raise InputError(f"{name} is {value!r:.60}; pass a list of ids")
    return value


def _int64(array: NDArray, missing: int | str, name: str) -> NDArray[np.int64]:
    kind = array.dtype.kind
    if not len(array):
        return np.empty(0, np.int64)
    gone = _is_missing(array)
    if kind == "O":
        for i in np.flatnonzero(~gone):
            if isinstance(array[i], (bool, np.bool_)) or not isinstance(array[i], (int, np.integer)):
                raise InputError(f"{name}[{i}] is {array[i]!r:.60}; this column takes int64 ids")
    elif kind == "f":
        wrong = ~gone & ((array != np.floor(array)) | (np.abs(array) > _EXACT))
        if wrong.any():
            raise InputError(
                f"{name}[{np.argmax(wrong)}] is {array[np.argmax(wrong)].item()!r}; this column takes int64 ids"
            )
    elif kind not in "iu":
        raise InputError(f"{name}[0] is {array[0].item()!r:.60}; this column takes int64 ids")
    given = array[~gone]
    if len(given) and (int(given.min()) < -(2**63) or int(given.max()) > 2**63 - 1):
        raise InputError(f"{name} spans {given.min()}..{given.max()}, which leaves int64; ids are -2^63..2^63-1")
    ids = np.full(len(array), missing, np.int64)
    ids[~gone] = given.astype(np.int64)
    return ids


def _strings(array: NDArray, name: str) -> NDArray[np.object_]:
    if not len(array):
        return np.empty(0, object)
    if array.dtype.kind == "U":
        array = array.astype(object)
    gone = _is_missing(array)
    if array.dtype.kind != "O":
        if gone.all():
            return np.full(len(array), "", object)  # A column of nothing is one of NaN.
        raise InputError(
            f"{name}[{np.argmin(gone)}] is {array[np.argmin(gone)].item()!r:.60}; this column takes string ids, pass str values"
        )
    for i in np.flatnonzero(~gone):
        if not isinstance(array[i], str):
            raise InputError(f"{name}[{i}] is {array[i]!r:.60}; this column takes string ids, pass str values")
    texts = np.where(gone, "", array)
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{name}: {error.object[error.start]!a} cannot be written as UTF-8; pass valid text") from None
    return texts


def _is_missing(array: NDArray) -> NDArray[np.bool_]:
    if array.dtype.kind == "f":
        return np.isnan(array)
    if array.dtype.kind == "O":
        return np.fromiter(map(_none, array), np.bool_, len(array))
    return np.zeros(len(array), np.bool_)


def _none(value: Any) -> bool:
    # pandas's NA and NaT, without pandas.
    return (
        value is None
        or (isinstance(value, (float, np.floating)) and bool(value != value))
        or type(value).__name__ in ("NAType", "NaTType")
    )
