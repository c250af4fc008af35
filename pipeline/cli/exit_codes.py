"""How a command ends: exceptions and signals become an exit code and one line on stderr.

0 done, 1 the data, a file or a service is at fault, 2 the command line or the configuration is, 130 interrupted, 141 the reader of the
output is gone, 143 terminated. GRAPHHASH_DEBUG=1 shows the traceback instead of the line.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import click

from pipeline.errors import ConfigError
from pipeline.extras import remedy

INTERRUPTED, TERMINATED, BROKEN_PIPE = 130, 143, 141
# Until a signal whose exception was lost is sent again.
AGAIN_SECONDS = 0.1


@contextmanager
def exit_codes() -> Iterator[None]:
    """Exit with the code that belongs to the exception that leaves the block; without one, go on.

    Raises:
        SystemExit: with the code; the reason is on stderr.
        Exception: one that is a defect of ours, or any one with GRAPHHASH_DEBUG=1: its traceback is wanted.
    """
    with _noted_signals() as received:
        try:
            yield
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(2)
        except (click.ClickException, ConfigError) as error:
            _fail(error.format_message() if isinstance(error, click.ClickException) else str(error), 2)
        except (click.Abort, KeyboardInterrupt):
            _interrupted()
        except SystemExit as error:
            # Ray turns Ctrl-C into SystemExit(1). Without a Ctrl-C it is the exit code of the command itself.
            if error.code == 1 and signal.SIGINT in received:
                _interrupted()
            raise
        except BrokenPipeError:
            # The reader of our output is gone (`| head`): nothing is wrong, and nothing can be said.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(BROKEN_PIPE)
        except Exception as error:
            # Ray hands on a task's error as a subclass whose text is the remote traceback; `cause` is the error itself.
            cause = getattr(error, "cause", None)
            cause = cause if isinstance(cause, Exception) else error
            missing = remedy(cause) if isinstance(cause, ModuleNotFoundError) else None
            if os.environ.get("GRAPHHASH_DEBUG") == "1" or (missing is None and not _is_expected(cause)):
                raise
            _fail(missing or str(cause), 1)


@contextmanager
def _noted_signals() -> Iterator[set[int]]:
    """Note which of SIGINT and SIGTERM arrive during the block. SIGINT acts as before, SIGTERM unwinds the stack like Ctrl-C.

    Does nothing outside the main thread, whose owner decides about signals.
    """
    received: set[int] = set()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    of_ignored = sys.unraisablehook

    def again() -> None:
        if sys.unraisablehook is not of_ignored:
            os.kill(os.getpid(), max(received))

    def on_ignored(ignored: sys.UnraisableHookArgs) -> None:
        """An exception does not leave a callback of C, such as the one that numba's compiler calls: send the signal again, later."""
        if received and isinstance(ignored.exc_value, (SystemExit, KeyboardInterrupt)):
            threading.Timer(AGAIN_SECONDS, again).start()
        else:
            of_ignored(ignored)

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.add(number)
        handler = before[signal.SIGINT]
        if callable(handler):
            handler(number, frame)

    def terminate(number: int, _frame: FrameType | None) -> None:
        received.add(number)
        raise SystemExit(TERMINATED)

    if callable(before[signal.SIGINT]):  # Not where Ctrl-C is ignored, as below nohup.
        signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, terminate)
    sys.unraisablehook = on_ignored
    try:
        yield received
    finally:
        sys.unraisablehook = of_ignored
        for number, handler in before.items():
            if handler is not None:  # None: set by a program in C, which Python cannot put back.
                signal.signal(number, handler)


def _interrupted() -> NoReturn:
    _fail("interrupted; finished stages are kept, and the same command goes on from them", INTERRUPTED)


def _fail(message: str, code: int) -> NoReturn:
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()] or ["no reason given"]
    print("graphhash: error: " + " ".join(lines), file=sys.stderr)
    sys.exit(code)


def _is_expected(error: Exception) -> bool:
    """Whether an error speaks to the user: one of ours, or the operating system's. Any other one is a defect of ours."""
    from graphhash.errors import GraphHashError
    from serving.errors import ServingError

    return isinstance(error, (GraphHashError, ServingError, OSError))
