"""Work that Ctrl-C and SIGTERM end in an orderly way: asked once to stop, and left alone when asked twice.

:func:`noted_signals` is for work in this thread, :func:`run_interruptibly` for work that other processes do.
"""

from __future__ import annotations

import _thread
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

_log = logging.getLogger(__name__)

# After a signal workers may be starting, or in the middle of a long step.
STOP_GRACE_S = 120.0
POLL_S = 0.2


class Interruption:
    """The first signal of a block.

    Attributes:
        number: SIGINT or SIGTERM; None: there was none.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self) -> bool:
        """Whether the work is asked to stop."""
        return self.number is not None


def end(number: int) -> NoReturn:
    """End the command as the signal would: KeyboardInterrupt, or SystemExit with 128 and its number."""
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


@contextmanager
def noted_signals() -> Iterator[Interruption]:
    """Inside the block the first Ctrl-C or SIGTERM is noted, and the second ends the work at once, as does STOP_GRACE_S after the first.

    A signal that is ignored, as below nohup, stays so. Outside the main thread, which alone receives signals, none is noted.
    """
    noted = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    asked, ended = threading.Event(), threading.Event()

    def on_signal(number: int, frame: Any) -> None:
        if noted.number is not None:
            end(number)
        noted.number = number
        asked.set()

    def watch() -> None:
        asked.wait()
        if noted.number is None:
            return
        announce_stop()
        if not ended.wait(STOP_GRACE_S):
            _thread.interrupt_main(signal.Signals(noted.number))

    before = _install(on_signal)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield noted
    finally:
        ended.set()
        asked.set()
        for number, handler in before.items():
            signal.signal(number, handler)


def announce_stop() -> None:
    _log.info("stopping as soon as a checkpoint is written; again to stop at once")


def _install(on_signal: Callable[[int, Any], None]) -> dict[int, Any]:
    """Handle SIGINT and SIGTERM where they are not ignored; returns the handlers before."""
    wanted = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    return {number: signal.signal(number, on_signal) for number in wanted}


def run_interruptibly(
    work: Callable[[], Any], stop: Callable[[], None], poll: Callable[[], None]
) -> tuple[BaseException | None, int | None]:
    """Run ``work`` in a thread; on the first Ctrl-C or SIGTERM call ``stop`` and wait, on the second, or after STOP_GRACE_S, do not wait.

    In a thread of its own Ray Train leaves the signals to us; in the main thread it would abort its workers on Ctrl-C. Outside the main
    thread, which alone receives signals, ``work`` simply runs.

    Args:
        poll: called every POLL_S while ``work`` runs.

    Returns: what it raised, and the signal.
    """
    if threading.current_thread() is not threading.main_thread():
        try:
            work()
        except Exception as error:
            return error, None
        return None, None
    raised: list[BaseException] = []
    ended = threading.Event()
    received: list[tuple[int, float]] = []

    def body() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)
        finally:
            ended.set()

    def on_signal(number: int, frame: Any) -> None:
        received.append((number, time.monotonic()))

    before = _install(on_signal)
    thread = threading.Thread(target=body, daemon=True)
    try:
        thread.start()
        stopping = False
        while not ended.wait(POLL_S):
            poll()
            if received and not stopping:
                stopping = True
                stop()
            if len(received) > 1 or (received and time.monotonic() - received[0][1] > STOP_GRACE_S):
                break
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return (raised[0] if raised else None), (received[0][0] if received else None)
