"""Progress lines: how a command prints what the modules log.

Modules log to ``logging.getLogger(__name__)``: progress at INFO, what the user should know at WARNING. Nothing is configured on import, so
a program that calls ``pipeline`` handles these loggers as any others. A command prints them as plain lines on stderr:

    with progress_printed():
        run(config)

A job inside a larger one (a training of a comparison) prints under a prefix or not at all, see :func:`prefixed` and :func:`silenced`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

LOGGERS = ("pipeline", "graphhash")
# Attribute of the record of a stage that was up to date; prefixed jobs leave these records out.
SKIPPED = {"stage_skipped": True}


@dataclass(frozen=True)
class _Scope:
    prefix: str = ""
    is_silent: bool = False


_NO_SCOPE = _Scope()
# Per thread and per asyncio task, so that jobs that run side by side do not prefix each other's lines.
_scope: ContextVar[_Scope] = ContextVar("progress_scope", default=_NO_SCOPE)


class ProgressHandler(logging.Handler):
    """Prints records as plain lines on the stderr of the moment, under the prefix of their job."""

    def emit(self, record: logging.LogRecord) -> None:
        scope = _scope.get()
        if scope.is_silent or (scope.prefix and getattr(record, "stage_skipped", False)):
            return
        prefix = f"{scope.prefix}: " if scope.prefix else ""
        # An error is not caught as in other handlers: a closed stderr ends the command as a closed stdout does.
        print(prefix + self.format(record), file=sys.stderr, flush=True)


@contextmanager
def progress_printed() -> Iterator[None]:
    """Print the records of our loggers, from INFO on, while the block lasts."""
    handler = ProgressHandler()
    with ExitStack() as stack:
        for logger in map(logging.getLogger, LOGGERS):
            stack.callback(_restore, logger, logger.level, logger.propagate)
            logger.setLevel(logging.INFO)
            # A handler that a library has given to the root logger would print every line again.
            logger.propagate = False
            logger.addHandler(handler)
            stack.callback(logger.removeHandler, handler)
        yield


def _restore(logger: logging.Logger, level: int, propagate: bool) -> None:
    logger.setLevel(level)
    logger.propagate = propagate


@contextmanager
def prefixed(prefix: str) -> Iterator[None]:
    """Print this thread's lines as ``prefix: line`` while the block lasts, without those of skipped stages."""
    token = _scope.set(_Scope(prefix=prefix))
    try:
        yield
    finally:
        _scope.reset(token)


@contextmanager
def silenced() -> Iterator[None]:
    """Print none of this thread's lines while the block lasts."""
    token = _scope.set(_Scope(is_silent=True))
    try:
        yield
    finally:
        _scope.reset(token)
