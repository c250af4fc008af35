"""Running a bundle: numpy and onnxruntime alone.

retriever = serving.Retriever("out/bundle")
retriever.recommend([42], k=20).item_ids
scorer = serving.Scorer("ctr/bundle")
scorer.predict({"user_id": [42], "item_id": [7]})
serving.open_bundle("out/bundle")  # one of the two, by the task in the manifest
"""

from __future__ import annotations

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
