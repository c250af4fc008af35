"""The bundle: a folder that holds one exported model, and the check that it is whole and unchanged.

The folder holds `manifest.json` (see `serving.manifest`), `model.onnx`, MAY hold the external data files of that model, and MUST hold
nothing
else: no folders, no links. There is no pickle and nothing to execute but the graph.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from serving.errors import BundleError, BundleLoadError
from serving.external_data import external_locations
from serving.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MODEL,
    check_fields,
    read_manifest,
    self_hash,
    spell,
)


def write_manifest(folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the files of `folder` and write its manifest, flushed to disk.

    Args:
        folder: holds the model's files and no manifest yet.
        content: every key of the format but `format_version`, `created_at`, `files` and `manifest_sha256`.

    Returns: the manifest as written.

    Raises:
        BundleError: a key is missing, has the wrong type, or holds what JSON cannot (NaN, for one).
    """
    names = sorted(entry.name for entry in os.scandir(folder))
    manifest: dict[str, Any] = {
        **content,
        "format_version": FORMAT_VERSION,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)} for name in names
        },
    }
    try:
        manifest["manifest_sha256"] = self_hash(manifest)
        text = spell(manifest)
    except (TypeError, ValueError) as error:
        raise BundleError(
            f"the manifest cannot be written as JSON ({error}); pass finite numbers, strings, lists and dicts"
        ) from error
    if len(text) > MAX_MANIFEST_BYTES:
        raise BundleError(
            f"the manifest takes {len(text)} bytes of {MAX_MANIFEST_BYTES}; pass fewer metrics or provenance"
        )
    written = json.loads(text)
    check_fields(written, folder)
    with open(folder / MANIFEST, "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return written


def check_bundle(path: Path | str) -> dict[str, Any]:
    """Verify every byte of a bundle and return its manifest. Reads each file once; takes about 1 s per GB.

    Raises:
        BundleError: anything is missing, added, changed, cut, outside the folder, or of another format version.
        BundleLoadError: a file cannot be read.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    try:
        _check_files(folder, manifest["files"])
        outside = sorted(external_locations(folder / MODEL) - (manifest["files"].keys() - {MODEL}))
    except ValueError as error:
        raise BundleError(f"{folder / MODEL}: no well-formed ONNX file ({error}); export the bundle again") from error
    except OSError as error:
        raise BundleLoadError(
            f"{error.filename or folder}: cannot be read ({error.strerror}); check its permissions"
        ) from error
    if outside:
        raise BundleError(
            f"{folder / MODEL}: reads {outside[0]!r}, which is not a file of the bundle; do not use it, export again"
        )
    return manifest


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_files(folder: Path, files: object) -> None:
    """Names, then kinds, then sizes, then content: the cheap refusals first."""
    if not isinstance(files, dict) or MODEL not in files:
        raise BundleError(f"{folder / MANIFEST}: does not list {MODEL}; export the bundle again")
    for name, entry in files.items():
        if name in ("", ".", "..", MANIFEST) or any(c in "/\\:\0" for c in name):
            raise BundleError(
                f"{folder / MANIFEST}: {name!r} is not a plain file name; do not use this bundle, export again"
            )
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise BundleError(
                f"{folder / MANIFEST}: {name} is listed without bytes and sha256; export the bundle again"
            )
    with os.scandir(folder) as entries:
        present = {entry.name: entry.stat(follow_symlinks=False) for entry in entries}
    for name in sorted(present.keys() - files.keys() - {MANIFEST}):
        raise BundleError(f"{folder / name}: not part of the bundle; remove it")
    for name in sorted(files.keys() - present.keys()):
        raise BundleError(f"{folder / name}: missing; copy the bundle again or export it again")
    for name, entry in files.items():
        if not stat.S_ISREG(present[name].st_mode):
            raise BundleError(f"{folder / name}: not a plain file; copy the bundle again, links resolved")
        if present[name].st_size != entry["bytes"]:
            raise BundleError(
                f"{folder / name}: {present[name].st_size} bytes, should be {entry['bytes']}; copy the bundle again"
            )
    for name, entry in files.items():
        digest = file_sha256(folder / name)
        if digest != entry["sha256"]:
            raise BundleError(
                f"{folder / name}: changed (sha256 {digest[:12]}..., should be "
                f"{str(entry['sha256'])[:12]}...); copy the bundle again"
            )
