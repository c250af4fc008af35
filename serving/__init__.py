"""Running a bundle: numpy and onnxruntime alone.

retriever = serving.Retriever("out/bundle")
retriever.recommend([42], k=20).item_ids
"""

from __future__ import annotations

from serving.bundle import BundleError, check_bundle
from serving.retriever import Recommendations, Retriever, Scores

__all__ = ["BundleError", "Recommendations", "Retriever", "Scores", "check_bundle"]
