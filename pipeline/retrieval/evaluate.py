"""The evaluate stage: Recall@20 and NDCG@20 on the test interactions, and every byte of the model counted.

Training and validation items are left out of a user's ranking; users with nothing held out are left out of the mean; ties go to
the lower item row.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graphhash.errors import DataError
from graphhash.maps.bucket_map import table_rows
from graphhash.metrics.ranking import ndcg_at_k, recall_at_k, top_k
from graphhash.models.mf import RetrievalModel
from pipeline.config.run_config import RunConfig
from pipeline.distributed.session import run_tasks
from pipeline.distributed.shards import ShardedCsr
from pipeline.retrieval.budget import full_bytes
from pipeline.retrieval.defaults import precision_of
from pipeline.retrieval.stored import ShippedVectors, as_shipped, count_bytes
from pipeline.retrieval.weights import load_method

K = 20
# Scores of one block of users and all items: float32, 64 MiB.
BLOCK_SCORES = 2**24


def evaluate_method(config: RunConfig, method: str, ingest_dir: Path, method_dir: Path) -> dict[str, Any]:
    """Test a trained method.

    What the export stores is rounded to its precision first, so that the figures belong to what is shipped. With ``train.workers`` above 1
    as many Ray tasks rank a share of the users each; Ray must be running then.

    Returns: ``recall@20``, ``ndcg@20``, ``recall@20_float32`` (without the rounding; all None where there is no test set),
        ``n_test_users``, ``rows``, ``bytes`` (of tables, maps and bias), ``bytes_full``, ``bytes_ratio``, ``bytes_of``, ``precision``,
        ``indices_per_id``, ``item_bias``.
    """
    model, users, items = load_method(method_dir, ingest_dir)
    precision = precision_of(config, method)
    parts = count_bytes(model, precision)
    n_shares = config.train.workers or 1
    shares = [(precision, method, ingest_dir, method_dir, number, n_shares) for number in range(n_shares)]
    ranked = [rank_share(*shares[0])] if n_shares == 1 else run_tasks(rank_share, shares, label=f"evaluate {method}")
    recall, ndcg, as_trained = (np.concatenate(part) for part in zip(*ranked, strict=True))
    unrounded = f"recall@{K}_float32"
    metrics: dict[str, Any] = {f"recall@{K}": None, f"ndcg@{K}": None, unrounded: None, "n_test_users": len(recall)}
    if len(recall):
        metrics |= {
            f"recall@{K}": float(recall.mean()),
            f"ndcg@{K}": float(ndcg.mean()),
            unrounded: float(as_trained.mean()),
        }
    total, full = sum(parts.values()), full_bytes(users.n_ids, items.n_ids, config.train.dim)
    return metrics | {
        "rows": table_rows(users, items),
        "bytes": total,
        "bytes_full": full,
        "bytes_ratio": total / full,
        "bytes_of": parts,
        "precision": precision,
        "indices_per_id": users.indices_per_id,
        "item_bias": model.item_bias is not None,
    }


def rank_share(
    precision: str, method: str, ingest_dir: Path, method_dir: Path, number: int, n_shares: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Recall and NDCG of a share of the test users, and their recall without the rounding to ``precision``.

    Raises:
        DataError: ``precision`` cannot hold a value of a table.
    """
    model, _, _ = load_method(method_dir, ingest_dir)
    try:
        shipped = as_shipped(model, precision)
    except ValueError as error:
        raise DataError(
            f"method {method!r}: a table holds {error}; train with a lower learning rate, or use float32"
        ) from error
    test = ShardedCsr.open(ingest_dir / "test").load()
    users = np.array_split(np.flatnonzero(np.diff(test.indptr)), n_shares)[number]
    if not len(users):
        return np.empty(0), np.empty(0), np.empty(0)
    seen = ShardedCsr.open(ingest_dir / "train").load() + ShardedCsr.open(ingest_dir / "validation").load()
    recall, ndcg = rank_users(shipped, users, seen, test, K)
    return recall, ndcg, recall if precision == "float32" else rank_users(model, users, seen, test, K)[0]


@torch.no_grad()
def rank_users(
    model: RetrievalModel | ShippedVectors,
    users: NDArray[np.integer],
    seen: csr_array,
    relevant: csr_array,
    k: int,
    on_block: Callable[[int], None] = lambda n: None,
    lap: Callable[[str], None] = lambda phase: None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Recall@k and NDCG@k of users, ranking all items in blocks of users.

    Args:
        model: on any device; the scores come from there, the ranking is done here.
        users: rows, shape (n,), each with something relevant.
        seen: items to leave out, shape (n_users, n_items).
        relevant: held-out items, same shape.
        k: slots.
        on_block: told how many users each block held.
        lap: told the name of every phase when it is over: scores, ranking, metrics.

    Returns: two arrays of shape (n,).

    Raises:
        DataError: a score is NaN.
    """
    device = model.item_embedding.device
    scores_of = model.score_all_items()
    block = max(1, BLOCK_SCORES // model.item_embedding.n_ids)
    recalls, ndcgs = [np.empty(0)], [np.empty(0)]
    for start in range(0, len(users), block):
        part = users[start : start + block]
        scores = scores_of(torch.from_numpy(np.asarray(part, np.int64)).to(device)).cpu().numpy()
        lap("scores")
        try:
            ranked = top_k(scores, k, seen[part])
        except ValueError as error:
            raise DataError(str(error)) from error
        lap("ranking")
        recalls.append(recall_at_k(ranked, relevant[part]))
        ndcgs.append(ndcg_at_k(ranked, relevant[part]))
        lap("metrics")
        on_block(len(part))
    return np.concatenate(recalls), np.concatenate(ndcgs)
