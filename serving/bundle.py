"""The bundle: a folder that holds one exported model, and the check that it is whole and unchanged.

Formats 2 and 3. The folder holds `manifest.json`, `model.onnx`, MAY hold the external data files of that model, and
MUST hold nothing else: no folders, no links. There is no pickle and nothing to execute but the graph.

`manifest.json` is JSON in exactly one spelling (UTF-8 escaped to ASCII, keys sorted, indent 2, a final
newline), at most 1 MiB:

    format_version      int, 2; 3 for the task "ctr", whose other keys are in `serving.ctr_manifest`
    created_at          str, UTC, ISO 8601
    task                str, "retrieval"
    inputs, outputs     {tensor: {"dtype": "int64" | "string" | "float32" | "bool", "shape": [axis, ...],
                        "meaning": str}}
    optional_inputs     as inputs: those with a default in the graph
    id_types            {"user_id": "int64" | "string", "item_id": same}
    padding_item_id     an id that no item has, to pad the rows of `exclude_item_id`
    n_users, n_items    int, ids in the model
    dim                 int, length of a vector
    model               str, "mf", "lightgcn" or "neumf"
    runtime             {"mode": "folded" | "compressed", "stored_bytes": int, "resident_bytes": int,
                        "load_bytes": int, "cost": str}: tensors on disk, about what a session keeps of them, and
                        about what it needs while it loads
    method              {"users": str, "items": str}, how the bucket maps were made
    n_buckets           {"users": int, "items": int}, table rows, the unknown ids' row among them
    indices_per_id           {"users": int, "items": int}, table rows read per id
    item_bias           bool
    precision           "float32" | "float16" | "int8" | "int4" (both with a float16 scale per row), type of the tables in the file; arithmetic is float32
    precision_loss      {"recall@20": float, "recall@20_float32": float, "relative": float}, of the test; each
                        may be null
    tie_rule            str
    tolerance           {"absolute": float, "relative": float}: a score s of the trained model, its tables
                        rounded to `precision`, and of the exported one differ by at most absolute + relative * max |s|, or nothing is published
    bucket_map_hashes   {"users": hex sha256, "items": hex sha256}
    vocabulary_hashes   {"users": hex sha256, "items": hex sha256}
    metrics             {str: value}, of the trained model
    provenance          {str: value}: run id, seed, versions: what its maker wants to find again
    files               {name: {"bytes": int, "sha256": hex}}, every file but the manifest
    manifest_sha256     hex sha256 of this JSON without this key

The model's own metadata hold the keys IDENTITY again, as one JSON object called "graphhash", so that a manifest and a graph
of different bundles do not go together.

Format 1 had none of that, and no `optional_inputs`, `model`, `runtime` and `precision_loss`; such a bundle is read, and recommends.

The hashes find damage and mix-ups. They are no signature: whoever can rewrite the whole folder can rewrite
them too.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from serving import ctr_manifest
from serving.external_data import external_locations

# The newest known, and the one that a task's bundles are written in: programs that know no newer one go on reading those of retrieval.
FORMAT_VERSION = 3
FORMATS = {"retrieval": 2, "ctr": 3}
MANIFEST = "manifest.json"
MODEL = "model.onnx"
MAX_MANIFEST_BYTES = 2**20

IDENTITY = (
    "task", "model", "id_types", "padding_item_id", "n_users", "n_items", "dim", "n_buckets", "indices_per_id", "precision",
    "bucket_map_hashes", "vocabulary_hashes",
)  # fmt: skip
METADATA = "graphhash"

_SIDES = {"users", "items"}
_FIELDS = {
    "created_at": str,
    "task": str,
    "inputs": dict,
    "optional_inputs": dict,
    "outputs": dict,
    "id_types": dict,
    "padding_item_id": (int, str),
    "n_users": int,
    "n_items": int,
    "dim": int,
    "model": str,
    "runtime": dict,
    "precision_loss": dict,
    "method": dict,
    "n_buckets": dict,
    "indices_per_id": dict,
    "item_bias": bool,
    "precision": str,
    "tie_rule": str,
    "tolerance": dict,
    "bucket_map_hashes": dict,
    "vocabulary_hashes": dict,
    "metrics": dict,
    "provenance": dict,
}

# Those that came with a later format.
_SINCE = {"optional_inputs": 2, "model": 2, "runtime": 2, "precision_loss": 2}


class BundleError(RuntimeError):
    """A bundle that cannot be used, or be made. The message is one line: what, where, remedy."""


def identity(manifest: dict[str, Any]) -> str:
    """What the model's metadata repeat of its manifest, as JSON."""
    keys = ctr_manifest.IDENTITY if manifest["task"] == "ctr" else IDENTITY
    return json.dumps({key: manifest[key] for key in keys}, sort_keys=True)


