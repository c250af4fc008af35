"""Example calls of a retrieval bundle's graph, which MLflow stores with the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graphhash.graph.vocabulary import Vocabulary
from pipeline.tracking.onnx_model import ModelCall


def example_call(manifest: Mapping[str, Any], user_ids: Sequence[Any]) -> ModelCall:
    """A call for users.

    Args:
        user_ids: raw ids, of the bundle's type.
    """
    inputs = {
        "user_id": np.array(list(user_ids)),  # Texts as numpy's, which MLflow wants.
        "k": np.array(min(20, manifest["n_items"]), np.int64),
        # An id of no item, as MLflow's example has to have a value of every input.
        "exclude_item_id": np.array([[manifest["padding_item_id"]]] * len(user_ids)),
        "candidate_item_id": np.array([[manifest["padding_item_id"]]]),
    }
    # All outputs by name: up to bundle format 4 candidates had a default, which MLflow's signatures cannot have.
    return ModelCall(inputs, tuple(manifest["outputs"]))


def known_call(manifest: Mapping[str, Any], ingest_dir: Path) -> ModelCall:
    """A call for the first two users of a run's log."""
    users = Vocabulary.load(ingest_dir / "users.parquet")
    return example_call(manifest, users.take(np.arange(min(2, len(users)))).tolist())


def unknown_call(manifest: Mapping[str, Any]) -> ModelCall:
    """A call for one user, who need not be known."""
    return example_call(manifest, [0] if manifest["id_types"]["user_id"] == "int64" else [""])
