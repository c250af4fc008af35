"""The error for input data that cannot be used."""

from __future__ import annotations


class DataError(ValueError):
    """Bad input data or a damaged file. The message is one line: place, value, remedy.

    It is always made from exactly one string, so that it survives pickling between Ray workers.
    """
