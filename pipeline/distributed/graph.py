"""Clustering over Ray: the graph and its contracted levels stay in files, and tasks work on ranges of rows.

A task gets a path and a row range, the labels and totals of the other side, and returns what is O(ids): labels, flags, gains. A graph
of communities is made in two steps of tasks, like any shuffle: every shard writes what its rows contribute, and every range of
communities sums its share of all that. The process that started it never holds the edges: a contracted level comes into its memory
only when it has fewer entries than the graph has ids.

A task that is lost with its worker or its node is run again (Ray's ``max_retries``), and gives the same bits again.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from graphhash.errors import DataError
from graphhash.graph.bipartite import balanced_chunks
from graphhash.graph.local import LocalCommunities, Rows, exact_weights, sum_pairs, sum_parts
from pipeline.distributed.shards import ShardedCsr
from pipeline.storage.mapped import load_array

MAX_RETRIES = 5
OTHER = {"users": "items", "items": "users"}


class _Source(NamedTuple):
    """A stored graph; the fingerprint keeps a worker from answering from one that stood in the same folder before."""

    path: str
    total_weight: float
    fingerprint: str


class _Range(NamedTuple):
    """Rows [start, stop) of a side of a stored graph."""

    side: str
    source: _Source
    start: int
    stop: int


class RayGraph:
    """:class:`graphhash.graph.bipartite.Graph` over Ray tasks; Ray must be running.

    Args:
        by_user, by_item: the graph and its transpose, in files that every worker can read.
        n_shards: row ranges per side, at least one for each stored shard; the CPUs share them.
        folder: where contracted levels are kept while they are needed, readable and writable by every worker.
    """

    def __init__(self, by_user: ShardedCsr, by_item: ShardedCsr, n_shards: int, folder: Path):
        self.n_users, self.n_items = by_user.n_rows, by_user.n_cols
        self._folder = folder.absolute()
        self._within = None  # Labels of both sides, where only the edges inside them are this graph's.
        self._n_shards = n_shards
        self._sides, self._lengths = {}, {}
        degrees = {}
        for side, stored in (("users", by_user), ("items", by_item)):
            source = _Source(str(stored.path.absolute()), by_user.total_weight, stored.fingerprint)
            lengths = _run(_row_lengths, [_Range(side, source, start, stop) for start, stop in stored.shards])
            self._lengths[side] = np.concatenate(lengths)
            self._sides[side] = [
                _Range(side, source, first + int(a), first + int(b))
                for (first, _), part in zip(stored.shards, lengths, strict=True)
                for a, b in row_ranges(part, n_shards, by_user.n_edges)
            ]
            degrees[side] = np.concatenate(_run(_degrees, self._sides[side], self._within))
        self.user_degrees, self.item_degrees = degrees["users"], degrees["items"]
        self.total_weight = float(self.user_degrees.sum())

    def move(self, side, labels, other_labels, totals, scale, fresh, active):
        shared = _put((labels, active, other_labels, totals))
        moved, awake = labels.copy(), np.zeros(len(other_labels), np.bool_)
        # A range in which nobody may move needs no task.
        places = [place for place in self._sides[side] if active[place.start : place.stop].any()]
        parts = _run(_move, places, self._within, shared, scale, fresh)
        for place, (rows, new, bits) in zip(places, parts, strict=True):
            moved[place.start + rows] = new
            awake |= np.unpackbits(bits, count=len(awake)).view(np.bool_)
        return moved, awake

    def contract(self, user_labels, item_labels, n_groups):
        labels = {"users": user_labels, "items": item_labels}
        per_side = [np.bincount(labels[side], self._lengths[side], n_groups) for side in labels]
        work = np.sum(per_side, axis=0)
        places = self._sides["users"] + self._sides["items"]
        return _shuffle(
            _contract_rows,
            places,
            (self._within, _put(labels), n_groups),
            work,
            self._n_shards,
            self._folder,
            self.n_users + self.n_items,
        )

    def weight_inside(self, user_labels, item_labels):
        return sum(_run(_weight_inside, self._sides["users"], self._within, _put((user_labels, item_labels))))

    def inside(self, user_labels, item_labels):
        graph = copy.copy(self)
        graph._within = _put({"users": user_labels, "items": item_labels})
        return graph

    def joined(self, user_labels, item_labels):
        parts = _run(_joined, self._sides["users"], self._within, _put((user_labels, item_labels)))
        return np.concatenate([parents for parents, _ in parts]), np.concatenate([anchors for _, anchors in parts])

    def row_weights(self, side):
        return np.concatenate(_run(_row_weights, self._sides[side], self._within))

    def bucket_weights(self, side, labels, other_labels, n_labels, wanted):
        parts = _run(_bucket_weights, self._sides[side], self._within, _put((labels, other_labels, n_labels, wanted)))
        return sum_pairs(*(np.concatenate(column) for column in zip(*parts, strict=True)))


class RayCommunities:
    """:class:`graphhash.graph.bipartite.Communities` in files: one for each range of nodes, removed with this object.

    Args:
        folder: a temporary directory, owned.
        starts: boundaries of the ranges, shape (n_parts + 1,).
        n_entries: entries of each node's row, int64, shape (n_nodes,).
        n_shards, parent, n_kept: of the graphs contracted from this one, see :func:`_shuffle`.
    """

    def __init__(
        self,
        folder: tempfile.TemporaryDirectory,
        starts: NDArray[np.int64],
        n_entries: NDArray[np.int64],
        n_shards: int,
        parent: Path,
        n_kept: int,
    ):
        self.n_nodes = int(starts[-1])
        self._folder, self._n_entries = folder, n_entries
        self._places = [(part, int(start)) for part, start in enumerate(starts[:-1])]
        self._settings = n_shards, parent, n_kept

    def propose(self, grouping, scale, active, moved):
        shared = _put((grouping, scale, active, moved))
        parts = _run(_propose, self._places, self._folder.name, self.n_nodes, shared)
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))

    def contract(self, labels, n_groups):
        work = np.bincount(labels, self._n_entries, n_groups)
        common = (self._folder.name, self.n_nodes, _put(labels), n_groups)
        return _shuffle(_contract_communities, self._places, common, work, *self._settings)


def _shuffle(task: Callable, places: list, common: tuple, work: NDArray, n_shards: int, parent: Path, n_kept: int):
    """Contract: ``task`` writes what each place's rows contribute, then each range of groups is summed.

    Args:
        task: gets a number of its own with a place, a folder, and ``common``.
        work: entries that each group's row is summed from, shape (n_groups,).
        n_shards: ranges of groups to make.  parent: where temporary folders go.
        n_kept: a result of at most so many entries is returned as it is, in memory.
    """
    n_groups = len(work)
    ranges = balanced_chunks(np.concatenate([[0], np.cumsum(work)]), n_shards)
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix="parts-") as parts:
            _run(task, list(enumerate(places)), parts, *common)
            level = tempfile.TemporaryDirectory(dir=parent, prefix="level-")
            bounds = enumerate(zip(ranges[:-1].tolist(), ranges[1:].tolist(), strict=True))
            parts_of = [(part, start, stop) for part, (start, stop) in bounds]
            lengths = _run(_sum_range, parts_of, parts, len(places), level.name, n_groups)
    except OSError as error:
        raise DataError(
            f"{parent}: cannot keep a level of the clustering ({error}); free some space, or lower the shards"
        ) from error
    n_entries = np.concatenate(lengths)
    if n_entries.sum() <= n_kept:
        rows = [_read_csr(level.name, part) for part in range(len(ranges) - 1)]
        columns, values = (np.concatenate([row[i] for row in rows]) for i in (1, 2))
        ends = np.cumsum(n_entries)
        return LocalCommunities(ends - n_entries, ends, columns, values)
    return RayCommunities(level, ranges, n_entries, n_shards, parent, n_kept)


def row_ranges(lengths: NDArray[np.int64], n_shards: int, n_edges: int) -> list[tuple[int, int]]:
    """Row ranges of a stored shard: as large a share of ``n_shards`` as it has of the edges, so that a task reads one file."""
    n_pieces = max(1, round(n_shards * int(lengths.sum()) / n_edges))
    cuts = balanced_chunks(np.concatenate([[0], np.cumsum(lengths)]), n_pieces)
    return list(itertools.pairwise(cuts))


def _put(value: Any) -> Any:
    import ray

    return ray.put(value)


def _run(task: Callable, places: Sequence[tuple], *common: Any) -> list:
    """Results of ``task(place, *common)`` for every place, in order, from as many Ray tasks of one CPU as there are CPUs.

    Raises:
        OSError: a task could not read or write a file.
        DataError: a file is damaged.
    """
    import ray

    n_tasks = max(1, min(len(places), int(ray.cluster_resources().get("CPU", 1))))
    cuts = np.linspace(0, len(places), n_tasks + 1).astype(int)
    try:
        batches = ray.get([_remote().remote(task, places[a:b], *common) for a, b in itertools.pairwise(cuts)])
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (OSError, DataError)):
            raise error.cause from error
        raise
    return [result for batch in batches for result in batch]


@cache
def _remote() -> Any:
    """The one remote function, made once: Ray sends every new one to all workers."""
    import ray

    return ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(_at_places)


def _at_places(task: Callable, places: Sequence[tuple], *common) -> list:
    numba.set_num_threads(1)
    return [task(place, *common) for place in places]


@lru_cache(maxsize=64)
def _stored_rows(source: _Source, start: int, stop: int) -> Rows:
    """Rows of a graph; a worker that gets the same range again need not open it again. The edges are a memory map."""
    stored = ShardedCsr.open(source.path)
    indptr, indices, weights = stored.read(start, stop)
    return Rows(indptr, indices, weights if stored.unit_weights else exact_weights(weights, source.total_weight))


def _rows(place: _Range, within: dict[str, NDArray] | None) -> Rows:
    rows = _stored_rows(place.source, place.start, place.stop)
    if within is None:
        return rows
    return rows.inside(within[place.side][place.start : place.stop], within[OTHER[place.side]])


def _row_lengths(place: _Range) -> NDArray[np.int64]:
    return np.diff(ShardedCsr.open(place.source.path).read(place.start, place.stop)[0])


def _degrees(place, within):
    return _rows(place, within).degrees


def _row_weights(place, within):
    return _rows(place, within).row_weights()


def _joined(place, within, shared):
    labels, other_labels = shared
    return _rows(place, within).joined(labels[place.start : place.stop], other_labels)


def _weight_inside(place, within, shared):
    labels, other_labels = shared
    return _rows(place, within).weight_inside(labels[place.start : place.stop], other_labels)


def _bucket_weights(place, within, shared):
    labels, *others = shared
    return _rows(place, within).bucket_weights(labels[place.start : place.stop], *others)


def _move(place, within, shared, scale, fresh):
    labels, active, other_labels, totals = shared
    own = slice(place.start, place.stop)
    moved, awake = _rows(place, within).move(labels[own], other_labels, totals, scale, fresh + place.start, active[own])
    # What did not change need not travel.
    changed = np.flatnonzero(moved != labels[own])
    return changed, moved[changed], np.packbits(awake)


def _contract_rows(numbered, folder, within, labels, n_groups):
    number, place = numbered
    own_labels = labels[place.side][place.start : place.stop]
    contributed = _rows(place, within).contract(own_labels, labels[OTHER[place.side]], n_groups)
    _write_csr(folder, number, contributed.compact())


def _contract_communities(numbered, folder, source, n_nodes, labels, n_groups):
    number, place = numbered
    _write_csr(folder, number, _communities(place, source, n_nodes).contract(labels, n_groups).compact())


def _sum_range(groups: tuple[int, int, int], parts: str, n_parts: int, folder: str, n_groups: int) -> NDArray[np.int64]:
    """Rows of a range of groups in a contracted graph, written; returns their lengths."""
    number, start, stop = groups
    pieces = []
    for part in range(n_parts):
        indptr, columns, values = _read_csr(parts, part)
        bounds = np.array(indptr[start : stop + 1])
        pieces.append((bounds - bounds[0], columns[bounds[0] : bounds[-1]], values[bounds[0] : bounds[-1]]))
    csr = sum_parts(pieces, start, n_groups).compact()
    _write_csr(folder, number, csr)
    return np.diff(csr[0])


def _propose(place, folder, n_nodes, shared):
    grouping, scale, active, moved = shared
    return _communities(place, folder, n_nodes).propose(grouping, scale, active, moved)


def _communities(place: tuple[int, int], folder: str, n_nodes: int) -> LocalCommunities:
    """A stored part of a contracted graph, by its number and its first node."""
    number, first = place
    indptr, columns, values = _read_csr(folder, number)
    return LocalCommunities(indptr[:-1], indptr[1:], columns, values, first, n_nodes)


def _write_csr(folder: str, number: int, csr: tuple[NDArray, NDArray, NDArray]) -> None:
    for name, array in zip(("indptr", "columns", "values"), csr, strict=True):
        np.save(Path(folder, f"{number}.{name}.npy"), array)


def _read_csr(folder: str, number: int) -> list[NDArray]:
    return [load_array(Path(folder, f"{number}.{name}.npy")) for name in ("indptr", "columns", "values")]
