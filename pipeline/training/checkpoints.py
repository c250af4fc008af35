"""Checkpoints of a training on disk, from which it resumes after a crash or Ctrl-C.

    FOLDER/epoch-000120-step-00000000/state.pt        the state of pipeline.training.loop (torch.save, read with weights_only)
    FOLDER/epoch-000120-step-00000000/manifest.json   {"version": 1, "key": ..., "epoch": ..., "step": ..., "bytes": ..., "sha256": ...}

A checkpoint holds the last weights and the best ones. It is written into a hidden folder, flushed, and renamed, so that it is there whole
or not at all; the two newest are kept. A checkpoint whose file is truncated or has another checksum is refused, and the one before it is
taken. The key identifies the settings and data that a checkpoint belongs to; checkpoints of another key are ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from pipeline.storage.atomic import PARTIAL

VERSION = 1
KEPT = 2
STATE = "state.pt"
MANIFEST = "manifest.json"
# A file of this name makes the training write a checkpoint and stop.
STOP_FILE = "stop"


@dataclass(frozen=True)
class CheckpointManager:
    """The checkpoints in one folder.

    Args:
        folder: made when there is something to write.
        key: of the training.
        facts: JSON values to keep beside every checkpoint.
    """

    folder: Path
    key: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stop_file(self) -> Path:
        return self.folder / STOP_FILE

    def save(self, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint, and remove all but the two newest.

        Raises:
            OSError: it cannot be written; the earlier ones are kept.
        """
        import torch

        target = self.folder / f"epoch-{state['epoch']:06d}-step-{state['step']:08d}"
        partial = self.folder / f".{target.name}{PARTIAL}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            with open(partial / STATE, "wb") as file:
                hashed = _Hashed(file)
                try:
                    torch.save(dict(state), cast("IO[bytes]", hashed))
                except Exception as error:
                    # torch wraps what a file of ours raises.
                    raise hashed.error or error from error
                file.flush()
                os.fsync(file.fileno())
            manifest = {"version": VERSION, "key": self.key, "epoch": state["epoch"], "step": state["step"],
                        "bytes": hashed.n_bytes, "sha256": hashed.sha256.hexdigest(), **self.facts}  # fmt: skip
            with open(partial / MANIFEST, "w", encoding="utf-8") as file:
                file.write(json.dumps(manifest, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        # Half-written ones are of a process that was killed.
        for old in [*self._folders()[KEPT:], *self.folder.glob(f".*{PARTIAL}")]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def newest(self, warn: Callable[[str], None] = lambda line: None) -> str | None:
        """The name of the newest checkpoint that is whole; None: there is none.

        Args:
            warn: called with a line for every checkpoint that is refused, and why.
        """
        for name, _ in self._whole(warn):
            return name
        return None

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of the newest checkpoint that is whole."""
        for _, manifest in self._whole(lambda line: None):
            return manifest
        return None

    def load(self, name: str) -> dict[str, Any]:
        """The state in the checkpoint of this name, on the CPU."""
        import torch

        return torch.load(self.folder / name / STATE, weights_only=True, map_location="cpu")

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _folders(self) -> list[Path]:
        """Newest first."""
        return sorted(self.folder.glob("epoch-*"), reverse=True)

    def _whole(self, warn: Callable[[str], None]) -> Iterator[tuple[str, dict[str, Any]]]:
        for folder in self._folders():
            try:
                manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
                if manifest["key"] != self.key or manifest["version"] != VERSION:
                    continue
                file = folder / STATE
                if (n_bytes := file.stat().st_size) != manifest["bytes"]:
                    raise ValueError(f"{STATE} has {n_bytes:,} bytes of {manifest['bytes']:,}")
                with open(file, "rb") as opened:
                    digest = hashlib.file_digest(opened, "sha256").hexdigest()
                if digest != manifest["sha256"]:
                    raise ValueError(
                        f"the checksum of {STATE} is {digest[:12]}..., it was {manifest['sha256'][:12]}..."
                    )
            except (OSError, ValueError, KeyError, TypeError) as error:
                warn(f"{folder}: this checkpoint is damaged and not used ({error}); the one before it is tried")
                continue
            yield folder.name, manifest


class _Hashed:
    """A file that is written and hashed in one pass, and remembers why it could not be written."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.sha256, self.n_bytes = hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        n = memoryview(data).nbytes
        self.sha256.update(data)
        self.n_bytes += n
        return n

    def flush(self) -> None:
        self._file.flush()
