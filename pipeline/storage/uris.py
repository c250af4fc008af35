"""Logs on shared storage, ``s3://``, ``gs://``, ``file://`` and what else pyarrow's filesystems open, as files here.

A log at a URI is copied once into the run folder, ``RUN/.source``, and read from there; it is copied again when it changes. Run folders at
URIs are in `pipeline.runs.remote`.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from graphhash.errors import first_line
from pipeline.storage.atomic import FULL_DISK, PARTIAL

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

    from pipeline.config.run_config import RunConfig

SOURCE = ".source"
# Settings of a log that may be at URIs.
INPUTS = ("path", "user_features", "item_features")
COPY_BYTES = 8 * 2**20
N_COPIES = 8
# Storage where an object appears whole; elsewhere it is written beside its place and moved there.
WHOLE_OBJECTS = ("s3", "gcs", "abfs")


def is_uri(path: str) -> bool:
    """Whether a path is a URI, such as ``s3://bucket/log.parquet``."""
    return re.match(r"[a-z][a-z0-9+.-]+://", path) is not None


def below(folder: str, name: str) -> str:
    """The path or URI of a file or folder in a folder; the query of a URI, which says how the storage is reached, stays behind it."""
    if not is_uri(folder):
        return f"{folder.rstrip('/')}/{name}"
    parts = urlsplit(folder)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def in_ray_job() -> bool:
    """Whether this process was started by `ray job submit`, in a temporary copy of its working directory."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def work_folder(uri: str, root: str | None = None) -> Path:
    """Where the run folder at a URI is worked on: always the same folder, below `root`, or below the system's temporary one."""
    base = Path(root) if root else Path(tempfile.gettempdir()) / f"graphhash-{os.getuid()}"
    name = PurePosixPath(urlsplit(uri).path).name or "run"
    return base.absolute() / f"{name}-{hashlib.sha256(uri.rstrip('/').encode()).hexdigest()[:12]}"


def open_uri(uri: str) -> tuple[FileSystem, str]:
    """The filesystem of a URI and the path in it.

    Raises:
        DataError: pyarrow does not know the scheme, or cannot make sense of the rest; or it holds a password, which would be written to
            `config.toml`, to MLflow, and to logs.
    """
    from pyarrow import ArrowException
    from pyarrow.fs import FileSystem

    from graphhash.errors import DataError

    parts = urlsplit(uri)
    if parts.password is not None:
        raise DataError(
            f"{parts.scheme}://...@{parts.hostname}{parts.path}: holds a password, which would be kept with the run; leave it to the "
            "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS) or to the machine's role"
        )
    try:
        filesystem, path = FileSystem.from_uri(uri)
        if not path.strip("/"):
            raise ValueError("it names no place")
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{uri}: cannot be opened ({first_line(error)}); write s3://, gs://, abfs:// or file:///, or a path"
        ) from error
    return filesystem, path.rstrip("/")


def localised(config: RunConfig) -> RunConfig:
    """The configuration with a local copy in the place of every input at a URI.

    Raises:
        DataError: nothing is there, or it cannot be read; or a path is not there in a Ray job, where paths are those of the cluster.
    """
    from graphhash.errors import DataError

    folder = Path(config.run.out) / SOURCE
    paths = {key: getattr(config.data, key) for key in INPUTS}
    for key, path in paths.items():
        if path and is_uri(path):
            paths[key] = str(fetch(path, folder))
        elif path and in_ray_job() and not glob.has_magic(path) and not Path(path).exists():
            raise DataError(
                f"{path}: no such file or folder on {os.uname().nodename}, where the job runs; put it on storage that the cluster's "
                "machines share, or give a URI such as s3://bucket/log.parquet"
            )
    return replace(config, data=replace(config.data, **paths))


def with_uris(config: RunConfig) -> RunConfig:
    """The configuration with the URI in the place of every copy that :func:`localised` put there."""
    paths: dict[str, Any] = {key: path and uri_of_copy(path) for key in INPUTS for path in [getattr(config.data, key)]}
    return replace(config, data=replace(config.data, **paths))


