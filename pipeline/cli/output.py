"""What commands print and write: tables, figures by name, and the file of `--json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_json(file: str | None, value: Any) -> None:
    """Write the file of ``--json``, if there is one."""
    if file is not None:
        from pipeline.storage.atomic import write_json_atomic

        write_json_atomic(Path(file), value)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns padded to their widest text, the first aligned left, the others right."""
    lines = (header, *rows)
    first, *others = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        texts = (text.rjust(width) for text, width in zip(line[1:], others, strict=True))
        print("  ".join((line[0].ljust(first), *texts)).rstrip())


def print_pairs(values: Mapping[str, Any], indent: str = "") -> None:
    """A dict as `name  value` lines, nested ones indented."""
    width = max((len(key) for key, value in values.items() if not isinstance(value, dict)), default=0)
    for key, value in values.items():
        if isinstance(value, dict):
            print(f"{indent}{key}")
            print_pairs(value, indent + "  ")
            continue
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        text = f"{value:.6g}" if isinstance(value, float) else text
        print(f"{indent}{key.ljust(width)}  {text}")
