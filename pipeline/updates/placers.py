"""How the methods of a run place new ids, by name: what ``graphhash.maps.placement`` and the hashes do for each kind of map."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, vstack

from graphhash.clustering.balanced import balanced_labels
from graphhash.clustering.labels import Labels
from graphhash.errors import DataError
from graphhash.maps.bucket_map import BucketMap, plain_map
from graphhash.maps.community_maps import SIDES, double_graph_maps, graph_maps, multilevel_maps
from graphhash.maps.hashes import lsh_structure_map, quotient_remainder_split, universal_hash
from graphhash.maps.placement import best_communities, extended_labels, place_labels, soft_rows, with_new_ids
from pipeline.maps.methods import METHODS, Inputs, multilevel_labels


@dataclass(frozen=True, eq=False)
class Placing:
    """What new ids are placed by.

    Args:
        inputs: what the trained maps were made from.
        edges: interactions with at least one end that is not trained, shape (all users, all items).
        maps: by side, of the known ids: the trained ones, and then those that were placed earlier.
        earlier: communities of the ids placed earlier, by side, int32, shape (n_levels, n_placed).
    """

    inputs: Inputs
    edges: csr_array
    maps: Mapping[str, BucketMap]
    earlier: Mapping[str, NDArray[np.int32]]

    @property
    def n_ids(self) -> dict[str, int]:
        """All ids of a side, the new ones among them."""
        return dict(zip(SIDES, self.edges.shape, strict=True))

    @property
    def n_new(self) -> dict[str, int]:
        return {side: self.n_ids[side] - self.maps[side].n_ids for side in SIDES}

    @cached_property
    def degrees(self) -> dict[str, NDArray[np.float64]]:
        """Of the trained ids."""
        return {side: np.asarray(d, np.float64) for side, d in zip(SIDES, self.inputs.degrees, strict=True)}

    def found(self, labels: Labels, level: int) -> dict[str, NDArray[np.int32]]:
        """Communities of all ids in ``labels``; -1 for an id without a place."""
        earlier = {side: self.earlier[side][level] for side in SIDES}
        return place_labels(self.inputs.graph, labels, earlier, self.edges)


@dataclass(frozen=True, eq=False)
class Places:
    """Where the new ids are.

    Args:
        maps: by side, of all ids; those without a place read what unknown ids read.
        has_place: by side, bool, shape (n_new,).
        labels: communities of all ids that are not trained, by side, int32, shape (n_levels, n); -1 without a place.
        user_rows: rows that new users have of their own, float32, shape (n_rows, dim); None: there are none.
    """

    maps: dict[str, BucketMap]
    has_place: dict[str, NDArray[np.bool_]]
    labels: dict[str, NDArray[np.int32]]
    user_rows: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Placer:
    """A way of placing, how it is told to the user, and how many communities it gives an id."""

    place: Callable[[Placing], Places]
    how: str
    n_levels: int = 0


def _nowhere(placing: Placing) -> Places:
    """A table with a row for every id has none for a new one, and a hash of features knows none of it."""
    has_place = {side: np.zeros(placing.n_new[side], np.bool_) for side in SIDES}
    maps = {
        side: with_new_ids(known, np.zeros((placing.n_new[side], 1)), None, has_place[side])
        for side, known in placing.maps.items()
    }
    return Places(maps, has_place, _untrained(placing))


def _hashed(name: str) -> Callable[[Placing], Places]:
    """The same function of a higher number: the map of more ids, none of which has a degree, begins with the trained one."""

    def place(placing: Placing) -> Places:
        graph = placing.inputs.graph
        # An empty row costs a pointer.
        n_users, n_items = placing.edges.shape
        indptr = np.concatenate([graph.indptr, np.full(n_users - graph.shape[0], graph.indptr[-1])])
        longer = csr_array((graph.data, graph.indices, indptr), shape=(n_users, n_items))
        maps = dict(zip(SIDES, METHODS[name].make(replace(placing.inputs, graph=longer)), strict=True))
        return _places(placing, maps, {side: np.ones(placing.n_new[side], np.bool_) for side in SIDES})

    return place


def _quotient_remainder(placing: Placing) -> Places:
    """While the quotients last; ids beyond have no place."""
    maps, has_place = {}, {}
    for side, n_trained, n_buckets in zip(SIDES, placing.inputs.graph.shape, placing.inputs.rows, strict=True):
        n_quotients, n_remainders = quotient_remainder_split(n_trained, n_buckets)
        ids = np.arange(placing.n_ids[side])
        quotients = np.minimum(ids // n_remainders, n_quotients - 1)
        maps[side] = plain_map(
            np.stack([ids % n_remainders, n_remainders + quotients], axis=1), n_buckets, "quotient_remainder"
        )
        has_place[side] = (ids < n_quotients * n_remainders)[placing.maps[side].n_ids :]
    return _places(placing, maps, has_place)


def _lsh_structure(placing: Placing) -> Places:
    """By the trained ones among an id's neighbours: others have no projection."""
    graphs = {"users": placing.inputs.graph, "items": csr_array(placing.inputs.graph.T)}
    edges = {"users": placing.edges, "items": csr_array(placing.edges.T)}
    maps, has_place = {}, {}
    for number, (side, other) in enumerate((SIDES, SIDES[::-1])):
        n_trained, n_columns = graphs[side].shape
        own = edges[side][n_trained:, :n_columns]
        longer = csr_array(vstack([graphs[side], own], format="csr"))
        n_buckets, seed = placing.inputs.rows[number], placing.inputs.seed + number
        maps[side] = lsh_structure_map(longer, placing.degrees[other], n_buckets, seed=seed)
        has_place[side] = np.diff(own.indptr)[placing.maps[side].n_ids - n_trained :] > 0
    return _places(placing, maps, has_place)


