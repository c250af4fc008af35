"""Clustering of a graph with isolated ids, which have no interaction.

Modularity does not depend on the community of an isolated id, so each would stay a community, and a table row, of its own. Where only
positive samples are edges, most ids can be isolated. All isolated ids of a side share one community here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from graphhash.clustering.api import cluster
from graphhash.clustering.labels import Labels


def cluster_connected(biadjacency: csr_array, *, rows: int | tuple[int, int] | None = None, **settings: Any) -> Labels:
    """:func:`graphhash.clustering.api.cluster` of the ids that have interactions, with one more community per side for isolated ids.

    Without isolated ids this is ``cluster``.

    Args:
        biadjacency: interactions, shape (n_users, n_items).
        rows: as there, these communities among them.
        settings: as there.

    Raises:
        ArgumentError: as there.
    """
    graph = csr_array(biadjacency)
    connected = [np.diff(graph.indptr) > 0, np.diff(csr_array(graph.T.tocsr()).indptr) > 0]
    isolated = [not side.all() for side in connected]
    if not any(isolated):
        return cluster(graph, rows=rows, **settings)
    if isinstance(rows, int):
        rows = rows - sum(isolated)
    elif rows is not None:
        rows = (rows[0] - isolated[0], rows[1] - isolated[1])
    found = cluster(csr_array(graph[connected[0]][:, connected[1]]), rows=rows, **settings)
    first = 1 + max(int(found.users.max()), int(found.items.max()))
    sides = []
    for number, (labels, side) in enumerate(zip((found.users, found.items), connected, strict=True)):
        whole = np.full(len(side), first + number, np.int32)
        whole[side] = labels
        sides.append(whole)
    return replace(found, users=sides[0], items=sides[1])
