"""Clustering over Ray: the graph and its contracted levels stay in files, and tasks work on ranges of rows.

A task gets a path and a row range, the labels and totals of the other side, and returns what is O(ids): labels, flags, gains. A graph
of communities is made in two steps of tasks, like any shuffle: every shard writes what its rows contribute, and every range of
communities sums its share of all that. The process that started it never holds the edges: a contracted level comes into its memory
only when it has fewer entries than the graph has ids.

A task that is lost with its worker or its node is run again (Ray's ``max_retries``), and gives the same bits again.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from graphhash.errors import DataError
from graphhash.graph import balanced_chunks
from graphhash.local_graph import LocalCommunities, Rows, exact_weights, sum_pairs, sum_parts
from pipeline.shards import ShardedCsr

MAX_RETRIES = 5


class _Source(NamedTuple):
    """A stored graph; the fingerprint keeps a worker from answering from one that stood in the same folder before."""

    path: str
    total_weight: float
    fingerprint: str


class RayGraph:
    """:class:`graphhash.graph.Graph` over Ray tasks; Ray must be running.

    Args:
        by_user, by_item: the graph and its transpose, in files that every worker can read.
        n_shards: row ranges per side, at least one for each stored shard; one task each.
        folder: where contracted levels are kept while they are needed, readable and writable by every worker.
    """

    def __init__(self, by_user: ShardedCsr, by_item: ShardedCsr, n_shards: int, folder: Path):
        self.n_users, self.n_items = by_user.n_rows, by_user.n_cols
        self._folder = folder.absolute()
        self._within = None  # Labels of users and items, where only the edges inside them are this graph's.
        self._n_shards = n_shards
        self._sides, self._lengths = {}, {}
        degrees = {}
        for side, stored in (("users", by_user), ("items", by_item)):
            source = _Source(str(stored.path.absolute()), by_user.total_weight, stored.fingerprint)
            lengths = _run(_row_lengths, [(source, start, stop) for start, stop in stored.shards])
            self._lengths[side] = np.concatenate(lengths)
            self._sides[side] = [
                (source, first + int(a), first + int(b))
                for (first, _), part in zip(stored.shards, lengths, strict=True)
                for a, b in _pieces(part, n_shards, by_user.n_edges)
            ]
            degrees[side] = np.concatenate(self._all(side, _degrees))
        self.user_degrees, self.item_degrees = degrees["users"], degrees["items"]
        self.total_weight = float(self.user_degrees.sum())

    def move(self, side, labels, other_labels, totals, scale, fresh, active):
        shared = _put((labels, active, other_labels, totals))
        moved, awake = labels.copy(), np.zeros(len(other_labels), np.bool_)
        # A range in which nobody may move needs no task.
        ranges = [
            (source, start, stop) for source, start, stop in self._sides[side] if active[start:stop].any()
        ]
        parts = self._all(side, _move, (shared, scale, fresh), ranges)
        for (_, start, _), (rows, new, bits) in zip(ranges, parts, strict=True):
            moved[start + rows] = new
            awake |= np.unpackbits(bits, count=len(awake)).view(np.bool_)
        return moved, awake

    def contract(self, user_labels, item_labels, n_groups):
        labels = {"users": user_labels, "items": item_labels}
        shared = {side: _put(side_labels) for side, side_labels in labels.items()}
        jobs, work = [], np.zeros(n_groups)
        for side, other in (("users", "items"), ("items", "users")):
            jobs += [
                (
                    source,
                    start,
                    stop,
                    self._within and self._within[side],
                    shared[side],
                    shared[other],
                    n_groups,
                )
                for source, start, stop in self._sides[side]
            ]
            work += np.bincount(labels[side], self._lengths[side], n_groups)
        return _shuffle(_contract_rows, jobs, work, self._n_shards, self._folder, self.n_users + self.n_items)

    def weight_inside(self, user_labels, item_labels):
        return sum(self._all("users", _weight_inside, (_put((user_labels, item_labels)),)))

    def inside(self, user_labels, item_labels):
        graph = copy.copy(self)
        graph._within = {"users": _put((user_labels, item_labels)), "items": _put((item_labels, user_labels))}
        return graph

    def joined(self, user_labels, item_labels):
        parts = self._all("users", _joined, (_put((user_labels, item_labels)),))
        return np.concatenate([parents for parents, _ in parts]), np.concatenate(
            [anchors for _, anchors in parts]
        )

    def row_weights(self, side):
        return np.concatenate(self._all(side, _row_weights))

    def bucket_weights(self, side, labels, other_labels, n_labels, wanted):
        parts = self._all(side, _bucket_weights, (_put((labels, other_labels, n_labels, wanted)),))
        return sum_pairs(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _all(self, side: str, task: Callable, arguments: tuple = (), ranges: list | None = None) -> list:
        """Results of a task on every row range of a side, in order."""
        within = self._within and self._within[side]
        ranges = self._sides[side] if ranges is None else ranges
        return _run(task, [(*place, within, *arguments) for place in ranges])


class RayCommunities:
    """:class:`graphhash.graph.Communities` in files: one for each range of nodes, removed with this object.

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
        self._folder, self._starts, self._n_entries = folder, starts, n_entries
        self._settings = n_shards, parent, n_kept

    def propose(self, grouping, scale, active, moved):
        shared = _put((grouping, scale, active, moved, self.n_nodes))
        parts = _run(
            _propose,
            [(self._folder.name, part, int(start), shared) for part, start in enumerate(self._starts[:-1])],
        )
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))

    def contract(self, labels, n_groups):
        shared = _put(labels)
        jobs = [
            (self._folder.name, part, int(start), shared, n_groups, self.n_nodes)
            for part, start in enumerate(self._starts[:-1])
        ]
        return _shuffle(
            _contract_communities, jobs, np.bincount(labels, self._n_entries, n_groups), *self._settings
        )


