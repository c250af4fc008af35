"""What retrieval measures on the test, and its budget where none is given."""

from __future__ import annotations

from pipeline.task import Measure

MEASURES = (
    Measure("recall@20", "recall@20", "recall@20 on the test interactions"),
    Measure("ndcg@20", "NDCG@20", "NDCG@20 on the test interactions"),
)
DEFAULT_BUDGET = ("ratio", 0.25)
