"""A private copy of a bundle's files, to load or check a model from.

ONNX Runtime maps external data for as long as a session lives, and a mapped file that somebody cuts ends the process (SIGBUS). Nobody
writes to a private copy. It lies in the system's temporary folder (TMPDIR), and its names are removed at the end of the block; a session
that was opened before keeps what it has mapped.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from serving.bundle_model import BundleModel
from serving.errors import BundleError, BundleLoadError, first_line
from serving.manifest import read_manifest

# Name, size, time and number of each file: what changes when a folder is replaced or written to.
Fingerprint = tuple[tuple[str, int, int, int], ...]
Model = TypeVar("Model", bound=BundleModel)


def fingerprint(folder: Path) -> Fingerprint:
    """The state of a folder's files; empty where there is no folder."""
    try:
        with os.scandir(folder) as entries:
            stats = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    except OSError:
        return ()
    return tuple(sorted((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats))


@contextmanager
def private_copy(folder: Path) -> Iterator[Path]:
    """A copy of a bundle's files for the length of the block; errors that leave it name the bundle itself.

    Raises:
        BundleError: the folder holds no bundle.
        BundleLoadError: the copy cannot be made.
    """
    read_manifest(folder)  # Before gigabytes are copied of what is no bundle.
    try:
        with tempfile.TemporaryDirectory(prefix="graphhash-bundle-") as private:
            copy = Path(private) / "bundle"
            shutil.copytree(folder, copy, symlinks=True)
            try:
                yield copy
            except BundleError as error:
                raise type(error)(str(error).replace(str(copy), str(folder))) from error
    except OSError as error:
        unreadable = [folder / name for name, *_ in fingerprint(folder) if not os.access(folder / name, os.R_OK)]
        if unreadable:
            raise BundleLoadError(f"{unreadable[0]}: cannot be read; check its permissions") from error
        reason = error.strerror or first_line(error)
        raise BundleLoadError(
            f"{folder}: cannot be copied to {tempfile.gettempdir()} ({reason}); set TMPDIR to a folder with room for the bundle"
        ) from error


def load_privately(folder: Path, load: Callable[[Path], Model]) -> Model:
    """A model that no change of the bundle's files reaches.

    Args:
        load: loads a bundle from a folder.

    Returns: the model, warmed up, with `path` the folder itself.

    Raises:
        BundleError: as :func:`private_copy` and `load`.
    """
    with private_copy(folder) as copy:
        loaded = load(copy)
        # The first run of a session allocates its memory, and has then mapped all that it reads.
        loaded.warm_up()
    loaded.path = folder
    return loaded
