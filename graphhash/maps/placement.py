"""Placing new ids: users and items that a later log brings, put beside the trained ones with everything else frozen.

Trained tables, the rows of trained ids, their communities and their degrees stay as they are, so an id's place depends on its own
interactions, and on those of the new ids that it met, but not on what else a log holds. Its *community* is the one of largest gain of
modularity (:func:`place_labels`); its *affinities* are those that a trained id with the same interactions has (:func:`soft_rows`);
an item's *bias* is what items of its degree have (:func:`typical_bias`). A hash needs no interactions (``graphhash.maps.hashes``). Where trained
users read rows of their own, a mixture of other users' rows is worth less than a *row of its own*, solved from what a user used
(:func:`solved_vectors`, :func:`with_own_rows`).

Order of new ids that met each other: items first, from the users that are known; then users, from known items and those just placed; then
both again, from all that have a place by then, until a round places no further id. An id is left without a place when nobody that it met
has one; it then reads the unknown ids' row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, vstack

from graphhash.clustering.labels import Labels
from graphhash.maps.bucket_map import BucketMap
from graphhash.maps.codebook import nearest_codes
from graphhash.maps.community_maps import SIDES, SoftPlan, affinity_rows, one_hot

# Trained items next in degree whose mean bias a new one gets. On MovieLens-1M an item's bias is off the mean over its neighbours in degree
# by .54 of the biases' standard deviation for 16 of them, .53 for 64 and for 256; 0 is off by 1.05.
SIMILAR_ITEMS = 64

# How much a solved vector is drawn to zero and away from all items, in mean squared lengths of items' vectors. Validation recall of trained
# users whose vectors are solved anew: MovieLens-1M .262 with 0.6, .289 with 1.7, .278 with 5.8; Gowalla .177, .172 with 1.9, .158 with 6.4.
SHRINKAGE = 2.0
# Users solved at a time, and pairs whose mean score is taken.
_SOLVED, _PAIRS = 1024, 200_000

Sides = Mapping[str, NDArray]


def place_labels(graph: csr_array, labels: Labels, placed: Sides, edges: csr_array) -> dict[str, NDArray[np.int32]]:
    """Communities of new users and items.

    A user u joins the community c of largest ``w(u,c)/m - g k_u D_c / m^2``, with w(u,c) the weight of its interactions with items of c,
    k_u that of all its interactions with items that have a place, D_c and m the trained items' degrees in c and in all, and g the labels'
    resolution; items the same way. Only communities that have a row in the side's table are open, and ties go to the lowest. The largest
    gain may be negative: alone, an id would have no row. Where none of the communities that it met is open, it joins the one of those who
    share its trained neighbours: the largest weight after two steps, each neighbour's scaled to 1.

    Args:
        graph: training interactions.
        labels: of the trained ids.
        placed: communities of ids that were placed earlier and follow the trained ones, by side, int32.
        edges: interactions with at least one end that is not trained, shape (all users, all items); rows go on from those of ``placed``.

    Returns: communities of all ids by side, int32, shape (n_ids,); -1 for an id without a place.
    """
    trained = {"users": labels.users, "items": labels.items}
    n_labels = int(max(labels.users.max(), labels.items.max())) + 1
    sides = {"users": csr_array(edges), "items": csr_array(edges.T)}
    degrees = {
        side: np.asarray(graph.sum(axis=axis), np.float64).ravel() for side, axis in zip(SIDES, (1, 0), strict=True)
    }
    totals = {side: np.bincount(trained[side], degrees[side], n_labels) for side in SIDES}
    is_open = {side: np.bincount(trained[side], minlength=n_labels) > 0 for side in SIDES}
    total_weight = float(degrees["users"].sum())
    found, n_known = {}, {}
    for side in SIDES:
        n_known[side] = len(trained[side]) + len(placed[side])
        unplaced = np.full(sides[side].shape[0] - n_known[side], -1)
        found[side] = np.concatenate([trained[side], placed[side], unplaced]).astype(np.int32)
    n_before = -1
    while (n_placed := sum(int((found[side] >= 0).sum()) for side in SIDES)) > n_before:
        n_before = n_placed
        for side, other in (SIDES[::-1], SIDES):
            own = sides[side][n_known[side] :]
            best = best_communities(
                own, found[other], totals[other], total_weight, labels.resolution, is_open[side], 1
            )[:, 0]
            stuck = np.flatnonzero(best < 0)
            if len(stuck):
                n_trained = len(trained[other])
                own_steps = csr_array(own[stuck][:, :n_trained]).multiply(1 / np.maximum(degrees[other], 1e-300))
                back = graph.T if side == "users" else graph
                shared = csr_array(own_steps @ (back @ one_hot(trained[side], n_labels, np.ones(len(trained[side])))))
                communities = np.arange(n_labels, dtype=np.int32)
                best[stuck] = best_communities(shared, communities, np.zeros(n_labels), 1.0, 0.0, is_open[side], 1)[
                    :, 0
                ]
            found[side][n_known[side] :] = np.where(best >= 0, best, found[side][n_known[side] :])
    return found


def best_communities(
    rows: csr_array,
    labels: NDArray[np.int32],
    totals: NDArray[np.float64],
    total_weight: float,
    resolution: float,
    is_open: NDArray[np.bool_],
    n_best: int,
) -> NDArray[np.int32]:
    """The communities of largest gain of every row, best first.

    Args:
        rows: interactions, shape (n, n_other).
        labels: communities of the other side's ids, shape (n_other,); -1 for one without a place, which does not count.
        totals: the other side's degree in each community.  total_weight: of the trained graph.
        is_open: communities that may be joined.
        n_best: how many to find.

    Returns: shape (n, n_best), ties by the lowest community; -1 where there are fewer.
    """
    has_place = np.flatnonzero(labels >= 0)
    rows = csr_array(csr_array(rows)[:, has_place].astype(np.float64))
    weights = csr_array(rows @ one_hot(labels[has_place], len(totals), np.ones(len(has_place))))
    row = np.repeat(np.arange(weights.shape[0]), np.diff(weights.indptr))
    community, degrees = weights.indices, np.asarray(rows.sum(axis=1)).ravel()
    # Times m, which changes no order.
    gains = weights.data - resolution * degrees[row] * totals[community] / total_weight
    kept = np.flatnonzero(is_open[community])
    kept = kept[np.lexsort((community[kept], -gains[kept], row[kept]))]
    rank = np.arange(len(kept)) - np.searchsorted(row[kept], row[kept])
    best = np.full((weights.shape[0], n_best), -1, np.int32)
    first = rank < n_best
    best[row[kept[first]], rank[first]] = community[kept[first]]
    return best


def extended_labels(labels: Labels, found: Sides) -> Labels:
    """Labels of all ids; those without a place get the first id's, and must be covered by ``with_new_ids``."""
    users, items = (
        np.where(found[side] >= 0, found[side], trained[0])
        for side, trained in zip(SIDES, (labels.users, labels.items), strict=True)
    )
    return Labels(users.astype(np.int32), items.astype(np.int32), labels.resolution, labels.modularity)


