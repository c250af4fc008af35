"""How far placed users fall below trained ones: the run placed without a share of their interactions, against a full refit.

Of every new user with two interactions or more, a seeded share of them is held out, at least one. The new ids are placed on the rest, with
everything else frozen; and a model is made from nothing on the old training interactions and the rest together, clustering included, with
the run's own settings. Both rank the same items for the same users, and so does the fallback that these users have without an update.
Tables are rounded as they are shipped. Interactions of the log between known ids take no part.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from graphhash.graph.interactions import edge_hash
from graphhash.maps.placement import with_new_ids
from graphhash.models.mf import RetrievalModel
from pipeline.distributed.session import ray_session
from pipeline.distributed.shards import ShardedCsr
from pipeline.retrieval.cluster import cluster_run
from pipeline.retrieval.evaluate import K, rank_users, store_rounded
from pipeline.retrieval.placed import Placed
from pipeline.retrieval.train import train_method
from pipeline.retrieval.weights import load_method, with_more_ids
from pipeline.storage.atomic import PARTIAL
from pipeline.tracking.tracker import Tracker
from pipeline.updates.log import NewLog
from pipeline.updates.update import Trained, find_places, new_biases, user_rows, with_unseen

_log = logging.getLogger(__name__)


def compare_with_refit(
    trained: Trained, known: Placed, new: NewLog, *, share: float, seed: int
) -> dict[str, Any] | None:
    """Recall@20 and NDCG@20 of the new users, placed, trained anew, and unknown.

    Args:
        share: of a new user's interactions that is held out, in (0, 1).
        seed: draws them.

    Returns: ``n_users``, ``n_held_out``, and ``placed``, ``refit`` and ``fallback`` with ``recall@20`` and ``ndcg@20`` each;
    ``share_of_refit`` with the ratios of the first two; ``seconds`` of placing and of the refit.
    None where no new user has two interactions.
    """
    rest, held_out = hold_out(new, share, seed)
    tested = np.flatnonzero(np.diff(held_out.indptr))
    if not len(tested):
        return None
    started = time.perf_counter()
    interactions = with_unseen(known.seen, rest)
    places = find_places(trained, known, interactions)
    bias = np.concatenate([known.item_bias, new_biases(trained, interactions, new.n_known["items"])])
    seconds = {"place": round(time.perf_counter() - started, 2)}
    unknown = with_new_ids(
        known.maps["users"], np.zeros((new.n_new["users"], known.maps["users"].indices_per_id)), np.zeros(new.n_new["users"], np.uint8),
        np.zeros(new.n_new["users"], np.bool_),
    )  # fmt: skip
    # An item without a place cannot be recommended.
    masked = interactions + _all_of(
        tested, new.n_known["items"] + np.flatnonzero(~places.has_place["items"]), interactions.shape
    )
    precision = trained.config.precision_of(trained.method)
    result: dict[str, Any] = {"n_users": len(tested), "n_held_out": held_out.nnz}
    for name, users, rows in (
        ("placed", places.maps["users"], user_rows(known, places)),
        ("fallback", unknown, known.user_rows),
    ):
        model = with_more_ids(trained.model, {"users": users, "items": places.maps["items"]}, bias, rows)
        result[name] = _measure(model, precision, tested, masked, held_out)
    _log.info("refit: %s interactions ...", f"{interactions.nnz:,}")
    started = time.perf_counter()
    result["refit"] = _measure(_refit(trained, interactions, held_out), precision, tested, interactions, held_out)
    seconds["refit"] = round(time.perf_counter() - started, 2)
    result["share_of_refit"] = {
        key: result["placed"][key] / value if value else None for key, value in result["refit"].items()
    }
    return result | {"seconds": seconds}


def hold_out(new: NewLog, share: float, seed: int) -> tuple[csr_array, csr_array]:
    """The interactions of new ids to place on, and those of new users to test on, each of the log's shape.

    A user's interactions of lowest hash are held out (``graphhash.graph.interactions``), but not all of a new item's.
    """
    edges = new.graph.tocoo()
    users, items = edges.coords
    has_new_end = (users >= new.n_known["users"]) | (items >= new.n_known["items"])
    users, items, weights = users[has_new_end], items[has_new_end], edges.data[has_new_end]
    order = np.lexsort((edge_hash(users, items, seed=seed), users))
    counts = np.bincount(users, minlength=edges.shape[0])
    rank = np.empty(len(users), np.int64)
    rank[order] = np.arange(len(users)) - np.repeat(np.cumsum(counts) - counts, counts)
    n_held_out = np.where(counts > 1, np.maximum(1, np.round(share * counts)), 0)
    n_held_out = np.minimum(n_held_out, np.maximum(counts - 1, 0))
    n_held_out[: new.n_known["users"]] = 0
    is_held_out = rank < n_held_out[users]
    lost = np.bincount(items[~is_held_out], minlength=edges.shape[1]) == 0
    lost[: new.n_known["items"]] = False
    is_held_out &= ~lost[items]
    parts = []
    for part in (~is_held_out, is_held_out):
        parts.append(csr_array((weights[part], (users[part], items[part])), shape=edges.shape))
    return parts[0], parts[1]


def _refit(trained: Trained, interactions: csr_array, held_out: csr_array) -> RetrievalModel:
    """The method trained on ``interactions``, clustered anew, with the run's settings and its validation."""
    config = trained.config
    config = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, levels=(), shards=0))
    folder = trained.folder.path / f".refit{PARTIAL}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        for name in ("ingest", "cluster", "method"):
            (folder / name).mkdir(parents=True)
        validation = ShardedCsr.open(trained.folder.path / "ingest" / "validation").load()
        users, items = validation.tocoo().coords
        graphs = {
            "train": interactions,
            "train_by_item": csr_array(interactions.T),
            "validation": csr_array((validation.data, (users, items)), shape=interactions.shape),
            "test": held_out,
        }
        for name, graph in graphs.items():
            ShardedCsr.write(folder / "ingest" / name, graph, n_shards=config.data.shards)
        cluster_run(config, folder / "ingest", folder / "cluster")
        with ray_session(config.run.address):
            train_method(config, trained.method, folder / "ingest", folder / "cluster", folder / "method", Tracker())
        return load_method(folder / "method", folder / "ingest")[0]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measure(
    model: RetrievalModel, precision: str, tested: np.ndarray, seen: csr_array, held_out: csr_array
) -> dict[str, float]:
    store_rounded(model, precision)
    recall, ndcg = rank_users(model, tested, seen, held_out, K)
    return {f"recall@{K}": float(recall.mean()), f"ndcg@{K}": float(ndcg.mean())}


def _all_of(users: np.ndarray, items: np.ndarray, shape: tuple[int, int]) -> csr_array:
    """Every one of the users with every one of the items."""
    pairs = np.repeat(users, len(items)), np.tile(items, len(users))
    return csr_array((np.ones(len(pairs[0]), np.float32), pairs), shape=shape)
