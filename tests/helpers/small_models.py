"""Small retrieval models whose scores are exact in float32, and the obvious way to answer from them.

Tables hold small whole numbers and weights are multiples of one half, so every order of summing gives the
same score, ties are frequent, and answers can be compared with `==`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from graphhash.graph.vocabulary import Vocabulary
from graphhash.maps.bucket_map import BucketMap, full_map
from graphhash.maps.hashes import modulo_map
from graphhash.models.mf import MatrixFactorization
from pipeline.retrieval.export import ExportOptions, TrainedRetrieval, export_retrieval

FACTS = {"metrics": {"recall@20": 0.25}, "provenance": {"run": "test"}}
INT_IDS = [-(2**63), -7, -1, 0, 3, 12, 2**31, 2**53 + 1, 2**63 - 1]
STRING_IDS = ["", " ", "0", "a", "a\0b", "Ünïcode", "日本", "🙂", "x" * 300]


@dataclass(frozen=True)
class SmallModel:
    model: MatrixFactorization
    user_map: BucketMap
    item_map: BucketMap
    users: Vocabulary
    items: Vocabulary

    def export(self, out: Path, **options) -> dict:
        trained = TrainedRetrieval(self.model, self.user_map, self.item_map, self.users, self.items)
        facts = {name: options.pop(name, default) for name, default in FACTS.items()}
        return export_retrieval(trained, out, ExportOptions(**options), **facts)


def soft_map(n_ids: int, n_buckets: int, indices_per_id: int, rng: np.random.Generator) -> BucketMap:
    """Random buckets with weights 0, 0.5, 1 and 1.5."""
    rows = rng.integers(0, n_buckets, (n_ids + 1, indices_per_id)).astype(np.int32)
    codebook = np.concatenate([rng.integers(0, 4, (200, indices_per_id)) / 2, np.eye(1, indices_per_id)]).astype(
        np.float32
    )
    codes = rng.integers(0, 200, n_ids + 1).astype(np.uint8)
    rows[-1, 0], codes[-1] = n_buckets - 1, 200
    return BucketMap(rows, n_buckets, "soft", codebook=codebook, codes=codes)


def vocabulary(kind: str, n_ids: int) -> Vocabulary:
    """Boundary ids first, then plain ones; in this order, which is not ascending."""
    if kind == "int64":
        return Vocabulary(np.array([*INT_IDS, *range(100, 100 + n_ids)][:n_ids]))
    return Vocabulary([*STRING_IDS, *(f"id {i}" for i in range(n_ids))][:n_ids])


def small_model(
    users: str = "int64",
    items: str = "int64",
    maps: str = "soft",
    *,
    n_users: int = 14,
    n_items: int = 23,
    n_buckets: int = 6,
    item_bias: bool = True,
) -> SmallModel:
    rng = np.random.default_rng(0)
    makers = {
        "full": lambda n: full_map(n),
        "modulo": lambda n: modulo_map(n, n_buckets),
        "soft": lambda n: soft_map(n, n_buckets, 3, rng),
    }
    user_map, item_map = makers[maps](n_users), makers[maps](n_items)
    model = MatrixFactorization(user_map, item_map, 4, item_bias=item_bias, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.from_numpy(rng.integers(-2, 3, parameter.shape).astype(np.float32)))
    return SmallModel(model, user_map, item_map, vocabulary(users, n_users), vocabulary(items, n_items))


def naive_answer(small: SmallModel, user_id: int | str, k: int, exclude: list) -> tuple[list, list[float], bool]:
    """Item ids, scores, and whether the user is known: one user, one item, one lookup at a time."""

    def vector(bucket_map: BucketMap, table: torch.Tensor, entry: int) -> np.ndarray:
        total = np.zeros(table.shape[1])
        for row, weight in zip(bucket_map.rows[entry], bucket_map.weights[entry], strict=True):
            total += float(weight) * table[row].detach().numpy().astype(np.float64)
        return total

    user_ids, item_ids = small.users.ids.to_pylist(), small.items.ids.to_pylist()
    known = user_id in user_ids
    user = vector(small.user_map, small.model.user_embedding.table, user_ids.index(user_id) if known else len(user_ids))
    ranked = []
    for item, item_id in enumerate(item_ids):
        if item_id not in exclude:
            score = float(user @ vector(small.item_map, small.model.item_embedding.table, item))
            if small.model.item_bias is not None:
                score += float(small.model.item_bias.detach()[item])
            ranked.append((-score, item))
    ranked = sorted(ranked)[:k]
    return [item_ids[item] for _, item in ranked], [-score for score, _ in ranked], known