def soft_rows(
    graph: csr_array,
    labels: Labels,
    found: Sides,
    edges: csr_array,
    maps: Mapping[str, BucketMap],
    hops: str,
) -> dict[str, tuple[NDArray[np.int32], NDArray[np.uint8], NDArray[np.bool_]]]:
    """What new ids read of soft maps: the affinities of a trained id with their interactions, rounded to the maps' own codebook.

    Trained ids hand on what they did in training, and new ones their own interactions with ids that have a place.

    Args:
        graph: training interactions.  labels: of the trained ids.
        found: communities of all ids, of :func:`place_labels`.
        edges: as there.
        maps: by side, of as many ids as are known; the new ids' rows follow. A ``double_soft`` map is given without its hashed lookup.
        hops: the maps' own.

    Returns: by side, rows int32 (n_new, indices_per_id), codebook uint8 (n_new,), and which ids have a place.
    """
    graphs = {"users": csr_array(graph), "items": csr_array(graph.T)}
    plan = SoftPlan.of(labels, *(np.asarray(graphs[side].sum(axis=1), np.float64).ravel() for side in SIDES), hops)
    edges = _between_placed(edges, found)
    all_edges = {"users": edges, "items": csr_array(edges.T)}
    buckets, degrees = {}, {}
    for side, trained in zip(SIDES, (labels.users, labels.items), strict=True):
        # A label's bucket is its rank among the side's labels, as in `SoftPlan.of`.
        rank = np.searchsorted(np.unique(trained), np.where(found[side] >= 0, found[side], trained[0]))
        buckets[side] = (rank + (plan.n_user_buckets if hops == "1+2" and side == "items" else 0)).astype(np.int32)
        own = np.asarray(all_edges[side].sum(axis=1), np.float64).ravel()[len(trained) :]
        degrees[side] = np.concatenate([plan.degrees[side], own])
    # Trained ids first, and new ones as if they had been there.
    wide = replace(plan, buckets=buckets, degrees=degrees)
    read = {}
    for side, other in (SIDES, SIDES[::-1]):
        n_trained, n_known = len(plan.degrees[other]), maps[side].n_ids
        parts = [plan.sources(other, graphs[other], 0), wide.sources(other, all_edges[other][n_trained:], n_trained)]
        sources = vstack(parts, format="csr")
        rows, weights = affinity_rows(
            all_edges[side][n_known:], csr_array(sources), maps[side].indices_per_id, split=plan.n_user_buckets
        )
        # The last profile is the unknown ids' own.
        codebook = maps[side].codebook[:-1]
        read[side] = rows, nearest_codes(weights, codebook), rows[:, 0] < plan.n_buckets[side]
    return read


