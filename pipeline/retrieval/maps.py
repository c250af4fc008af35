"""The bucket maps of a method: the first part of the train stage.

Files (``RUN/methods/<method>/``): ``users.npz`` and ``items.npz``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from scipy.sparse import csr_array

from graphhash.clustering.labels import Labels
from graphhash.errors import DataError
from pipeline.distributed.maps import StoredGraph
from pipeline.logs.features import load_features
from pipeline.maps.methods import METHODS, Inputs, Maps, ResolvedMethod
from pipeline.task import TRAIN_PARTS, StageContext

SIDES = ("users", "items")


def make_maps(
    context: StageContext,
    method: ResolvedMethod,
    graph: csr_array,
    labels: Labels,
    out: Path,
    parts: tuple[str, ...] = TRAIN_PARTS,
) -> Maps:
    """The maps of users and items of a method, written into ``out``.

    Args:
        graph: interactions, shape (n_users, n_items).
        labels: communities of the train graph.
        parts: of the log that ``graph`` is of. Ray tasks read the stored train graph; of other parts this process makes the maps.

    Raises:
        DataError: the method cannot make maps of this graph, or of these features.
    """
    config = context.config
    # Over Ray where the clustering was; the maps are the same, bit for bit.
    over_ray = config.cluster.shards and parts == TRAIN_PARTS
    stored = StoredGraph(context.ingest_dir, out, config.cluster.shards) if over_ray else None
    features = partial(load_features, config.data, context.ingest_dir)
    inputs = Inputs(
        graph, labels, method.indices_per_id, method.hops, config.map.seed, features, stored, n_rows=method.n_rows
    )
    try:
        maps = METHODS[method.name].make(inputs)
    except ValueError as error:
        raise DataError(f"method {method.name!r}: {error}") from error
    for side, bucket_map in zip(SIDES, maps, strict=True):
        bucket_map.save(out / f"{side}.npz")
    return maps
