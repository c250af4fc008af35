"""Bucket maps of the columns of a CTR data set: pairs of columns with their graphs, and a map for every column.

A pair is two columns whose positive training samples make a bipartite graph. The methods of `pipeline.maps.methods` take its first column
for users and its second for items. A column whose partner has another partner, or stays full, takes its side of the two maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graphhash.clustering.connected import cluster_connected
from graphhash.clustering.labels import Labels
from graphhash.errors import DataError
from graphhash.graph.bipartite import biadjacency
from graphhash.maps.bucket_map import BucketMap, full_map
from graphhash.maps.folded_map import FoldIndex
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
    graph = entries_graph(features, pair, part.positive_entries(pair.columns))
    if not graph.nnz:
        names = " and ".join(map(repr, pair.names(features)))
        raise DataError(
            f"no positive training sample has known ids in {names}: there is no graph; lower data.min_count, or keep both full"
        )
    return graph


def entries_graph(features: Features, pair: Pair, entries: NDArray[np.int32]) -> csr_array:
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
) -> list[BucketMap]:
    """The bucket map of every categorical column, then of every multi-valued one.

    Args:
        graphs, labels: of the pairs of `find_pairs`.
        method: one of METHODS; those that keep a row for every id hash nothing, what the schema hashes neither.

    Raises:
        DataError: the method cannot make maps of these graphs.
    """
    maps: dict[int, BucketMap] = {}
    for number, pair in enumerate(mapped_pairs(features, method)):
        inputs = pair_inputs(features, pair, number, graphs[number], labels[number], method, options)
        maps |= pair_maps(features, pair, inputs, method)
    columns = range(len(features.all_columns))
    return [
        maps[number] if number in maps else single_map(features, number, method, options.seed) for number in columns
    ]


def single_map(features: Features, number: int, method: str, seed: int) -> BucketMap:
    """The map of a column that no pair compresses: the hash of the schema, or the identity."""
    column = features.all_columns[number]
    if number >= len(features.columns) or keeps_every_row(method):
        return full_map(column.n_ids)
    category = features.schema.category(column.name)
    if category.rows is None:
        return full_map(column.n_ids)
    return hashed_map(category.compress, column.n_ids, category.rows, features.counts(column)[:-1], seed + number)


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
    features: Features, pair: Pair, way: str, inputs: Inputs, folds: Folds | None = None
) -> tuple[BucketMap, BucketMap]:
    """The maps that a method makes of a pair, of both sides; with ``folds`` those of folds, if it mixes.

    Raises:
        DataError: it cannot make any.
    """
    try:
        return _soft(way, inputs, folds) if way in SOFT_SETTINGS else METHODS[way].make(inputs)
    except ValueError as error:
        names = " and ".join(map(repr, pair.names(features)))
        raise DataError(f"method {way!r} of columns {names}: {error}") from error


def pair_maps(
    features: Features, pair: Pair, inputs: Inputs, method: str, folds: Folds | None = None
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


@dataclass(frozen=True, eq=False)
class Folds:
    """What the maps of a pair are cross-fitted by: the graph of every fold, and which ids of both columns are read in it."""

    graphs: Sequence[csr_array]
    indices: tuple[FoldIndex, FoldIndex]


def _soft(method: str, inputs: Inputs, folds: Folds | None) -> tuple[BucketMap, BucketMap]:
    settings = {**SOFT_SETTINGS[method], "indices_per_id": inputs.indices_per_id, "hops": inputs.hops}
    if folds is not None:
        settings |= {"folds": folds.graphs, "fold_indices": folds.indices}
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


def own_labels(graph: csr_array) -> Labels:
    """Communities of a pair for a method that takes none from the clustering."""
    return cluster_connected(graph, resolution=OWN_RESOLUTION)


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