def _communities(make: Callable[[Labels, int], tuple[BucketMap, BucketMap]]) -> Callable[[Placing], Places]:
    def place(placing: Placing) -> Places:
        found = placing.found(placing.inputs.labels, 0)
        maps = make(extended_labels(placing.inputs.labels, found), placing.inputs.seed)
        return _places(placing, dict(zip(SIDES, maps, strict=True)), None, found)

    return place


def _multilevel(placing: Placing) -> Places:
    levels = multilevel_labels(placing.inputs)
    found = [placing.found(labels, level) for level, labels in enumerate(levels)]
    extended = [extended_labels(labels, of_level) for labels, of_level in zip(levels, found, strict=True)]
    return _places(placing, dict(zip(SIDES, multilevel_maps(extended), strict=True)), None, *found)


def _balanced(placing: Placing) -> Places:
    """A user's second row is that of its second best community."""
    inputs = placing.inputs
    labels = balanced_labels(inputs.graph, rows=inputs.labels.rows)
    found = placing.found(labels, 0)
    users, items = graph_maps(extended_labels(labels, found))
    n_labels = int(max(labels.users.max(), labels.items.max())) + 1
    totals = np.bincount(labels.items, placing.degrees["items"], n_labels)
    holds_users = np.bincount(labels.users, minlength=n_labels) > 0
    n_trained = len(labels.users)
    own = placing.edges[n_trained:]
    best = best_communities(
        own, found["items"], totals, placing.degrees["users"].sum(), labels.resolution, holds_users, 2
    )
    # The first is the community that the id is in, which was found with fewer of its neighbours where it was placed earlier.
    first = found["users"][n_trained:]
    second = np.where(best[:, 0] == first, best[:, 1], best[:, 0])
    rows = np.repeat(users.rows, 2, axis=1)
    rows[n_trained:-1, 1] = np.where(
        second >= 0, np.searchsorted(np.unique(labels.users), second), rows[n_trained:-1, 0]
    )
    codes = np.ones(len(rows), np.uint8)
    codes[n_trained:-1] = second < 0
    # The trained users' second rows are in their own map.
    n_stored = placing.maps["users"].n_ids
    rows[:n_stored], codes[:n_stored] = (
        a[:n_stored] for a in (placing.maps["users"].rows, placing.maps["users"].codes)
    )
    maps = {"users": replace(placing.maps["users"], rows=rows, codes=codes), "items": items}
    return _places(placing, maps, None, found)


def _soft(placing: Placing) -> Places:
    return _soft_places(placing, placing.maps)


