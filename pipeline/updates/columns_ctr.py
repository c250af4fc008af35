"""Fold-in of CTR: new values of compressed columns get rows in a trained model, and nothing is trained.

Columns are assigned in groups: those of a pair that one method compresses, whose positive samples are the graph, and single columns that
the schema hashes. Tables, layers and the entries of known values stay as they are. A new value that has no rows by the rule of its
method (``pipeline.updates.rules_ctr``) stays unassigned, and reads the out-of-vocabulary row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graphhash.errors import DataError
from graphhash.graph.bipartite import SIDES
from graphhash.graph.vocabulary import Vocabulary
from graphhash.maps.bucket_map import BucketMap, plain_map
from graphhash.maps.fold_in import without_unassigned
from graphhash.maps.hashes import quotient_remainder_split
from pipeline.ctr.data import Column, Features
from pipeline.ctr.folded_in import GroupState
from pipeline.ctr.maps import MapOptions, Pair, alone, find_pairs, hashed_map, pair_inputs, pair_ways, way_maps
from pipeline.maps.methods import Inputs
from pipeline.updates.rules import NewIds
from pipeline.updates.rules_ctr import CTR_RULES


@dataclass(frozen=True, eq=False)
class Group:
    """Columns that are assigned together.

    Args:
        name: of its files.
        pair: the columns whose positive samples are the graph, by side.
        way: the method that makes their maps.
        columns: by side, the number of the column that this group compresses, or None.
        together: whether both columns read one map pair, whose table they may share.
        inputs: what the trained maps were made from.
        trained: the trained maps of both sides.
        tables: by number of the column, those that maps mix rows of, where the model stores a row for every id; shape (n_rows, dim).
    """

    name: str
    pair: Pair
    way: str
    columns: dict[str, int | None]
    together: bool
    inputs: Inputs
    trained: dict[str, BucketMap]
    tables: Mapping[int, NDArray[np.float32]]

    def column_map(self, side: str, maps: Mapping[str, BucketMap]) -> BucketMap:
        """The map that the model reads for a side."""
        return maps[side] if self.together else alone(maps[side])


def make_groups(
    features: Features,
    graphs: Sequence[csr_array],
    labels: Sequence,
    method: str,
    options: MapOptions,
    tables: Mapping[int, NDArray[np.float32]] | None = None,
) -> list[Group]:
    """The groups of a method's columns, with the maps of the training made again.

    Args:
        graphs, labels, options: as for :func:`pipeline.ctr.maps.make_maps`.
        tables: as of :class:`Group`.

    Raises:
        DataError: as there.
    """
    groups = []
    for number, pair in enumerate(find_pairs(features)):
        inputs = pair_inputs(features, pair, number, graphs[number], labels[number], method, options)
        ways = pair_ways(features, pair, method)
        for way in dict.fromkeys(filter(None, ways)):
            columns = {
                side: column if own == way else None
                for side, column, own in zip(SIDES, pair.columns, ways, strict=True)
            }
            made = dict(zip(SIDES, way_maps(features, pair, way, inputs), strict=True))
            together = ways == [way, way]
            groups.append(Group(f"{number}_{way}", pair, way, columns, together, inputs, made, tables or {}))
    return groups


def empty_state(group: Group) -> GroupState:
    """A group as it was trained."""
    labels = {side: np.empty((CTR_RULES[group.way].n_levels, 0), np.int32) for side in SIDES}
    return GroupState(group.trained, labels, np.empty((0, 2), np.int64))


def assign_group(
    group: Group, known: GroupState, n_new: Mapping[str, int], edges: NDArray[np.int64]
) -> tuple[GroupState, dict[str, NDArray[np.bool_]]]:
    """Assign the new values of a group.

    Args:
        n_new: by side, values after those of ``known``.
        edges: numbers of both ends of the new log's positive samples with an end that is not trained, int64, shape (n, 2).

    Returns: the state without unassigned values, and which of the new ones are assigned, by side.
    """
    edges = np.unique(np.concatenate([known.edges, edges]), axis=0)
    n_known = {side: known.maps[side].n_ids for side in SIDES}
    n_all = {side: n_known[side] + n_new[side] for side in SIDES}
    ones = np.ones(len(edges), np.float32)
    graph = csr_array((ones, (edges[:, 0], edges[:, 1])), shape=(n_all["users"], n_all["items"]))
    assert group.inputs.frequencies is not None
    frequencies = tuple(
        np.concatenate([counts, np.zeros(n_all[side] - len(counts), counts.dtype)])
        for side, counts in zip(SIDES, group.inputs.frequencies, strict=True)
    )
    inputs = replace(group.inputs, frequencies=(frequencies[0], frequencies[1]))
    assignment = CTR_RULES[group.way].assign(NewIds(inputs, graph, known.maps, known.labels))
    kept = {side: np.concatenate([np.ones(n_known[side], np.bool_), assignment.is_assigned[side]]) for side in SIDES}
    n_trained = dict(zip(SIDES, group.inputs.graph.shape, strict=True))
    number = {side: np.cumsum(kept[side]) - 1 for side in SIDES}
    used = kept["users"][edges[:, 0]] & kept["items"][edges[:, 1]]
    ends = np.column_stack([number["users"][edges[used, 0]], number["items"][edges[used, 1]]]).astype(np.int64)
    state = GroupState(
        {
            side: without_unassigned(assignment.maps[side], n_known[side], assignment.is_assigned[side])
            for side in SIDES
        },
        {side: assignment.labels[side][:, kept[side][n_trained[side] :]] for side in SIDES},
        ends,
    )
    return state, assignment.is_assigned


def mixed_rows(group: Group, side: str, state: GroupState) -> NDArray[np.float32]:
    """Rows of the folded-in ids of a side, as mixtures of the trained table: float32, shape (n_folded_in, dim)."""
    number, bucket_map = group.columns[side], group.column_map(side, state.maps)
    assert number is not None
    assert bucket_map.codebook is not None, "a soft map has a codebook"
    assert bucket_map.codes is not None, "a soft map has codes"
    new = slice(group.trained[side].n_ids, -1)
    weights = bucket_map.codebook[bucket_map.codes[new]].astype(np.float32)
    return np.einsum("nk,nkd->nd", weights, group.tables[number][bucket_map.rows[new]])


def column_order(column: Column, bucket_map: BucketMap) -> BucketMap:
    """The map with the missing value's entry, which is the last trained one, behind folded-in ids, where a bundle has it."""
    if not column.has_missing:
        return bucket_map
    missing, n = column.n_ids - 1, bucket_map.n_ids
    order = np.concatenate([np.arange(missing), np.arange(column.n_ids, n), [missing, n]])
    codes = None if bucket_map.codes is None else bucket_map.codes[order]
    return replace(bucket_map, rows=bucket_map.rows[order], codes=codes)


