"""The interactions that a model is trained on: those of one or several parts of the ingested log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scipy.sparse import csr_array

from pipeline.distributed.shards import ShardedCsr


def load_interactions(ingest_dir: Path, parts: Sequence[str]) -> csr_array:
    """The interactions of some parts together, float32, shape (n_users, n_items).

    Args:
        parts: such as "train" and "validation"; all parts have the same ids.

    Raises:
        DataError: a file is missing or damaged.
    """
    total, *others = (ShardedCsr.open(ingest_dir / part).load() for part in parts)
    for graph in others:
        total = total + graph
    return total
