"""Bucket maps of the columns of a CTR data set: pairs of columns with their graphs, and a map for every column.

A pair is two columns whose positive training samples make a bipartite graph. The methods of `pipeline.maps.methods` take its first column
for users and its second for items. A column whose partner has another partner, or stays full, takes its side of the two maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graphhash.clustering.connected import cluster_connected
from graphhash.clustering.labels import Labels
from graphhash.errors import DataError
from graphhash.graph.bipartite import biadjacency
from graphhash.maps.bucket_map import BucketMap, full_map
from graphhash.maps.hashes import double_frequency_map, double_map, frequency_map, modulo_map, quotient_remainder_map
from graphhash.maps.soft_maps import double_soft_maps, soft_maps
from pipeline.ctr.data import Features, JoinedParts, Part
from pipeline.ctr.defaults import compresses_pairs, keeps_every_row
from pipeline.ctr.models import MAP_SETTINGS
from pipeline.ctr.schema import HASHES, SMALL
from pipeline.errors import ConfigError
from pipeline.maps.methods import METHODS, Inputs

# Pairs draw their hash functions apart from each other; a pair uses its seed and the next one.
SEEDS_PER_PAIR = 2
# Training rows are split into so many folds, each of which reads mixtures made without its own positive samples. Validation log loss of
# DLRM with soft on Frappe: 5 .1250, 10 .1236, 20 .1232; 15 % of the pairs hidden from all rows .168. Training holds a map per fold.
N_FOLDS = 8
# What `map.hops=auto` is for CTR.
CTR_HOPS = "1+2"
# The mixtures of `full_soft` are those of `soft`. They are not stored, so their communities follow no budget: those of this resolution.
SOFT_SETTINGS = MAP_SETTINGS | dict.fromkeys(("full_soft", "full_soft_small_dim"), MAP_SETTINGS["soft"])
OWN_RESOLUTION = 5.0


@dataclass(frozen=True)
class Pair:
    """Two columns, by number, that make a graph, and which of them it compresses."""

    columns: tuple[int, int]
    compressed: tuple[bool, bool]

    def names(self, features: Features) -> tuple[str, str]:
        first, second = (features.columns[number].name for number in self.columns)
        return first, second


@dataclass(frozen=True)
class MapOptions:
    """Options of the maps of a method.

    Args:
        indices_per_id: table rows read per id; None: the method's own number.
        hops: steps of the graph that soft methods mix over.
        seed: of the hash functions.
    """

    indices_per_id: int | None
    hops: str
    seed: int


def find_pairs(features: Features) -> list[Pair]:
    """The pairs of the columns that are compressed with a partner, in the order of their first columns."""
    numbers = {column.name: number for number, column in enumerate(features.columns)}
    sides: dict[tuple[int, int], list[bool]] = {}
    for number, column in enumerate(features.columns):
        category = features.schema.category(column.name)
        partner = numbers.get(category.partner or "")
        if partner is None or category.rows is not None or category.compress == "full":
            continue
        if category.compress == "auto" and column.n_ids <= SMALL:
            continue
        key = (min(number, partner), max(number, partner))
        sides.setdefault(key, [False, False])[key.index(number)] = True
    return [Pair(key, (first, second)) for key, (first, second) in sorted(sides.items())]


def check_compressed(features: Features, methods: Sequence[str]) -> None:
    """Raise ConfigError if a method compresses and no column can be."""
    hashed = any(category.compress in HASHES for category in features.schema.categories)
    if not find_pairs(features) and not hashed and any(map(compresses_pairs, methods)):
        raise ConfigError(
            f"no column is compressed: name two with --user-column and --item-column, or partners in a schema, of more than {SMALL} values"
        )


def pair_graph(features: Features, part: Part | JoinedParts, pair: Pair) -> csr_array:
    """Pairs of ids in positive training samples, each once: first column x second column. Samples with an OOV id in either are left out.

    Raises:
        DataError: no positive sample has both.
    """
    graph = _graph(features, pair, part.positive_entries(pair.columns))
    if not graph.nnz:
        names = " and ".join(map(repr, pair.names(features)))
        raise DataError(
            f"no positive training sample has known ids in {names}: there is no graph; lower data.min_count, or keep both full"
        )
    return graph


def draw_folds(n_rows: int, seed: int) -> NDArray[np.uint8]:
    """A fold for every training row, in [0, N_FOLDS), shape (n_rows,)."""
    return np.random.default_rng([seed, N_FOLDS]).integers(0, N_FOLDS, n_rows, dtype=np.uint8)


def fold_graphs(features: Features, part: Part | JoinedParts, pair: Pair, fold: NDArray[np.uint8]) -> list[csr_array]:
    """:func:`pair_graph` for the rows of each fold: without their own positive samples, but with those of the same pair in other rows."""
    entries, fold = part.positive_entries(pair.columns), fold[np.asarray(part.labels) > 0]
    return [_graph(features, pair, entries[fold != number]) for number in range(N_FOLDS)]


def _graph(features: Features, pair: Pair, entries: NDArray[np.int32]) -> csr_array:
    """The graph of the entries of both columns, shape (n, 2), OOV ids left out."""
    shape = [features.columns[number].n_ids for number in pair.columns]
    first, second = entries[(entries < shape).all(1)].T
    if not len(first):
        return csr_array(tuple(shape), dtype=np.float32)
    graph = biadjacency(first, second, n_users=shape[0], n_items=shape[1])
    graph.data[:] = 1
    return graph


def make_maps(
    features: Features,
    graphs: Sequence[csr_array],
    labels: Sequence[Labels],
    method: str,
    options: MapOptions,
    folds: Callable[[Pair], Sequence[csr_array]] = lambda pair: (),
) -> list[BucketMap]:
    """The bucket map of every categorical column, then of every multi-valued one.

    Args:
        graphs, labels: of the pairs of `find_pairs`.
        method: one of METHODS; those that keep a row for every id hash nothing, what the schema hashes neither.
        folds: gives the graphs of a pair by folds (:func:`fold_graphs`), while its maps are made: the mixtures of soft methods are then
            those of folds (:func:`graphhash.soft_maps`), for training.

    Raises:
        DataError: the method cannot make maps of these graphs.
    """
    maps: dict[int, BucketMap] = {}
    for number, pair in enumerate(mapped_pairs(features, method)):
        inputs = pair_inputs(features, pair, number, graphs[number], labels[number], method, options)
        maps |= _pair_maps(features, pair, inputs, method, folds(pair))
    for number, column in enumerate(features.columns):
        category = features.schema.category(column.name)
        if number not in maps and category.rows is not None and not keeps_every_row(method):
            counts = features.counts(column)[:-1]
            maps[number] = hashed_map(category.compress, column.n_ids, category.rows, counts, options.seed + number)
    return [maps.get(number) or full_map(column.n_ids) for number, column in enumerate(features.all_columns)]


def pair_inputs(
    features: Features,
    pair: Pair,
    number: int,
    graph: csr_array,
    labels: Labels,
    method: str,
    options: MapOptions,
) -> Inputs:
    """What the maps of a pair, of this number, are made from."""
    users, items = (features.counts(features.columns[column])[:-1] for column in pair.columns)
    indices, seed = resolve_indices(method, options.indices_per_id), options.seed + SEEDS_PER_PAIR * number
    return Inputs(graph, labels, indices, options.hops, seed, frequencies=(users, items))


def pair_ways(features: Features, pair: Pair, method: str) -> list[str | None]:
    """The method that makes the map of each column of a pair; None where the column is not compressed by it."""
    return [
        _way(features, column, method) if used else None
        for column, used in zip(pair.columns, pair.compressed, strict=True)
    ]


def way_maps(
    features: Features, pair: Pair, way: str, inputs: Inputs, folds: Sequence[csr_array] = ()
) -> tuple[BucketMap, BucketMap]:
    """The maps that a method makes of a pair, of both sides.

    Raises:
        DataError: it cannot make any.
    """
    try:
        return _soft(way, inputs, folds) if way in SOFT_SETTINGS else METHODS[way].make(inputs)
    except ValueError as error:
        names = " and ".join(map(repr, pair.names(features)))
        raise DataError(f"method {way!r} of columns {names}: {error}") from error


def _pair_maps(
    features: Features, pair: Pair, inputs: Inputs, method: str, folds: Sequence[csr_array]
) -> dict[int, BucketMap]:
    """The maps of the columns that a pair compresses, by number."""
    ways = pair_ways(features, pair, method)
    maps: dict[int, BucketMap] = {}
    for way in dict.fromkeys(filter(None, ways)):
        made = way_maps(features, pair, way, inputs, folds)
        together = ways == [way, way]
        for side, column in enumerate(pair.columns):
            if ways[side] == way:
                maps[column] = made[side] if together else alone(made[side])
    return maps


def resolve_indices(method: str, requested: int | None) -> int:
    """Indices per id of a method, where the configuration requests a number, or None."""
    return METHODS[method].resolve_indices(
        SOFT_SETTINGS.get(method, {}).get("indices_per_id") if requested is None else requested
    )


def alone(bucket_map: BucketMap) -> BucketMap:
    """A map that shares its table with another one, without the other's OOV row."""
    if not bucket_map.shared:
        return bucket_map
    last = bucket_map.n_buckets - 2
    rows = np.where(bucket_map.rows == bucket_map.oov_row, last, bucket_map.rows).astype(np.int32)
    return replace(bucket_map, rows=rows, n_buckets=last + 1, shared=False)


