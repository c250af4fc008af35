"""The run folder: one writer at a time, stages that are skipped when nothing changed, and whole results or none.

A stage writes into a hidden folder beside its place, which is renamed when all of it is there. A crash, a full
disk or Ctrl-C therefore leaves the previous result untouched; what a killed process left behind is removed by the
next one. `RUN/stages/<stage>.json` records what a stage was made from and what it made:

    {"key": sha256 of stage, settings and inputs, "settings": {...}, "inputs": {...},
     "outputs": {file: {"size": bytes, "mtime_ns": ..., "sha256": ...}}, "seconds": ..., "result": {...}}

A stage is up to date when its key is the recorded one and every output is intact.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import RunFolderError
from pipeline.progress import SKIPPED
from pipeline.storage.atomic import (
    FULL_DISK,
    PARTIAL,
    REPLACED,
    file_sha256,
    link_or_copy,
    replace_folder,
    write_json_atomic,
    write_text_atomic,
)
from pipeline.storage.locks import LockedError, NoLocksError, file_lock

_log = logging.getLogger(__name__)

# Why a stage without a record is computed.
NEVER = "never computed here"


@dataclass(frozen=True)
class StageResult:
    """What a stage left: its key (an input of the stages after it), the dict it returned, its time, and its own inputs."""

    name: str
    key: str
    result: dict[str, Any]
    seconds: float
    skipped: bool
    inputs: Mapping[str, str] = field(default_factory=dict)


class RunFolder:
    """A run folder, locked while the `with` block lasts. `on_stage` is called after every stage that was not skipped.

        with RunFolder(Path("out")) as run:
            run.stage("cluster", {"resolution": 200.0}, [ingest.key], "cluster", lambda folder: cluster(folder))

    Raises:
        RunFolderError: another process holds the folder, or it cannot be made.
    """

    def __init__(self, path: Path | str, *, on_stage: Callable[[], None] = lambda: None) -> None:
        self.path = Path(path)
        self.on_stage = on_stage
        self._lock: contextlib.ExitStack | None = None

    def __enter__(self) -> RunFolder:
        with contextlib.ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(file_lock(self.path / ".lock"))
            except LockedError as error:
                raise RunFolderError(
                    f"{self.path} is in use by {error}; wait for it, or choose another run folder"
                ) from None
            except NoLocksError as error:
                raise RunFolderError(
                    f"{self.path}/.lock: cannot be locked ({error.strerror}); put the run folder on a file system with locks, or at a URI"
                ) from error
            except OSError as error:
                raise RunFolderError(
                    f"{self.path}: cannot write there ({error.strerror}); choose another run folder"
                ) from error
            try:
                lock.sign()
                self._remove_litter()
            except OSError as error:
                raise _one_line(error, self.path) from error
            self._lock = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def stage(
        self,
        name: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        folder: str,
        compute: Callable[[Path], dict[str, Any]],
    ) -> StageResult:
        """Run `compute` into a fresh folder that then replaces `RUN/folder`, unless that is up to date.

        Args:
            name: stage, unique in the run, such as `train soft`.
            settings: what the output depends on; JSON values.
            inputs: keys of earlier stages and fingerprints of files, by name.
            folder: place of the output below the run folder.
            compute: takes the folder to fill and returns a JSON-able dict, kept in the record.
        """
        target = self.path / folder

        def publish() -> tuple[dict[str, Any], Path, list[Path]]:
            partial = target.with_name(f".{target.name}{PARTIAL}")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            try:
                result = compute(partial)
                files = [p.relative_to(partial) for p in sorted(partial.rglob("*")) if p.is_file()]
                replace_folder(partial, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            return result, target, files

        return self._run(name, settings, inputs, publish)

    def value(
        self,
        name: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        file: str,
        compute: Callable[[], dict[str, Any]],
    ) -> StageResult:
        """Like `stage`, for a stage whose whole output is one JSON file, `RUN/file`."""

        def publish() -> tuple[dict[str, Any], Path, list[Path]]:
            result = compute()
            write_json_atomic(self.path / file, result)
            return result, self.path, [Path(file)]

        return self._run(name, settings, inputs, publish)

    def reuse(
        self, source: Path, name: str, settings: Mapping[str, Any], inputs: Mapping[str, str], folder: str
    ) -> bool:
        """Take the output of `stage` with these arguments over from another run folder, if it is up to date there.

        The files are hard links where the file system has them: no stage writes into a finished file.

        Returns: whether it was taken over. What is up to date here stays.
        """
        assert self._lock is not None, "stages run inside `with RunFolder(...)`"
        other, target = RunFolder(source), self.path / folder
        if self.would_skip(name, settings, inputs) or not other.would_skip(name, settings, inputs):
            return False
        partial = target.with_name(f".{target.name}{PARTIAL}")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source / folder, partial, copy_function=link_or_copy)
            replace_folder(partial, target)
            write_text_atomic(self._record_path(name), other._record_path(name).read_text(encoding="utf-8"))
        except (OSError, shutil.Error):
            return False  # The source is being written anew, or the disk is full: the stage itself will say which.
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return self.would_skip(name, settings, inputs)

    def current(self, name: str) -> StageResult | None:
        """The stage as recorded, if its outputs are intact, whatever its settings were; else None."""
        record = self._record(name)
        if record is None or not self._intact(record):
            return None
        inputs = record.get("inputs")
        inputs = inputs if isinstance(inputs, dict) else {}
        return StageResult(name, record["key"], record["result"], record["seconds"], True, inputs)

    def would_skip(self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
        """Whether `stage` or `value` with these arguments would find its output up to date."""
        return not self.reasons(name, settings, inputs)

    def reasons(self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> list[str]:
        """Why `stage` or `value` with these arguments would compute, such as "train.lr changed 0.04 -> 0.02"; empty if it would not."""
        record = self._record(name)
        if record is None:
            return [NEVER]
        if record["key"] == stage_key(name, settings, inputs):
            return [] if self._intact(record) else ["its outputs are damaged or missing"]
        return _differences(record, settings, inputs)

    def _run(
        self,
        name: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        publish: Callable[[], tuple[dict[str, Any], Path, list[Path]]],
    ) -> StageResult:
        assert self._lock is not None, "stages run inside `with RunFolder(...)`"
        key = stage_key(name, settings, inputs)
        reasons = self.reasons(name, settings, inputs)
        if not reasons:
            record = self._record(name)
            assert record is not None
            _log.info("%s: unchanged, skipped", name, extra=SKIPPED)
            return StageResult(name, key, record["result"], record["seconds"], True)
        # A first computation needs no reason.
        _log.info("%s ...", name if reasons == [NEVER] else f"{name}: {'; '.join(reasons)}")
        started = time.perf_counter()
        try:
            result, root, files = publish()
            seconds = time.perf_counter() - started
            outputs = {str((root / file).relative_to(self.path)): _describe_file(root / file) for file in files}
            record = {
                "stage": name,
                "key": key,
                "settings": dict(settings),
                "inputs": dict(inputs),
                "outputs": outputs,
                "seconds": round(seconds, 3),
                "result": result,
            }
            write_json_atomic(self._record_path(name), record)
        except OSError as error:
            raise _one_line(error, self.path, f"stage {name!r}") from error
        _log.info("%s: done in %.1f s", name, seconds)
        self.on_stage()
        return StageResult(name, key, result, round(seconds, 3), False)

    def _record_path(self, name: str) -> Path:
        return self.path / "stages" / f"{name.replace(' ', '-')}.json"

    def _record(self, name: str) -> dict[str, Any] | None:
        try:
            record = json.loads(self._record_path(name).read_text(encoding="utf-8"))
            return record if {"key", "outputs", "seconds", "result"} <= record.keys() else None
        except (OSError, ValueError, AttributeError):
            return None  # No readable record: the stage is simply computed again.

    def _intact(self, record: dict[str, Any]) -> bool:
        for name, was in record["outputs"].items():
            path = self.path / name
            try:
                now = path.stat()
                if now.st_size != was["size"]:
                    return False
                # The time differs after a copy of the whole folder; the content decides then.
                if now.st_mtime_ns != was["mtime_ns"] and file_sha256(path) != was["sha256"]:
                    return False
            except OSError:
                return False
        return True

    def _remove_litter(self) -> None:
        """Under the lock, every hidden work folder belongs to a process that died."""
        for pattern in (f".*{PARTIAL}", f"*/.*{PARTIAL}"):
            for partial in self.path.glob(pattern):
                shutil.rmtree(partial, ignore_errors=True) if partial.is_dir() else partial.unlink(missing_ok=True)
        for pattern in (f".*{REPLACED}", f"*/.*{REPLACED}"):
            for replaced in self.path.glob(pattern):
                target = replaced.with_name(replaced.name[1 : -len(REPLACED)])
                if target.exists():
                    shutil.rmtree(replaced, ignore_errors=True)
                else:
                    replaced.rename(target)  # The process died between the two renames.


def stage_key(name: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Hex sha256 of what a stage's output depends on."""
    text = json.dumps([name, dict(settings), dict(inputs)], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _differences(record: Mapping[str, Any], settings: Mapping[str, Any], inputs: Mapping[str, str]) -> list[str]:
    """How settings and inputs differ from the recorded ones, one text each."""
    before, made_from = record.get("settings"), record.get("inputs")
    if not isinstance(before, dict) or not isinstance(made_from, dict):
        return ["made by an earlier version of graphhash"]
    now = json.loads(json.dumps(dict(settings)))
    found = [
        "this version of graphhash computes it differently" if key == "version" else f"{key} changed {change}"
        for key in dict.fromkeys([*now, *before])
        if (change := _change(before.get(key), now.get(key)))
    ]
    found += [
        f"{name} changed" for name in dict.fromkeys([*inputs, *made_from]) if inputs.get(name) != made_from.get(name)
    ]
    return found or ["made by an earlier version of graphhash"]


def _change(before: Any, now: Any) -> str:
    """How a setting differs, as "0.04 -> 0.02"; empty where it does not."""
    if before == now:
        return ""
    if isinstance(before, dict) and isinstance(now, dict):
        # By method: those that came or went are named by the list of methods.
        parts = {key: _change(before[key], now[key]) for key in before.keys() & now.keys()}
        return ", ".join(f"{change} ({key})" for key, change in sorted(parts.items()) if change)
    return f"{_as_text(before)} -> {_as_text(now)}"


def _as_text(value: Any) -> str:
    if value is None:
        return "default"
    if isinstance(value, list):
        return ",".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _describe_file(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": file_sha256(path)}


def _one_line(error: OSError, path: Path, during: str = "the run folder") -> OSError | RunFolderError:
    """A full disk as an error that says what is kept and what to do; any other error as it is."""
    # Ray hands on a task's error as a subclass of it that holds the original one in `cause`.
    if getattr(getattr(error, "cause", error), "errno", None) not in FULL_DISK:
        return error
    try:
        free = f"{shutil.disk_usage(path).free / 2**20:.0f} MiB free"
    except OSError:
        free = "no space left"
    return RunFolderError(
        f"{path}: the disk is full ({free}) while writing {during}; earlier results are kept. "
        "Free some space and run the same command again, or choose another run folder"
    )
