"""The evaluate stage: recall, NDCG and their like on the test interactions, and every byte of the model counted.

Training and validation items are left out of a user's ranking; users with nothing held out are left out of the mean; ties go to
the lower item row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graphhash.errors import DataError
from graphhash.maps.bucket_map import table_rows
from graphhash.metrics.ranking import recall_at_k, top_k
from graphhash.models.mf import RetrievalModel
from pipeline.config.run_config import RunConfig
from pipeline.distributed.session import run_tasks
from pipeline.distributed.shards import ShardedCsr
from pipeline.maps.derived import trained_facts
from pipeline.retrieval.accuracy import Parts, figures
from pipeline.retrieval.budget import full_bytes
from pipeline.retrieval.defaults import precision_of
from pipeline.retrieval.interactions import load_interactions
from pipeline.retrieval.stored import ShippedVectors, as_shipped, count_bytes
from pipeline.retrieval.weights import load_method
from pipeline.task import REFIT_PARTS

logger = logging.getLogger(__name__)

# Scores of one block of users and all items: float32, 64 MiB.
BLOCK_SCORES = 2**24
# Users whose scores are looked at, and the deviation of scores, of their size, below which they count as alike.
USERS_COMPARED, CONSTANT_SHARE = 1000, 1e-4
# Scores of a test, unless told otherwise: some 20 minutes of a core. And the fewest users.
MOST_SCORES, FEWEST_USERS = 10**11, 10_000
REMEDY = "try a lower --weight-decay, more epochs, or more rows"


def evaluate_method(config: RunConfig, method: str, ingest_dir: Path, method_dir: Path) -> dict[str, Any]:
    """Test a trained method.

    What the export stores is rounded to its precision first, so that the figures belong to what is shipped. With ``train.workers`` above 1
    as many Ray tasks rank a share of the users each; Ray must be running then.

    Returns: the figures of :func:`pipeline.retrieval.accuracy.figures`, ``unmeasured`` (why one is None, by key), ``warnings`` (of scores
        that tell users or items apart by nothing), ``k`` (the cut-offs), ``recall@20_float32`` (recall at the first
        cut-off, 20 by default, without the rounding; all None where there is no test set), ``n_test_users`` (ranked),
        ``n_users_with_test``, ``rows``, ``bytes`` (of
        tables, maps and bias), ``bytes_full``, ``bytes_ratio``, ``bytes_of``, ``precision``, ``indices_per_id``, ``item_bias``, and what
        :func:`pipeline.maps.derived.trained_facts` tells of the training.
    """
    model, users, items = load_method(method_dir, ingest_dir)
    precision = precision_of(config, method)
    parts = count_bytes(model, precision)
    metrics = _accuracy(config, method, precision, ingest_dir, method_dir)
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
        **trained_facts(method_dir),
    }


def _accuracy(config: RunConfig, method: str, precision: str, ingest_dir: Path, method_dir: Path) -> dict[str, Any]:
    """The figures of the test, from shares of the users ranked side by side."""
    cutoffs, n_shares = config.evaluate.cutoffs, config.train.workers or 1
    test = ShardedCsr.open(ingest_dir / "test").load()
    tested, n_with_test = users_to_rank(config, test), int(np.count_nonzero(np.diff(test.indptr)))
    if len(tested) < n_with_test:
        logger.info(
            "evaluate %s: ranks for %d of %d users with test items (evaluate.users)", method, len(tested), n_with_test
        )
    shares = [
        (precision, method, ingest_dir, method_dir, max(cutoffs), part) for part in np.array_split(tested, n_shares)
    ]
    ranked = [rank_share(*shares[0])] if n_shares == 1 else run_tasks(rank_share, shares, label=f"evaluate {method}")
    topk, as_trained = (np.concatenate(part) for part in list(zip(*ranked, strict=True))[:2])
    main = cutoffs[0]
    unrounded = float(recall_at_k(as_trained[:, :main], test[tested]).mean()) if len(tested) else None
    measured = figures(topk, tested, test, Parts.of(ShardedCsr.open(ingest_dir / "train").load()), cutoffs)
    return {
        "k": list(cutoffs),
        **measured,
        "unmeasured": _unmeasured(measured, len(tested)),
        "warnings": list(dict.fromkeys(warning for _, _, warnings in ranked for warning in warnings)),
        f"recall@{main}_float32": unrounded,
        "n_test_users": len(tested),
        "n_users_with_test": n_with_test,
    }


def users_to_rank(config: RunConfig, test: csr_array) -> NDArray[np.intp]:
    """The users that are ranked, ascending: those with something held out, or a sample of them (``evaluate.users``), the same for all
    methods and seeds of a training.

    Args:
        test: held-out interactions, shape (n_users, n_items).
    """
    users = np.flatnonzero(np.diff(test.indptr))
    most = most_users(config, test.shape[1])
    if 0 < most < len(users):
        users = np.sort(np.random.default_rng(0).choice(users, most, replace=False))
    return users


def most_users(config: RunConfig, n_items: int) -> int:
    """The most users that a test ranks; 0: all of them."""
    if config.evaluate.users is not None:
        return config.evaluate.users
    return max(FEWEST_USERS, MOST_SCORES // max(n_items, 1))


def rank_share(
    precision: str, method: str, ingest_dir: Path, method_dir: Path, k: int, users: NDArray[np.intp]
) -> tuple[NDArray[np.int32], NDArray[np.int32], list[str]]:
    """The top k items of some test users, as shipped, and as trained, without the rounding to ``precision``; and warnings where
    the scores tell users or items apart by nothing.

    Raises:
        DataError: ``precision`` cannot hold a value of a table.
    """
    model, _, _ = load_method(method_dir, ingest_dir)
    shipped = shipped_model(model, precision, method)
    seen = load_interactions(ingest_dir, REFIT_PARTS)
    ranked, warnings = [np.empty((0, k), np.int32)], list[str]()
    for topk, scores in ranked_blocks(shipped, users, seen, k):
        if len(ranked) == 1:
            warnings = constant_warnings(scores[:USERS_COMPARED])
        ranked.append(topk)
    of_shipped = np.concatenate(ranked)
    return of_shipped, of_shipped if precision == "float32" else rank_users(model, users, seen, k), warnings


def constant_warnings(scores: NDArray[np.float32]) -> list[str]:
    """A warning where scores hardly differ between items, or between users, else none.

    Args:
        scores: of users and all items, shape (n_users, n_items).
    """
    of_items = float(scores.std(axis=1).max(initial=0.0))
    if of_items <= CONSTANT_SHARE * float(np.abs(scores).max(initial=0.0)):
        return [f"gives all items nearly the same score: it may be held down; {REMEDY}"]
    if len(scores) > 1 and float(scores.std(axis=0).max()) <= CONSTANT_SHARE * of_items:
        return [f"ranks items nearly alike for all users, as popularity does: it may be held down; {REMEDY}"]
    return []


def _unmeasured(measured: dict[str, Any], n_tested: int) -> dict[str, str]:
    """Why a measure is None, by key."""
    missing = [key for key, value in measured.items() if value is None]
    return dict.fromkeys(
        missing, "no test interaction is of this part" if n_tested else "there are no test interactions"
    )


def shipped_model(model: RetrievalModel, precision: str, method: str) -> RetrievalModel | ShippedVectors:
    """:func:`as_shipped` for a method of a run.

    Raises:
        DataError: ``precision`` cannot hold a value of a table.
    """
    try:
        return as_shipped(model, precision)
    except ValueError as error:
        raise DataError(
            f"method {method!r}: a table holds {error}; train with a lower learning rate, or use float32"
        ) from error


def rank_users(
    model: RetrievalModel | ShippedVectors,
    users: NDArray[np.integer],
    seen: csr_array,
    k: int,
    lap: Callable[[str], None] = lambda phase: None,
) -> NDArray[np.int32]:
    """The top k items of users, all items ranked in blocks of users.

    Args:
        model: on any device; the scores come from there, the ranking is done here.
        users: rows, shape (n,).
        seen: items to leave out, shape (n_users, n_items).
        k: slots.
        lap: told the name of every phase when it is over: scores, ranking.

    Returns: item rows, best first, shape (n, k); -1 marks an empty slot.

    Raises:
        DataError: a score is NaN.
    """
    ranked = [items for items, _ in ranked_blocks(model, users, seen, k, lap)]
    return np.concatenate([np.empty((0, k), np.int32), *ranked])


@torch.no_grad()
def ranked_blocks(
    model: RetrievalModel | ShippedVectors,
    users: NDArray[np.integer],
    seen: csr_array,
    k: int,
    lap: Callable[[str], None] = lambda phase: None,
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.float32]]]:
    """The ranking of :func:`rank_users` block by block, in the order of the users: items, and the scores of all items."""
    device = model.item_embedding.device
    scores_of = model.score_all_items()
    block = max(1, BLOCK_SCORES // model.item_embedding.n_ids)
    for start in range(0, len(users), block):
        part = users[start : start + block]
        scores = scores_of(torch.from_numpy(np.asarray(part, np.int64)).to(device)).cpu().numpy()
        lap("scores")
        try:
            ranked = top_k(scores, k, seen[part])
        except ValueError as error:
            raise DataError(str(error)) from error
        lap("ranking")
        yield ranked, scores
