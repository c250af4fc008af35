"""Cross-fitting of CTR trainings: every training row reads mixtures that were made without the positive samples of its fold.

The maps of a column by folds have entries for the ids that occur in the rows of a fold. They are made pair by pair, fold by fold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graphhash.clustering.labels import Labels
from graphhash.maps.folded_map import FoldedMap, FoldIndex
from pipeline.ctr.data import Features, JoinedParts, Part
from pipeline.ctr.maps import (
    SOFT_SETTINGS,
    Folds,
    MapOptions,
    Pair,
    entries_graph,
    mapped_pairs,
    pair_inputs,
    pair_maps,
    pair_ways,
)
from pipeline.maps.methods import Inputs

# Training rows are split into so many folds, each of which reads mixtures made without its own positive samples. Validation log loss of
# DLRM with soft on Frappe: 5 .1250, 10 .1236, 20 .1232; 15 % of the pairs hidden from all rows .168. Training holds a map per fold.
N_FOLDS = 8


def draw_folds(n_rows: int, seed: int) -> NDArray[np.uint8]:
    """A fold for every training row, in [0, N_FOLDS), shape (n_rows,)."""
    return np.random.default_rng([seed, N_FOLDS]).integers(0, N_FOLDS, n_rows, dtype=np.uint8)


def fold_graphs(features: Features, part: Part | JoinedParts, pair: Pair, fold: NDArray[np.uint8]) -> FoldGraphs:
    """:func:`pair_graph` for the rows of each fold: without their own positive samples, but with those of the same pair in other rows."""
    return FoldGraphs(features, pair, part.positive_entries(pair.columns), fold[np.asarray(part.labels) > 0])


@dataclass(frozen=True, eq=False)
class FoldGraphs(Sequence[csr_array]):
    """The graphs of all folds, each made when it is asked for: one is in memory at a time.

    Args:
        entries: of both columns in the positive rows, int32, shape (n, 2).
        fold: of these rows, shape (n,).
    """

    features: Features
    pair: Pair
    entries: NDArray[np.int32]
    fold: NDArray[np.uint8]

    def __len__(self) -> int:
        return N_FOLDS

    def __getitem__(self, number):
        if not 0 <= number < N_FOLDS:
            raise IndexError(f"fold {number} of {N_FOLDS}")
        return entries_graph(self.features, self.pair, self.entries[self.fold != number])


def fold_indices(
    features: Features, part: Part | JoinedParts, pair: Pair, fold: NDArray[np.uint8]
) -> tuple[FoldIndex, FoldIndex]:
    """The folds that every id of both columns occurs in, in rows of any label; OOV ids need none."""
    occurs = [np.zeros((N_FOLDS, features.columns[column].n_ids + 1), bool) for column in pair.columns]
    start = 0
    for entries in part.entry_blocks(pair.columns):
        own = fold[start : start + len(entries)]
        start += len(entries)
        for there, of_column in zip(occurs, entries.T, strict=True):
            there[own, of_column] = True
    first, second = (
        FoldIndex.of(np.packbits(there[:, :-1], axis=0, bitorder="little")[0], N_FOLDS) for there in occurs
    )
    return first, second


def cross_fitted_maps(
    features: Features,
    part: Part | JoinedParts,
    graphs: Sequence[csr_array],
    labels: Sequence[Labels],
    method: str,
    fold: NDArray[np.uint8],
    options: MapOptions,
) -> Iterator[tuple[int, FoldedMap]]:
    """For training: the maps of the columns that are read by folds, with their numbers (:meth:`graphhash.models.ctr.CtrModel.use_folds`).

    None unless the method is soft: communities and hashes are the same for all rows. Maps are made pair by pair, and have entries for
    what the rows of ``part`` read.

    Args:
        part: train.  fold: of its rows (:func:`draw_folds`).  graphs, labels, method, options: as for :func:`make_maps`.

    Raises:
        DataError: as :func:`make_maps`.
    """
    wanted = folded_columns(features, method)
    for number, pair in enumerate(mapped_pairs(features, method)):
        if wanted & set(pair.columns):
            inputs = pair_inputs(features, pair, number, graphs[number], labels[number], method, options)
            yield from folded_pair_maps(features, part, pair, inputs, method, fold).items()


def folded_pair_maps(
    features: Features, part: Part | JoinedParts, pair: Pair, inputs: Inputs, method: str, fold: NDArray[np.uint8]
) -> dict[int, FoldedMap]:
    """:func:`cross_fitted_maps` of one pair, by column."""
    folds = Folds(fold_graphs(features, part, pair, fold), fold_indices(features, part, pair, fold))
    maps, wanted = pair_maps(features, pair, inputs, method, folds), folded_columns(features, method)
    indices = zip(pair.columns, folds.indices, strict=True)
    return {column: FoldedMap.of(maps.pop(column), index) for column, index in indices if column in wanted}


def folded_columns(features: Features, method: str) -> set[int]:
    """Numbers of the columns that a method reads by folds (:func:`cross_fitted_maps`)."""
    if method not in SOFT_SETTINGS:
        return set()
    return {
        column
        for pair in mapped_pairs(features, method)
        for column, way in zip(pair.columns, pair_ways(features, pair, method), strict=True)
        if way in SOFT_SETTINGS
    }
