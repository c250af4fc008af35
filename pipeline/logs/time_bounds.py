"""The two times that cut a log into train, validation and test: from dates, or by shares of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from graphhash.errors import DataError
from graphhash.graph.interactions import TEST, TRAIN, VALIDATION

if TYPE_CHECKING:
    from pipeline.config.run_config import DataConfig

NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class TimeBounds:
    """The times at which validation and test begin, in microseconds since 1970; NEVER for a part without rows."""

    validation_from: int = NEVER
    test_from: int = NEVER

    def parts(self, times: NDArray[np.int64]) -> NDArray[np.uint8]:
        """TRAIN, VALIDATION or TEST of each row, shape (n,)."""
        later = np.where(times >= self.test_from, TEST, VALIDATION)
        return np.where(times >= self.validation_from, later, TRAIN).astype(np.uint8)

    def as_texts(self) -> dict[str, str | None]:
        """Both times as ISO 8601 in UTC, by part; None for a part without rows."""
        return {"validation": as_text(self.validation_from), "test": as_text(self.test_from)}


def find_bounds(config: DataConfig, times: Sequence[NDArray[np.int64]]) -> TimeBounds:
    """The bounds of split="temporal".

    Rows of equal times are in one part, the later one: a part is larger than its share where it begins within rows of one time.

    Args:
        times: of all rows, in parts, each of them ascending and of one row or more.

    Raises:
        DataError: no row is left for train, or none from a date of the settings.
    """
    n_rows, given = sum(map(len, times)), config.bounds

    def n_before(time: int) -> int:
        return sum(int(np.searchsorted(part, time)) for part in times)

    def from_share(share: float, end: int) -> int:
        """Time of the row at which the share of all rows before the row `end` begins."""
        n_held_out = round(share * n_rows)
        return _time_of(times, max(end - n_held_out, 0)) if n_held_out else NEVER

    for part, time in given.items():
        if n_before(time) == n_rows:
            raise DataError(
                f"{config.path}: data.{part}_from={getattr(config, part + '_from')} is after the latest row, "
                f"{as_text(max(int(p[-1]) for p in times))}; give an earlier time"
            )
    test_from = given.get("test", from_share(config.test, n_rows))
    end = n_rows if test_from == NEVER else n_before(test_from)
    validation_from = min(given.get("validation", from_share(config.validation, end)), test_from)
    if validation_from != NEVER and not n_before(validation_from):
        raise DataError(
            f"{config.path}: no row is before {as_text(validation_from)}, where validation and test begin, so none is left to "
            "train on; give later times or smaller shares"
        )
    return TimeBounds(validation_from, test_from)


def as_text(time: int) -> str | None:
    """A time in UTC as ISO 8601; None where it never comes."""
    if time == NEVER:
        return None
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=time)).replace(tzinfo=None).isoformat(" ")


def _time_of(times: Sequence[NDArray[np.int64]], row: int) -> int:
    """The time of a row of all, which are in ascending order: the largest time with at most `row` smaller ones."""
    low, high = min(int(part[0]) for part in times), max(int(part[-1]) for part in times)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(int(np.searchsorted(part, middle)) for part in times) <= row:
            low = middle
        else:
            high = middle - 1
    return low
