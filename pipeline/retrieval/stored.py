"""A trained retrieval model once it is stored: its numbers rounded to the stored precision, and the bytes of each part."""

from __future__ import annotations

import copy

import numpy as np
import torch

from graphhash.maps.bucket_map import BucketMap
from graphhash.maps.quantization import bias_dtype, rounded, row_bytes
from graphhash.models.lightgcn import LightGCN
from graphhash.models.mf import AllItemScores, RetrievalModel, product_of_all_items


@torch.no_grad()
def as_shipped(model: RetrievalModel, precision: str) -> RetrievalModel | ShippedVectors:
    """What answers once the export has stored ``model`` in ``precision``; ``model`` stays as it is.

    Raises:
        ValueError: int8 cannot hold a value.
    """
    if isinstance(model, LightGCN):
        return ShippedVectors(model, precision)
    rounded_model = copy.deepcopy(model)
    store_rounded(rounded_model, precision)
    return rounded_model


class ShippedVectors:
    """LightGCN as it is exported: vectors propagated in float32 and then rounded, a row for every id and one for unknown users.

    Attributes:
        vectors: of users, the unknown one last, and of items, float32, on the model's device.
    """

    def __init__(self, model: LightGCN, precision: str) -> None:
        self.item_embedding = model.item_embedding
        self.item_bias: torch.Tensor | None = model.item_bias
        device = model.item_embedding.table.device
        self.vectors = [
            torch.from_numpy(rounded(v.cpu().numpy(), precision)).to(device) for v in model.vectors_with_oov()
        ]
        if model.item_bias is not None:
            bias = rounded(model.item_bias.detach().cpu().numpy(), bias_dtype(precision))
            self.item_bias = torch.from_numpy(bias).to(device)

    def score_all_items(self) -> AllItemScores:
        """Scores of every item for each user, as ``LightGCN.score_all_items``."""
        users, items = self.vectors
        return lambda rows: product_of_all_items(users[rows], items[:-1], self.item_bias)


@torch.no_grad()
def store_rounded(model: RetrievalModel, precision: str) -> None:
    """Put into the tables and the bias of ``model``, on any device, what is left of them once stored in ``precision``.

    Raises:
        ValueError: int8 cannot hold a value.
    """
    for table in tables(model):
        table.copy_(torch.from_numpy(rounded(table.cpu().numpy(), precision)))
    if model.item_bias is not None:
        model.item_bias.copy_(torch.from_numpy(rounded(model.item_bias.cpu().numpy(), bias_dtype(precision))))


def tables(model: RetrievalModel) -> list[torch.nn.Parameter]:
    """The tables of a model: two, or the one that users and items share."""
    users, items = model.user_embedding.table, model.item_embedding.table
    return [users] if users is items else [users, items]


def count_bytes(model: RetrievalModel, users: BucketMap, items: BucketMap, precision: str) -> dict[str, int]:
    """Bytes of each stored part: ``tables`` in ``precision``, ``maps`` (rows and weights) and ``bias``.

    NeuMF has its network's ``layers`` as well; LightGCN cannot answer without its ``graph``, counted as one int32 an edge and one
    int64 a user.
    """
    parts = {
        "tables": sum(table.shape[0] * row_bytes(table.shape[1], precision) for table in tables(model)),
        "maps": users.nbytes + items.nbytes,
        "bias": 0 if model.item_bias is None else np.dtype(bias_dtype(precision)).itemsize * model.item_bias.numel(),
    }
    apart = {"item_bias", "user_embedding.table", "item_embedding.table"}
    if layers := sum(4 * weight.numel() for name, weight in model.named_parameters() if name not in apart):
        parts["layers"] = layers
    if isinstance(model, LightGCN):
        parts["graph"] = 4 * len(model.indices_of_users) + 8 * len(model.indptr_of_users)
    return parts
