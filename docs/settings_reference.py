"""MkDocs hook: writes the tables of the configuration page from the settings and their descriptions."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from pipeline.config.sections import SECTIONS

PLACE = "<!-- SETTINGS -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs for every page; replaces PLACE."""
    return markdown.replace(PLACE, settings_tables()) if PLACE in markdown else markdown


def settings_tables() -> str:
    """One heading and one Markdown table per section of the configuration."""
    parts = []
    for name, section in SECTIONS.items():
        parts += [f"## {name}", "", inspect.cleandoc(section.__doc__ or ""), ""]
        parts += ["| key | type | default | meaning |", "|---|---|---|---|"]
        parts += [
            f"| `{name}.{key}` | {_cell(kind)} | {_cell(_spelled(default))} | {_cell(text)} |"
            for key, kind, default, text in _settings(section)
        ]
        parts.append("")
    return "\n".join(parts)


def _settings(section: type) -> Iterator[tuple[str, str, Any, str]]:
    """Name, type, default and description of every setting, in the order of the source."""
    kinds, descriptions = _from_source(section)
    fields = getattr(section, "model_fields", None)
    for key, kind in kinds.items():
        if fields is not None:
            field = fields[key]
            yield key, kind, field.get_default(call_default_factory=True), field.description or descriptions[key]
        else:
            field = next(f for f in dataclasses.fields(section) if f.name == key)
            yield key, kind, field.default, descriptions[key]


def _from_source(section: type) -> tuple[dict[str, str], dict[str, str]]:
    """The annotation and the docstring below every field of a class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(body, ast.ClassDef)
    kinds: dict[str, str] = {}
    descriptions: dict[str, str] = {}
    last = None
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            last = node.target.id
            kinds[last], descriptions[last] = ast.unparse(node.annotation), ""
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and last is not None:
            descriptions[last] = " ".join(str(node.value.value).split())
            last = None
        else:
            last = None
    kinds = {key: kind for key, kind in kinds.items() if not key.startswith("_") and "ClassVar" not in kind}
    return kinds, descriptions


def _spelled(default: Any) -> str:
    if default is None or default in ("", ()):
        return "none"
    if isinstance(default, tuple):
        return f"`{','.join(map(str, default))}`"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _cell(text: str) -> str:
    return text.replace("|", "or") if " | " in text else text.replace("|", "\\|")
