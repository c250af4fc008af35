"""Clustering a graph in which some ids have no interaction at all.

Modularity says nothing of them, so each would stay a community, and a table row, of its own. Where positives alone are edges that can
be most ids: those who never clicked. All of a side's share one community here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from graphhash.clustering.api import cluster
from graphhash.clustering.labels import Labels


def cluster_connected(biadjacency: csr_array, *, rows: int | tuple[int, int] | None = None, **settings: Any) -> Labels:
    """:func:`graphhash.clustering.api.cluster` of the ids that have interactions, with one more community per side for those that have none.

    Where every id has one, this is ``cluster``.

    Args:
        biadjacency: interactions, shape (n_users, n_items).
        rows: as there, these communities among them.
        settings: as there.

    Raises:
        ArgumentError: as there.
    """
    graph = csr_array(biadjacency)
    linked = [np.diff(graph.indptr) > 0, np.diff(csr_array(graph.T.tocsr()).indptr) > 0]
    alone = [not side.all() for side in linked]
    if not any(alone):
        return cluster(graph, rows=rows, **settings)
    if isinstance(rows, int):
        rows = rows - sum(alone)
    elif rows is not None:
        rows = (rows[0] - alone[0], rows[1] - alone[1])
    found = cluster(csr_array(graph[linked[0]][:, linked[1]]), rows=rows, **settings)
    first = 1 + max(int(found.users.max()), int(found.items.max()))
    sides = []
    for number, (labels, side) in enumerate(zip((found.users, found.items), linked, strict=True)):
        whole = np.full(len(side), first + number, np.int32)
        whole[side] = labels
        sides.append(whole)
    return replace(found, users=sides[0], items=sides[1])
