"""What MLflow could not be told yet, on disk: a file per entry, delivered later in the order in which they were made.

    RUN/.mlflow/<store>/entries/<ns>-<host>-<pid>-<n>.json   {"run": run id, "kind": ..., "content": {...}}
    RUN/.mlflow/<store>/refused/                             entries that the store refused, each with its "reason"
    RUN/.mlflow/<store>/open/<run id>                        runs that were opened here and have not been ended
    RUN/.mlflow/<store>/ids.json                             {provisional run id: the id that the store gave it}

Any number of processes may write at once, as every entry is a file of its own, put in place whole. One delivers at a time.
A run that is opened while the store is away has a provisional id, ``later-...``, until it is delivered.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.storage.atomic import write_json_atomic

FOLDER = ".mlflow"
PROVISIONAL = "later-"
_numbers = itertools.count()


@dataclass(frozen=True)
class Outbox:
    """The entries below one folder, which is made when there is something to keep."""

    folder: Path

    def put(self, run: str, kind: str, content: dict[str, Any]) -> None:
        """Keep an entry until it is delivered.

        Args:
            run: id of the run, which may be provisional.  kind, content: what `deliver` is to be called with; JSON values.
        """
        name = f"{time.time_ns():020d}-{socket.gethostname()}-{os.getpid()}-{next(_numbers):06d}.json"
        write_json_atomic(self.folder / "entries" / name, {"run": run, "kind": kind, "content": content})

    def __bool__(self) -> bool:
        """Whether there is anything to deliver, or to end."""
        return bool(self._entries()) or bool(self.open_runs())

    def __len__(self) -> int:
        return len(self._entries())

    def deliver(
        self, send: Callable[[str, str, dict[str, Any]], str | None], is_away: Callable[[Exception], bool]
    ) -> int:
        """Send every entry, oldest first, and take it away when it has arrived.

        Args:
            send: takes run id, kind and content; returns the id of a run that it opened, else None.
            is_away: whether an error of `send` means that the store cannot be reached. Any other error is a refusal: the entry
                goes to `refused/`, with the reason, and the next one is sent.

        Returns: the number of entries that arrived. 0 while another process delivers.

        Raises: the error of `send` for which `is_away` holds; this entry and all later ones are kept.
        """
        n_sent = 0
        with self._alone() as alone:
            for path in self._entries() if alone else ():
                try:
                    entry = json.loads(path.read_text(encoding="utf-8"))
                    given = send(self.real_id(entry["run"]), entry["kind"], entry["content"])
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    self._refuse(path, f"no entry: {error}")
                except FileNotFoundError as error:
                    # An artifact that has been made anew or removed since.
                    self._refuse(path, str(error))
                except Exception as error:
                    if is_away(error):
                        raise
                    self._refuse(path, str(error))
                else:
                    if given is not None:
                        write_json_atomic(self.folder / "ids.json", self._ids() | {entry["run"]: given})
                    path.unlink(missing_ok=True)
                    n_sent += 1
        return n_sent

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

    def _entries(self) -> list[Path]:
        return sorted((self.folder / "entries").glob("[0-9]*.json"))

    def _ids(self) -> dict[str, str]:
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.folder / "ids.json").read_text(encoding="utf-8"))
        return {}

    def _refuse(self, path: Path, reason: str) -> None:
        (self.folder / "refused").mkdir(exist_ok=True)
        with contextlib.suppress(OSError, ValueError):
            write_json_atomic(
                self.folder / "refused" / path.name, json.loads(path.read_text()) | {"reason": reason[:1000]}
            )
            path.unlink(missing_ok=True)
            return
        with contextlib.suppress(OSError):
            path.rename(self.folder / "refused" / path.name)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[bool]:
        """Hold the right to deliver; False if another process has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
            else:
                yield True
        finally:
            os.close(lock)


def provisional_id() -> str:
    """An id for a run that the store does not know yet."""
    return PROVISIONAL + uuid.uuid4().hex