def single_hash(
    features: Features, number: int, vocabulary: Vocabulary, seed: int, trained: BucketMap
) -> tuple[BucketMap, int]:
    """The map of a column that the schema hashes, with the values after the trained ones, and how many of all entries have rows.

    Raises:
        DataError: trained entries are not those of this program.
    """
    column = features.columns[number]
    category, counts = features.schema.category(column.name), features.counts(column)[:-1]
    assert category.rows is not None
    n_all = len(vocabulary) + column.has_missing
    padded = np.concatenate([counts, np.zeros(n_all - len(counts), counts.dtype)])
    n_assigned = n_all
    if category.compress == "quotient_remainder":
        # There are quotients for so many ids.
        n_quotients, n_remainders = quotient_remainder_split(column.n_ids, category.rows)
        n_assigned = min(n_all, n_quotients * n_remainders)
        ids = np.arange(n_assigned)
        rows = np.stack([ids % n_remainders, n_remainders + ids // n_remainders], axis=1)
        made = plain_map(rows, category.rows, category.compress)
    else:
        made = hashed_map(category.compress, n_all, category.rows, padded, seed + number)
    if not np.array_equal(made.rows[: column.n_ids], trained.rows[:-1]):
        raise DataError(
            f"the map of column {column.name!r} is not what this program makes of the run's data and settings; "
            "run 'graphhash train' again"
        )
    return made, n_assigned
