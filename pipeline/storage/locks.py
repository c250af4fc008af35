"""Locks between processes: an exclusive `flock` on a file or a folder, and who holds it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict


class Holder(TypedDict):
    """The process that holds a lock: where it runs, since when (ISO 8601), and its command line."""

    pid: int
    host: str
    command: str
    started: str


class LockedError(Exception):
    """Another process holds the lock; the message names it."""


class NoLocksError(OSError):
    """The file system has no locks."""


@dataclass(frozen=True)
class FileLock:
    """A lock that is held."""

    descriptor: int

    def sign(self) -> None:
        """Write into the locked file who holds it, for the error of whoever finds it locked."""
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, json.dumps(this_process()).encode(), 0)


@contextlib.contextmanager
def file_lock(path: Path, *, wait: bool = False) -> Iterator[FileLock]:
    """Hold the lock on a file, which is made where missing, or on a folder, which has to exist.

    The file stays: to remove it would let a third process lock a new file of the same name. The lock ends with the process.

    Args:
        wait: wait until no other process holds it.

    Raises:
        LockedError: another process holds it.
        NoLocksError: the file system has no locks.
        OSError: the file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise LockedError(_holder_in(descriptor)) from None
            raise NoLocksError(error.errno, error.strerror, str(path)) from error
        yield FileLock(descriptor)
    finally:
        os.close(descriptor)


def this_process() -> Holder:
    """This process as the holder of a lock."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": shlex.join(sys.argv),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def describe_holder(holder: Any) -> str:
    """Who holds a lock, for an error; `holder` is what another process wrote."""
    try:
        return f"process {holder['pid']} on {holder['host']} since {holder['started']} ({holder['command']})"
    except (KeyError, TypeError):
        return "another process"


def _holder_in(descriptor: int) -> str:
    try:
        return describe_holder(json.loads(os.pread(descriptor, 65536, 0)))
    except (OSError, ValueError):
        return "another process"
