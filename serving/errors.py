"""The errors of serving. Each message is one line: what is wrong, where, and the remedy."""

from __future__ import annotations


class ServingError(Exception):
    """An error whose message is one line for the user."""


class InputError(ServingError, ValueError):
    """An option, or a raw value of a request, that is of the wrong type or out of range."""


class BundleError(ServingError, RuntimeError):
    """A bundle that cannot be used, or cannot be written."""


class BundleLoadError(BundleError):
    """A bundle that could not be read or loaded now, though nothing is known to be wrong with it: a later attempt may succeed."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters; the name of its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
