"""What a setting may be: its type, its range, its choices; and how it is written."""

from __future__ import annotations

import difflib
import functools
import json
import math
import types
import typing
from collections.abc import Sequence
from typing import Any

from pipeline.errors import ConfigError


@functools.cache
def kinds_of(section: type) -> dict[str, tuple[type, ...]]:
    """Field name -> the plain types it takes; `tuple` stands for a tuple of strings."""
    kinds = {}
    for name, hint in typing.get_type_hints(section).items():
        members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds[name] = tuple(typing.get_origin(member) or member for member in members)
    return kinds


def describe(kinds: tuple[type, ...]) -> str:
    words = {
        str: "a text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        tuple: "a list of texts",
        types.NoneType: "none",
    }
    return " or ".join(words[kind] for kind in kinds)


def check_types(section_value: Any, section: str) -> None:
    for name, kinds in kinds_of(type(section_value)).items():
        value = getattr(section_value, name)
        if float in kinds and type(value) is int:
            object.__setattr__(section_value, name, float(value))
            continue
        if type(value) not in kinds or (type(value) is tuple and any(type(part) is not str for part in value)):
            raise ConfigError(f"{section}.{name}={value!r} is {type(value).__name__}; expected {describe(kinds)}")


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(value, choices, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"{key}={value!r} is unknown; {hint}choices are {', '.join(choices)}")


def check_range(key: str, value: float, low: float, high: float = math.inf, *, high_open: bool = False) -> None:
    if not (low <= value <= high) or not math.isfinite(value) or (high_open and value == high):
        bound = f"at least {low}" if high == math.inf else f"from {low} to {'below ' if high_open else ''}{high}"
        raise ConfigError(f"{key}={value} is out of range; it must be {bound}")


def toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(toml_value(part) for part in value) + "]"
    if isinstance(value, str):
        # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
