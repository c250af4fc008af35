"""Cold-start assignment rules, one per method: the table rows of users and items that were not there in training.

What a rule does for a kind of bucket map is in ``graphhash.maps.fold_in`` and in the hash functions; here each method names its rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, vstack

from graphhash.clustering.balanced import balanced_labels
from graphhash.clustering.labels import Labels
from graphhash.errors import DataError
from graphhash.graph.bipartite import SIDES
from graphhash.maps.bucket_map import BucketMap, plain_map
from graphhash.maps.community_maps import double_graph_maps, graph_maps, multilevel_maps
from graphhash.maps.fold_in import (
    OpenCommunities,
    assign_communities,
    best_communities,
    extended_labels,
    soft_entries,
    with_new_ids,
)
from graphhash.maps.hashes import lsh_structure_map, quotient_remainder_split, universal_hash
from pipeline.maps.methods import METHODS, Inputs, multilevel_labels, residual_labels


@dataclass(frozen=True, eq=False)
class NewIds:
    """What new ids are assigned by.

    Args:
        inputs: what the trained maps were made from.
        edges: interactions with at least one end that is not trained, shape (all users, all items).
        maps: by side, of the known ids: the trained ones, then those that earlier updates folded in.
        earlier: communities of the ids folded in earlier, by side, int32, shape (n_levels, n_folded_in).
    """

    inputs: Inputs
    edges: csr_array
    maps: Mapping[str, BucketMap]
    earlier: Mapping[str, NDArray[np.int32]]

    @property
    def n_ids(self) -> dict[str, int]:
        """The number of all ids of a side, trained, folded in and new."""
        return dict(zip(SIDES, self.edges.shape, strict=True))

    @property
    def n_new(self) -> dict[str, int]:
        """The number of new ids by side."""
        return {side: self.n_ids[side] - self.maps[side].n_ids for side in SIDES}

    @cached_property
    def degrees(self) -> dict[str, NDArray[np.float64]]:
        """Degrees of the trained ids, by side."""
        return {side: np.asarray(d, np.float64) for side, d in zip(SIDES, self.inputs.degrees, strict=True)}

    def communities(self, labels: Labels, level: int) -> dict[str, NDArray[np.int32]]:
        """Communities of all ids in the clustering ``labels``, by side; -1 for an unassigned id."""
        earlier = {side: self.earlier[side][level] for side in SIDES}
        return assign_communities(self.inputs.graph, labels, earlier, self.edges)


@dataclass(frozen=True, eq=False)
class Assignment:
    """The table rows of new ids.

    Args:
        maps: by side, of all ids; unassigned ones read the out-of-vocabulary row.
        is_assigned: by side, bool, shape (n_new,).
        labels: communities of all ids that are not trained, by side, int32, shape (n_levels, n); -1 for an unassigned id.
        rows: by side, embeddings of new ids that have a table row of their own, float32, shape (n_rows, dim).
    """

    maps: dict[str, BucketMap]
    is_assigned: dict[str, NDArray[np.bool_]]
    labels: dict[str, NDArray[np.int32]]
    rows: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """A method's way to assign new ids.

    Args:
        assign: the rule.
        description: completes "new ids are assigned ..." for the user.
        n_levels: how many communities it gives an id.
        fits: whether assigned ids get vectors of their own, fitted to their interactions.
    """

    assign: Callable[[NewIds], Assignment]
    description: str
    n_levels: int = 0
    fits: bool = False


def _unassigned(new: NewIds) -> Assignment:
    """No new id gets a row: a hash of features knows no features of a new id."""
    return _no_rows(new, {side: np.zeros(new.n_new[side], np.bool_) for side in SIDES})


def _reached(new: NewIds) -> Assignment:
    """Ids whose vectors can be fitted afterwards: users of known items, then items of known or these users, then users of these items."""
    n_users, n_items = new.maps["users"].n_ids, new.maps["items"].n_ids
    edges = csr_array(new.edges != 0)
    of_new_users, of_new_items = csr_array(edges[n_users:]), csr_array(edges[:, n_items:].T)
    users = of_new_users[:, :n_items].sum(axis=1) > 0
    items = of_new_items @ np.concatenate([np.ones(n_users), users]) > 0
    users |= of_new_users @ np.concatenate([np.zeros(n_items), items]) > 0
    return _no_rows(new, {"users": users, "items": items})


def _no_rows(new: NewIds, is_assigned: dict[str, NDArray[np.bool_]]) -> Assignment:
    """An assignment in which all new ids read the OOV row."""
    nobody = {side: np.zeros(new.n_new[side], np.bool_) for side in SIDES}
    maps = {
        side: with_new_ids(known, np.zeros((new.n_new[side], 1), np.int32), None, nobody[side])
        for side, known in new.maps.items()
    }
    return Assignment(maps, is_assigned, untrained_labels(new))


def _hashed(name: str) -> Callable[[NewIds], Assignment]:
    """The same hash of a higher row number: the map of more ids, of which the new ones have no degree, begins with the trained map."""

    def assign(new: NewIds) -> Assignment:
        graph = new.inputs.graph
        # An empty row costs a pointer.
        n_users, n_items = new.edges.shape
        indptr = np.concatenate([graph.indptr, np.full(n_users - graph.shape[0], graph.indptr[-1])])
        longer = csr_array((graph.data, graph.indices, indptr), shape=(n_users, n_items))
        maps = dict(zip(SIDES, METHODS[name].make(replace(new.inputs, graph=longer)), strict=True))
        return _assignment(new, maps, {side: np.ones(new.n_new[side], np.bool_) for side in SIDES})

    return assign


def _quotient_remainder(new: NewIds) -> Assignment:
    """While the quotients last; ids beyond them stay unassigned."""
    maps, is_assigned = {}, {}
    for side, n_trained, n_buckets in zip(SIDES, new.inputs.graph.shape, new.inputs.rows, strict=True):
        n_quotients, n_remainders = quotient_remainder_split(n_trained, n_buckets)
        ids = np.arange(new.n_ids[side])
        quotients = np.minimum(ids // n_remainders, n_quotients - 1)
        maps[side] = plain_map(
            np.stack([ids % n_remainders, n_remainders + quotients], axis=1), n_buckets, "quotient_remainder"
        )
        is_assigned[side] = (ids < n_quotients * n_remainders)[new.maps[side].n_ids :]
    return _assignment(new, maps, is_assigned)


def _lsh_structure(new: NewIds) -> Assignment:
    """By the trained ids among the neighbours of a new one: others have no projection."""
    graphs = {"users": new.inputs.graph, "items": csr_array(new.inputs.graph.T)}
    edges = {"users": new.edges, "items": csr_array(new.edges.T)}
    maps, is_assigned = {}, {}
    for number, (side, other) in enumerate((SIDES, SIDES[::-1])):
        n_trained, n_columns = graphs[side].shape
        own = edges[side][n_trained:, :n_columns]
        longer = csr_array(vstack([graphs[side], own], format="csr"))
        n_buckets, seed = new.inputs.rows[number], new.inputs.seed + number
        maps[side] = lsh_structure_map(longer, new.degrees[other], n_buckets, seed=seed)
        is_assigned[side] = np.diff(own.indptr)[new.maps[side].n_ids - n_trained :] > 0
    return _assignment(new, maps, is_assigned)


def _communities(make: Callable[[Labels, int], tuple[BucketMap, BucketMap]]) -> Callable[[NewIds], Assignment]:
    def assign(new: NewIds) -> Assignment:
        communities = new.communities(new.inputs.labels, 0)
        maps = make(extended_labels(new.inputs.labels, communities), new.inputs.seed)
        return _assignment(new, dict(zip(SIDES, maps, strict=True)), None, communities)

    return assign


def _multilevel(new: NewIds) -> Assignment:
    levels = multilevel_labels(new.inputs)
    communities = [new.communities(labels, level) for level, labels in enumerate(levels)]
    extended = [extended_labels(labels, of_level) for labels, of_level in zip(levels, communities, strict=True)]
    return _assignment(new, dict(zip(SIDES, multilevel_maps(extended), strict=True)), None, *communities)


def _baco(new: NewIds) -> Assignment:
    """The rows of the best community; users read that of their second best community as well."""
    inputs = new.inputs
    labels = balanced_labels(inputs.graph, rows=inputs.labels.rows)
    communities = new.communities(labels, 0)
    users, items = graph_maps(extended_labels(labels, communities))
    n_trained = len(labels.users)
    second = _second_best(new, labels, communities)
    rows = np.repeat(users.rows, 2, axis=1)
    rows[n_trained:-1, 1] = np.where(
        second >= 0, np.searchsorted(np.unique(labels.users), second), rows[n_trained:-1, 0]
    )
    codes = np.ones(len(rows), np.uint8)
    codes[n_trained:-1] = second < 0
    # The trained users' second rows are in their own map.
    known, n_known = new.maps["users"], new.maps["users"].n_ids
    assert known.codes is not None, "a map of two weighted rows has codes"
    rows[:n_known], codes[:n_known] = known.rows[:n_known], known.codes[:n_known]
    return _assignment(new, {"users": replace(known, rows=rows, codes=codes), "items": items}, None, communities)


def _second_best(new: NewIds, labels: Labels, communities: Mapping[str, NDArray[np.int32]]) -> NDArray[np.int32]:
    """The second best community of each user that is not trained; -1 where there is none."""
    n_labels = int(max(labels.users.max(), labels.items.max())) + 1
    totals = np.bincount(labels.items, new.degrees["items"], n_labels).astype(np.float64)
    holds_users = np.bincount(labels.users, minlength=n_labels) > 0
    n_trained = len(labels.users)
    total_weight = float(new.degrees["users"].sum())
    open_to_users = OpenCommunities(totals, total_weight, labels.resolution, holds_users)
    best = best_communities(new.edges[n_trained:], communities["items"], open_to_users, 2)
    # The first is the community that the id is in, which was found with fewer of its neighbours where it was folded in earlier.
    first = communities["users"][n_trained:]
    return np.where(best[:, 0] == first, best[:, 1], best[:, 0])


def _soft(new: NewIds) -> Assignment:
    return _soft_assignment(new, new.maps)


def _residual(new: NewIds) -> Assignment:
    inputs = replace(new.inputs, labels=residual_labels(new.inputs))
    return _soft(replace(new, inputs=inputs))


def _double_soft(new: NewIds) -> Assignment:
    """The indices of the soft map, and the hashed one after them."""
    inner = {}
    for side, known in new.maps.items():
        assert known.codebook is not None, "a soft map has a codebook"
        inner[side] = replace(known, rows=known.rows[:, :-1], codebook=np.ascontiguousarray(known.codebook[:, :-1]))
    assignment, maps = _soft_assignment(new, inner), {}
    for number, side in enumerate(SIDES):
        known, soft = new.maps[side], assignment.maps[side]
        assert soft.codes is not None, "a soft map has codes"
        n_rows = known.n_buckets - (2 if known.shared else 1)
        hashed = universal_hash(np.arange(soft.n_ids), n_rows, np.random.default_rng([new.inputs.seed, number]))
        rows = np.column_stack([soft.rows, np.append(hashed, known.oov_row)])[known.n_ids : -1]
        maps[side] = with_new_ids(known, rows, soft.codes[known.n_ids : -1], assignment.is_assigned[side])
    return replace(assignment, maps=maps)


def _soft_assignment(new: NewIds, maps: Mapping[str, BucketMap]) -> Assignment:
    inputs, communities = new.inputs, new.communities(new.inputs.labels, 0)
    entries = soft_entries(inputs.graph, inputs.labels, communities, new.edges, maps, inputs.hops)
    longer = {side: with_new_ids(maps[side], *entries[side]) for side in SIDES}
    return Assignment(longer, {side: entries[side][2] for side in SIDES}, untrained_labels(new, communities))


def _assignment(
    new: NewIds,
    maps: Mapping[str, BucketMap],
    is_assigned: dict[str, NDArray[np.bool_]] | None,
    *communities: Mapping[str, NDArray[np.int32]],
) -> Assignment:
    """The assignment from maps of all ids, which must begin with the maps of the known ones.

    Args:
        is_assigned: None: every id with a community in all of ``communities`` is.
        communities: of all ids, by level.

    Raises:
        DataError: the maps begin otherwise.
    """
    if is_assigned is None:
        is_assigned = {
            side: np.all([level[side][new.maps[side].n_ids :] >= 0 for level in communities], axis=0) for side in SIDES
        }
    longer = {}
    for side, n_trained in zip(SIDES, new.inputs.graph.shape, strict=True):
        known, made = new.maps[side], maps[side]
        if not np.array_equal(made.rows[:n_trained], known.rows[:n_trained]) or made.n_buckets != known.n_buckets:
            raise DataError(
                f"the {side} map of method {known.method!r} is not what this program makes of the run's data and settings; "
                "run 'graphhash train' again"
            )
        added = slice(known.n_ids, -1)
        codes = None if made.codes is None else made.codes[added]
        longer[side] = with_new_ids(known, made.rows[added], codes, is_assigned[side])
    return Assignment(longer, is_assigned, untrained_labels(new, *communities))


def untrained_labels(new: NewIds, *communities: Mapping[str, NDArray[np.int32]]) -> dict[str, NDArray[np.int32]]:
    """Communities of the ids that are not trained, by side, shape (n_levels, n)."""
    labels = {}
    for side, n_trained in zip(SIDES, new.inputs.graph.shape, strict=True):
        levels = [of_level[side][n_trained:] for of_level in communities]
        labels[side] = np.array(levels, np.int32).reshape(len(communities), new.n_ids[side] - n_trained)
    return labels


_BY_HASH = "by the same hash of their number"
_BY_GAIN = "to the community of largest gain of modularity"
_BY_AFFINITY = "by the affinities that a trained id with their interactions has"
FULL_TABLES = (
    *("full", "full_float16", "full_int8", "full_int4", "full_small_dim"),
    *("full_soft", "full_soft_int8", "full_soft_int4"),
)
RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (*FULL_TABLES, "additive", "full_additive"),
        Rule(_reached, "to rows of their own, fitted to their interactions", fits=True),
    ),
    "modulo": Rule(_hashed("modulo"), _BY_HASH),
    "double": Rule(_hashed("double"), _BY_HASH),
    "quotient_remainder": Rule(_quotient_remainder, "by quotient and remainder of their number, while there is room"),
    "frequency": Rule(_hashed("frequency"), f"as infrequent ids, {_BY_HASH}"),
    "double_frequency": Rule(_hashed("double_frequency"), f"as infrequent ids, {_BY_HASH}"),
    "lsh": Rule(_unassigned, "to no row: a log holds no features of them"),
    "lsh_structure": Rule(_lsh_structure, "by the same random projections of their trained neighbours"),
    "graph": Rule(_communities(lambda labels, seed: graph_maps(labels)), _BY_GAIN, 1),
    "double_graph": Rule(
        _communities(lambda labels, seed: double_graph_maps(labels, seed=seed)), f"{_BY_GAIN}, and {_BY_HASH}", 1
    ),
    "multilevel": Rule(_multilevel, f"{_BY_GAIN}, at each level", 2),
    "baco": Rule(_baco, f"{_BY_GAIN}, users to the second best as well", 1),
    "soft": Rule(_soft, _BY_AFFINITY, 1),
    "residual": Rule(_residual, f"{_BY_AFFINITY}; numbers of their own are zero", 1),
    "double_soft": Rule(_double_soft, f"{_BY_AFFINITY}, and {_BY_HASH}", 1),
}
