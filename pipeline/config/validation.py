"""Validated sections: pydantic dataclasses whose errors are one line with key, value and remedy."""

from __future__ import annotations

import functools
import math
import types
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from graphhash.errors import did_you_mean
from pipeline.errors import ConfigError

T = TypeVar("T")
# Values are of the type that the field names; a whole number is taken where a number is expected.
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
# A seed of any section.
Seed = Annotated[int, Field(ge=0)]
WORDS: dict[type, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "a list of texts",
    types.NoneType: "none",
}


def one_line_errors(section: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: construction raises ConfigError instead of pydantic's ValidationError.

    Args:
        section: name of the section, which precedes a field's name in messages; empty for the sections together.
    """

    def decorate(cls: type[T]) -> type[T]:
        construct = cls.__init__

        @functools.wraps(construct)
        def __init__(self: T, *args: Any, **values: Any) -> None:
            try:
                construct(self, *args, **values)
            except ValidationError as error:
                messages = [_message(section, cls, detail) for detail in error.errors(include_url=False)]
                raise ConfigError("; also ".join(messages)) from None

        setattr(cls, "__init__", __init__)  # noqa: B010  mypy refuses the assignment to a method.
        return cls

    return decorate


def fields_of(section: type) -> dict[str, FieldInfo]:
    """Field name -> pydantic's description of it, in the order of the class."""
    return dict(getattr(section, "__pydantic_fields__"))  # noqa: B009  Set by pydantic's decorator, unknown to mypy.


@functools.cache
def kinds_of(section: type) -> dict[str, tuple[type, ...]]:
    """Field name -> the plain types that it takes; `tuple` stands for a tuple of strings."""
    kinds = {}
    for name, hint in typing.get_type_hints(section).items():
        members = typing.get_args(hint) if isinstance(hint, types.UnionType) or _is_union(hint) else (hint,)
        kinds[name] = tuple(map(_plain, members))
    return kinds


def describe(kinds: Sequence[type]) -> str:
    """The types as a message names them: "a whole number or none"."""
    return " or ".join(WORDS[kind] for kind in kinds)


def _is_union(hint: object) -> bool:
    return typing.get_origin(hint) is typing.Union


def _plain(hint: Any) -> type:
    origin = typing.get_origin(hint)
    return str if origin is typing.Literal else origin or hint


def _message(section: str, cls: type, error: Any) -> str:
    """What is wrong with a setting, from one of pydantic's errors."""
    kind, value, where = error["type"], error["input"], error["loc"]
    if "error" in error.get("ctx", {}):
        return str(error["ctx"]["error"])
    name = str(where[0])
    key = f"{section}.{name}" if section else name
    field = fields_of(cls).get(name)
    if field is None:
        return f"unknown key {key!r}; {did_you_mean(name, fields_of(cls))}keys are {', '.join(fields_of(cls))}"
    if kind == "literal_error":
        choices = _choices(field.annotation)
        return f"{key}={value!r} is unknown; {did_you_mean(str(value), choices)}choices are {', '.join(choices)}"
    if kind == "finite_number" or kind.startswith(("greater_than", "less_than")):
        return f"{key}={value} is out of range; it must be {_bounds(field, float in kinds_of(cls)[name])}"
    expected = describe(kinds_of(cls)[name]) if section else "a section"
    if len(where) > 1:
        return f"{key} holds {value!r}, which is {type(value).__name__}; expected {expected}"
    return f"{key}={value!r} is {type(value).__name__}; expected {expected}"


def _choices(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    return [choice for member in typing.get_args(annotation) for choice in _choices(member)]


def _bounds(field: FieldInfo, is_float: bool) -> str:
    """The range of a number: "at least 1", "from 0.0 to below 1.0", "a finite number above 0"."""
    low: Any = -math.inf
    high: Any = math.inf
    low_open = high_open = False
    for bound in field.metadata:
        if isinstance(bound, Ge):
            low = bound.ge
        elif isinstance(bound, Gt):
            low, low_open = bound.gt, True
        elif isinstance(bound, Le):
            high = bound.le
        elif isinstance(bound, Lt):
            high, high_open = bound.lt, True
    if low == -math.inf and high == math.inf:
        return "a finite number"
    if high == math.inf:
        return f"{'a finite number ' if is_float else ''}{'above' if low_open else 'at least'} {low}"
    if low_open:
        return f"above {low} and {'below' if high_open else 'at most'} {high}"
    return f"from {low} to {'below ' if high_open else ''}{high}"