def with_new_ids(
    known: BucketMap, rows: NDArray[np.int32], codes: NDArray[np.uint8] | None, has_place: NDArray[np.bool_]
) -> BucketMap:
    """The map with new ids after the known ones; the unknown ids' entry stays last.

    Args:
        rows: of the new ids, shape (n_new, indices_per_id).  codes: theirs, where the map has codebook.
        has_place: ids without a place get what unknown ids read.
    """
    rows = np.where(has_place[:, None], rows, known.rows[-1:]).astype(np.int32)
    identity = known.identity and len(rows) == 0
    rows = np.concatenate([known.rows[:-1], rows, known.rows[-1:]])
    if known.codebook is None:
        return replace(known, rows=rows, identity=identity)
    own = np.where(has_place, codes, known.codes[-1]).astype(np.uint8)
    return replace(known, rows=rows, codes=np.concatenate([known.codes[:-1], own, known.codes[-1:]]))


def solved_vectors(
    edges: csr_array,
    item_vectors: NDArray[np.float32],
    item_bias: NDArray[np.float32] | None,
    liked: float,
    random: float,
) -> NDArray[np.float32]:
    """Vectors of users for frozen items: one half-step of implicit ALS (Hu et al., ICDM 2008, eq. 4), its targets the scores of trained users.

    The vector p of a user with items S minimises ``sum_S (p q_i + b_i - liked)^2 + w sum_all (p q_i + b_i - random)^2 + r |p|^2``,
    with r = SHRINKAGE times the mean of |q_i|^2, and w such that the second sum has the weight of the third: ``w tr(Q^T Q) = r dim``.

    Args:
        edges: what each user used, shape (n, n_items); weights do not count.
        item_vectors: float32, shape (n_items, dim).  item_bias: shape (n_items,); None: zeros.
        liked, random: mean scores of trained users' interactions, and of any pairs (:func:`mean_scores`).

    Returns: float32, shape (n, dim); zeros where all items' vectors are zero.
    """
    items = item_vectors.astype(np.float64)
    n_items, dim = items.shape
    bias = np.zeros(n_items) if item_bias is None else item_bias.astype(np.float64)
    gram = items.T @ items
    solved = np.zeros((edges.shape[0], dim), np.float32)
    if not (trace := float(np.trace(gram))):
        return solved
    ridge = SHRINKAGE * trace / n_items
    weight = ridge * dim / trace
    everywhere = weight * gram + ridge * np.eye(dim), weight * ((random - bias) @ items)
    edges = csr_array(edges)
    for start in range(0, len(solved), _SOLVED):
        part = edges.indptr[start : start + _SOLVED + 1]
        left, right = (np.repeat(of_all[None], len(part) - 1, axis=0) for of_all in everywhere)
        for user, (first, end) in enumerate(itertools.pairwise(part)):
            used = edges.indices[first:end]
            left[user] += items[used].T @ items[used]
            right[user] += (liked - bias[used]) @ items[used]
        solved[start : start + _SOLVED] = np.linalg.solve(left, right[:, :, None])[:, :, 0]
    return solved


