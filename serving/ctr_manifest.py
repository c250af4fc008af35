"""The manifest of a CTR model's bundle (task "ctr"), beside the keys that every manifest has, and its check.

The inputs are one tensor per column. The outputs are `probability`, `logit` and, of models with a categorical column, `known`, whose second
axis is the categorical columns in order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NotRequired, TypedDict

FIELDS: dict[str, type | tuple[type, ...]] = {
    "created_at": str,
    "task": str,
    "inputs": dict,
    "outputs": dict,
    "columns": list,
    "model": str,
    "layers": dict,
    "dim": int,
    "id_bias": bool,
    "method": str,
    "precision": str,
    "precision_loss": dict,
    "calibration": dict,
    "runtime": dict,
    "tolerance": dict,
    "bucket_map_hashes": dict,
    "vocabulary_hashes": dict,
    "metrics": dict,
    "provenance": dict,
}
# What the graph's own metadata repeat.
IDENTITY = ("task", "model", "layers", "dim", "columns", "precision", "bucket_map_hashes", "vocabulary_hashes")

_DTYPES = {"categorical": ("int64", "string"), "multi_valued": ("int64", "string"), "dense": ("float64",)}
_COUNTS = {
    "categorical": ("n_ids", "n_buckets", "indices_per_id"),
    "multi_valued": ("n_ids", "n_buckets", "indices_per_id", "width"),
    "dense": (),
}


class TimePart(TypedDict):
    """How a categorical column is made of a time."""

    column: str
    format: str  # as in strptime
    part: Literal["hour", "weekday"]


class ColumnSpec(TypedDict):
    """A column of a CTR model, as the manifest describes it."""

    name: str  # in the log
    input: str  # the tensor that takes it
    role: Literal["categorical", "multi_valued", "dense"]
    dtype: Literal["int64", "string", "float64"]  # dense columns: "float64"
    # Of categorical and multi-valued columns:
    n_ids: NotRequired[int]  # in the vocabulary, the missing value among them if training has seen one
    missing: NotRequired[
        int | str
    ]  # raw value that stands for a missing one and pads multi-valued rows; no value of the log is this
    map: NotRequired[str]  # how the bucket map was made
    embedding: NotRequired[str]  # of what is no bucket map: "product", "cce", "cafe", "robe" or "dhe"
    n_buckets: NotRequired[int]  # table rows, with the out-of-vocabulary (OOV) row
    indices_per_id: NotRequired[int]  # table rows read per id
    precision: NotRequired[str]  # of the table, as of the bundle
    text_only: NotRequired[
        bool
    ]  # some trained ids are numbers in another form than the plain one, such as 007: numbers are refused
    # Of multi-valued columns:
    width: NotRequired[int]  # values of a row that count; later ones do not
    separator: NotRequired[str]  # between the values of a text
    # Of categorical columns that are made of a time:
    time: NotRequired[TimePart]
    # Of categorical columns that are the buckets of a number (`serving.values.log_square_buckets`): its name in the log.
    bucket: NotRequired[str]
    # Of dense columns: (number - mean) / std goes into the model, 0 for a missing number.
    mean: NotRequired[float]
    std: NotRequired[float]


class CtrFields(TypedDict):
    """The keys of the task "ctr" beside those of `serving.manifest.Manifest`."""

    columns: list[ColumnSpec]  # categorical, then multi-valued, then dense ones
    layers: dict[str, Any]  # sizes of the model's layers
    id_bias: bool  # a number per id of compressed columns
    method: str  # of the run
    precision_loss: dict[str, float | None]  # "log_loss" and "log_loss_float32" of the test, and "relative"
    calibration: dict[
        str, float | None
    ]  # "calibration", mean prediction over mean label of the test; "ece", expected calibration error
    runtime: dict[str, int]  # "stored_bytes": tensors on disk, and about what a session keeps of them
    # "absolute", "relative", "n_rows", "largest": the logits of the exported model and of the trained one, its tables rounded as they are
    # stored, differ by at most absolute + relative * max |logit| on n_rows test rows, or nothing is published. `largest` was measured.
    tolerance: dict[str, float]


def check_ctr(manifest: Mapping[str, Any]) -> None:
    """Raise ValueError with the reason if a value is out of its range, or two contradict each other; types are as in FIELDS."""
    columns = manifest["columns"]
    if not columns or not all(isinstance(column, dict) for column in columns):
        raise ValueError(f"columns is {columns!r:.80}")
    for column in columns:
        _check_column(column)
    for key in ("name", "input"):
        if len({column[key] for column in columns}) != len(columns):
            raise ValueError(f"two columns have the same {key}")
    if not _is_count(manifest["dim"]):
        raise ValueError(f"dim is {manifest['dim']!r:.80}, must be a number from 1")
    ids = [column["name"] for column in columns if column["role"] != "dense"]
    for key in ("bucket_map_hashes", "vocabulary_hashes"):
        if sorted(manifest[key]) != sorted(ids):
            raise ValueError(f"{key} is of columns {sorted(manifest[key])!r:.200}, the model has {sorted(ids)!r:.200}")
    stated = {column["input"]: column["dtype"] for column in columns}
    if {name: _dtype(spec) for name, spec in manifest["inputs"].items()} != stated:
        raise ValueError("inputs are not those of the columns")
    outputs = {"probability": "float32", "logit": "float32"}
    if any(column["role"] == "categorical" for column in columns):
        outputs["known"] = "bool"
    if {name: _dtype(spec) for name, spec in manifest["outputs"].items()} != outputs:
        raise ValueError(f"outputs is {manifest['outputs']!r:.80}")


def _check_column(column: dict[str, Any]) -> None:
    name, role = column.get("name"), column.get("role")
    has_texts = all(isinstance(column.get(key), str) for key in ("name", "input", "role", "dtype"))
    if not has_texts or column["dtype"] not in _DTYPES.get(str(role), ()):
        raise ValueError(f"column {column!r:.120} has no name, input, role and type that go together")
    for key in _COUNTS[str(role)]:
        if not _is_count(column.get(key)):
            raise ValueError(f"{key} of column {name!r:.80} is {column.get(key)!r:.80}, must be a number from 1")
    if role == "dense":
        if not (_is_finite(column.get("mean")) and _is_finite(column.get("std")) and column["std"] > 0):
            values = f"{column.get('mean')!r:.40} and {column.get('std')!r:.40}"
            raise ValueError(f"mean and std of column {name!r:.80} are {values}")
        return
    missing, is_text = column.get("missing"), column["dtype"] == "string"
    if not (isinstance(missing, str) if is_text else type(missing) is int and -(2**63) <= missing < 2**63):
        raise ValueError(f"the missing value of column {name!r:.80} is {missing!r:.80}, which is no {column['dtype']}")
    if role == "multi_valued" and not (isinstance(column.get("separator"), str) and column["separator"]):
        raise ValueError(f"the separator of column {name!r:.80} is {column.get('separator')!r:.80}")
    if not isinstance(column.get("text_only", False), bool):
        raise ValueError(f"text_only of column {name!r:.80} is {column['text_only']!r:.80}")
    if "bucket" in column and not (isinstance(column["bucket"], str) and column["dtype"] == "int64"):
        raise ValueError(f"the bucket of column {name!r:.80} is {column['bucket']!r:.80}")
    if not isinstance(column.get("embedding", ""), str):
        raise ValueError(f"embedding of column {name!r:.80} is {column['embedding']!r:.80}")
    time = column.get("time")
    if time is not None and not (_is_time(time) and column["dtype"] == "int64"):
        raise ValueError(f"the time of column {name!r:.80} is {time!r:.80}")


def _is_time(time: Any) -> bool:
    has_texts = isinstance(time, dict) and all(isinstance(time.get(key), str) for key in ("column", "format", "part"))
    return has_texts and time["part"] in ("hour", "weekday")


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**63


def _dtype(spec: Any) -> Any:
    return spec.get("dtype") if isinstance(spec, dict) else None