def _double_soft(placing: Placing) -> Places:
    """The soft map's lookups, and the hashed one behind them."""
    inner = {
        side: replace(m, rows=m.rows[:, :-1], codebook=np.ascontiguousarray(m.codebook[:, :-1]))
        for side, m in placing.maps.items()
    }
    places, maps = _soft_places(placing, inner), {}
    for number, side in enumerate(SIDES):
        known, soft = placing.maps[side], places.maps[side]
        n_rows = known.n_buckets - (2 if known.shared else 1)
        hashed = universal_hash(np.arange(soft.n_ids), n_rows, np.random.default_rng([placing.inputs.seed, number]))
        rows = np.column_stack([soft.rows, np.append(hashed, known.unknown_row)])[known.n_ids : -1]
        maps[side] = with_new_ids(known, rows, soft.codes[known.n_ids : -1], places.has_place[side])
    return replace(places, maps=maps)


def _soft_places(placing: Placing, maps: Mapping[str, BucketMap]) -> Places:
    inputs, found = placing.inputs, placing.found(placing.inputs.labels, 0)
    read = soft_rows(inputs.graph, inputs.labels, found, placing.edges, maps, inputs.hops)
    longer = {side: with_new_ids(maps[side], *read[side]) for side in SIDES}
    return Places(longer, {side: read[side][2] for side in SIDES}, _untrained(placing, found))


def _places(
    placing: Placing,
    maps: Mapping[str, BucketMap],
    has_place: dict[str, NDArray[np.bool_]] | None,
    *found: Mapping[str, NDArray],
) -> Places:
    """Places from maps of all ids, which must begin with the known ones.

    Args:
        has_place: None: that has every id with a community in all of ``found``.
    """
    if has_place is None:
        has_place = {
            side: np.all([level[side][placing.maps[side].n_ids :] >= 0 for level in found], axis=0) for side in SIDES
        }
    longer = {}
    for side, n_trained in zip(SIDES, placing.inputs.graph.shape, strict=True):
        known, made = placing.maps[side], maps[side]
        if not np.array_equal(made.rows[:n_trained], known.rows[:n_trained]) or made.n_buckets != known.n_buckets:
            raise DataError(
                f"the {side} map of method {known.method!r} is not what this program makes of the run's data and settings; "
                "run 'graphhash train' again"
            )
        new = slice(known.n_ids, -1)
        codes = None if made.codes is None else made.codes[new]
        longer[side] = with_new_ids(known, made.rows[new], codes, has_place[side])
    return Places(longer, has_place, _untrained(placing, *found))


def _untrained(placing: Placing, *found: Mapping[str, NDArray]) -> dict[str, NDArray[np.int32]]:
    labels = {}
    for side, n_trained in zip(SIDES, placing.inputs.graph.shape, strict=True):
        levels = [of_level[side][n_trained:] for of_level in found]
        labels[side] = np.array(levels, np.int32).reshape(len(found), placing.n_ids[side] - n_trained)
    return labels


_BY_NUMBER = "by the same hash of their number"
_BY_GAIN = "in the community of largest gain of modularity"
PLACERS: dict[str, Placer] = {
    "full": Placer(_nowhere, "nowhere: a full table has a row for trained ids alone"),
    "modulo": Placer(_hashed("modulo"), _BY_NUMBER),
    "double": Placer(_hashed("double"), _BY_NUMBER),
    "quotient_remainder": Placer(_quotient_remainder, "by quotient and remainder of their number, while there is room"),
    "frequency": Placer(_hashed("frequency"), "as infrequent ids, " + _BY_NUMBER),
    "double_frequency": Placer(_hashed("double_frequency"), "as infrequent ids, " + _BY_NUMBER),
    "lsh": Placer(_nowhere, "nowhere: a log brings no features of them"),
    "lsh_structure": Placer(_lsh_structure, "by the same random projections of their trained neighbours"),
    "graph": Placer(_communities(lambda labels, seed: graph_maps(labels)), _BY_GAIN, 1),
    "double_graph": Placer(
        _communities(lambda labels, seed: double_graph_maps(labels, seed=seed)), _BY_GAIN + ", and " + _BY_NUMBER, 1
    ),
    "multilevel": Placer(_multilevel, _BY_GAIN + ", at each level", 2),
    "balanced": Placer(_balanced, _BY_GAIN + ", users in the second best as well", 1),
    "soft": Placer(_soft, "by the affinities that a trained id with their interactions has", 1),
    "double_soft": Placer(
        _double_soft, "by the affinities that a trained id with their interactions has, and " + _BY_NUMBER, 1
    ),
}