def fetch(uri: str, folder: Path, *, opened: tuple[FileSystem, str] | None = None) -> Path:
    """Copy a file, the files directly in a folder, or those that a glob matches, unless the copies in `folder` are as new.

    Copies have the modification times of the originals, so that a log that did not change is the same log to the stages.

    Args:
        opened: filesystem and path, where they are known.

    Returns: the path to read instead: a file, a folder, or a glob.

    Raises:
        DataError: nothing is there, or it cannot be read.
    """
    from graphhash.errors import DataError

    filesystem, path = opened or open_uri(uri)
    local = folder / hashlib.sha256(uri.encode()).hexdigest()[:12]
    with readable(uri):
        from pyarrow.fs import FileSelector, FileType

        pattern, result = None, local
        if glob.has_magic(path):
            path, pattern = path.rpartition("/")[::2]
            result = local / pattern
        info = filesystem.get_file_info(path)
        if info.type == FileType.NotFound:
            raise DataError(f"{uri}: no such file or folder; check the path")
        if info.type == FileType.File:
            files, result = [info], local / info.base_name
        else:
            there = [entry for entry in filesystem.get_file_info(FileSelector(path)) if entry.type == FileType.File]
            files = [entry for entry in there if pattern is None or fnmatch.fnmatch(entry.base_name, pattern)]
            if not files:
                raise DataError(f"{uri}: no file is there; check the path")
        local.mkdir(parents=True, exist_ok=True)
        _note_of(local).write_text(uri, encoding="utf-8")
        download(
            filesystem,
            [(entry, local / entry.base_name) for entry in files if not _same(entry, local / entry.base_name)],
        )
    names = {entry.base_name for entry in files}
    for stale in (file for file in local.iterdir() if file.name not in names and not file.name.endswith(PARTIAL)):
        stale.unlink()
    return result


def uri_of_copy(path: str) -> str:
    """The URI that a path was fetched from by :func:`fetch`; the path itself where it is no such copy."""
    for copied in (Path(path), Path(path).parent):
        # The folder of a bare name, and a root, have no name of their own.
        with contextlib.suppress(OSError):
            if copied.name:
                return _note_of(copied).read_text(encoding="utf-8")
    return path


def _note_of(local: Path) -> Path:
    """The file that holds the URI of a folder of copies."""
    return local.with_name(f"{local.name}.uri")


def state_here(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def state_there(info: FileInfo) -> list[int]:
    return [info.size, info.mtime_ns or 0]


def _same(info: FileInfo, path: Path) -> bool:
    return path.is_file() and state_here(path) == state_there(info)


def download(filesystem: FileSystem, wanted: list[tuple[FileInfo, Path]]) -> None:
    def copy(info: FileInfo, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
        try:
            with filesystem.open_input_stream(info.path) as source, open(partial, "wb") as target:
                shutil.copyfileobj(source, target, COPY_BYTES)
            os.utime(partial, ns=(info.mtime_ns or 0, info.mtime_ns or 0))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    with ThreadPoolExecutor(N_COPIES) as pool:
        list(pool.map(lambda pair: copy(*pair), wanted))


def upload(filesystem: FileSystem, target: str, path: Path) -> None:
    whole = filesystem.type_name in WHOLE_OBJECTS
    folder, _, name = target.rpartition("/")
    partial = target if whole else f"{folder}/.{name}.{uuid.uuid4().hex[:8]}{PARTIAL}"
    with open(path, "rb") as source, filesystem.open_output_stream(partial) as stream:
        shutil.copyfileobj(source, stream, COPY_BYTES)
    if not whole:
        filesystem.move(partial, target)


def bundle_folder(path: str) -> Path:
    """A bundle's folder here: a path as it is, and a URI as a copy in a temporary folder.

    Raises:
        DataError: nothing is at the URI, or it cannot be read.
    """
    if not is_uri(path):
        return Path(path)
    return fetch(path.rstrip("/"), work_folder(path))


@contextlib.contextmanager
def readable(uri: str) -> Iterator[None]:
    """The storage's errors in one line."""
    from pyarrow import ArrowException

    from graphhash.errors import DataError

    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{uri}: no such file or folder; check the path") from error
    except (ArrowException, OSError) as error:
        if getattr(error, "errno", None) in FULL_DISK:
            raise
        raise DataError(
            f"{uri}: cannot be read ({first_line(error)}); check the path, the region, and the credentials on {os.uname().nodename}"
        ) from error
