"""Splits by time, and weights by age: which rows of the log are of train, validation and test, and the parts that are held out.

**temporal.** Two times cut the log. Validation begins at the first, the test at the second; rows of equal times are in one part, the later
one. Without dates, the share `test` of all rows, the latest ones, is the test, and the share `validation` before them is for validation; a
part is larger than its share where the time at its beginning is that of several rows.

**leave-last-out.** A user's rows are ordered by time, rows of equal times as they are read. The last `n` items that appear for the
first time are the test's, the `n` before them are for validation, and the first item of every user stays in train. What the user did
before the first of these rows is train.

Nothing that comes later reaches train: vocabularies, core, weights and graph are made of the rows of train alone. A held-out row is left
out where train lacks its user or its item, or where an earlier part has the pair already, since items that a user has seen are not ranked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from numpy.typing import NDArray

from graphhash.errors import DataError
from graphhash.graph.interactions import TEST, TRAIN, VALIDATION
from pipeline.logs.time_bounds import TimeBounds, as_text, find_bounds
from pipeline.retrieval.ingestion.files import Workspace
from pipeline.retrieval.ingestion.ranges import Layout, Rows
from pipeline.storage.mapped import load_array

if TYPE_CHECKING:
    from pipeline.config.run_config import DataConfig

HELD_OUT = {"validation": VALIDATION, "test": TEST}
WHOLE_LOG = TimeBounds()
MICROSECONDS_PER_DAY = 86_400 * 10**6


@dataclass(frozen=True)
class Cut:
    """How the rows of train files are cut by time.

    Args:
        bounds: of split="temporal".
        n_validation, n_test: items of a user, of split="leave-last-out"; None with split="temporal".
    """

    bounds: TimeBounds = WHOLE_LOG
    n_validation: int | None = None
    n_test: int = 0

    def parts(self, rows: Rows) -> NDArray[np.uint8]:
        """TRAIN, VALIDATION or TEST of each row, shape (n,).

        Args:
            rows: with times; all rows of their users, in reading order.
        """
        times = _times(rows)
        if self.n_validation is not None:
            return self._last_of_users(rows, times, self.n_validation)
        return self.bounds.parts(times)

    def _last_of_users(self, rows: Rows, times: NDArray[np.int64], n_validation: int) -> NDArray[np.uint8]:
        users, items = rows.users.astype(np.int64), rows.items.astype(np.int64)
        users -= users.min(initial=np.iinfo(np.int64).max)
        order = np.lexsort((times, users))  # Stable.
        users, pairs = users[order], (users * (items.max(initial=0) + 1) + items)[order]
        is_first = np.zeros(len(order), bool)
        is_first[np.unique(pairs, return_index=True)[1]] = True
        n_items = np.bincount(users[is_first], minlength=users.max(initial=-1) + 1)
        # Different items of the user up to each row; the first of its items is always train's.
        so_far = np.cumsum(is_first) - (np.cumsum(n_items) - n_items)[users]
        n_test = np.minimum(self.n_test, n_items - 1)
        n_train = np.maximum(n_items - n_test - n_validation, 1)
        part = np.where(so_far > (n_items - n_test)[users], TEST, VALIDATION)
        found = np.empty(len(order), np.uint8)
        found[order] = np.where(so_far > n_train[users], part, TRAIN)
        return found


@dataclass(frozen=True)
class TrainRows:
    """Which rows of the train files are trained on, and what they weigh.

    Args:
        cut: of a split by time.
        half_life: microseconds.
        newest: time of the latest row of train; set with `half_life`.
    """

    cut: Cut | None = None
    half_life: float | None = None
    newest: int | None = None

    def of(self, rows: Rows) -> Rows:
        """The rows of train, in the same order, with their weights by age."""
        if self.cut is not None:
            rows = rows.only(self.cut.parts(rows) == TRAIN)
        if self.half_life is None or self.newest is None:
            return rows
        age = (self.newest - _times(rows)) / self.half_life
        return rows.weighted(rows.full_weights * np.exp2(-age))

    def check(self, weights: NDArray[np.float64]) -> None:
        """Raise DataError where ageing leaves a merged weight below float32."""
        if self.half_life is not None and len(weights) and weights.min() < np.finfo(np.float32).tiny:
            raise DataError(
                f"half_life={self.half_life / MICROSECONDS_PER_DAY:g} days leaves the oldest interactions a weight of {weights.min():.2g}, "
                "which float32 cannot hold; give a longer one (--half-life)"
            )


ALL_ROWS = TrainRows()


class PartFacts(TypedDict):
    """Rows of a part that is held out; those that are left out because train lacks the user or the item, or because an earlier part has the
    pair; and the different users and items that train lacks."""

    rows: int
    rows_of_unseen: int
    rows_repeated: int
    unseen_users: int
    unseen_items: int


class TimeFacts(TypedDict):
    """What `ingest.json` holds of times. `first` is the time at which a part begins, of split="temporal"."""

    column: str
    first: dict[str, str | None]
    parts: dict[str, PartFacts]
    newest: str | None


def find_cut(config: DataConfig, work: Workspace, parts: Sequence[int]) -> Cut | None:
    """The cut of a split by time, None of another split.

    Args:
        parts: chunks of the log, which are read.

    Raises:
        DataError: no row is left for train, or none from a date of the settings.
    """
    if not config.by_time:
        return None
    if config.split == "leave-last-out":
        n = config.last_n
        return Cut(n_validation=n if config.validation else 0, n_test=n if config.test else 0)
    times = [load_array(work.times(number)) for number in parts]
    bounds = find_bounds(config, [part for part in times if len(part)])
    return Cut(bounds)


def with_newest(rows: TrainRows, newest: Sequence[int | None]) -> TrainRows:
    """The same with the time of train's latest row.

    Args:
        newest: as `newest_of_partition` returns it, of all partitions.
    """
    return replace(rows, newest=max((time for time in newest if time is not None), default=None))


def newest_of_partition(work: Workspace, layout: Layout, partition: int, rows: TrainRows) -> int | None:
    """Time of the latest row of train in a partition."""
    times = _times(rows.of(layout.read(work, layout.blocks, partition)))
    return int(times.max()) if len(times) else None


def part_facts(work: Workspace, found: Sequence[dict[str, PartFacts]]) -> dict[str, PartFacts]:
    """The facts of validation and test.

    Args:
        found: as `pipeline.retrieval.ingestion.encode.hold_out` returns them, of all partitions.
    """
    facts = {}
    for name in HELD_OUT:
        of_part = [each[name] for each in found]
        unseen = [work.load(unseen_items(name, p)) for p in range(len(found))]
        facts[name] = PartFacts(
            rows=sum(part["rows"] for part in of_part),
            rows_of_unseen=sum(part["rows_of_unseen"] for part in of_part),
            rows_repeated=sum(part["rows_repeated"] for part in of_part),
            unseen_users=sum(part["unseen_users"] for part in of_part),
            # A user is in one partition, an item in many.
            unseen_items=len(np.unique(np.concatenate(unseen))),
        )
    return facts


def unseen_items(part: str, partition: int) -> str:
    """Name of the array of a part's items that train lacks."""
    return f"unseen_{part}_items-{partition:06d}"


def time_facts(column: str, rows: TrainRows, parts: dict[str, PartFacts]) -> TimeFacts:
    """What is recorded of the times."""
    cut = rows.cut or Cut()
    return {
        "column": column,
        "first": cut.bounds.as_texts(),
        "parts": parts,
        "newest": None if rows.newest is None else as_text(rows.newest),
    }


def describe_times(facts: TimeFacts, split: str, half_life: float | None) -> list[str]:
    """The same as lines: one of each held-out part, one of the weights."""
    lines = []
    for name, part in facts["parts"].items():
        first = facts["first"].get(name)
        lines.append(
            f"split {split}: {name}{f' from {first}' if first else ''}: {part['rows']:,} rows; left out: "
            f"{part['rows_of_unseen']:,} of {part['unseen_users']:,} users and {part['unseen_items']:,} items that train lacks, "
            f"{part['rows_repeated']:,} of pairs known before"
        )
    if half_life is not None:
        lines.append(f"weights: halved every {half_life:g} days before {facts['newest']}")
    return lines


def _times(rows: Rows) -> NDArray[np.int64]:
    assert rows.times is not None  # They are read where a split or weights need them.
    return rows.times
