"""One self-contained HTML page from a jinja2 template: number formats, embedded pictures, and autoescaping.

A task's template lies beside its `report.py` and extends `page.html.j2`, which lies here. Every value is escaped;
undefined names raise.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

MIB = 2**20


def render(template: Path, values: Mapping[str, Any]) -> str:
    """The page of a template file.

    Args:
        template: extends `page.html.j2`.
        values: the names that the template and `page.html.j2` use.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "count": lambda n: f"{n:,}",
        "fixed": fixed,
        "percent": percent,
        "size": size,
        "duration": duration,
        "data_uri": data_uri,
    }
    return environment.get_template(template.name).render(values)


def fixed(value: float | None, n_decimals: int = 4) -> str:
    """0.12345 -> "0.1235"; "-" for None."""
    return "-" if value is None else f"{value:,.{n_decimals}f}"


def percent(share: float) -> str:
    """0.25 -> "25.0 %"."""
    return f"{100 * share:.1f} %"


def size(n_bytes: int) -> str:
    """Bytes in KiB or MiB."""
    if n_bytes < MIB:
        return f"{n_bytes / 1024:,.0f} KiB"
    return f"{n_bytes / MIB:,.2f} MiB" if n_bytes < 100 * MIB else f"{n_bytes / MIB:,.0f} MiB"


def duration(seconds: float | None) -> str:
    """Seconds, or minutes from two minutes on; "-" for None."""
    if seconds is None:
        return "-"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def data_uri(png: Path) -> str:
    """A PNG file as the `src` of an image."""
    return f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}"