def write_manifest(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Describe the files of `folder` and write its manifest, flushed to disk.

    Args:
        folder: holds the model's files and no manifest yet.
        content: every key of the format but `format_version`, `created_at`, `files` and `manifest_sha256`.

    Returns: the manifest as written.

    Raises:
        BundleError: a key is missing, has the wrong type, or holds what JSON cannot (NaN, for one).
    """
    names = sorted(entry.name for entry in os.scandir(folder))
    manifest = {
        **content,
        "format_version": FORMATS.get(content.get("task", ""), FORMAT_VERSION),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": {name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in names},
    }
    try:
        manifest["manifest_sha256"] = _self_hash(manifest)
        text = _spell(manifest)
    except (TypeError, ValueError) as error:
        raise BundleError(
            f"the manifest cannot be written as JSON ({error}); pass finite numbers, strings, lists and dicts"
        ) from error
    if len(text) > MAX_MANIFEST_BYTES:
        raise BundleError(
            f"the manifest takes {len(text)} bytes of {MAX_MANIFEST_BYTES}; pass fewer metrics or provenance"
        )
    _check_fields(json.loads(text), folder)
    with open(folder / MANIFEST, "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return json.loads(text)


def check_bundle(path: Path | str) -> dict[str, Any]:
    """Verify every byte of a bundle and return its manifest. Reads each file once; takes about 1 s per GB.

    Raises:
        BundleError: anything is missing, added, changed, cut, outside the folder, or of a newer format.
    """
    folder = Path(path)
    manifest = _read_manifest(folder)
    _check_files(folder, manifest["files"])
    try:
        outside = sorted(external_locations(folder / MODEL) - (manifest["files"].keys() - {MODEL}))
    except ValueError as error:
        raise BundleError(f"{folder / MODEL}: no well-formed ONNX file ({error}); export the bundle again") from error
    if outside:
        raise BundleError(
            f"{folder / MODEL}: reads {outside[0]!r}, which is not a file of the bundle; do not use it, export again"
        )
    return manifest


def task_of(path: Path | str) -> str:
    """What a bundle is for, "retrieval" or "ctr"; its files are not looked at. BundleError as `check_bundle`."""
    return _read_manifest(Path(path))["task"]


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise BundleError(f"{path}: not a plain file; copy the bundle again, links resolved")
        with open(path, "rb") as file:
            text = file.read(MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise BundleError(
            f"{folder}: no bundle there ({MANIFEST} is missing); make one with 'graphhash export'"
        ) from None
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    if len(text) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes, which no manifest is; export again")
    try:
        manifest = json.loads(text.decode("ascii"), parse_constant=_refuse_constant)
        spelling = _spell(manifest) if isinstance(manifest, dict) else None
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise BundleError(f"{path}: not valid JSON ({reason}); copy the bundle again or export it again") from error
    if spelling is None:
        raise BundleError(f"{path}: holds a {type(manifest).__name__} instead of an object; export the bundle again")
    version = manifest.get("format_version")
    # The version comes first: everything after it may be different in a newer format.
    if type(version) is not int or version < 1:
        raise BundleError(f"{path}: format_version is {version!r}, not a number from 1; export the bundle again")
    if version > FORMAT_VERSION:
        raise BundleError(
            f"{path}: bundle format {version} is newer than {FORMAT_VERSION}, the newest known here; update graphhash"
        )
    if spelling != text or manifest.get("manifest_sha256") != _self_hash(manifest):
        raise BundleError(f"{path}: changed since it was written; copy the bundle again or export it again")
    _check_fields(manifest, folder)
    return manifest


def _check_fields(manifest: dict[str, Any], folder: Path) -> None:
    version = manifest["format_version"]
    is_ctr = version > 2 and manifest.get("task") == "ctr"
    fields = (
        ctr_manifest.FIELDS
        if is_ctr
        else {name: types for name, types in _FIELDS.items() if _SINCE.get(name, 1) <= version}
    )
    for name, types in fields.items():
        value = manifest.get(name)
        if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
            raise BundleError(f"{folder / MANIFEST}: {name} is {value!r:.80}; export the bundle again")
    if is_ctr:
        try:
            ctr_manifest.check_ctr(manifest)
        except ValueError as error:
            raise BundleError(f"{folder / MANIFEST}: {error}; export the bundle again") from None
        return
    for name in ("method", "n_buckets", "indices_per_id", "bucket_map_hashes", "vocabulary_hashes"):
        if manifest[name].keys() != _SIDES:
            raise BundleError(
                f"{folder / MANIFEST}: {name} has keys {sorted(manifest[name])}, not items and users; export again"
            )
    counts = {name: manifest[name] for name in ("n_users", "n_items", "dim")}
    counts |= {
        f"{name}.{side}": manifest[name][side] for name in ("n_buckets", "indices_per_id") for side in sorted(_SIDES)
    }
    for name, count in counts.items():
        if type(count) is not int or not 1 <= count < 2**63:
            raise BundleError(
                f"{folder / MANIFEST}: {name} is {count!r:.80}, must be a number from 1; export the bundle again"
            )
    types, padding = manifest["id_types"], manifest["padding_item_id"]
    if types.keys() != {"user_id", "item_id"} or any(kind not in ("int64", "string") for kind in types.values()):
        raise BundleError(f"{folder / MANIFEST}: id_types is {types!r:.80}; export the bundle again")
    fits = isinstance(padding, int) and -(2**63) <= padding < 2**63
    if fits != (types["item_id"] == "int64"):
        raise BundleError(
            f"{folder / MANIFEST}: padding_item_id {padding!r:.80} is no {types['item_id']}; export the bundle again"
        )
    for side in fields.keys() & {"inputs", "optional_inputs", "outputs"}:
        if not all(isinstance(spec, dict) and isinstance(spec.get("dtype"), str) for spec in manifest[side].values()):
            raise BundleError(f"{folder / MANIFEST}: {side} lacks a dtype; export the bundle again")


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
    present = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(folder)}
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
        try:
            digest = _sha256(folder / name)
        except OSError as error:
            raise BundleError(f"{folder / name}: cannot be read ({error.strerror}); check its permissions") from error
        if digest != entry["sha256"]:
            raise BundleError(
                f"{folder / name}: changed (sha256 {digest[:12]}..., should be "
                f"{str(entry['sha256'])[:12]}...); copy the bundle again"
            )


def _spell(manifest: dict[str, Any]) -> bytes:
    """The one spelling of a manifest: with a second one, a changed byte could go unnoticed."""
    return (json.dumps(manifest, indent=2, sort_keys=True, allow_nan=False) + "\n").encode("ascii")


def _self_hash(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(
        _spell({key: value for key, value in manifest.items() if key != "manifest_sha256"})
    ).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
