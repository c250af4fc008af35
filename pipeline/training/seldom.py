"""Which embeddings of a model a training step reads seldom, so that :class:`graphhash.nn.row_adam.RowAdam` is faster than Adam."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from graphhash.nn.embedding import BucketEmbedding

# A table is seldom read if a step reads at most one of this many of its rows.
SELDOM = 8


def seldom_embeddings(reads: Iterable[tuple[BucketEmbedding, int]]) -> list[BucketEmbedding]:
    """The embeddings whose tables are seldom read; none off the CPU.

    Args:
        reads: every embedding with the number of ids that a step looks up in it. Embeddings may share a table.
    """
    found: list[BucketEmbedding] = []
    rows_read: dict[Tensor, int] = {}
    for embedding, n_ids in reads:
        rows_read[embedding.table] = rows_read.get(embedding.table, 0) + n_ids * embedding.indices_per_id
        found.append(embedding)
    return [e for e in found if e.table.device.type == "cpu" and rows_read[e.table] * SELDOM <= len(e.table)]
