"""The schema of a CTR data set: which column is the label, and what the others are.

A schema comes from a TOML file (`data.schema`), from a named data set (`pipeline.ctr.datasets`), or is guessed from the first rows of the
log. As TOML:

    label = "click"                 # 0 or 1
    label_from = 4                  # optional: the label is 1 from this value of a number on
    group = "user_id"               # optional: AUC is also averaged over the groups of this column
    dense = ["price"]
    categorical = ["user_id", "item_id", "device"]
    [columns.user_id]               # optional, for a categorical column
    partner = "item_id"             # the column on the other side of its graph; "auto": the one that tells most (`pipeline.ctr.partners`)
    compress = "method"             # auto, full, method, or the name of a hash
    rows = 1000                     # of a hash without a partner
    min_count = 2                   # fewer rows of train than this make a value out-of-vocabulary (OOV)
    kind = "string"                 # or int64
    [multi_valued.genres]                   # multi-valued; `separator`, `min_count`, `kind`
    separator = "|"
    [times]                         # a time becomes two categorical columns, <name>_hour and <name>_weekday
    hour = "%y%m%d%H"               # as in strptime (`serving.values.TimeFormat`); times with an offset are taken in UTC

    buckets = ["clicks"]            # a number becomes the categorical column <name>_bucket (`serving.values.log_square_buckets`)

`compress`: "auto" is the run's method for a column that has a partner and more than SMALL values, and full for any other; "method" is the
run's method whatever the size.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from graphhash.errors import DataError, did_you_mean
from serving.values import time_format

# A table of at most so many values stays full: there is nothing to save.
SMALL = 100
# Hashes that a schema may give to a single column: those that need the number and the frequency of an id alone.
HASHES = ("modulo", "double", "quotient_remainder", "frequency", "double_frequency")
# The partner that a column has where the data decide.
AUTO = "auto"
COMPRESS = ("auto", "full", "method", *HASHES)
KINDS = ("auto", "int64", "string")
TIME_PARTS: tuple[Literal["hour", "weekday"], ...] = ("hour", "weekday")


@dataclass(frozen=True)
class Category:
    """A categorical column; see the module for what each field means."""

    name: str
    compress: str = "auto"
    partner: str | None = None
    rows: int | None = None
    min_count: int | None = None
    kind: str = "auto"


@dataclass(frozen=True)
class MultiValued:
    """A multi-valued column: values of a text between separators, or of a list."""

    name: str
    separator: str = "|"
    min_count: int | None = None
    kind: str = "auto"


@dataclass(frozen=True)
class CtrSchema:
    """What the columns of a CTR data set are.

    Raises:
        DataError: a column has two parts, a partner is no categorical column, or a value is none of those allowed.
    """

    label: str
    categories: tuple[Category, ...] = ()
    dense: tuple[str, ...] = ()
    multi_valued: tuple[MultiValued, ...] = ()
    times: tuple[tuple[str, str], ...] = ()
    group: str | None = None
    label_from: float | None = None
    buckets: tuple[str, ...] = ()

    def __post_init__(self):
        of_ids: list[Category | MultiValued] = [*self.categories, *self.multi_valued]
        names = [self.label, *self.dense, *(column.name for column in of_ids)]
        for name in names:
            if names.count(name) > 1:
                raise DataError(f"schema: column {name!r} is named {names.count(name)} times; give it one part")
        if not self.categories and not self.multi_valued:
            raise DataError("schema: there is no categorical and no multi-valued column; name one in 'categorical'")
        known = {c.name for c in self.categories}
        for c in self.categories:
            if c.partner not in (None, AUTO) and (c.partner not in known or c.partner == c.name):
                raise DataError(
                    f'schema: the partner of {c.name!r} is {c.partner!r}, which is no other categorical column; or write "auto"'
                )
            _check_choice(c.name, "compress", c.compress, COMPRESS)
            if c.compress == "method" and c.partner is None:
                raise DataError(
                    f"schema: column {c.name!r} is compressed by the run's method and has no partner; name one"
                )
            if c.compress in HASHES and c.partner is None and c.rows is None:
                raise DataError(f"schema: column {c.name!r} is hashed into no number of rows; give rows, or a partner")
            if c.rows is not None and (c.compress not in HASHES or c.rows < 4):
                raise DataError(f"schema: column {c.name!r} has rows={c.rows}, which is for a hash, and 4 or more")
        for column in of_ids:
            _check_choice(column.name, "kind", column.kind, KINDS)
            if column.min_count is not None and column.min_count < 1:
                raise DataError(
                    f"schema: column {column.name!r} has min_count={column.min_count}; it must be at least 1"
                )
        for name, form in self.times:
            try:
                time_format(form)
            except ValueError as error:
                raise DataError(f"schema: the time {name!r} has the format {form!r}: {error}") from None
        for feature in self.multi_valued:
            if not feature.separator:
                raise DataError(
                    f"schema: column {feature.name!r} has an empty separator; name the text between two values"
                )

    @property
    def names(self) -> list[str]:
        """Columns that have to be in the file, each once."""
        made = {f"{name}_{part}" for name, _ in self.times for part in TIME_PARTS}
        made |= {f"{name}_bucket" for name in self.buckets}
        names = [self.label, *(c.name for c in self.categories if c.name not in made), *self.dense]
        names += [feature.name for feature in self.multi_valued] + [name for name, _ in self.times] + [*self.buckets]
        return list(dict.fromkeys([*names, *([self.group] if self.group else [])]))

    def category(self, name: str) -> Category:
        """The categorical column of this name."""
        return next(c for c in self.categories if c.name == name)

    def with_pair(self, column: str, partner: str) -> CtrSchema:
        """The same with these two columns as each other's partners."""
        other = {column: partner, partner: column}
        return replace(
            self, categories=tuple(replace(c, partner=other.get(c.name, c.partner)) for c in self.categories)
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON values, for `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CtrSchema:
        """The inverse of `as_dict`."""
        return cls(
            **{
                **values,
                "categories": tuple(Category(**c) for c in values["categories"]),
                "dense": tuple(values["dense"]),
                "multi_valued": tuple(MultiValued(**feature) for feature in values["multi_valued"]),
                "times": tuple((name, form) for name, form in values["times"]),
                "buckets": tuple(values.get("buckets", ())),
            }
        )


def read_schema(path: Path) -> CtrSchema:
    """The schema in a TOML file.

    Raises:
        DataError: the file cannot be read, a key is unknown, or a value is wrong.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot read the schema ({error.strerror})") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{path}: not valid TOML: {error}") from error
    try:
        return _parse(tree)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _parse(tree: Mapping[str, Any]) -> CtrSchema:
    kinds = {"label": str, "label_from": (int, float), "group": str, "dense": list, "categorical": list,
             "columns": dict, "multi_valued": dict, "times": dict, "buckets": list}  # fmt: skip
    _check_keys(tree, kinds, "schema")
    if "label" not in tree:
        raise DataError('schema: it names no label; write label = "click"')
    names = list(tree.get("categorical", []))
    made = [f"{name}_{part}" for name in tree.get("times", {}) for part in TIME_PARTS]
    made += [f"{name}_bucket" for name in tree.get("buckets", ())]
    columns = tree.get("columns", {})
    if stray := [name for name in columns if name not in (*names, *made)]:
        raise DataError(f"schema: [columns.{stray[0]}] is of no column in 'categorical'; add it there")
    options = {"compress": str, "partner": str, "rows": int, "min_count": int, "kind": str}
    for name, values in columns.items():
        _check_keys(values, options, f"schema: [columns.{name}]")
    for name, values in tree.get("multi_valued", {}).items():
        _check_keys(values, {"separator": str, "min_count": int, "kind": str}, f"schema: [multi_valued.{name}]")
    return CtrSchema(
        tree["label"],
        tuple(Category(name, **columns.get(name, {})) for name in dict.fromkeys((*names, *made))),
        tuple(tree.get("dense", [])),
        tuple(MultiValued(name, **values) for name, values in tree.get("multi_valued", {}).items()),
        tuple(tree.get("times", {}).items()),
        tree.get("group"),
        tree.get("label_from"),
        tuple(tree.get("buckets", ())),
    )


def _check_keys(values: Any, kinds: Mapping[str, Any], where: str) -> None:
    if not isinstance(values, Mapping):
        raise DataError(f"{where} is {values!r}; write it as a table of keys")
    for key, value in values.items():
        if key not in kinds:
            raise DataError(
                f"{where}: unknown key {key!r}; {did_you_mean(key, kinds, cutoff=0.5)}keys are {', '.join(kinds)}"
            )
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise DataError(f"{where}: {key}={value!r} is {type(value).__name__}, which it does not take")
        if isinstance(value, list) and not all(isinstance(part, str) for part in value):
            raise DataError(f"{where}: {key}={value!r} is no list of names")


def _check_choice(column: str, key: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise DataError(
            f"schema: column {column!r} has {key}={value!r}; {did_you_mean(value, choices, cutoff=0.5)}choices are {', '.join(choices)}"
        )