def cross_fitted_maps(
    features: Features,
    part: Part | JoinedParts,
    graphs: Sequence[csr_array],
    labels: Sequence[Labels],
    method: str,
    fold: NDArray[np.uint8],
    options: MapOptions,
) -> dict[int, BucketMap]:
    """For training: the maps of the columns that are read by folds, by number (:meth:`graphhash.models.ctr.CtrModel.use_folds`).

    None unless the method is soft: communities and hashes are the same for all rows.

    Args:
        part: train.  fold: of its rows (:func:`draw_folds`).  graphs, labels, method, options: as for :func:`make_maps`.

    Raises:
        DataError: as :func:`make_maps`.
    """
    if method not in SOFT_SETTINGS:
        return {}
    maps = make_maps(features, graphs, labels, method, options, lambda pair: fold_graphs(features, part, pair, fold))
    return {
        number: maps[number] for number, column in enumerate(features.columns) if maps[number].n_ids != column.n_ids
    }


def _soft(method: str, inputs: Inputs, folds: Sequence[csr_array]) -> tuple[BucketMap, BucketMap]:
    settings = {**SOFT_SETTINGS[method], "indices_per_id": inputs.indices_per_id, "hops": inputs.hops, "folds": folds}
    if method != "double_soft":
        return soft_maps(inputs.graph, inputs.labels, **settings)
    return double_soft_maps(inputs.graph, inputs.labels, frequencies=inputs.frequencies, seed=inputs.seed, **settings)


