"""What the manifest of a click-through model's bundle holds (format 3, task "ctr"), and its check.

Beside `format_version`, `created_at`, `files` and `manifest_sha256`, which `serving.bundle` describes:

    task                "ctr"
    inputs, outputs     {tensor: {"dtype": str, "shape": [axis, ...], "meaning": str}}; outputs are `probability`, `logit` and, of models
                        with a categorical column, `known`, whose second axis is the categorical columns in order
    columns             list of a dict per column, categorical, then multi-valued ("bag"), then dense, each with
        name            in the log
        input           the tensor that takes it
        role            "categorical" | "bag" | "dense"
        dtype           "int64" | "string", of a dense one "float64"
      of a categorical and of a bag
        n_ids           int, known values, a missing one among them if it is known
        missing         the raw value that stands for a missing one, and fills up the rows of a bag; no value of the log is this
        map             str, how its bucket map was made
        n_buckets       int, table rows it reads, the unknown ids' row among them
        indices_per_id       int, rows read for one value
        precision       "float32" | "float16" | "int8" | "int4", of its table
      of a bag
        width           int, values of a row that count; later ones do not
        separator       str, between the values of a text
      of a categorical one that is made of a time (else not there)
        time            {"column": str, "format": str, as in strptime, "part": "hour" | "weekday"}
      of a dense one
        mean, std       float; (number - mean) / std goes into the model, 0 for a missing number
    model               str, "widedeep", "deepfm", "dcnv2" or "dlrm"
    layers              {str: value}, sizes of its layers
    dim                 int, length of a column's vector
    id_bias             bool, a number per id of compressed columns
    method              str, of the run
    precision           "float32" | "float16" | "int8" | "int4", of compressed tables
    precision_loss      {"log_loss": float, "log_loss_float32": float, "relative": float}, of the test; each may be null
    calibration         {"calibration": float, mean prediction over mean label of the test, "ece": float, expected calibration error}; each
                        may be null
    runtime             {"stored_bytes": int}: tensors on disk, and about what a session keeps of them
    tolerance           {"absolute": float, "relative": float, "n_rows": int, "largest": float}: the logit of the exported model and that of
                        the trained one, its tables rounded as they are stored, differ by at most absolute + relative * max |logit| on n_rows
                        rows of the test, or nothing is published; `largest` is what they differed by
    bucket_map_hashes   {column: hex sha256}
    vocabulary_hashes   {column: hex sha256}
    metrics, provenance as of other tasks
"""

from __future__ import annotations

import math
from typing import Any

FIELDS = {
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

_DTYPES = {"categorical": ("int64", "string"), "bag": ("int64", "string"), "dense": ("float64",)}
_COUNTS = {
    "categorical": ("n_ids", "n_buckets", "indices_per_id"),
    "bag": ("n_ids", "n_buckets", "indices_per_id", "width"),
    "dense": (),
}


def check_ctr(manifest: dict[str, Any]) -> None:
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
    if not all(isinstance(column.get(key), str) for key in ("name", "input", "role", "dtype")) or column[
        "dtype"
    ] not in _DTYPES.get(role, ()):
        raise ValueError(f"column {column!r:.120} has no name, input, role and type that go together")
    for key in _COUNTS[role]:
        if not _is_count(column.get(key)):
            raise ValueError(f"{key} of column {name!r:.80} is {column.get(key)!r:.80}, must be a number from 1")
    if role == "dense":
        mean, std = column.get("mean"), column.get("std")
        if (
            not all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in (mean, std))
            or std <= 0
        ):
            raise ValueError(f"mean and std of column {name!r:.80} are {mean!r:.40} and {std!r:.40}")
        return
    missing = column.get("missing")
    is_id = (
        isinstance(missing, str)
        if column["dtype"] == "string"
        else type(missing) is int and -(2**63) <= missing < 2**63
    )
    if not is_id:
        raise ValueError(f"the missing value of column {name!r:.80} is {missing!r:.80}, which is no {column['dtype']}")
    if role == "bag" and not (isinstance(column.get("separator"), str) and column["separator"]):
        raise ValueError(f"the separator of column {name!r:.80} is {column.get('separator')!r:.80}")
    time = column.get("time")
    if time is not None and not (
        isinstance(time, dict)
        and all(isinstance(time.get(key), str) for key in ("column", "format", "part"))
        and time["part"] in ("hour", "weekday")
        and column["dtype"] == "int64"
    ):
        raise ValueError(f"the time of column {name!r:.80} is {time!r:.80}")


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**63


def _dtype(spec: Any) -> Any:
    return spec.get("dtype") if isinstance(spec, dict) else None
