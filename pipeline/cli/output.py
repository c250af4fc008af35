"""What commands print and write: tables, figures by name, and the file of `--json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, TextIO

import click

# The file of `--json` that stands for standard output.
STDOUT = "-"
_META = "pipeline.cli.output.stdout"


def json_option(written: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The option ``--json FILE``, for :func:`write_json`. With ``-`` standard output holds JSON alone: what the command prints otherwise
    goes to standard error.

    Args:
        written: what stands in the file, for the help.
    """

    def of_json_alone(context: click.Context, _option: click.Parameter, file: str | None) -> str | None:
        if file == STDOUT:
            context.meta[_META] = sys.stdout
            context.with_resource(redirect_stdout(sys.stderr))
        return file

    text = f"Write {written} to FILE as JSON; - for standard output, with all else on standard error."
    return click.option("--json", "json_file", metavar="FILE", callback=of_json_alone, help=text)


def write_json(file: str | None, value: Any) -> None:
    """Write the file of ``--json``, if there is one."""
    if file == STDOUT:
        stdout: TextIO = click.get_current_context().meta[_META]
        print(json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False), file=stdout, flush=True)
    elif file is not None:
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
        text = f"{value:.6g}" if isinstance(value, float) else "-" if value is None else text
        print(f"{indent}{key.ljust(width)}  {text}")