def _way(features: Features, column: int, method: str) -> str:
    compress = features.schema.category(features.columns[column].name).compress
    return compress if compress in HASHES and not keeps_every_row(method) else method


def mapped_pairs(features: Features, method: str) -> list[Pair]:
    """The pairs whose columns a method reads through maps: none where it trains full tables alone."""
    return find_pairs(features) if not keeps_every_row(method) or method in SOFT_SETTINGS else []


def own_columns(features: Features, method: str) -> list[int]:
    """Numbers of the columns that a method itself compresses, and no hash that the schema names."""
    pairs = find_pairs(features)
    used = {c for pair in pairs for c, on in zip(pair.columns, pair.compressed, strict=True) if on}
    return sorted(c for c in used if _way(features, c, method) == method)


def own_labels(graphs: Sequence[csr_array]) -> list[Labels]:
    """Communities of all pairs for a method that takes none from the clustering."""
    return [cluster_connected(graph, resolution=OWN_RESOLUTION) for graph in graphs]


def hashed_map(name: str, n_ids: int, n_rows: int, counts: NDArray[np.int64], seed: int) -> BucketMap:
    """The map of a column that the schema hashes by itself; the identity where its table would have more rows than ids.

    Raises:
        DataError: the table is too small.
    """
    if n_rows > n_ids:
        return full_map(n_ids)
    makers = {"modulo": modulo_map, "quotient_remainder": quotient_remainder_map}
    try:
        if name in makers:
            return makers[name](n_ids, n_rows)
        if name == "double":
            return double_map(n_ids, n_rows, seed=seed)
        return {"frequency": frequency_map, "double_frequency": double_frequency_map}[name](counts, n_rows, seed=seed)
    except ValueError as error:
        raise DataError(f"hash {name!r}: {error}") from error
