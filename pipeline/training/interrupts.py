"""Work that Ctrl-C and SIGTERM end in an orderly way: asked once to stop, and left alone when asked twice."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

# After a signal workers may be starting, or in the middle of a long step.
STOP_GRACE_S = 120.0
POLL_S = 0.2


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

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
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
