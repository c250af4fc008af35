"""Running a bundle: numpy and onnxruntime alone.

retriever = serving.Retriever("out/bundle")
retriever.recommend([42], k=20).item_ids
scorer = serving.Scorer("clicks/bundle")
scorer.predict({"user_id": [42], "item_id": [7]})
"""

from __future__ import annotations

from serving.bundle import BundleError, check_bundle
from serving.retriever import Recommendations, Retriever, Scores
from serving.scorer import Predictions, Scorer

__all__ = ["BundleError", "Predictions", "Recommendations", "Retriever", "Scorer", "Scores", "check_bundle"]
