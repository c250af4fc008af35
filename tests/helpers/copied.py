"""Processes that are copies of one that has imported PyTorch and the pipeline already, which a new interpreter takes seconds for."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any, TextIO

PRELOADED = ("pipeline.cli.main", "pipeline.retrieval.train", "tests.graphhash.nn.test_workers")


def copies() -> ForkServerContext:
    """The context of ``multiprocessing`` whose processes are copies."""
    context = get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


class Program:
    """A function in a process of its own, as if it were a program: with streams and an exit code."""

    def __init__(self, process: BaseProcess, stdin: TextIO, stdout: TextIO, stderr: TextIO) -> None:
        self._process = process
        self.stdin, self.stdout, self.stderr = stdin, stdout, stderr

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float) -> int:
        """The exit code; that of a process which a signal has killed is negative."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, "the program does not end"
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


@contextmanager
def program(function: Callable[..., Any], *arguments: Any) -> Iterator[Program]:
    """``function(*arguments)`` of a module, in a copy, which is killed at the end where it has not ended."""
    context = copies()
    # Of each pair, what reads comes first.
    stdin, stdout, stderr = (context.Pipe(duplex=False) for _ in range(3))
    theirs = [stdin[0], stdout[1], stderr[1]]
    process = context.Process(target=_run, args=(theirs, function, arguments))
    process.start()
    for end in theirs:
        end.close()
    with stdin[1], stdout[0], stderr[0], ExitStack() as opened:
        ours = (
            opened.enter_context(open(end.fileno(), mode, closefd=False))
            for end, mode in ((stdin[1], "w"), (stdout[0], "r"), (stderr[0], "r"))
        )
        try:
            yield Program(process, *ours)
        finally:
            process.kill()
            process.join()


def _run(ends: list[Any], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    for number, end in enumerate(ends):
        os.dup2(end.fileno(), number)
        end.close()
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    # A shell's background jobs, and what they start, ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    function(*arguments)