def mean_scores(graph: csr_array, scores_of: Callable[[NDArray, NDArray], NDArray]) -> tuple[float, float]:
    """Mean scores of interactions and of any pairs, of _PAIRS of each, drawn with a fixed seed.

    Args:
        scores_of: of users and items, rows of shape (n,) each: shape (n,).
    """
    rng = np.random.default_rng(0)
    users, items = graph.tocoo().coords
    chosen = np.sort(rng.integers(0, len(users), _PAIRS))
    pairs = (users[chosen], items[chosen]), tuple(rng.integers(0, n, _PAIRS) for n in graph.shape)
    liked, random = (float(scores_of(*pair).mean()) for pair in pairs)
    return liked, random


def with_own_rows(placed: BucketMap, n_known: int, has_place: NDArray[np.bool_]) -> BucketMap:
    """The map with a table row of its own, with weight 1, for each new id that has a place: after all others, and before the unknown ids'.

    Args:
        placed: of the known ids and the new ones, its table not shared.
        has_place: of the new ids, which follow the first ``n_known``.
    """
    unknown = placed.unknown_row
    rows = np.where(placed.rows == unknown, unknown + int(has_place.sum()), placed.rows)
    own = np.append(n_known + np.flatnonzero(has_place), placed.n_ids)
    # Lookups of weight 0 read it too, so that a later update changes no entry.
    rows[own] = unknown + np.arange(len(own))[:, None]
    codes = None
    if placed.codes is not None:
        codes = placed.codes.copy()
        codes[own] = codes[-1]
    return replace(
        placed,
        rows=rows.astype(np.int32),
        n_buckets=placed.n_buckets + len(own) - 1,
        codes=codes,
        identity=False,
    )


def without_places(longer: BucketMap, n_known: int, has_place: NDArray[np.bool_]) -> BucketMap:
    """The map without the new ids that have no place: those after the first ``n_known``."""
    kept = np.concatenate([np.ones(n_known, np.bool_), has_place, [True]])
    codes = None if longer.codes is None else longer.codes[kept]
    return replace(longer, rows=longer.rows[kept], codes=codes)


def typical_bias(
    degrees: NDArray[np.float64], bias: NDArray[np.float32], new_degrees: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Biases of new items: the mean over the SIMILAR_ITEMS trained items next to them in degree.

    A trained bias is mostly popularity, so the degree says it. A new log is shorter than the training log, and a new item's degree
    therefore rather low: no item outranks what it has shown.

    Args:
        degrees, bias: of the trained items, shape (n_items,).
        new_degrees: shape (n_new,).
    """
    order = np.argsort(degrees, kind="stable")
    n_similar = min(SIMILAR_ITEMS, len(order))
    sums = np.concatenate([[0.0], np.cumsum(bias[order], dtype=np.float64)])
    places = [np.searchsorted(degrees[order], new_degrees, side) for side in ("left", "right")]
    starts = np.clip((places[0] + places[1] - n_similar) // 2, 0, len(order) - n_similar)
    return ((sums[starts + n_similar] - sums[starts]) / n_similar).astype(np.float32)


def _between_placed(edges: csr_array, found: Sides) -> csr_array:
    """The interactions whose both ends have a place."""
    edges = edges.tocoo()
    users, items = edges.coords
    kept = (found["users"][users] >= 0) & (found["items"][items] >= 0)
    return csr_array((edges.data[kept], (users[kept], items[kept])), shape=edges.shape)
