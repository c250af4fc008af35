"""What commands and options have in common: examples in the help, groups of options, and options of lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class Epilog(click.Command):
    """A command whose examples keep their line breaks in `--help`."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.epilog:
            formatter.write("\nExamples:\n" + "".join(f"  {line}\n" for line in self.epilog.strip().splitlines()))


class Lists(Epilog):
    """A command whose list options take values separated by commas or spaces, and may be repeated."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        names = {name for option in self.params if isinstance(option.type, Values) for name in option.opts}
        joined: list[str] = []
        takes_more = False
        for arg in args:
            # An override has a `=`, and no value of a list does.
            if takes_more and not arg.startswith("-") and "=" not in arg:
                joined[-1] += f",{arg}" if joined[-1] not in names else ""
                if joined[-1] in names:
                    joined.append(arg)
                continue
            takes_more = arg.partition("=")[0] in names
            joined.append(arg)
        return super().parse_args(ctx, joined)


class Values(click.ParamType):
    """Values of one kind, separated by commas."""

    def __init__(self, kind: Callable[[str], Any], words: str) -> None:
        self.kind, self.name = kind, words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in value.split(",") if part.strip()]
        try:
            return tuple(self.kind(part) for part in parts)
        except ValueError:
            self.fail(f"{value!r} holds what is not {self.name}", param, ctx)


def group(*options: Callable[[F], F]) -> Callable[[F], F]:
    """A decorator that adds options to a command, in this order."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def list_option(name: str, kind: Callable[[str], Any], words: str, metavar: str, text: str) -> Callable[..., Any]:
    """An option whose values are of one kind, separated by commas, and which may be repeated."""
    return click.option(name, type=Values(kind, words), multiple=True, metavar=f"{metavar}[,{metavar}]...", help=text)
