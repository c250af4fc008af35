"""Atomic writes: a reader sees the old file or folder, or the new one, never a part."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".partial"
REPLACED = ".replaced"
# Error numbers of a write that found no space.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


def write_json_atomic(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write indented JSON so that a reader sees the old file or the new one, never a part.

    Args:
        durable: wait until it is on the disk; without, a file of little worth costs no waiting, and may be empty after a power failure.

    Raises:
        ValueError: `value` holds NaN or an infinity, which JSON has no word for.
    """
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    write_bytes_atomic(path, text.encode(), durable=durable)


def write_text_atomic(path: Path, text: str) -> None:
    """Write UTF-8 text so that a reader sees the old file or the new one, never a part."""
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part.

    Args:
        durable: as of :func:`write_json_atomic`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A path to write a file to. The file replaces `target` at the end, and is removed if an error is raised."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def link_or_copy(source: str, target: str) -> None:
    """Make `target` a hard link to `source`, or a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def replace_folder(partial: Path, target: Path) -> None:
    """Put `partial` in the place of `target`. A folder cannot be replaced in one step: the old one is a backup meanwhile."""
    replaced = target.with_name(f".{target.name}{REPLACED}")
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    try:
        partial.rename(target)
    except BaseException:
        if replaced.exists():
            replaced.rename(target)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """An empty folder to fill. It replaces `target` at the end, and is removed if an error is raised."""
    partial = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}{PARTIAL}")
    partial.mkdir(parents=True)
    try:
        yield partial
        replace_folder(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
