"""What a retrieval model's graph stores: tables, bucket maps and the bias; and what of them a session materializes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from graphhash.maps.bucket_map import BucketMap, full_map
from graphhash.maps.vector_codes import VectorCodes
from graphhash.models.lightgcn import LightGCN
from graphhash.models.mf import RetrievalModel, VectorModel
from graphhash.nn.codes import CodeEmbedding
from graphhash.nn.compressed import CompressedEmbedding
from graphhash.nn.embedding import BucketEmbedding
from graphhash.nn.residual import ResidualEmbedding
from pipeline.export.layers import as_array

# Numbers of a table, 64 MiB, up to which a materialized graph reads it in float32.
_TABLE_VALUES = 2**24
# Numbers of users' vectors, 64 MiB, up to which they are materialized as well; more users are read from the table on request, which took
# 3 to 6 % of a request's time on Gowalla.
_USER_VALUES = 2**24
# Bytes of table rows that are read in one piece (`pipeline.retrieval.onnx_scores`).
_PIECE_BYTES = 2**28


@dataclass(frozen=True)
class Residual:
    """Numbers of ids' own, float32, shape (n_ids + 1, own_dim), in ``bits`` beside tables in int8 or int4, and their projection."""

    own: NDArray[np.float32]
    bits: int
    projection: NDArray[np.float32]


@dataclass(frozen=True)
class Parts:
    """What of a model is stored: tables, float32, shape (n_rows, dim), or codes, the maps into them, and the bias.

    Args:
        cosine: vectors are scaled to length 1 when they are read.
        user_residual, item_residual: what is added to the vectors read from the tables; None: nothing.
    """

    user_table: NDArray[np.float32] | VectorCodes
    item_table: NDArray[np.float32] | VectorCodes
    user_map: BucketMap
    item_map: BucketMap
    item_bias: NDArray[np.float32] | None
    cosine: bool = False
    user_residual: Residual | None = None
    item_residual: Residual | None = None

    @property
    def dim(self) -> int:
        return self.user_table.shape[1]


@torch.no_grad()
def stored_parts(model: RetrievalModel, user_map: BucketMap, item_map: BucketMap) -> Parts:
    """The tables and maps that a graph stores of a model: LightGCN's vectors are tables of their own, with a row for every id."""
    bias = None if model.item_bias is None else as_array(model.item_bias)
    cosine = isinstance(model, VectorModel) and model.cosine
    of_users, of_items = model.user_embedding, model.item_embedding
    if not isinstance(model, LightGCN):
        tables = _table(of_users), _table(of_items)
        return Parts(*tables, user_map, item_map, bias, cosine, _residual(of_users), _residual(of_items))
    users, items = (as_array(of_side) for of_side in model.vectors_with_oov())
    return Parts(users, items, full_map(user_map.n_ids), full_map(item_map.n_ids), bias, cosine)


def _table(embedding: CompressedEmbedding) -> NDArray[np.float32] | VectorCodes:
    """What is stored of an embedding: its table, without what a residual adds, its codes, or, of any other kind, all vectors, that
    of the OOV id last."""
    if isinstance(embedding, BucketEmbedding):
        return as_array(embedding.table)
    if isinstance(embedding, CodeEmbedding):
        return embedding.vector_codes()
    if isinstance(embedding, ResidualEmbedding):
        return as_array(embedding.mixture.table)
    return as_array(embedding(torch.arange(embedding.n_ids + 1, device=embedding.device)))


def stores_vectors(model: RetrievalModel) -> bool:
    """Whether a graph holds a vector of every id, because it cannot compute them from what the model stores."""
    known = (BucketEmbedding, CodeEmbedding, ResidualEmbedding)
    return not isinstance(model, LightGCN) and not isinstance(model.user_embedding, known)


def _residual(embedding: CompressedEmbedding) -> Residual | None:
    if not isinstance(embedding, ResidualEmbedding):
        return None
    assert embedding.projection is not None, "full tables beside a mixture are trained, and never stored"
    return Residual(as_array(embedding.own.table), embedding.own_bits, as_array(embedding.projection))


def materialized_users(user_map: BucketMap, dim: int) -> int:
    """How many users' vectors a materialized graph keeps beside what is stored."""
    return user_map.n_ids if user_map.codebook is not None and user_map.n_ids * dim <= _USER_VALUES else 0


def unpacked_rows(bucket_map: BucketMap, dim: int) -> int:
    """How many rows of a map's table a materialized graph keeps in float32 beside what is stored; a full one stays as it is."""
    return 0 if bucket_map.identity or bucket_map.n_buckets * dim > _TABLE_VALUES else bucket_map.n_buckets


def materialized_bytes(user_map: BucketMap, item_map: BucketMap, dim: int, n_biases: int) -> tuple[int, int]:
    """About what a session of a materialized graph keeps beside what is stored, and what it needs for that while it loads, in bytes."""
    n_users, n_rows = materialized_users(user_map, dim), unpacked_rows(item_map, dim)
    n_rows += 0 if user_map.shared else unpacked_rows(user_map, dim)
    n_vectors = item_map.n_ids + 1 + n_users
    kept = 4 * dim * (n_vectors + n_rows) + 4 * n_biases
    read = 4 * dim * (item_map.n_ids * item_map.indices_per_id + n_users * user_map.indices_per_id)
    # ONNX Runtime keeps every step until all is folded, and the one at hand twice: a table is unpacked in eight, a vector made in four.
    return kept, kept + read + min(read, _PIECE_BYTES) + 4 * dim * (3 * n_vectors + 7 * n_rows)
