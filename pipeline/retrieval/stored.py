"""A trained retrieval model once it is stored: its numbers rounded to the stored precision, and the bytes of each part."""

from __future__ import annotations

import copy

import torch

from graphhash.maps.quantization import bias_bytes, rounded, rounded_bias
from graphhash.models.lightgcn import LightGCN
from graphhash.models.mf import AllItemScores, RetrievalModel, product_of_all_items
from graphhash.nn.compressed import StoredTable


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

    Where scores are cosines, the rounded vectors are scaled to length 1 again.

    Attributes:
        vectors: of users, the unknown one last, and of items, float32, on the model's device.
    """

    def __init__(self, model: LightGCN, precision: str) -> None:
        self.item_embedding = model.item_embedding
        self.item_bias: torch.Tensor | None = model.item_bias
        device = model.item_embedding.device
        self.vectors = [
            model.scaled(torch.from_numpy(rounded(v.cpu().numpy(), precision)).to(device))
            for v in model.vectors_with_oov()
        ]
        if model.item_bias is not None:
            bias = rounded_bias(model.item_bias.detach().cpu().numpy(), precision)
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
    for table, stored_in in tables(model, precision):
        table.copy_(torch.from_numpy(rounded(table.cpu().numpy(), stored_in)))
    if model.item_bias is not None:
        model.item_bias.copy_(torch.from_numpy(rounded_bias(model.item_bias.cpu().numpy(), precision)))


def tables(model: RetrievalModel, precision: str) -> list[StoredTable]:
    """The parameters of both embeddings that are stored row by row; one that users and items share is there once."""
    both = model.user_embedding.stored_tables(precision) + model.item_embedding.stored_tables(precision)
    return list({id(stored.table): stored for stored in both}.values())


def count_bytes(model: RetrievalModel, precision: str) -> dict[str, int]:
    """Bytes of each stored part: ``tables`` in ``precision``, ``maps`` (rows, codes and weights) and ``bias``.

    ``layers`` are all other parameters, in float32: NeuMF's network, and what an embedding has beside its tables. LightGCN cannot answer
    without its ``graph``, counted as one int32 an edge and one int64 a user.
    """
    stored = tables(model, precision)
    parts = {
        "tables": sum(table.n_bytes for table in stored),
        "maps": model.user_embedding.map_bytes + model.item_embedding.map_bytes,
        "bias": 0 if model.item_bias is None else bias_bytes(model.item_bias.numel(), precision),
    }
    apart = {id(table.table) for table in stored} | {id(model.item_bias)}
    if layers := sum(4 * weight.numel() for weight in model.parameters() if id(weight) not in apart):
        parts["layers"] = layers
    if isinstance(model, LightGCN):
        parts["graph"] = 4 * len(model.indices_of_users) + 8 * len(model.indptr_of_users)
    return parts
