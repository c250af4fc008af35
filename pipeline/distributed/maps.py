"""Soft maps over Ray: those of ``graphhash.soft_maps``, bit for bit, from ranges of rows of a stored graph.

The rows of each side are cut as for clustering (``pipeline.distributed.graph``), and tasks go over them three times:
for the degrees; for what ids give to each bucket (``SoftPlan.sources``), joined to one file per array and
side; and for the largest affinities of every id, from the memory-mapped sources of the other side.

In memory, a task holds the edges of its range (some 50 bytes each while sources are made, 8 later), about 40
bytes for every id of either side, and pages of the sources, which the tasks of one machine share. The driver
holds numbers per id, and the maps: 8 bytes for an id's lookup, twice while codebook are found. A file of
sources has 12 bytes for each entry, at most one for an edge or an id.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graphhash.clustering.labels import Labels
from graphhash.graph.bipartite import SIDES
from graphhash.maps.affinities import csr_affinity_rows, row_degrees
from graphhash.maps.bucket_map import BucketMap
from graphhash.maps.soft_maps import SoftPlan, check_soft, n_soft_indices, with_hashed_row
from pipeline.distributed.graph import OTHER, row_ranges
from pipeline.distributed.session import run_tasks
from pipeline.distributed.shards import ShardedCsr
from pipeline.storage.mapped import load_array

CSR_ARRAYS = {"indptr": np.int64, "buckets": np.int32, "values": np.float64}


class StoredGraph(NamedTuple):
    """A training graph in files.

    Args:
        ingest_dir: holds ``train/`` and ``train_by_item/``, readable by every worker.
        folder: where sources are kept while they are needed, readable and writable by every worker.
        n_shards: row ranges per side, at least one for each stored shard.
    """

    ingest_dir: Path
    folder: Path
    n_shards: int


class _Range(NamedTuple):
    """Rows [start, stop) of a side of a stored graph; ``number`` counts the ranges of a side."""

    side: str
    number: int
    path: Path
    start: int
    stop: int


def soft_maps(stored: StoredGraph, labels: Labels, *, indices_per_id: int, hops: str) -> tuple[BucketMap, BucketMap]:
    """:func:`graphhash.soft_maps` by Ray tasks; Ray must be running.

    Raises:
        ValueError: as there.
        OSError: a file could not be written or read.
        DataError: the stored graph is damaged.
    """
    import ray

    graphs = {
        side: ShardedCsr.open((stored.ingest_dir / name).absolute())
        for side, name in zip(SIDES, ("train", "train_by_item"), strict=True)
    }
    check_soft((graphs["users"].n_rows, graphs["users"].n_cols), labels, indices_per_id, hops)
    places, degrees = {}, {}
    for side, graph in graphs.items():
        facts = run_tasks(_row_facts, [(graph.path, *shard) for shard in graph.shards], label="degrees")
        degrees[side] = np.concatenate([part[1] for part in facts])
        places[side] = [
            (graph.path, first + int(a), first + int(b))
            for (first, _), (lengths, _) in zip(graph.shards, facts, strict=True)
            for a, b in row_ranges(lengths, stored.n_shards, graph.n_edges)
        ]
    plan = SoftPlan.of(labels, degrees["users"], degrees["items"], hops)
    shared = ray.put(plan)
    with tempfile.TemporaryDirectory(dir=stored.folder.absolute(), prefix="maps-") as name:
        folder = Path(name)
        ranges = [_Range(side, number, *place) for side in SIDES for number, place in enumerate(places[side])]
        run_tasks(_write_sources, [(folder, place, shared) for place in ranges], label="sources")
        run_tasks(_join_sources, [(folder, side, len(places[side])) for side in SIDES], label="join")
        reads = [(folder, place, shared, indices_per_id) for place in ranges]
        run_tasks(_write_affinities, reads, label="affinities")
        maps = []
        for side in SIDES:
            rows, weights = (_gather(folder, side, len(places[side]), array) for array in ("rows", "weights"))
            maps.append(plan.bucket_map(side, rows, weights, "soft"))
    return maps[0], maps[1]


def double_soft_maps(
    stored: StoredGraph, labels: Labels, *, indices_per_id: int, hops: str, seed: int
) -> tuple[BucketMap, BucketMap]:
    """:func:`graphhash.double_soft_maps` by Ray tasks, as :func:`soft_maps`."""
    softs = soft_maps(stored, labels, indices_per_id=n_soft_indices(indices_per_id), hops=hops)
    return with_hashed_row(softs[0], 0, seed=seed), with_hashed_row(softs[1], 1, seed=seed)


def _row_facts(path: Path, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Edges and degree of every row of a range."""
    rows = _rows(path, start, stop)
    return np.diff(rows.indptr).astype(np.int64), row_degrees(rows)


def _write_sources(folder: Path, place: _Range, plan: SoftPlan) -> None:
    numba.set_num_threads(1)
    sources = plan.sources(place.side, _rows(place.path, place.start, place.stop), place.start)
    for name, array in zip(CSR_ARRAYS, (sources.indptr, sources.indices, sources.data), strict=True):
        np.save(_part(folder, place.side, place.number, name), array.astype(CSR_ARRAYS[name], copy=False))


def _join_sources(folder: Path, side: str, n_parts: int) -> None:
    """One file per array, from the parts' files, which are removed; only indptr is in memory at once."""
    ends = [load_array(_part(folder, side, number, "indptr"))[1:] for number in range(n_parts)]
    before = np.cumsum([0, *(part[-1] for part in ends)])
    indptr = [np.zeros(1, np.int64), *(part + n for part, n in zip(ends, before[:-1], strict=True))]
    np.save(folder / f"{side}.indptr.npy", np.concatenate(indptr))
    for name in ("buckets", "values"):
        shape = (int(before[-1]),)
        facts = {"descr": np.dtype(CSR_ARRAYS[name]).str, "fortran_order": False, "shape": shape}
        with open(folder / f"{side}.{name}.npy", "wb") as stream:
            np.lib.format.write_array_header_1_0(stream, facts)
            for number in range(n_parts):
                part = _part(folder, side, number, name)
                load_array(part).tofile(stream)
                part.unlink()


def _write_affinities(folder: Path, place: _Range, plan: SoftPlan, indices_per_id: int) -> None:
    numba.set_num_threads(1)
    rows = _rows(place.path, place.start, place.stop)
    indptr, indices, data = (load_array(folder / f"{OTHER[place.side]}.{name}.npy") for name in CSR_ARRAYS)
    edges = rows.indptr, rows.indices, rows.data
    found = csr_affinity_rows(
        edges, (indptr, indices, data), plan.n_buckets[place.side], indices_per_id, split=plan.n_user_buckets
    )
    for name, array in zip(("rows", "weights"), found, strict=True):
        np.save(_part(folder, place.side, place.number, name), array)


def _gather(folder: Path, side: str, n_parts: int, name: str) -> NDArray:
    """An array of all ranges, in their order."""
    parts: Sequence[NDArray] = [load_array(_part(folder, side, number, name)) for number in range(n_parts)]
    return np.concatenate(parts)


def _rows(path: Path, start: int, stop: int) -> csr_array:
    """Rows of a stored graph in memory."""
    stored = ShardedCsr.open(path)
    indptr, indices, weights = stored.read(start, stop)
    if stored.unit_weights:
        weights = np.ones(len(indices), np.float32)
    return csr_array((weights, indices, indptr), shape=(stop - start, stored.n_cols))


def _part(folder: Path, side: str, number: int, name: str) -> Path:
    return folder / f"{side}-{number:05d}.{name}.npy"
