"""The manifest of a bundle: its keys, its one spelling, and its check.

`manifest.json` is JSON in exactly one spelling (UTF-8 escaped to ASCII, keys sorted, indent 2, a final newline), at most 1 MiB.
`Manifest` has the keys of every bundle, `RetrievalManifest` those of the task "retrieval"; `serving.ctr_manifest` has those of the task
"ctr".

The metadata of the ONNX model repeat the keys IDENTITY as one JSON object called "graphhash", so that the manifest of one bundle is not
accepted for the graph of another. The hashes find damage and mix-ups. They are no signature: whoever can rewrite the folder can rewrite
them.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from serving import ctr_manifest
from serving.errors import BundleError, BundleLoadError, first_line

FORMAT_VERSION = 5
# The oldest format that is read. Up to 4 candidates were an input with a default, in `optional_inputs`, and the keys NEW_IN_5 were missing.
OLDEST_FORMAT = 4
MANIFEST = "manifest.json"
MODEL = "model.onnx"
MAX_MANIFEST_BYTES = 2**20

IDENTITY = (
    "task", "model", "id_types", "padding_item_id", "n_users", "n_items", "dim", "n_buckets", "indices_per_id", "precision",
    "bucket_map_hashes", "vocabulary_hashes",
)  # fmt: skip
METADATA = "graphhash"

_SIDES = {"users", "items"}
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "created_at": str,
    "task": str,
    "inputs": dict,
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


# Of both tasks, and of retrieval alone.
NEW_IN_5: dict[str, type | tuple[type, ...]] = {"onnx": dict, "ids_as_text": dict, "example": dict}
_RETRIEVAL_NEW_IN_5: dict[str, type | tuple[type, ...]] = {"empty_inputs": dict}
_RETRIEVAL_UP_TO_4: dict[str, type | tuple[type, ...]] = {"optional_inputs": dict}


class TensorSpec(TypedDict):
    """An input or output of the graph. A symbolic axis is its name."""

    dtype: str  # "int64", "string", "float32", "float64" or "bool"
    shape: list[str]
    meaning: str


class FileEntry(TypedDict):
    """A file of the bundle. The hash is hexadecimal."""

    bytes: int
    sha256: str


class OnnxFacts(TypedDict):
    """What a runtime has to read."""

    opset: dict[str, int]  # by domain, "ai.onnx" and "ai.onnx.ml"
    ir_version: int
    least_onnxruntime: str  # the first version of ONNX Runtime that reads the file


class ExampleTensor(TypedDict):
    """A tensor of the example request or its answer."""

    dtype: str
    shape: list[int]
    data: list[Any]  # row by row; those of int64 as texts


class Manifest(TypedDict):
    """The keys of every bundle. Hashes are sha256, in hexadecimal digits."""

    format_version: int
    created_at: str  # UTC, ISO 8601
    task: str  # "retrieval" or "ctr"
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    model: str  # "mf", "lightgcn" or "neumf"; ctr: "widedeep", "deepfm", "dcnv2", "dlrm" or "finalnet"
    dim: int  # length of a vector
    # Type of the compressed tables in the file: "float32", "float16", or "int8" or "int4" with a float16 scale per row. Arithmetic is
    # float32.
    precision: str
    bucket_map_hashes: dict[str, str]  # by side, "users" and "items"; ctr: by column
    vocabulary_hashes: dict[str, str]  # likewise
    metrics: dict[str, Any]  # of the trained model
    provenance: dict[str, Any]  # run id, seed, versions: what the maker wants to find again
    onnx: OnnxFacts
    # The integers of this manifest that JSON readers round, as texts: "padding_item_id"; ctr: the missing value of every column, by name.
    ids_as_text: dict[str, str]
    example: dict[str, dict[str, ExampleTensor]]  # "inputs" and "outputs"
    files: dict[str, FileEntry]  # every file but the manifest
    manifest_sha256: str  # of this JSON without this key


class RuntimeCost(TypedDict):
    """What an ONNX Runtime session needs; see `pipeline.retrieval.onnx_scores`."""

    mode: str  # "materialized" (a float32 vector per item in memory) or "compressed"
    stored_bytes: int  # tensors on disk
    resident_bytes: int  # about what a session keeps of them
    load_bytes: int  # about what a session needs while it loads
    cost: str  # in words


class RetrievalManifest(Manifest):
    """The manifest of the task "retrieval"."""

    empty_inputs: dict[str, list[str | int]]  # shapes of the inputs that may be empty, where they are
    id_types: dict[str, str]  # "user_id" and "item_id": "int64" or "string"
    padding_item_id: int | str  # an id of no item, which pads the rows of `exclude_item_id`
    n_users: int  # in the vocabulary
    n_items: int
    runtime: RuntimeCost
    method: dict[str, str]  # by side: how the bucket map was made
    n_buckets: dict[str, int]  # by side: table rows, with the out-of-vocabulary (OOV) row
    indices_per_id: dict[str, int]  # by side: table rows read per id
    item_bias: bool
    precision_loss: dict[
        str, float | None
    ]  # "recall@20" and "recall@20_float32" of the test, at its first cut-off, and "relative", what is lost
    tie_rule: str
    # "absolute" and "relative": a score s of the trained model, its tables rounded to `precision`, and the exported one's differ by at most
    # absolute + relative * max |s|, or nothing is published.
    tolerance: dict[str, float]


def identity(manifest: Mapping[str, Any]) -> str:
    """What the model's metadata repeat of its manifest, as JSON."""
    keys = ctr_manifest.IDENTITY if manifest["task"] == "ctr" else IDENTITY
    return json.dumps({key: manifest[key] for key in keys}, sort_keys=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The checked manifest of a bundle; the other files are not looked at.

    Raises:
        BundleError: the manifest is missing, changed, malformed, or of another format version.
        BundleLoadError: it cannot be read.
    """
    path = folder / MANIFEST
    text = _read(path, folder)
    try:
        manifest = json.loads(text.decode("ascii"), parse_constant=_refuse_constant)
        spelling = spell(manifest) if isinstance(manifest, dict) else None
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{path}: not valid JSON ({first_line(error)}); copy the bundle again or export it again"
        ) from error
    if spelling is None:
        raise BundleError(f"{path}: holds a {type(manifest).__name__} instead of an object; export the bundle again")
    # The version comes first: everything after it may differ in another format.
    _check_version(manifest.get("format_version"), path)
    if spelling != text or manifest.get("manifest_sha256") != self_hash(manifest):
        raise BundleError(f"{path}: changed since it was written; copy the bundle again or export it again")
    check_fields(manifest, folder)
    return manifest


def task_of(path: Path | str) -> str:
    """The task of a bundle, "retrieval" or "ctr"; errors as of `read_manifest`."""
    return read_manifest(Path(path))["task"]


def spell(manifest: Mapping[str, Any]) -> bytes:
    """The one spelling of a manifest: with a second one, a changed byte could go unnoticed."""
    return (json.dumps(manifest, indent=2, sort_keys=True, allow_nan=False) + "\n").encode("ascii")


def self_hash(manifest: Mapping[str, Any]) -> str:
    """The sha256 of a manifest without its own hash."""
    return hashlib.sha256(
        spell({key: value for key, value in manifest.items() if key != "manifest_sha256"})
    ).hexdigest()


def check_fields(manifest: Mapping[str, Any], folder: Path) -> None:
    """Raise BundleError where a key is missing, has the wrong type, or contradicts another one."""
    is_ctr = manifest.get("task") == "ctr"
    try:
        for name, types in _fields(manifest, is_ctr=is_ctr).items():
            value = manifest.get(name)
            if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
                raise ValueError(f"{name} is {value!r:.80}")
        if is_ctr:
            ctr_manifest.check_ctr(manifest)
        else:
            _check_retrieval(manifest)
    except ValueError as error:
        raise BundleError(f"{folder / MANIFEST}: {error}; export the bundle again") from None


def _fields(manifest: Mapping[str, Any], *, is_ctr: bool) -> dict[str, type | tuple[type, ...]]:
    """Keys and types of the manifest's task, in the format that it states."""
    if manifest.get("format_version", FORMAT_VERSION) < 5:
        return ctr_manifest.FIELDS if is_ctr else _FIELDS | _RETRIEVAL_UP_TO_4
    return (ctr_manifest.FIELDS if is_ctr else _FIELDS | _RETRIEVAL_NEW_IN_5) | NEW_IN_5


def _read(path: Path, folder: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise BundleError(f"{path}: not a plain file; copy the bundle again, links resolved")
        with open(path, "rb") as file:
            text = file.read(MAX_MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(
            f"{folder}: no bundle there ({MANIFEST} is missing); make one with 'graphhash export'"
        ) from None
    except OSError as error:
        raise BundleLoadError(
            f"{path}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from error
    if len(text) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes, which no manifest is; export again")
    return text


def _check_version(version: object, path: Path) -> None:
    if type(version) is not int or version < 1:
        raise BundleError(f"{path}: format_version is {version!r}, not a number from 1; export the bundle again")
    if version > FORMAT_VERSION:
        raise BundleError(
            f"{path}: bundle format {version} is newer than {FORMAT_VERSION}, the newest known here; update graphhash"
        )
    if version < OLDEST_FORMAT:
        raise BundleError(
            f"{path}: bundle format {version} is older than {OLDEST_FORMAT}, the oldest read here; export it again with 'graphhash export'"
        )


def _check_retrieval(manifest: Mapping[str, Any]) -> None:
    """Raise ValueError with the reason if a value is out of its range; types are as in `_FIELDS`."""
    for name in ("method", "n_buckets", "indices_per_id", "bucket_map_hashes", "vocabulary_hashes"):
        if manifest[name].keys() != _SIDES:
            raise ValueError(f"{name} has keys {sorted(manifest[name])}, not items and users")
    counts = {name: manifest[name] for name in ("n_users", "n_items", "dim")}
    counts |= {
        f"{name}.{side}": manifest[name][side] for name in ("n_buckets", "indices_per_id") for side in sorted(_SIDES)
    }
    for name, count in counts.items():
        if type(count) is not int or not 1 <= count < 2**63:
            raise ValueError(f"{name} is {count!r:.80}, must be a number from 1")
    types, padding = manifest["id_types"], manifest["padding_item_id"]
    if types.keys() != {"user_id", "item_id"} or any(kind not in ("int64", "string") for kind in types.values()):
        raise ValueError(f"id_types is {types!r:.80}")
    fits = isinstance(padding, int) and -(2**63) <= padding < 2**63
    if fits != (types["item_id"] == "int64"):
        raise ValueError(f"padding_item_id {padding!r:.80} is no {types['item_id']}")
    if not isinstance(manifest["runtime"].get("mode"), str):
        raise ValueError(f"runtime is {manifest['runtime']!r:.80}")
    for side in ("inputs", "optional_inputs", "outputs"):
        specs = manifest.get(side, {}).values()
        if not all(isinstance(spec, dict) and isinstance(spec.get("dtype"), str) for spec in specs):
            raise ValueError(f"{side} lacks a dtype")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
