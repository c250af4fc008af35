"""A run folder at a URI: worked on in a folder of this machine, or one that all machines share, and kept alike there.

    with run_folder(config) as folder: ...     # locked here and there, fetched; every stage is sent when it is done

Files of a stage go first and its record last, and the record knows every file's hash, so what was sent half is not taken for whole by the
next command.

The place is held by an object, ``.lock.json``, with the holder's name, that is written anew every minute; one that has not been for
five, by the clock of the storage, belongs to a process that died. Object stores have no locks: two commands that start in the same
second can both see the place free, and each looks again before it goes on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphhash.errors import first_line
from pipeline.errors import RunFolderError
from pipeline.runs.folder import RunFolder
from pipeline.storage.atomic import PARTIAL
from pipeline.storage.locks import describe_holder, this_process
from pipeline.storage.uris import (
    N_COPIES,
    download,
    is_uri,
    open_uri,
    readable,
    state_here,
    state_there,
    upload,
    work_folder,
)
from pipeline.tracking.outbox import FOLDER as MLFLOW

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

    from pipeline.config.run_config import RunConfig

_log = logging.getLogger(__name__)

LOCK = ".lock.json"
SYNCED = ".synced.json"
LOCK_BEAT_S, LOCK_DEAD_S = 60.0, 300.0
# Two that saw the place free write their lock within this time, or one of them is told.
LOCK_SETTLE_S = 1.0


@contextlib.contextmanager
def run_folder(config: RunConfig) -> Iterator[RunFolder]:
    """The run folder of a configuration, locked; one at a URI is fetched first, and sent after every stage and at the end.

    Raises:
        RunFolderError: another process holds it, or it cannot be written.
        DataError: what is at the URI cannot be read.
    """
    if config.run.remote is None:
        with RunFolder(config.run.out) as folder:
            yield folder
        return
    mirror = Mirror(config.run.remote, Path(config.run.out))

    def on_stage() -> None:
        try:
            mirror.send()
        except RunFolderError as error:
            # A network that fails for a moment ends no training: the end of the command tries again, and fails if it must.
            _log.warning("%s", error)

    with RunFolder(config.run.out, on_stage=on_stage) as folder, mirror.held():
        yield folder


@contextlib.contextmanager
def held_folder(run: str) -> Iterator[Path]:
    """The folder of a run that exists, a path as it is; one at a URI is held, fetched, and sent at the end. Not locked here."""
    if not is_uri(run):
        yield Path(run)
        return
    mirror = Mirror(run, work_folder(run))
    with mirror.held():
        yield mirror.folder


class Mirror:
    """A run folder at a URI, and the folder where it is worked on.

    Args:
        uri: of the run folder.
        folder: where it is worked on.
        opened: filesystem and path, where they are known.
    """

    def __init__(
        self,
        uri: str,
        folder: Path,
        *,
        opened: tuple[FileSystem, str] | None = None,
    ) -> None:
        self.uri, self.folder = uri, folder
        self._filesystem, self._path = opened or open_uri(uri)
        # Name -> [size and time there, size and time here], of files that are alike.
        self._synced: dict[str, list[int]] = {}
        self._token = uuid.uuid4().hex
        self._lost_to: dict[str, Any] | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the place, fetch what is there, and send what is left at the end, whatever the end was.

        Raises:
            RunFolderError: another process holds the place, or it cannot be written.
            DataError: it cannot be read.
        """
        self._take()
        stop = threading.Event()
        beat = threading.Thread(target=self._beat, args=(stop,), daemon=True)
        beat.start()
        try:
            self.fetch()
            try:
                yield
            except BaseException as error:
                try:
                    self.send()
                except Exception as second:
                    error.add_note(f"{self.uri}: not all was sent; it is kept in {self.folder}: {second}")
                raise
            self.send()
        finally:
            stop.set()
            beat.join()
            with contextlib.suppress(OSError):
                holder, _ = self._read_lock()
                if holder is not None and holder.get("token") == self._token:
                    self._filesystem.delete_file(f"{self._path}/{LOCK}")

    def fetch_file(self, name: str) -> None:
        """Bring one file from there, if there is one."""
        from pyarrow.fs import FileType

        with readable(self.uri):
            info = self._filesystem.get_file_info(f"{self._path}/{name}")
            if info.type == FileType.File:
                download(self._filesystem, [(info, self.folder / name)])

    def fetch(self) -> None:
        """Bring the folder here up to date with what is there. What was made here and has not been sent stays, unless it changed there."""
        from pyarrow.fs import FileType

        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError, ValueError):
            self._synced = json.loads((self.folder / SYNCED).read_text(encoding="utf-8"))
        with readable(self.uri):
            there = {name: info for name, info in self._there().items() if info.type == FileType.File}
            wanted = []
            for name, info in there.items():
                known = self._synced.get(name)
                if known is None or known[:2] != state_there(info) or not (self.folder / name).exists():
                    wanted.append((info, self.folder / name))
            download(self._filesystem, wanted)
        for name in self._synced.keys() - there.keys():
            (self.folder / name).unlink(missing_ok=True)
        fetched = {str(path.relative_to(self.folder)): info for info, path in wanted}
        self._synced = {name: known for name, known in self._synced.items() if name in there and name not in fetched}
        self._synced |= {name: [*state_there(info), *state_here(self.folder / name)] for name, info in fetched.items()}
        self._save()

    def send(self) -> None:
        """Bring the place up to date with the folder here: files, then records and manifests, then what is gone is deleted.

        Raises:
            RunFolderError: the place cannot be written.
        """
        if self._lost_to is not None:
            raise self._in_use(self._lost_to)
        here = self._here()
        changed = [name for name, state in here.items() if self._synced.get(name, [])[2:] != state]
        gone = [name for name in self._synced if name not in here]
        records = [name for name in changed if name.startswith("stages/") or name.endswith("/manifest.json")]
        files = [name for name in changed if name not in records]
        try:
            # A stage whose files are about to change is not recorded while they do.
            for name in [*records, *(name for name in gone if name.startswith("stages/"))]:
                if name in self._synced and (files or gone):
                    self._delete(name)
            for names in (files, records):
                with ThreadPoolExecutor(N_COPIES) as pool:
                    for name, known in zip(names, pool.map(self._upload, names), strict=True):
                        self._synced[name] = [*known, *here[name]]
            for name in gone:
                self._delete(name)
        except OSError as error:
            raise RunFolderError(
                f"{self.uri}: cannot be written ({first_line(error)}); the results are kept in {self.folder}, and the same command sends "
                "them when it can"
            ) from error
        finally:
            self._save()

    def _there(self) -> dict[str, FileInfo]:
        from pyarrow.fs import FileSelector

        entries = self._filesystem.get_file_info(FileSelector(self._path, recursive=True, allow_not_found=True))
        prefix = self._path.lstrip("/") + "/"
        named = {entry.path.lstrip("/").removeprefix(prefix): entry for entry in entries}
        return {name: entry for name, entry in named.items() if _is_kept(name)}

    def _here(self) -> dict[str, list[int]]:
        here = {}
        for path in sorted(self.folder.rglob("*")):
            name = str(path.relative_to(self.folder))
            # A training of a comparison may replace its files while these are listed.
            with contextlib.suppress(FileNotFoundError):
                if _is_kept(name) and path.is_file():
                    here[name] = state_here(path)
        return here

    def _upload(self, name: str) -> list[int]:
        target = f"{self._path}/{name}"
        self._filesystem.create_dir(target.rpartition("/")[0], recursive=True)
        upload(self._filesystem, target, self.folder / name)
        info = self._filesystem.get_file_info(target)
        return state_there(info)

    def _delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.delete_file(f"{self._path}/{name}")
        self._synced.pop(name, None)

    def _save(self) -> None:
        partial = self.folder / f".synced{PARTIAL}"
        partial.write_text(json.dumps(self._synced), encoding="utf-8")
        partial.replace(self.folder / SYNCED)

    def _take(self) -> None:
        try:
            self._filesystem.create_dir(self._path, recursive=True)
            holder, written = self._read_lock()
            if holder is not None:
                silent_s = self._now() - written
                if silent_s < LOCK_DEAD_S:
                    raise self._in_use(holder)
                _log.warning(
                    "%s: taken over from %s, which has not been heard of for %.0f s",
                    self.uri,
                    describe_holder(holder),
                    silent_s,
                )
            self._write_lock()
            time.sleep(LOCK_SETTLE_S)
            holder, _ = self._read_lock()
        except OSError as error:
            raise RunFolderError(
                f"{self.uri}: cannot be written ({first_line(error)}); check the path and the credentials"
            ) from error
        if holder is None or holder.get("token") != self._token:
            raise self._in_use(holder or {})

    def _now(self) -> float:
        """The time of the storage, which no clock of ours has to agree with."""
        probe = f"{self._path}/.now-{self._token}"
        with self._filesystem.open_output_stream(probe) as stream:
            stream.write(b"now")
        try:
            return (self._filesystem.get_file_info(probe).mtime_ns or 0) / 1e9
        finally:
            self._filesystem.delete_file(probe)

    def _write_lock(self) -> None:
        text = json.dumps({**this_process(), "token": self._token})
        with self._filesystem.open_output_stream(f"{self._path}/{LOCK}") as stream:
            stream.write(text.encode())

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(LOCK_BEAT_S):
            with contextlib.suppress(OSError):
                holder, _ = self._read_lock()
                if holder and holder.get("token") != self._token:
                    self._lost_to = holder
                    return
                self._write_lock()

    def _in_use(self, holder: dict[str, Any]) -> RunFolderError:
        return RunFolderError(
            f"{self.uri} is in use by {describe_holder(holder)}; wait for it, or choose another run folder"
        )

    def _read_lock(self) -> tuple[dict[str, Any] | None, float]:
        """The holder, and the time at which the storage got its lock; None if the place is free, {} if it cannot be made out."""
        from pyarrow.fs import FileType

        written = 0.0
        for _ in range(5):
            info = self._filesystem.get_file_info(f"{self._path}/{LOCK}")
            if info.type != FileType.File:
                return None, 0.0
            written = (info.mtime_ns or 0) / 1e9
            # Read while it is written anew, it may be gone, or a part of both.
            with (
                contextlib.suppress(FileNotFoundError, ValueError),
                self._filesystem.open_input_stream(f"{self._path}/{LOCK}") as stream,
            ):
                return dict(json.loads(stream.read())), written
            time.sleep(0.05)
        return {}, written


def _is_kept(name: str) -> bool:
    """Whether a file of a run folder belongs to what is kept: no locks, no work in progress, no copies of the log."""
    parts = name.split("/")
    hidden = [part for part in parts if part.startswith(".")]
    return (not hidden or parts[0] == MLFLOW) and not name.endswith((PARTIAL, "/lock"))
