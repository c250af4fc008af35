"""What a raw value is: the same id, number or time, whatever carries it.

A value comes as text of a csv file, from JSON, as a Python object, or as an element of a numpy, pandas or Arrow array. Training
(`pipeline.logs.values`) and serving (`serving.raw_columns`, `serving.raw_ids`) decide by these functions what it is.

- Whole numbers: integers, floats and decimals without a fraction, and their texts (`7`, `-7`, `7.0`, blanks around them). `007` and `+7`
  are other ids. A float beyond 2**53 may have been rounded, and is none.
- Texts stand as they are. The text of a number is its shortest one: `7` for 7 and 7.0, `0.5` for 0.5; that of a decimal has its digits.
- Booleans are 1 and 0 where numbers are expected, and `true` and `false` in any spelling elsewhere.
- Missing values are None, NaN, NaT, NA, and the texts that pandas reads as missing.
- Times are read by `TimeFormat`; those with an offset in UTC.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Those of pandas.read_csv.
MISSING_TEXTS = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL", "NaN", "None",
     "n/a", "nan", "null")
)  # fmt: skip
BOOLEAN_TEXTS = {word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False", "FALSE")}
# Expressions that Python's `re` and Arrow's RE2 read alike.
PLAIN_INTEGER = r"-?(?:0|[1-9][0-9]*)"
WHOLE = rf"[ \t]*{PLAIN_INTEGER}(?:\.0*)?[ \t]*"
NUMBER = r"[ \t]*[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|(?i:nan|inf|infinity))[ \t]*"
# Whole numbers above this may have been rounded on their way into a float.
EXACT = 2**53
# No id has more digits; Python refuses to write thousands of them.
_LONGEST = 10**80
_LOWEST, _HIGHEST = -(2**63), 2**63 - 1
# Digits of the directives that have a fixed number of them.
_WIDTHS = {"Y": 4, "y": 2, "m": 2, "d": 2, "H": 2, "I": 2, "M": 2, "S": 2, "j": 3}
_DIRECTIVES = frozenset("YymdHIMSjfzpbBaA%")

_whole = re.compile(WHOLE)
_number = re.compile(NUMBER)


def is_missing(value: Any) -> bool:
    """Whether a value of a column stands for a missing one."""
    if isinstance(value, str):
        return value in MISSING_TEXTS
    # pandas's NA and NaT, without pandas.
    return (
        value is None
        or (isinstance(value, (float, np.floating)) and bool(value != value))
        or (isinstance(value, Decimal) and value.is_nan())
        or type(value).__name__ in ("NAType", "NaTType")
    )


def whole_number(value: Any, *, booleans: bool = False) -> int | None:
    """The int64 that a value is; None where it is no whole number of int64.

    Args:
        booleans: take true and false, and their texts, as 1 and 0.
    """
    if isinstance(value, (bool, np.bool_)):
        return int(value) if booleans else None
    if isinstance(value, str):
        if booleans and value in BOOLEAN_TEXTS:
            return int(BOOLEAN_TEXTS[value])
        if not _whole.fullmatch(value):
            return None
        digits, point, _ = value.strip(" \t").partition(".")
        # Python refuses to read thousands of digits.
        number = int(digits) if len(digits) < 30 else _HIGHEST + 1
        return None if point and abs(number) > EXACT else _in_int64(number)
    if isinstance(value, (int, np.integer)):
        return _in_int64(int(value))
    if isinstance(value, (float, np.floating)):
        whole = math.isfinite(value) and float(value).is_integer() and abs(float(value)) <= EXACT
        return int(value) if whole else None
    if isinstance(value, Decimal):
        return _in_int64(int(value)) if value.is_finite() and value == value.to_integral_value() else None
    return None


def text_of(value: Any) -> str | None:
    """The text that a value is; None where it is neither text nor number nor boolean, or may have been rounded."""
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, (int, np.integer)):
        return str(int(value)) if abs(int(value)) < _LONGEST else None
    if isinstance(value, (float, np.floating)):
        if float(value).is_integer():
            return str(int(value)) if abs(float(value)) <= EXACT else None
        return np.format_float_positional(value, trim="-")
    if isinstance(value, Decimal):
        return format(value, "f") if value.is_finite() else None
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return None
    return None


def category_text(value: Any) -> str | None:
    """The text of a value of a categorical column: `text_of`, but a boolean is the same in any spelling."""
    text = text_of(value)
    return text.lower() if text in BOOLEAN_TEXTS else text


def number(value: Any) -> float | None:
    """The float64 that a value is, NaN where it is missing, 1 and 0 of a boolean; None where it is no number."""
    if is_missing(value):
        return math.nan
    if isinstance(value, str):
        if value in BOOLEAN_TEXTS:
            return float(BOOLEAN_TEXTS[value])
        return float(value) if _number.fullmatch(value) else None
    if isinstance(value, (bool, np.bool_, int, np.integer, float, np.floating, Decimal)):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    return None


def log_square_buckets(numbers: NDArray[np.float64]) -> NDArray[np.int64]:
    """Buckets of counts: ``floor(ln(x)^2)`` above 2, the whole part of smaller numbers, and 0 for a missing one.

    So the winners of Criteo's challenge of 2014 read its counts, and BARS after them.

    Args:
        numbers: shape (n,), NaN where missing.
    """
    filled = np.nan_to_num(numbers, nan=0.0)
    large = filled > 2
    whole = np.trunc(np.maximum(filled, -float(EXACT)))
    return np.where(large, np.floor(np.log(np.where(large, filled, 1.0)) ** 2), whole).astype(np.int64)


def is_other_numeral(text: str) -> bool:
    """Whether a text is a number that is written in another way than `text_of` writes it, such as 007, +7 or 7.0.

    A program that reads it as a number, as pandas does, loses the difference.
    """
    if not _number.fullmatch(text) or len(text) > 400:
        return False
    bare = text.strip(" \t")
    value = int(bare) if re.fullmatch(r"[+-]?[0-9]+", bare) else float(bare)
    return text_of(value) != text


class TimeFormat:
    """Times in a format of strptime, read in one way by training and serving.

    Texts, whole numbers that are written as the format says, and datetimes are times. One with an offset is taken in UTC.

    Args:
        form: the format, such as ``%Y-%m-%d %H:%M:%S``.

    Raises:
        ValueError: the format has a directive that depends on the machine, or is none.
    """

    def __init__(self, form: str) -> None:
        found = re.findall(r"%(.?)", form)
        wrong = [part for part in found if part not in _DIRECTIVES or not part]
        if wrong:
            raise ValueError(
                f"'%{wrong[0]}' is not a part of times; use {', '.join('%' + d for d in 'YmdHMSfzyjIpbBaA')}"
            )
        if not [part for part in found if part != "%"]:
            raise ValueError("it has no part of a time; write one such as '%Y-%m-%d %H:%M:%S'")
        self.form = form
        # Of digits alone: leading zeros are lost where such a time is read as a number.
        self._width = sum(_WIDTHS[part] for part in found) if not re.sub(r"%[YymdHIMSj]", "", form) else 0
        self.parse(datetime(2001, 12, 31, 23, 58, 59, tzinfo=UTC).strftime(form))

    def parse(self, value: Any) -> datetime:
        """The time that a value is.

        Raises:
            ValueError: it is none.
        """
        if isinstance(value, np.datetime64):
            value = value.astype("datetime64[us]").item()
        if isinstance(value, datetime):
            return value.astimezone(UTC).replace(tzinfo=None) if value.tzinfo is not None else value
        if isinstance(value, date):
            return datetime(value.year, value.month, value.day)
        text = None if isinstance(value, (bool, np.bool_)) else text_of(value)
        if text is None:
            raise ValueError(f"{value!r:.60} is no time like {self.form!r}")
        try:
            read = datetime.strptime(text.zfill(self._width) if self._width else text, self.form)
            return read.astimezone(UTC).replace(tzinfo=None) if read.tzinfo is not None else read
        except (ValueError, OverflowError):
            raise ValueError(f"{text!r:.60} is no time like {self.form!r}") from None


@lru_cache
def time_format(form: str) -> TimeFormat:
    """The same as `TimeFormat(form)`, made once."""
    return TimeFormat(form)


def _in_int64(value: int) -> int | None:
    return value if _LOWEST <= value <= _HIGHEST else None
