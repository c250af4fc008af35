"""Settings as TOML: files of a section per stage, read to and written from dotted keys."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.config.keys import check_key
from pipeline.config.sections import SECTIONS
from pipeline.errors import ConfigError

# The settings of a run, in its folder.
CONFIG_FILE = "config.toml"


def read_toml(path: Path) -> dict[str, Any]:
    """The settings of a file by dotted key, `{"train.dim": 16}`. The keys are checked, the values are not.

    Raises:
        ConfigError: unreadable file, no TOML, or a key that is unknown, each under the file's name.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration file ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8 (byte {error.start})") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    settings: dict[str, Any] = {}
    for section, values in tree.items():
        if not isinstance(values, dict):
            raise ConfigError(
                f"{path}: key {section!r} stands outside any section; write it under [{'], ['.join(SECTIONS)}]"
            )
        settings |= {f"{section}.{name}": value for name, value in values.items()}
    for key in settings:
        try:
            check_key(key)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    return settings


def write_toml(settings: Iterable[tuple[str, Any]]) -> str:
    """Dotted keys and their values, section by section, as TOML. None is left out."""
    lines: list[str] = []
    current = ""
    for key, value in settings:
        section, name = key.split(".")
        if section != current:
            lines += ([""] if lines else []) + [f"[{section}]"]
            current = section
        if value is not None:
            lines.append(f"{name} = {_toml_value(value)}")
    return "\n".join([*lines, ""])


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(part) for part in value) + "]"
    if isinstance(value, str):
        # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
