"""The bucket maps of a method, made on disk pair by pair: by Ray tasks where Ray is running, else in this process, with the same bytes.

The graph, the communities and the maps of a pair are in memory while its maps are made, and those of no other pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.ctr.budget import resolve_method
from pipeline.ctr.cluster import pair_labels
from pipeline.ctr.data import Features
from pipeline.ctr.defaults import keeps_every_row
from pipeline.ctr.folds import draw_folds, folded_columns, folded_pair_maps
from pipeline.ctr.maps import MapOptions, mapped_pairs, own_labels, pair_graph, pair_inputs, pair_maps, single_map
from pipeline.ctr.weights import save_folds, save_map
from pipeline.distributed.session import run_tasks
from pipeline.storage.mapped import load_array
from pipeline.task import StageContext

# Folder of the maps by folds, while there are such.
FOLDS = "folds"


@dataclass(frozen=True)
class MapJob:
    """What the maps of a method are made from, small enough to be passed to every task.

    Args:
        ingest_dir, cluster_dir: of the run, absolute.
        parts: of the log, whose positive samples the maps are made of.
        out: where they are written, absolute.
    """

    ingest_dir: Path
    cluster_dir: Path
    parts: tuple[str, ...]
    method: str
    options: MapOptions
    out: Path


def write_method_maps(context: StageContext, method: str, parts: tuple[str, ...], out: Path) -> None:
    """Write the maps of all columns (``pipeline.ctr.weights.load_maps``), and those by folds into ``out / FOLDS``.

    Args:
        parts: of the log; the maps are made of the communities of the train part and of the positive samples of these parts.
        out: exists.

    Raises:
        DataError: the method cannot make maps of these graphs.
    """
    features = Features.open(context.ingest_dir)
    resolved, seed = resolve_method(context.config, features, method), context.config.map.seed
    options = MapOptions(resolved.indices_per_id, resolved.hops, seed)
    job = MapJob(context.ingest_dir.absolute(), context.cluster_dir.absolute(), parts, method, options, out.absolute())
    (out / "maps").mkdir()
    if folded_columns(features, method):
        (out / FOLDS).mkdir()
        np.save(out / FOLDS / "fold.npy", draw_folds(len(features.rows_of(parts)), seed))
    pairs = mapped_pairs(features, method)
    made = run_tasks(_write_pair, [(job, number) for number in range(len(pairs))], label="maps")
    written = {column for columns in made for column in columns}
    for number in set(range(len(features.all_columns))) - written:
        save_map(single_map(features, number, method, seed), out, number)


def _write_pair(job: MapJob, number: int) -> list[int]:
    """Write the maps of the pair of this number; returns the columns that it compresses."""
    features = Features.open(job.ingest_dir)
    pair, rows = mapped_pairs(features, job.method)[number], features.rows_of(job.parts)
    graph = pair_graph(features, rows, pair)
    labels = own_labels(graph) if keeps_every_row(job.method) else pair_labels(job.cluster_dir, number)
    inputs = pair_inputs(features, pair, number, graph, labels, job.method, job.options)
    maps = pair_maps(features, pair, inputs, job.method)
    for column, bucket_map in maps.items():
        save_map(bucket_map, job.out, column)
    columns = list(maps)
    del maps
    if folded_columns(features, job.method) & set(pair.columns):
        fold = load_array(job.out / FOLDS / "fold.npy")
        save_folds(job.out / FOLDS, folded_pair_maps(features, rows, pair, inputs, job.method, fold))
    return columns
