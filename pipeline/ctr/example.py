"""Example calls of a CTR bundle's graph, which MLflow stores with the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.tracking.onnx_model import ModelCall


def example_call(manifest: Mapping[str, Any], ids: Mapping[str, Any] | None = None) -> ModelCall:
    """A call of one row, one array per input.

    Args:
        ids: a raw value of some columns, by name; the others are missing, and numbers are their means.
    """
    inputs = {}
    for column in manifest["columns"]:
        values = np.array(
            [column["mean"] if column["role"] == "dense" else (ids or {}).get(column["name"], column["missing"])]
        )
        inputs[column["input"]] = values[:, None] if column["role"] == "multi_valued" else values
    return ModelCall(inputs)


def known_call(manifest: Mapping[str, Any], ingest_dir: Path) -> ModelCall:
    """A call with the first id of every column of a run's log."""
    from pipeline.ctr.data import Features

    features = Features.open(ingest_dir)
    vocabularies = {column.name: features.vocabulary(column) for column in features.all_columns}
    return example_call(manifest, {name: ids.take([0])[0] for name, ids in vocabularies.items() if len(ids)})


def unknown_call(manifest: Mapping[str, Any]) -> ModelCall:
    """A call in which every id is missing."""
    return example_call(manifest)
