"""The page at /docs: the OpenAPI description as plain HTML, which needs no script and nothing from elsewhere."""

from __future__ import annotations

import json
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; font-size: 1.15rem; }
code, pre { font-family: ui-monospace, monospace; font-size: .9rem; }
pre { padding: .8rem; overflow-x: auto; background: color-mix(in srgb, currentColor 8%, transparent); }
td, th { text-align: left; padding: .2rem 1rem .2rem 0; vertical-align: top; }
"""
_EXAMPLES = {
    "/v1/recommend": {"user_ids": [42, 43], "k": 5, "exclude": [[7], []]},
    "/v1/score": {"user_id": 42, "item_ids": [7, 8]},
}


def docs_page(openapi: dict[str, Any], examples: dict[str, Any] = _EXAMPLES) -> str:
    """HTML of an OpenAPI description, as FastAPI makes it."""
    parts = [
        _operation(path, method, operation, examples)
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    ]
    title = escape(openapi["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}: HTTP interface</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style><main><h1>{title}: HTTP interface</h1>'
        f'<p>{escape(openapi["info"].get("description", ""))} For programs: <a href="openapi.json">openapi.json</a>.</p>'
        f"{''.join(parts)}</main></html>"
    )


def _operation(path: str, method: str, operation: dict[str, Any], examples: dict[str, Any]) -> str:
    text = f"<h2><code>{method.upper()} {escape(path)}</code> {escape(operation.get('summary', ''))}</h2>"
    text += f"<p>{escape(operation.get('description', ''))}</p>"
    schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    if schema is not None:
        rows = "".join(
            _row(name, field, name in schema.get("required", ())) for name, field in schema["properties"].items()
        )
        text += f"<table><tr><th>Field<th>Needed<th>Meaning</tr>{rows}</table>"
        if path in examples:
            example = json.dumps(examples[path])
            command = f"curl -H 'Content-Type: application/json' -d '{example}' http://127.0.0.1:8000{path}"
            text += f"<pre>{escape(command)}</pre>"
    statuses = "".join(
        f"<tr><td><code>{escape(status)}</code><td>{escape(answer.get('description', ''))}</tr>"
        for status, answer in operation.get("responses", {}).items()
        if status != "422"  # FastAPI's own, which this app never gives.
    )
    return text + f"<table><tr><th>Status<th>Meaning</tr>{statuses}</table>"


def _row(name: str, field: dict[str, Any], needed: bool) -> str:
    default = "no" if field.get("default") is None else f"no: {field['default']}"
    return f"<tr><td><code>{escape(name)}</code><td>{'yes' if needed else escape(default)}<td>{escape(field.get('description', ''))}</tr>"
