"""Running a bundle: numpy and onnxruntime alone.

retriever = serving.Retriever("out/bundle")
retriever.recommend([42], k=20).item_ids
scorer = serving.Scorer("ctr/bundle")
scorer.predict({"user_id": [42], "item_id": [7]})
serving.open_bundle("out/bundle")  # one of the two, by the task in the manifest
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Read when onnxruntime is imported. Its builds send figures of every session to their maker, and keep a device's number in the home folder.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from serving.bundle import check_bundle
    from serving.errors import BundleError
    from serving.retriever import Recommendations, Retriever, Scores
    from serving.scorer import Predictions, Scorer
    from serving.tasks import open_bundle

__all__ = [
    "BundleError",
    "Predictions",
    "Recommendations",
    "Retriever",
    "Scorer",
    "Scores",
    "check_bundle",
    "open_bundle",
]

# Imported when asked for: training reads `serving.values`, and needs no onnxruntime for that.
_MODULES = {
    "BundleError": "errors",
    "Predictions": "scorer",
    "Recommendations": "retriever",
    "Retriever": "retriever",
    "Scorer": "scorer",
    "Scores": "retriever",
    "check_bundle": "bundle",
    "open_bundle": "tasks",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'serving' has no attribute {name!r}")
    try:
        return getattr(import_module(f"serving.{_MODULES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        raise ModuleNotFoundError(
            f"serving.{name} needs onnxruntime, which is not installed; pip install 'graphhash[serve]', or 'graphhash[serve-gpu]' for CUDA",
            name=error.name,
        ) from None
