"""Fingerprints of input files: their names and content, with hashes kept in the run folder so that large logs are read once.

A kept hash is used while path, size, modification time, inode and change time of the file are the same, and were older than the clock's
granularity when it was hashed: an edit of equal size in the same instant would be missed otherwise. `RUN/.hashes.json` belongs to one
machine and is not copied with a run folder at a URI.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

from pipeline.storage.atomic import file_sha256, write_json_atomic

FILE = ".hashes.json"
# File systems keep times in steps of up to two seconds.
GRANULARITY_NS = 2_000_000_000


class KnownHash(TypedDict):
    """The hash of a file, the state that it had then, and when it was hashed (ns since the epoch)."""

    state: list[int]
    hashed_ns: int
    sha256: str


# Runs of a comparison in one process read the same log.
_KNOWN: dict[str, KnownHash] = {}


class FileHashes:
    """Hashes of files by content, remembered in a run folder, which need not exist."""

    def __init__(self, run: Path) -> None:
        self._file = run / FILE
        self._known: dict[str, KnownHash] = {}
        self._changed = False
        with contextlib.suppress(OSError, ValueError, TypeError):
            self._known = dict(json.loads(self._file.read_text(encoding="utf-8")))

    def fingerprint(self, paths: Iterable[Path]) -> str:
        """Hex sha256 over names and content of files, independent of their order, folder and times."""
        entries = sorted((path.name, self.sha256(path)) for path in map(Path, paths))
        return hashlib.sha256(json.dumps(entries).encode()).hexdigest()

    def sha256(self, path: Path) -> str:
        """Hex sha256 of a file, from memory where that is safe."""
        name, state = str(path.absolute()), _state(path)
        for known in (self._known.get(name), _KNOWN.get(name)):
            if known is not None and _is_safe(known, state):
                self._remember(name, known)
                return known["sha256"]
        started = time.time_ns()
        digest = file_sha256(path)
        if _state(path) == state:
            self._remember(name, {"state": state, "hashed_ns": started, "sha256": digest})
        return digest

    def save(self) -> None:
        """Keep the hashes in the run folder, if there is one; a folder that cannot be written is no error here."""
        # A configuration without a run folder is planned too: its empty name is not the working directory.
        if self._changed and self._file != Path(FILE) and self._file.parent.is_dir():
            with contextlib.suppress(OSError):
                write_json_atomic(self._file, self._known)
            self._changed = False

    def _remember(self, name: str, known: KnownHash) -> None:
        self._changed |= self._known.get(name) != known
        self._known[name] = _KNOWN[name] = known


def _state(path: Path) -> list[int]:
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns]


def _is_safe(known: KnownHash, state: list[int]) -> bool:
    try:
        _, modified, _, changed = state
        return known["state"] == state and max(modified, changed) + GRANULARITY_NS < known["hashed_ns"]
    except (KeyError, TypeError):
        return False