def _shuffle(task: Callable, jobs: list, work: NDArray, n_shards: int, parent: Path, n_kept: int):
    """Contract: ``task`` writes what each job's rows contribute, then each range of groups is summed.

    Args:
        task: gets a folder, a number of its own and a job's arguments.
        work: entries that each group's row is summed from, shape (n_groups,).
        n_shards: ranges of groups to make.  parent: where temporary folders go.
        n_kept: a result of at most so many entries is returned as it is, in memory.
    """
    n_groups = len(work)
    ranges = balanced_chunks(np.concatenate([[0], np.cumsum(work)]), n_shards)
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix="parts-") as parts:
            _run(task, [(parts, number, *job) for number, job in enumerate(jobs)])
            level = tempfile.TemporaryDirectory(dir=parent, prefix="level-")
            lengths = _run(
                _sum_range,
                [
                    (parts, len(jobs), level.name, part, int(start), int(stop), n_groups)
                    for part, (start, stop) in enumerate(zip(ranges[:-1], ranges[1:], strict=True))
                ],
            )
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


def _pieces(lengths: NDArray[np.int64], n_shards: int, n_edges: int) -> list[tuple[int, int]]:
    """Row ranges of a stored shard: as large a share of ``n_shards`` as it has of the edges, so that a task reads one file."""
    n_pieces = max(1, round(n_shards * int(lengths.sum()) / n_edges))
    cuts = balanced_chunks(np.concatenate([[0], np.cumsum(lengths)]), n_pieces)
    return list(zip(cuts[:-1], cuts[1:], strict=True))


def _put(value: Any) -> Any:
    import ray

    return ray.put(value)


def _run(task: Callable, jobs: list[tuple]) -> list:
    """Results of a Ray task of one CPU on every job, in order.

    Raises:
        OSError: a task could not read or write a file.
    """
    import ray

    try:
        return ray.get([_remote().remote(task, *job) for job in jobs])
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (OSError, DataError)):
            raise error.cause from error
        raise


@cache
def _remote() -> Any:
    """The one remote function, made once: Ray sends every new one to all workers."""
    import ray

    return ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(_in_one_thread)


def _in_one_thread(task: Callable, *arguments):
    numba.set_num_threads(1)
    return task(*arguments)


