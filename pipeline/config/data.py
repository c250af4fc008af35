"""Settings of the log: what to read, which rows count, and how it is split (section `data`)."""

from __future__ import annotations

import codecs
import math
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from pipeline.config.choices import Format, IdKind, Split
from pipeline.config.validation import STRICT, Seed, one_line_errors
from pipeline.errors import ConfigError

Share = Annotated[float, Field(ge=0.0, lt=1.0)]


@one_line_errors("data")
@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """What to read and how to split it (stage `ingest`)."""

    path: str = ""
    """The log: a file, a folder or a glob. Empty only until the command line or a file gives it."""
    format: Format = "auto"
    """Format of the log; `auto` is inferred from file names and contents."""
    user_column: str = "user_id"
    """Column of user ids."""
    item_column: str = "item_id"
    """Column of item ids."""
    user_kind: IdKind = "auto"
    """Type of the user ids: `int64`, or `string`, which takes every id as it stands; `auto` is inferred from the first 1,000."""
    item_kind: IdKind = "auto"
    """Type of the item ids, likewise."""
    separator: str | None = None
    """csv: the character between two fields; None: recognised (comma, tab, semicolon or bar)."""
    encoding: str = "utf-8"
    """csv: the encoding of the text, such as `latin-1` or `utf-16`."""
    columns: tuple[str, ...] | None = None
    """csv without a header: the names of its columns, in order; None: the first line has the names."""
    weight_column: str | None = None
    """Column of interaction weights; None: every row of the log weighs 1, and duplicates add up."""
    rating_column: str | None = None
    """Column that `positive_from` looks at; None: the weight column, or else `rating`."""
    positive_from: float | None = None
    """Least rating of an interaction; rows below it are left out. None: every row is one."""
    min_user_interactions: Annotated[int, Field(ge=1)] = 1
    """Least number of items of a user. Together with `min_item_interactions` this is a core: users and items are removed until all that
    are left fulfil both, with duplicates counted once."""
    min_item_interactions: Annotated[int, Field(ge=1)] = 1
    """Least number of users of an item."""
    user_features: str | None = None
    """For the method `lsh`: a csv, tsv or parquet file of user ids, in a column named as the log's, and numeric features. Ids without a
    row get the average (`pipeline.logs.features`)."""
    item_features: str | None = None
    """For the method `lsh`: the same of items."""
    label_column: str | None = None
    """With `task = "ctr"`: column of the labels, 0 and 1; None: the one named label, click or clicked."""
    schema: str | None = None
    """With `task = "ctr"`: a TOML file of column roles (`pipeline.ctr.schema`); None: those of a named data set, or inferred."""
    min_count: Annotated[int, Field(ge=1)] = 1
    """With `task = "ctr"`: an id of fewer training rows is out of vocabulary."""
    bad_rows: Literal["error", "skip"] = "error"
    """`error` stops at the first bad row; `skip` keeps bad rows in `ingest/rejected.parquet` and goes on."""
    split: Split = "random"
    """`random` draws validation and test; `given` takes the data set's own test file, and draws validation from train; `temporal` takes the
    latest interactions of all for the test, those before them for validation; `leave-last-out` the latest of every user."""
    time_column: str | None = None
    """Column of times, for the splits by time and `half_life`; None: recognised by its name or type."""
    test_from: str | None = None
    """With `split = "temporal"`: the time, in ISO 8601, from which interactions are of the test; None: by the share `test`."""
    validation_from: str | None = None
    """With `split = "temporal"`: the time from which they are of validation; None: by the share `validation`."""
    last_n: Annotated[int, Field(ge=1)] = 1
    """With `split = "leave-last-out"`: so many items of every user are of the test, and as many before them of validation."""
    half_life: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    """Days after which an interaction weighs half as much, counted back from the latest of train; None: weights do not depend on age."""
    validation: Share = 0.1
    """Share of all interactions for validation."""
    test: Share = 0.1
    """Share of all interactions for the test; not used with `split = "given"`."""
    seed: Seed = 0
    """Seed of the split."""
    shards: Annotated[int, Field(ge=1, le=4096)] = 8
    """CSR shards on disk. The communities do not depend on it."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        for key in ("user_column", "item_column"):
            if not getattr(self, key):
                raise ConfigError(f"data.{key} is empty; name the column that holds the ids")
        if self.user_column == self.item_column:
            raise ConfigError(f"data.user_column and data.item_column are both {self.user_column!r}; name two columns")
        _check_csv(self.separator, self.encoding, self.columns)
        self._check_times()
        if self.positive_from is not None and not math.isfinite(self.positive_from):
            raise ConfigError(f"data.positive_from={self.positive_from} is not finite; give a rating such as 4")
        if self.rating_column is not None and self.positive_from is None:
            raise ConfigError(
                f"data.rating_column={self.rating_column} is read with data.positive_from alone; give that (--positive-from 4), "
                "or name the column of weights with data.weight_column"
            )
        if self.split in ("random", "temporal") and self.validation + self.test >= 1.0:
            raise ConfigError(
                f"data.validation={self.validation} and data.test={self.test} leave nothing to train on; their sum must be below 1"
            )
        return self

    @property
    def by_time(self) -> bool:
        """Whether validation and test are chosen by time."""
        return self.split in ("temporal", "leave-last-out")

    @property
    def has_validation(self) -> bool:
        """Whether interactions are held out for validation."""
        return self.validation > 0 or self.validation_from is not None

    @property
    def reads_times(self) -> bool:
        """Whether the times of interactions are read."""
        return self.by_time or self.half_life is not None

    @property
    def bounds(self) -> dict[str, int]:
        """The dates from which parts begin, in microseconds since 1970 in UTC: those that are given of validation and test."""
        given = {"validation": self.validation_from, "test": self.test_from}
        return {part: _microseconds(f"{part}_from", text) for part, text in given.items() if text is not None}

    def _check_times(self) -> None:
        bounds = self.bounds
        if bounds and self.split != "temporal":
            part = next(iter(bounds))
            raise ConfigError(
                f"data.{part}_from={getattr(self, part + '_from')} needs data.split=temporal; set it, or leave it out"
            )
        if len(bounds) == 2 and bounds["validation"] > bounds["test"]:
            raise ConfigError(
                f"data.validation_from={self.validation_from} is after data.test_from={self.test_from}; validation comes before the test"
            )
        if self.last_n != 1 and self.split != "leave-last-out":
            raise ConfigError(f"data.last_n={self.last_n} needs data.split=leave-last-out; set it, or leave it out")
        if self.time_column is not None and not self.reads_times:
            raise ConfigError(
                f"data.time_column={self.time_column} is read with data.split=temporal or leave-last-out and with data.half_life alone; "
                "give one, or leave it out"
            )


def _microseconds(key: str, text: str) -> int:
    """A time of the settings since 1970 in UTC."""
    try:
        time = datetime.fromisoformat(text)
        time = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ConfigError(
            f"data.{key}={text!r} is no time; write one such as 2024-05-01 or 2024-05-01T12:30:00"
        ) from None
    return (time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def _check_csv(separator: str | None, encoding: str, columns: tuple[str, ...] | None) -> None:
    if separator is not None and (len(separator) != 1 or not separator.isascii() or separator in '"\r\n\0'):
        raise ConfigError(
            f"data.separator={separator!r} is not one ASCII character beside quotes and line ends; write one such as ';', or 'tab'"
        )
    try:
        is_text = codecs.lookup(encoding)._is_text_encoding
    except LookupError:
        is_text = False
    if not is_text:
        raise ConfigError(f"data.encoding={encoding!r} is unknown; name one such as utf-8, latin-1 or utf-16")
    if columns is not None and (not columns or len(set(columns)) < len(columns)):
        raise ConfigError(f"data.columns={','.join(columns)} must name every column of the file, each once")
