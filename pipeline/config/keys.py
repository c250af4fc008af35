"""Dotted keys of settings, such as `train.lr`, and overrides of them, such as `train.lr=0.01`."""

from __future__ import annotations

import difflib
import types
from typing import Any

from pipeline.config.sections import SECTIONS
from pipeline.config.validation import describe, fields_of, kinds_of
from pipeline.errors import ConfigError

# Keys and values of earlier versions -> those of today.
RENAMED_KEYS = {"train.decay": "train.l2_total", "map.n_lookups": "map.indices_per_id"}
RENAMED_VALUES = {("export.runtime", "folded"): "materialized"}


def keys() -> list[str]:
    """Every dotted key, such as `train.lr`, in the order of the sections."""
    return [f"{section}.{name}" for section, kind in SECTIONS.items() for name in fields_of(kind)]


def check_key(key: str) -> None:
    """Raise ConfigError with the nearest keys where this one is unknown."""
    known = keys()
    if key in known:
        return
    if key in RENAMED_KEYS:
        raise ConfigError(f"{key} was renamed; write {RENAMED_KEYS[key]}")
    by_name = [k for k in known if k.split(".")[1] == key.split(".")[-1]]
    names = {k.split(".")[1]: k for k in known}
    close = by_name or difflib.get_close_matches(key, known, 1, 0.6)
    close = close or [names[name] for name in difflib.get_close_matches(key.split(".")[-1], names, 1, 0.6)]
    remedy = f"did you mean {' or '.join(close)}?" if close else f"sections are {', '.join(SECTIONS)}"
    raise ConfigError(f"unknown key {key!r}; {remedy}")


def check_value(key: str, value: Any) -> None:
    """Raise ConfigError where a value has another name by now."""
    if isinstance(value, str) and (key, value) in RENAMED_VALUES:
        raise ConfigError(f"{key}={value!r} was renamed; write {RENAMED_VALUES[key, value]!r}")


def parse_override(text: str) -> tuple[str, Any]:
    """`train.lr=0.01` -> ("train.lr", 0.01), read as the key's own type.

    Raises:
        ConfigError: no `=`, unknown key, or a value that is not of the key's type.
    """
    key, separator, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not separator:
        raise ConfigError(f"{text!r} is not an override; write section.key=value, such as train.epochs=50")
    check_key(key)
    section, name = key.split(".")
    kinds = kinds_of(SECTIONS[section])[name]
    if types.NoneType in kinds and value.lower() in ("none", "null", ""):
        return key, None
    if tuple in kinds:
        return key, tuple(part.strip() for part in value.strip("[]").split(",") if part.strip())
    if str in kinds:
        return key, value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value
    if bool in kinds and value.lower() in ("true", "false"):
        return key, value.lower() == "true"
    for kind in (int, float):
        if kind in kinds:
            try:
                return key, kind(value)
            except ValueError:
                pass
    raise ConfigError(f"{key}={value!r} is not {describe(kinds)}")
