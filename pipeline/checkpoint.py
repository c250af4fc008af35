"""The trained weights of a method on disk: ``checkpoint/model.npz`` beside the bucket maps, plain arrays, no pickle.

``user_table`` and ``item_table`` are float32, shape (n_buckets, dim), the unknown ids' row last; ``item_bias`` is float32, shape
(n_items,), and there only where it was trained.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from graphhash.buckets import BucketMap
from graphhash.errors import DataError
from graphhash.retrieval import MatrixFactorization


def save_model(model: MatrixFactorization, method_dir: Path) -> None:
    """Write the trained tables to ``method_dir/checkpoint/model.npz``."""
    arrays = {"user_table": model.user_embedding.table, "item_table": model.item_embedding.table}
    if model.item_bias is not None:
        arrays["item_bias"] = model.item_bias
    (method_dir / "checkpoint").mkdir(exist_ok=True)
    np.savez(
        method_dir / "checkpoint" / "model.npz", **{name: value.detach().cpu().numpy() for name, value in arrays.items()}
    )


def load_method(method_dir: Path) -> tuple[MatrixFactorization, BucketMap, BucketMap]:
    """The trained model of a method and its bucket maps of users and items.

    Raises:
        DataError: a file is missing, damaged, or of another map.
    """
    users, items = BucketMap.load(method_dir / "users.npz"), BucketMap.load(method_dir / "items.npz")
    path = method_dir / "checkpoint" / "model.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            weights = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        bias = weights.get("item_bias")
        model = MatrixFactorization(users, items, weights["user_table"].shape[1], item_bias=bias is not None, seed=0)
        with torch.no_grad():
            model.user_embedding.table.copy_(weights["user_table"])
            model.item_embedding.table.copy_(weights["item_table"])
            if bias is not None:
                model.item_bias.copy_(bias)
    except Exception as error:
        raise DataError(f"{path}: not a readable checkpoint ({error}); run 'graphhash train' again") from error
    return model, users, items
