"""A queue on disk of what MLflow could not be sent yet: one file per entry, delivered later in the order of their numbers.

    RUN/.mlflow/<store>/entries/<number>-<host>-<pid>.json   {"run": run id, "kind": ..., "content": {...}}
    RUN/.mlflow/<store>/refused/                             entries that the store refused, each with its "reason"
    RUN/.mlflow/<store>/open/<run id>                        runs that were opened here and have not been ended
    RUN/.mlflow/<store>/ids.json                             {provisional run id: the id that the store gave it}

A new entry has a number above those of all entries that are queued, so each follows everything that was put before it, whatever the
clock says: its run's earlier entries, and the opening of its parent. (Earlier versions numbered entries by their time in nanoseconds;
theirs come first, and new ones count on from them.)

Any number of processes may write at once, as every entry is a file of its own, put in place whole. One delivers at a time.
A run that is opened while the store is unreachable has a provisional id, ``later-...``, until it is delivered.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.storage.atomic import write_json_atomic
from pipeline.storage.locks import LockedError, NoLocksError, file_lock

FOLDER = ".mlflow"
PROVISIONAL = "later-"
# The number of the last entry of this process, by folder: on a network file system a listing may lag behind.
_last_numbers: dict[Path, int] = {}
_numbering = threading.Lock()


@dataclass(frozen=True)
class Outbox:
    """The entries below one folder, which is made when there is something to keep."""

    folder: Path

    def put(self, run: str, kind: str, content: dict[str, Any]) -> None:
        """Keep an entry until it is delivered.

        Args:
            run: id of the run, which may be provisional.
            kind, content: what `deliver` calls `send` with; JSON values.
        """
        with _numbering:
            # Refused entries as well: none of them may be overwritten.
            numbers = [_number(path) for path in [*self._entries(), *(self.folder / "refused").glob("[0-9]*.json")]]
            number = max([*numbers, _last_numbers.get(self.folder, -1)]) + 1
            name = f"{number:020d}-{socket.gethostname()}-{os.getpid()}.json"
            write_json_atomic(self.folder / "entries" / name, {"run": run, "kind": kind, "content": content})
            _last_numbers[self.folder] = number

    def __bool__(self) -> bool:
        """Whether there is anything to deliver, or to end."""
        return bool(self._entries()) or bool(self.open_runs())

    def __len__(self) -> int:
        return len(self._entries())

    def deliver(
        self, send: Callable[[str, str, dict[str, Any]], str | None], is_unreachable: Callable[[Exception], bool]
    ) -> int:
        """Send every entry, in the order of their numbers, and remove it when it has arrived.

        Args:
            send: takes run id, kind and content; returns the id of a run that it opened, else None.
            is_unreachable: whether an error of `send` means that the store cannot be reached. Any other error is a refusal: the entry
                goes to `refused/`, with the reason, and the next one is sent.

        Returns: the number of entries that arrived. 0 while another process delivers.

        Raises: the error of `send` for which `is_unreachable` holds; this entry and all later ones are kept.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(file_lock(self.folder / "lock"))
            except (LockedError, NoLocksError):
                return 0
            return sum(self._deliver_one(path, send, is_unreachable) for path in self._entries())

    def real_id(self, run: str) -> str:
        """The store's id of a run; the provisional one while it has none."""
        return self._ids().get(run, run) if run.startswith(PROVISIONAL) else run

    def opened(self, run: str) -> None:
        """Note that a run is open."""
        (self.folder / "open").mkdir(parents=True, exist_ok=True)
        (self.folder / "open" / run).touch()

    def ended(self, run: str) -> None:
        """Note that a run has been ended, or that its end is an entry."""
        (self.folder / "open" / run).unlink(missing_ok=True)

    def open_runs(self) -> list[str]:
        """Runs that were opened and not ended. Under the run folder's lock their processes are dead."""
        with contextlib.suppress(OSError):
            return sorted(path.name for path in (self.folder / "open").iterdir())
        return []

    def _deliver_one(
        self,
        path: Path,
        send: Callable[[str, str, dict[str, Any]], str | None],
        is_unreachable: Callable[[Exception], bool],
    ) -> bool:
        """Send an entry and remove it, or set it aside where it is refused; whether it arrived."""
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            opened_id = send(self.real_id(entry["run"]), entry["kind"], entry["content"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            self._refuse(path, f"not an entry: {error}")
            return False
        except Exception as error:
            # A missing file is an artifact that has been made anew or removed since.
            if is_unreachable(error) and not isinstance(error, FileNotFoundError):
                raise
            self._refuse(path, str(error))
            return False
        if opened_id is not None:
            write_json_atomic(self.folder / "ids.json", self._ids() | {entry["run"]: opened_id})
        path.unlink(missing_ok=True)
        return True

    def _entries(self) -> list[Path]:
        return sorted((self.folder / "entries").glob("[0-9]*.json"), key=lambda path: (_number(path), path.name))

    def _ids(self) -> dict[str, str]:
        with contextlib.suppress(OSError, ValueError):
            ids: dict[str, str] = json.loads((self.folder / "ids.json").read_text(encoding="utf-8"))
            return ids
        return {}

    def _refuse(self, path: Path, reason: str) -> None:
        refused = self.folder / "refused" / path.name
        refused.parent.mkdir(exist_ok=True)
        with contextlib.suppress(OSError, ValueError):
            write_json_atomic(refused, json.loads(path.read_text(encoding="utf-8")) | {"reason": reason[:1000]})
            path.unlink(missing_ok=True)
            return
        with contextlib.suppress(OSError):
            path.rename(refused)


def provisional_id() -> str:
    """An id for a run that the store does not know yet."""
    return PROVISIONAL + uuid.uuid4().hex


def _number(entry: Path) -> int:
    digits = entry.name.partition("-")[0]
    return int(digits) if digits.isdigit() else -1