@lru_cache(maxsize=64)
def _stored_rows(source: _Source, start: int, stop: int) -> Rows:
    """Rows of a graph; a worker that gets the same range again need not open it again. The edges are a memory map."""
    stored = ShardedCsr.open(source.path)
    indptr, indices, weights = stored.read(start, stop)
    return Rows(
        indptr, indices, weights if stored.unit_weights else exact_weights(weights, source.total_weight)
    )


def _rows(source: _Source, start: int, stop: int, within) -> Rows:
    rows = _stored_rows(source, start, stop)
    if within is None:
        return rows
    labels, other_labels = within
    return rows.inside(labels[start:stop], other_labels)


def _row_lengths(source: _Source, start: int, stop: int) -> NDArray[np.int64]:
    return np.diff(ShardedCsr.open(source.path).read(start, stop)[0])


def _degrees(*place):
    return _rows(*place).degrees


def _row_weights(*place):
    return _rows(*place).row_weights()


def _joined(source, start, stop, within, shared):
    labels, other_labels = shared
    return _rows(source, start, stop, within).joined(labels[start:stop], other_labels)


def _weight_inside(source, start, stop, within, shared):
    labels, other_labels = shared
    return _rows(source, start, stop, within).weight_inside(labels[start:stop], other_labels)


def _bucket_weights(source, start, stop, within, shared):
    labels, *others = shared
    return _rows(source, start, stop, within).bucket_weights(labels[start:stop], *others)


def _move(source, start, stop, within, shared, scale, fresh):
    labels, active, other_labels, totals = shared
    rows = _rows(source, start, stop, within)
    moved, awake = rows.move(
        labels[start:stop], other_labels, totals, scale, fresh + start, active[start:stop]
    )
    # What did not change need not travel.
    changed = np.flatnonzero(moved != labels[start:stop])
    return changed, moved[changed], np.packbits(awake)


def _contract_rows(folder, number, source, start, stop, within, labels, other_labels, n_groups):
    rows = _rows(source, start, stop, within)
    _write_csr(folder, number, rows.contract(labels[start:stop], other_labels, n_groups).compact())


def _contract_communities(folder, number, source, part, first, shared, n_groups, n_nodes):
    _write_csr(
        folder, number, _communities(source, part, first, n_nodes).contract(shared, n_groups).compact()
    )


def _sum_range(
    parts: str, n_parts: int, folder: str, part: int, start: int, stop: int, n_groups: int
) -> NDArray[np.int64]:
    """Rows start..stop-1 of a contracted graph, written; returns their lengths."""
    pieces = []
    for number in range(n_parts):
        indptr, columns, values = _read_csr(parts, number)
        bounds = np.array(indptr[start : stop + 1])
        pieces.append((bounds - bounds[0], columns[bounds[0] : bounds[-1]], values[bounds[0] : bounds[-1]]))
    csr = sum_parts(pieces, start, n_groups).compact()
    _write_csr(folder, part, csr)
    return np.diff(csr[0])


def _propose(folder, part, first, shared):
    grouping, scale, active, moved, n_nodes = shared
    return _communities(folder, part, first, n_nodes).propose(grouping, scale, active, moved)


def _communities(folder: str, part: int, first: int, n_nodes: int) -> LocalCommunities:
    indptr, columns, values = _read_csr(folder, part)
    return LocalCommunities(indptr[:-1], indptr[1:], columns, values, first, n_nodes)


def _write_csr(folder: str, number: int, csr: tuple[NDArray, NDArray, NDArray]) -> None:
    for name, array in zip(("indptr", "columns", "values"), csr, strict=True):
        np.save(Path(folder, f"{number}.{name}.npy"), array)


def _read_csr(folder: str, number: int) -> list[NDArray]:
    return [
        # An empty array cannot be memory-mapped.
        np.load(file, mmap_mode="r" if file.stat().st_size > 4096 else None)
        for file in (Path(folder, f"{number}.{name}.npy") for name in ("indptr", "columns", "values"))
    ]
