"""Folded-in users against a full refit: how much recall and NDCG fold-in loses.

A seeded share of the interactions of every new user with two interactions or more is held out, at least one. The new ids are folded in on
the rest. The refit trains on the old training interactions and the rest together, clustering included, with the run's own settings. Both
rank the same items for the same users, and so does the fallback that these users have without an update. Tables are rounded as they are
shipped. Interactions of the log between known ids are not used.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from contextlib import nullcontext
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graphhash.graph.interactions import edge_hash
from graphhash.maps.bucket_map import BucketMap
from graphhash.maps.fold_in import with_new_ids
from graphhash.metrics.ranking import capped_recall_at_k, ndcg_at_k, recall_at_k
from graphhash.models.mf import RetrievalModel
from pipeline.distributed.session import ray_session
from pipeline.distributed.shards import ShardedCsr
from pipeline.maps.methods import METHODS
from pipeline.retrieval.cluster import cluster_run
from pipeline.retrieval.defaults import precision_of
from pipeline.retrieval.evaluate import rank_users
from pipeline.retrieval.folded_in import FoldedIn
from pipeline.retrieval.objective import K
from pipeline.retrieval.stored import store_rounded
from pipeline.retrieval.train import train_method
from pipeline.retrieval.weights import load_method, with_more_ids
from pipeline.storage.atomic import PARTIAL
from pipeline.task import StageContext
from pipeline.training.job import TrainingSession, fit_job_of
from pipeline.training.machine import trains_on_ray
from pipeline.updates.fold_in import Trained, all_rows, assign, assigned_biases, with_unseen
from pipeline.updates.log import NewLog

_log = logging.getLogger(__name__)

# Means over the new users.
Ranking = TypedDict("Ranking", {"recall@20": float, "capped_recall@20": float, "ndcg@20": float})


class Comparison(TypedDict):
    """New users folded in, under the refit, and with the fallback.

    ``share_of_refit``: the figures of ``folded_in`` over those of ``refit``; None where the latter is 0. ``seconds``: of ``fold_in`` and
    of ``refit``.
    """

    n_users: int
    n_held_out: int
    folded_in: Ranking
    refit: Ranking
    fallback: Ranking
    share_of_refit: dict[str, float | None]
    seconds: dict[str, float]


def compare_with_refit(trained: Trained, known: FoldedIn, new: NewLog, *, share: float, seed: int) -> Comparison | None:
    """Recall@20 and NDCG@20 of the new users, folded in, under a refit, and unknown. None where no new user has two interactions.

    Args:
        share: of a new user's interactions that is held out, in (0, 1).
        seed: of the share that is held out.
    """
    rest, held_out = hold_out(new, share, seed)
    tested = np.flatnonzero(np.diff(held_out.indptr))
    if not len(tested):
        return None
    started = time.perf_counter()
    interactions = with_unseen(known.seen, rest)
    assignment = assign(trained, known, interactions)
    bias = np.concatenate([known.item_bias, assigned_biases(trained, known, interactions, assignment)])
    fold_in_seconds = round(time.perf_counter() - started, 2)
    # An unassigned item cannot be recommended.
    unassigned = new.n_known["items"] + np.flatnonzero(~assignment.is_assigned["items"])
    masked = interactions + _all_of(tested, unassigned, interactions.shape)
    precision = precision_of(trained.config, trained.method)

    rows = all_rows(known, assignment)

    def measured(users: BucketMap, of_users: NDArray[np.float32]) -> Ranking:
        maps = {"users": users, "items": assignment.maps["items"]}
        model = with_more_ids(trained.model, maps, bias, rows | {"users": of_users})
        return _measure(model, precision, tested, masked, held_out)

    folded_in = measured(assignment.maps["users"], rows["users"])
    fallback = measured(_all_unknown(known.maps["users"], new.n_new["users"]), known.rows["users"])
    _log.info("refit: %s interactions ...", f"{interactions.nnz:,}")
    started = time.perf_counter()
    refit = _measure(_refit(trained, interactions, held_out), precision, tested, interactions, held_out)
    return Comparison(
        n_users=len(tested),
        n_held_out=held_out.nnz,
        folded_in=folded_in,
        refit=refit,
        fallback=fallback,
        share_of_refit=_shares(folded_in, refit),
        seconds={"fold_in": fold_in_seconds, "refit": round(time.perf_counter() - started, 2)},
    )


def hold_out(new: NewLog, share: float, seed: int) -> tuple[csr_array, csr_array]:
    """The interactions of new ids to fold in on, and those of new users to test on, each of the log's shape.

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

    def of(rows: NDArray[np.bool_]) -> csr_array:
        return csr_array((weights[rows], (users[rows], items[rows])), shape=edges.shape)

    return of(~is_held_out), of(is_held_out)


def _refit(trained: Trained, interactions: csr_array, held_out: csr_array) -> RetrievalModel:
    """The method trained on ``interactions``, clustered anew, with the run's settings and its validation."""
    config = trained.config
    config = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, levels=(), shards=0))
    folder = trained.folder.path / f".refit{PARTIAL}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        context = StageContext(config, folder)
        # What is stored otherwise after its training is trained first.
        methods = [name for name in (METHODS[trained.method].trained_as, trained.method) if name is not None]
        for place in (folder / "ingest", folder / "cluster", *map(context.method_dir, methods)):
            place.mkdir(parents=True)
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
        session = TrainingSession(fit_job=fit_job_of(config))
        with ray_session(config.run.address) if trains_on_ray(config) else nullcontext():
            for method in methods:
                train_method(context, method, context.method_dir(method), session)
        return load_method(context.method_dir(trained.method), folder / "ingest")[0]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measure(
    model: RetrievalModel, precision: str, tested: NDArray[np.int64], seen: csr_array, held_out: csr_array
) -> Ranking:
    assert K == 20, "as the figures are named"
    store_rounded(model, precision)
    ranked, wanted = rank_users(model, tested, seen, K), held_out[tested]
    return {
        "recall@20": float(recall_at_k(ranked, wanted).mean()),
        "capped_recall@20": float(capped_recall_at_k(ranked, wanted).mean()),
        "ndcg@20": float(ndcg_at_k(ranked, wanted).mean()),
    }


def _shares(figures: Ranking, of: Ranking) -> dict[str, float | None]:
    pairs = {
        "recall@20": (figures["recall@20"], of["recall@20"]),
        "capped_recall@20": (figures["capped_recall@20"], of["capped_recall@20"]),
        "ndcg@20": (figures["ndcg@20"], of["ndcg@20"]),
    }
    return {name: figure / whole if whole else None for name, (figure, whole) in pairs.items()}


def _all_unknown(users: BucketMap, n_new: int) -> BucketMap:
    """The map with new ids after the known ones, which read what unknown ids read."""
    none = np.zeros(n_new, np.bool_)
    return with_new_ids(users, np.zeros((n_new, users.indices_per_id), np.int32), np.zeros(n_new, np.uint8), none)


def _all_of(users: NDArray[np.int64], items: NDArray[np.int64], shape: tuple[int, ...]) -> csr_array:
    """Every one of the users with every one of the items, as interactions."""
    pairs = np.repeat(users, len(items)), np.tile(items, len(users))
    return csr_array((np.ones(len(pairs[0]), np.float32), pairs), shape=shape)
