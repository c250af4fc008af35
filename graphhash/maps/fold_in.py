"""Fold-in of new ids: users and items of a later log are assigned to trained communities and table rows, without training.

Trained tables, the rows of trained ids, their communities and their degrees stay as they are. What a new id reads depends on its own
interactions, and on those of the new ids that it interacted with, but on nothing else in the new log. It gets

- the *community* of largest gain of modularity (:func:`assign_communities`),
- the *affinities* that a trained id with the same interactions has (:func:`soft_entries`).

A hash needs no interactions (``graphhash.maps.hashes``). Vectors and biases of new ids are in ``graphhash.maps.fold_in_vectors``.

New ids that interacted with each other are assigned in rounds: items first, from trained users; then users, from trained items and those
just assigned; then both again, until a round assigns no further id. An id stays unassigned if nothing that it interacted with is
assigned; it then reads the OOV row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, vstack

from graphhash.clustering.labels import Labels
from graphhash.graph.bipartite import SIDES
from graphhash.maps.affinities import affinity_rows, one_hot, row_degrees
from graphhash.maps.bucket_map import BucketMap
from graphhash.maps.codebook import nearest_codes
from graphhash.maps.soft_maps import SoftPlan

Sides = Mapping[str, NDArray]


@dataclass(frozen=True, eq=False)
class OpenCommunities:
    """Communities that ids of one side may join, and what joining them costs.

    Args:
        totals: degree of the other side in each community, float64, shape (n_communities,).
        total_weight: of the trained graph.
        resolution: of the communities.
        is_open: communities that may be joined, bool, shape (n_communities,).
    """

    totals: NDArray[np.float64]
    total_weight: float
    resolution: float
    is_open: NDArray[np.bool_]


def assign_communities(
    graph: csr_array, labels: Labels, assigned: Sides, edges: csr_array
) -> dict[str, NDArray[np.int32]]:
    """Communities of new users and items.

    A user u joins the community c of largest ``w(u,c)/m - g k_u D_c / m^2``, with w(u,c) the weight of its interactions with items of c,
    k_u that of all its interactions with assigned items, D_c and m the trained items' degrees in c and in all, and g the resolution of
    the communities; items the same way. Only communities that have a row in the side's table are open, and ties go to the lowest. The
    largest gain may be negative, because an id without a community has no row. Where no community that it is connected with is open, it
    joins that of the ids that share its trained neighbours: the largest weight after two steps, each neighbour's scaled to 1.

    Args:
        graph: training interactions, shape (n_users, n_items).
        labels: communities of the trained ids.
        assigned: communities of ids that were folded in earlier and follow the trained ones, by side, int32.
        edges: interactions with at least one end that is not trained, shape (all users, all items); new ids follow those of ``assigned``.

    Returns: communities of all ids by side, int32, shape (n_ids,); -1 for an unassigned id.
    """
    trained = {"users": labels.users, "items": labels.items}
    n_labels = int(max(labels.users.max(), labels.items.max())) + 1
    sides = {"users": csr_array(edges), "items": csr_array(edges.T)}
    degrees = {
        side: np.asarray(graph.sum(axis=axis), np.float64).ravel() for side, axis in zip(SIDES, (1, 0), strict=True)
    }
    total_weight = float(degrees["users"].sum())
    open_to, communities, n_known = {}, {}, {}
    for side, other in (SIDES, SIDES[::-1]):
        totals = np.bincount(trained[other], degrees[other], n_labels).astype(np.float64)
        is_open = np.bincount(trained[side], minlength=n_labels) > 0
        open_to[side] = OpenCommunities(totals, total_weight, labels.resolution, is_open)
        n_known[side] = len(trained[side]) + len(assigned[side])
        unassigned = np.full(sides[side].shape[0] - n_known[side], -1)
        communities[side] = np.concatenate([trained[side], assigned[side], unassigned]).astype(np.int32)
    n_before = -1
    while (n_assigned := sum(int((communities[side] >= 0).sum()) for side in SIDES)) > n_before:
        n_before = n_assigned
        for side, other in (SIDES[::-1], SIDES):
            rows = sides[side][n_known[side] :]
            best = best_communities(rows, communities[other], open_to[side], 1)[:, 0]
            unassigned = np.flatnonzero(best < 0)
            if len(unassigned):
                steps = csr_array(rows[unassigned][:, : len(trained[other])])
                steps = steps.multiply(1 / np.maximum(degrees[other], 1e-300))
                back = graph.T if side == "users" else graph
                best[unassigned] = _best_after_two_steps(steps, back, trained[side], open_to[side])
            new = communities[side][n_known[side] :]
            communities[side][n_known[side] :] = np.where(best >= 0, best, new)
    return communities


def best_communities(
    rows: csr_array, labels: NDArray[np.int32], communities: OpenCommunities, n_best: int
) -> NDArray[np.int32]:
    """The communities of largest gain of every row, best first.

    Args:
        rows: interactions, shape (n, n_other).
        labels: communities of the other side's ids, int32, shape (n_other,); -1 for an unassigned one, which does not count.
        communities: those that may be joined.
        n_best: how many to find.

    Returns: int32, shape (n, n_best), ties by the lowest community; -1 where there are fewer.
    """
    assigned = np.flatnonzero(labels >= 0)
    rows = csr_array(csr_array(rows)[:, assigned].astype(np.float64))
    weights = csr_array(rows @ one_hot(labels[assigned], len(communities.totals), np.ones(len(assigned))))
    row = np.repeat(np.arange(weights.shape[0]), np.diff(weights.indptr))
    community, degrees = weights.indices, np.asarray(rows.sum(axis=1)).ravel()
    # Times m, which changes no order.
    expected = communities.resolution * degrees[row] * communities.totals[community] / communities.total_weight
    gains = weights.data - expected
    kept = np.flatnonzero(communities.is_open[community])
    kept = kept[np.lexsort((community[kept], -gains[kept], row[kept]))]
    rank = np.arange(len(kept)) - np.searchsorted(row[kept], row[kept])
    best = np.full((weights.shape[0], n_best), -1, np.int32)
    first = rank < n_best
    best[row[kept[first]], rank[first]] = community[kept[first]]
    return best


def extended_labels(labels: Labels, communities: Sides) -> Labels:
    """Labels of trained and new ids; an unassigned id gets the first id's community, which :func:`with_new_ids` has to replace.

    Args:
        labels: communities of the trained ids.
        communities: of all ids by side, of :func:`assign_communities`.
    """
    users, items = (
        np.where(communities[side] >= 0, communities[side], trained[0])
        for side, trained in zip(SIDES, (labels.users, labels.items), strict=True)
    )
    return Labels(users.astype(np.int32), items.astype(np.int32), labels.resolution, labels.modularity)


def soft_entries(
    graph: csr_array,
    labels: Labels,
    communities: Sides,
    edges: csr_array,
    maps: Mapping[str, BucketMap],
    hops: str,
) -> dict[str, tuple[NDArray[np.int32], NDArray[np.uint8], NDArray[np.bool_]]]:
    """Entries of new ids in soft maps: the affinities of a trained id with their interactions, rounded to the map's own codebook.

    Trained ids pass on what they did in training, and new ids their own interactions with assigned ids.

    Args:
        graph: training interactions, shape (n_users, n_items).
        labels: communities of the trained ids.
        communities: of all ids by side, of :func:`assign_communities`.
        edges: as there.
        maps: by side, of the known ids, which the new ones follow. A ``double_soft`` map is given without its hashed index.
        hops: of the maps.

    Returns: by side, rows, int32, shape (n_new, indices_per_id); codes, uint8, shape (n_new,); and which ids are assigned, bool.
    """
    graphs = {"users": csr_array(graph), "items": csr_array(graph.T)}
    plan = SoftPlan.of(labels, row_degrees(graphs["users"]), row_degrees(graphs["items"]), hops)
    edges = _between_assigned(edges, communities)
    all_edges = {"users": edges, "items": csr_array(edges.T)}
    buckets, degrees = {}, {}
    for side, trained in zip(SIDES, (labels.users, labels.items), strict=True):
        # A community's bucket is its rank among the side's communities, as in `SoftPlan.of`.
        known = np.where(communities[side] >= 0, communities[side], trained[0])
        rank = np.searchsorted(np.unique(trained), known)
        buckets[side] = (rank + (plan.n_user_buckets if hops == "1+2" and side == "items" else 0)).astype(np.int32)
        own = row_degrees(all_edges[side])[len(trained) :]
        degrees[side] = np.concatenate([plan.degrees[side], own])
    # The plan of trained ids, followed by new ones as if they had been trained.
    extended = replace(plan, buckets=buckets, degrees=degrees)
    entries = {}
    for side, other in (SIDES, SIDES[::-1]):
        n_trained, n_known = len(plan.degrees[other]), maps[side].n_ids
        parts = [
            plan.sources(other, graphs[other], 0),
            extended.sources(other, all_edges[other][n_trained:], n_trained),
        ]
        sources = vstack(parts, format="csr")
        rows, weights = affinity_rows(
            all_edges[side][n_known:], csr_array(sources), maps[side].indices_per_id, split=plan.n_user_buckets
        )
        codebook = maps[side].codebook
        assert codebook is not None
        # The last row of the codebook is the OOV entry's.
        entries[side] = rows, nearest_codes(weights, codebook[:-1]), rows[:, 0] < plan.n_buckets[side]
    return entries


def with_new_ids(
    known: BucketMap, rows: NDArray[np.int32], codes: NDArray[np.uint8] | None, assigned: NDArray[np.bool_]
) -> BucketMap:
    """The map with new ids after the known ones; the OOV entry stays last.

    Args:
        rows: of the new ids, int32, shape (n_new, indices_per_id).
        codes: of the new ids, uint8, shape (n_new,), where the map has a codebook.
        assigned: bool, shape (n_new,); unassigned ids read what OOV ids read.
    """
    rows = np.where(assigned[:, None], rows, known.rows[-1:]).astype(np.int32)
    identity = known.identity and len(rows) == 0
    rows = np.concatenate([known.rows[:-1], rows, known.rows[-1:]])
    if known.codes is None:
        return replace(known, rows=rows, identity=identity)
    assert codes is not None
    new_codes = np.where(assigned, codes, known.codes[-1]).astype(np.uint8)
    return replace(known, rows=rows, codes=np.concatenate([known.codes[:-1], new_codes, known.codes[-1:]]))


def with_own_rows(bucket_map: BucketMap, n_known: int, assigned: NDArray[np.bool_]) -> BucketMap:
    """The map with a new table row of weight 1 for each assigned new id: after all other rows, and before the OOV row.

    Args:
        bucket_map: of the known ids and the new ones, its table not shared.
        n_known: ids before the new ones.
        assigned: of the new ids, bool, shape (n_new,).
    """
    oov_row = bucket_map.oov_row
    rows = np.where(bucket_map.rows == oov_row, oov_row + int(assigned.sum()), bucket_map.rows)
    new_ids = np.append(n_known + np.flatnonzero(assigned), bucket_map.n_ids)
    # Indices of weight 0 read it too, so that a later update changes no entry.
    rows[new_ids] = oov_row + np.arange(len(new_ids))[:, None]
    codes = None
    if bucket_map.codes is not None:
        codes = bucket_map.codes.copy()
        codes[new_ids] = codes[-1]
    n_buckets = bucket_map.n_buckets + len(new_ids) - 1
    return replace(bucket_map, rows=rows.astype(np.int32), n_buckets=n_buckets, codes=codes, identity=False)


def without_unassigned(bucket_map: BucketMap, n_known: int, assigned: NDArray[np.bool_]) -> BucketMap:
    """The map without the unassigned new ids: those after the first ``n_known`` whose ``assigned``, shape (n_new,), is false."""
    kept = np.concatenate([np.ones(n_known, np.bool_), assigned, [True]])
    codes, rows = None if bucket_map.codes is None else bucket_map.codes[kept], bucket_map.rows[kept]
    # Where every id has its own row, those of new ids follow the trained ones.
    identity = codes is None and np.array_equal(rows, np.arange(len(rows))[:, None])
    return replace(bucket_map, rows=rows, codes=codes, identity=identity)


def _best_after_two_steps(
    steps: csr_array, back: csr_array, labels: NDArray[np.int32], communities: OpenCommunities
) -> NDArray[np.int32]:
    """The open community of largest weight of the ids that share neighbours with each row; -1 where there is none.

    Args:
        steps: weights of each row's neighbours, shape (n, n_neighbours).
        back: training interactions of the neighbours, shape (n_neighbours, n_ids).
        labels: communities of these ids, int32, shape (n_ids,).
    """
    n_labels = len(communities.totals)
    shared = csr_array(csr_array(steps) @ (back @ one_hot(labels, n_labels, np.ones(len(labels)))))
    by_weight = OpenCommunities(np.zeros(n_labels), 1.0, 0.0, communities.is_open)
    return best_communities(shared, np.arange(n_labels, dtype=np.int32), by_weight, 1)[:, 0]


def _between_assigned(edges: csr_array, communities: Sides) -> csr_array:
    """The interactions whose both ends are assigned."""
    coo = edges.tocoo()
    users, items = coo.coords
    kept = (communities["users"][users] >= 0) & (communities["items"][items] >= 0)
    return csr_array((coo.data[kept], (users[kept], items[kept])), shape=edges.shape)
