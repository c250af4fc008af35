"""Partners of columns that name none: the column whose graph tells most about communities of the values.

A schema leaves the choice to the data with ``partner = "auto"``. The measure is the modularity of the graph of both columns' positive
samples, less that of the same graph with its edges' ends shuffled (the configuration model), both clustered alike. A column that follows
from the other one, such as the city of an address, makes stars, and shuffled stars are as modular: its gain is 0, as it should be,
because its communities would repeat a column that the model reads anyway.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graphhash.clustering.api import cluster
from graphhash.graph.bipartite import biadjacency
from pipeline.ctr.schema import AUTO, SMALL, CtrSchema
from pipeline.storage.mapped import read_slice

# Positive samples of a column's values that are looked at: of its most frequent values, so many of each. A sample of all values would
# hardly hold two samples of a value.
MOST_SAMPLES, OF_A_VALUE = 65_536, 32
# Below it, a gain is noise: among independent columns of the synthetic log gains are -.02 to .00, and among partners .18 to .21. Frappe:
# user and item .06 and .08, user and city -.05. MovieLens-1M: .17 and .22, user and zip code .00.
LEAST_GAIN = 0.02
BLOCK_ROWS = 1 << 18

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedColumn:
    """A categorical column: its name, and the training rows of each of its entries, int64, shape (n_ids + 1,), OOV last."""

    name: str
    counts: NDArray[np.int64]

    @property
    def n_ids(self) -> int:
        return len(self.counts) - 1


def with_partners(
    schema: CtrSchema, columns: Sequence[EncodedColumn], labels: NDArray[np.uint8], categorical: NDArray[np.int32]
) -> CtrSchema:
    """The schema with a partner, or none, for every column whose partner is "auto". What was chosen is logged, with its gain.

    A partner has more than SMALL values. A column for which no other has a gain of LEAST_GAIN stays full.

    Args:
        columns: of ``categorical``, in order.
        labels, categorical: the training samples, shapes (n,) and (n, n_columns); memory maps are read in blocks.

    Raises:
        DataError: a column that a hash compresses, without a number of rows, has no partner.
    """
    wanted = [number for number, column in enumerate(columns) if schema.category(column.name).partner == AUTO]
    searched = [number for number in wanted if _is_compressed(schema, columns[number])]
    chosen = {
        columns[number].name: _chosen(columns, number, rows)
        for number, rows in _samples(columns, searched, labels, categorical)
    }
    for name, (partner, gain) in chosen.items():
        if partner is None:
            logger.warning(
                "column %s has no partner: no column tells communities of its values (the best gain of modularity is %.3f); compress it by "
                "a hash such as double_frequency, or keep it full",
                name,
                gain,
            )
        else:
            logger.info("partner of %s: %s (modularity %.3f above that of shuffled pairs)", name, partner, gain)
    categories = []
    for category in schema.categories:
        if category.partner == AUTO:
            partner = chosen.get(category.name, (None, 0.0))[0]
            keeps_full = partner is None and category.compress in ("auto", "method")
            category = replace(category, partner=partner, compress="full" if keeps_full else category.compress)
        categories.append(category)
    return replace(schema, categories=tuple(categories))


def _is_compressed(schema: CtrSchema, column: EncodedColumn) -> bool:
    compress = schema.category(column.name).compress
    return compress != "full" and (compress != "auto" or column.n_ids > SMALL)


def _samples(
    columns: Sequence[EncodedColumn], searched: Sequence[int], labels: NDArray[np.uint8], categorical: NDArray[np.int32]
) -> list[tuple[int, NDArray[np.int32]]]:
    """Positive samples of the most frequent values of each of some columns, at most OF_A_VALUE of a value, in their order."""
    places, room, found = {}, {}, {number: [np.empty((0, len(columns)), np.int32)] for number in searched}
    for number in searched:
        counts = columns[number].counts[:-1]
        # All their rows are taken for positive ones here: then there are fewer samples, never more.
        order = np.argsort(-counts, kind="stable")
        n_values = int(np.searchsorted(np.cumsum(np.minimum(counts[order], OF_A_VALUE)), MOST_SAMPLES)) + 1
        places[number] = np.full(len(counts) + 1, -1, np.int32)
        places[number][order[:n_values]] = np.arange(min(n_values, len(counts)))
        room[number] = np.full(min(n_values, len(counts)), OF_A_VALUE)
    for start in range(0, len(labels), BLOCK_ROWS):
        positive = np.asarray(labels[start : start + BLOCK_ROWS]) > 0
        block = read_slice(categorical, start, start + BLOCK_ROWS)[positive]
        for number in searched:
            place = places[number][block[:, number]]
            rows, place = block[place >= 0], place[place >= 0]
            kept = _ranks(place) < room[number][place]
            room[number] -= np.bincount(place[kept], minlength=len(room[number]))
            found[number].append(rows[kept])
    return [(number, np.concatenate(rows)) for number, rows in found.items()]


def _ranks(values: NDArray[np.int32]) -> NDArray[np.int64]:
    """How many equal values come before each one, shape (n,)."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(values) else order
    ranks = np.empty(len(values), np.int64)
    ranks[order] = np.arange(len(values)) - np.repeat(first, np.diff(np.append(first, len(values))))
    return ranks


def _chosen(columns: Sequence[EncodedColumn], number: int, rows: NDArray[np.int32]) -> tuple[str | None, float]:
    """The best partner of a column, and its gain; None where no gain is large enough."""
    gains = {}
    for other, column in enumerate(columns):
        pairs = rows[(rows[:, number] < columns[number].n_ids) & (rows[:, other] < column.n_ids)]
        if other != number and column.n_ids > SMALL and len(pairs):
            gains[column.name] = modularity_gain(pairs[:, number], pairs[:, other])
    best = max(gains, key=lambda name: gains[name], default=None)
    if best is None:
        return None, 0.0
    return (best if gains[best] >= LEAST_GAIN else None), gains[best]


def modularity_gain(first: NDArray[np.integer], second: NDArray[np.integer]) -> float:
    """Modularity of the graph of two columns of values, less that of the graph with the ends of its edges shuffled.

    Args:
        first, second: the values of samples, shape (n,), at least one; a pair counts once.
    """
    graph = _graph(first, second)
    ends = graph.tocoo().coords
    shuffled = _graph(ends[0], np.random.default_rng(0).permutation(ends[1]))
    found, by_chance = (cluster(pairs, resolution=1.0, max_cycles=3).modularity for pairs in (graph, shuffled))
    return found - by_chance


def _graph(first: NDArray[np.integer], second: NDArray[np.integer]) -> csr_array:
    graph = biadjacency(*(np.unique(values, return_inverse=True)[1] for values in (first, second)))
    graph.data[:] = 1
    return graph
