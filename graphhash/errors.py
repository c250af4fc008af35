"""Errors that speak to the user, and what their messages are made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraphHashError(Exception):
    """An error whose message is one line for the user: place, value, remedy.

    It is always made from exactly one string, so that it survives pickling between processes.
    """


class ArgumentError(GraphHashError, ValueError):
    """An argument of the wrong type or shape, out of range, or in contradiction with another one."""


class DataError(GraphHashError, ValueError):
    """Bad input data, or a damaged file."""


def did_you_mean(word: str, choices: Iterable[str], *, cutoff: float = 0.6) -> str:
    """``"did you mean 'x'? "`` for the choice closest to ``word``, or an empty string where none is close.

    Args:
        cutoff: least similarity of a choice, from 0 (anything) to 1 (the word itself).
    """
    close = difflib.get_close_matches(word, list(choices), 1, cutoff)
    return f"did you mean {close[0]!r}? " if close else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters; the name of its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
