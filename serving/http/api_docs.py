"""The page at /docs: the OpenAPI description as plain HTML, which needs no script and nothing from elsewhere."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import urlencode

_STYLE = """
:root { color-scheme: light dark; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word; }
h2 { margin-top: 2.5rem; font-size: 1.15rem; overflow-wrap: anywhere; }
code, pre { font-family: ui-monospace, monospace; font-size: .9rem; }
pre { padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; background: color-mix(in srgb, currentColor 8%, transparent); }
td, th { text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top; overflow-wrap: anywhere; }
th, td:first-child { overflow-wrap: normal; }
@media (max-width: 34rem) { td, th { padding-right: .4rem; font-size: .875rem; } }
"""
HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def docs_page(openapi: Mapping[str, Any], examples: Mapping[tuple[str, str], Any], server: str, *, token: bool) -> str:
    """HTML of an OpenAPI description, as FastAPI makes it.

    Args:
        examples: (method, path) -> an example's body; of GET, its parameters.
        server: where requests go, such as "http://127.0.0.1:8000".
        token: whether requests need one; the commands then read it from the variable TOKEN.
    """
    parts = [
        _operation(path, method, operation, _command(method, path, examples, server, token=token))
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    ]
    title = escape(openapi["info"]["title"])
    note = "<p>Set the variable <code>TOKEN</code> before you run the commands.</p>" if token else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}: HTTP interface</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{_STYLE}</style><main><h1>{title}: HTTP interface</h1>"
        f'<p>{escape(openapi["info"].get("description", ""))} For programs: <a href="openapi.json">openapi.json</a>.</p>'
        f"{note}{''.join(parts)}</main></html>"
    )


def _command(method: str, path: str, examples: Mapping[tuple[str, str], Any], server: str, *, token: bool) -> str:
    """A line for a shell that sends the example; empty where there is none."""
    example = examples.get((method, path))
    if example is None:
        return ""
    words = ["curl"]
    if token:
        words.append('-H "Authorization: Bearer $TOKEN"')
    if method == "post":
        words += [
            "-H 'Content-Type: application/json' -d",
            shlex.quote(json.dumps(example)),
            shlex.quote(server + path),
        ]
    else:
        words.append(shlex.quote(f"{server}{path}?{urlencode(example)}"))
    return " ".join(words)


def _operation(path: str, method: str, operation: Mapping[str, Any], command: str) -> str:
    text = f"<h2><code>{method.upper()} {escape(path)}</code> {escape(operation.get('summary', ''))}</h2>"
    text += f"<p>{escape(operation.get('description', ''))}</p>"
    body = operation.get("requestBody", {})
    schema = body.get("content", {}).get("application/json", {}).get("schema")
    if schema is not None:
        fields = [
            (name, name in schema.get("required", ()), field, field.get("description", ""))
            for name, field in schema["properties"].items()
        ]
        text += _table(fields) + f"<p>{escape(body.get('description', ''))}</p>"
    elif operation.get("parameters"):
        text += _table(
            [
                (
                    parameter["name"],
                    parameter.get("required", False),
                    parameter["schema"],
                    parameter.get("description", ""),
                )
                for parameter in operation["parameters"]
            ]
        )
    if command:
        text += f"<pre>{escape(command)}</pre>"
    statuses = "".join(
        f"<tr><td><code>{escape(status)}</code><td>{escape(answer.get('description', ''))}</tr>"
        for status, answer in operation.get("responses", {}).items()
    )
    return text + f"<table><tr><th>Status<th>Meaning</tr>{statuses}</table>"


def _table(fields: Sequence[tuple[str, bool, Mapping[str, Any], str]]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code><td>{escape(_type(schema))}<td>{'yes' if needed else _default(schema)}"
        f"<td>{escape(text)}</tr>"
        for name, needed, schema, text in fields
    )
    return f"<table><tr><th>Field<th>Type<th>Needed<th>Meaning</tr>{rows}</table>"


def _default(schema: Mapping[str, Any]) -> str:
    return "no" if schema.get("default") is None else f"no: {escape(str(schema['default']))}"


def _type(schema: Mapping[str, Any]) -> str:
    """A schema in a few words, with its bounds."""
    if "anyOf" in schema:
        return " or ".join(_type(part) for part in schema["anyOf"] if part.get("type") != "null")
    kind = schema.get("type", "any")
    if kind == "array":
        most = f"at most {schema['maxItems']} of " if "maxItems" in schema else ""
        return f"array of {most}{_type(schema.get('items', {}))}"
    name = schema.get("format") or (" or ".join(kind) if isinstance(kind, list) else kind)
    if "format" not in schema and ("minimum" in schema or "maximum" in schema):
        name += f" from {schema.get('minimum', '')}" + (f" to {schema['maximum']}" if "maximum" in schema else "")
    return name
