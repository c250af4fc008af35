"""MkDocs hook: writes the tables of the configuration page from the settings, their types and their descriptions."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

from pipeline.config.sections import SECTIONS

PLACE = "<!-- SETTINGS -->"
NAMES = {bool: "true or false", float: "number", int: "integer", str: "text", type(None): "none"}
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs for every page; replaces PLACE."""
    return markdown.replace(PLACE, settings_tables()) if PLACE in markdown else markdown


def settings_tables() -> str:
    """One heading and one Markdown table per section of the configuration."""
    parts = []
    for name, section in SECTIONS.items():
        parts += [f"## {name}", "", inspect.cleandoc(section.__doc__ or ""), ""]
        parts += ["| key | values | default | meaning |", "|---|---|---|---|"]
        parts += [" | ".join([f"| `{name}.{row[0]}`", *row[1:]]) + " |" for row in _settings(section)]
        parts.append("")
    return "\n".join(parts)


def _settings(section: type) -> Iterator[tuple[str, str, str, str]]:
    """Name, values, default and description of every setting, in the order of the source."""
    kinds = typing.get_type_hints(section, include_extras=True)
    descriptions = _descriptions(section)
    for field in dataclasses.fields(section):
        text = descriptions.get(field.name, "").replace("|", "\\|")
        yield field.name, _values(kinds[field.name]), _spelled(field.default), text


def _values(kind: Any) -> str:
    """The values of a type, in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        found = [bound for extra in arguments[1:] for bound in _bounds(extra)]
        return ", ".join([_values(arguments[0]), " and ".join(found)]) if found else _values(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_values(argument) for argument in arguments)
    if origin is tuple:
        return f"list of {_values(arguments[0])}"
    return NAMES.get(kind, getattr(kind, "__name__", str(kind)))


def _bounds(extra: Any) -> Iterator[str]:
    """The bounds that a constraint states, such as `Field(ge=1)`."""
    for part in (extra, *getattr(extra, "metadata", ())):
        for name, words in BOUNDS.items():
            bound = getattr(part, name, None)
            if bound is not None:
                yield f"{words} {bound:g}"


def _descriptions(section: type) -> dict[str, str]:
    """The docstring below every field of a class, by field."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for field, below in itertools.pairwise(body.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            found[field.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return found


def _spelled(default: Any) -> str:
    if default is None or default in ("", ()):
        return "none"
    if isinstance(default, tuple):
        return f"`{','.join(map(str, default))}`"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"
