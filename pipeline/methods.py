"""The methods of a run by name: how each makes its bucket maps, and the settings it takes by default.

The defaults of learning rate and weight decay were chosen on the validation recall of Gowalla (MF, BPR, full batch).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from graphhash.balanced import balanced_labels, balanced_maps
from graphhash.buckets import (
    BucketMap,
    double_frequency_map,
    frequency_map,
    full_map,
    graph_maps,
    modulo_map,
    soft_maps,
)
from graphhash.clustering import Labels

Maps = tuple[BucketMap, BucketMap]


@dataclass(frozen=True)
class Method:
    """How a method compresses, and what it trains with unless told otherwise.

    Args:
        make: (training graph, labels, lookups per id, seed) -> maps of users and items.
        summary: one line for tables and help.
        n_lookups: rows read per id.
        free_lookups: whether ``map.n_lookups`` changes that number.
        weighted: whether lookups carry stored weights.
        plain_items: whether all of this is said of users alone, and items read one row without a weight.
        item_bias: whether items get a trained scalar each by default.
        lr, weight_decay: of Adam.
    """

    make: Callable[[csr_array, Labels, int, int], Maps]
    summary: str
    n_lookups: int = 1
    free_lookups: bool = False
    weighted: bool = False
    plain_items: bool = False
    item_bias: bool = False
    lr: float = 1e-2
    weight_decay: float = 1e-8

    def lookups(self, asked: int | None) -> int:
        """Lookups per id when the configuration asks for ``asked``."""
        return asked if asked is not None and self.free_lookups else self.n_lookups

    def map_bytes(self, asked: int | None, row_bytes: int) -> tuple[int, int]:
        """Bytes of the map per user and per item, with ``row_bytes`` for a row number."""
        per_user = self.lookups(asked) * (row_bytes + (1 if self.weighted else 0))
        return per_user, row_bytes if self.plain_items else per_user

    def with_bias(self, asked: bool | None) -> bool:
        """Whether the model has an item bias when the configuration asks for ``asked``."""
        return self.item_bias if asked is None else asked


def _full(graph: csr_array, labels: Labels, n_lookups: int, seed: int) -> Maps:
    return full_map(graph.shape[0]), full_map(graph.shape[1])


def _modulo(graph: csr_array, labels: Labels, n_lookups: int, seed: int) -> Maps:
    # As many rows as `graph` takes, the unknown ids' row included.
    return modulo_map(graph.shape[0], labels.user_rows + 1), modulo_map(graph.shape[1], labels.item_rows + 1)


def _by_frequency(make: Callable[..., BucketMap]) -> Callable[[csr_array, Labels, int, int], Maps]:
    def maps(graph: csr_array, labels: Labels, n_lookups: int, seed: int) -> Maps:
        degrees = np.asarray(graph.sum(axis=1)).ravel(), np.asarray(graph.sum(axis=0)).ravel()
        users = make(degrees[0], labels.user_rows + 1, seed=seed)
        return users, make(degrees[1], labels.item_rows + 1, seed=seed + 1)

    return maps


def _graph(graph: csr_array, labels: Labels, n_lookups: int, seed: int) -> Maps:
    return graph_maps(labels)


def _soft(graph: csr_array, labels: Labels, n_lookups: int, seed: int) -> Maps:
    return soft_maps(graph, labels, n_lookups=n_lookups)


def _balanced(graph: csr_array, labels: Labels, n_lookups: int, seed: int) -> Maps:
    # It has its own communities, of as many rows.
    return balanced_maps(graph, balanced_labels(graph, rows=labels.rows))


METHODS: dict[str, Method] = {
    "full": Method(_full, "no compression: a row for every id", weight_decay=3e-7),
    "modulo": Method(_modulo, "row number modulo table size"),
    "frequency": Method(_by_frequency(frequency_map), "frequent ids keep a row, the others hash"),
    "double_frequency": Method(
        _by_frequency(double_frequency_map), "frequent ids keep a row, the others hash twice", n_lookups=2, weighted=True
    ),
    "graph": Method(_graph, "GraphHash: ids of one community share a row", lr=2e-2, weight_decay=1e-6),
    "balanced": Method(
        _balanced, "BACO: balanced communities of its own, two rows per user", n_lookups=2, weighted=True, plain_items=True,
        lr=2e-2, weight_decay=1e-6,
    ),
    "soft": Method(
        _soft, "every id reads a mixture of its neighbours' communities",
        n_lookups=12, free_lookups=True, weighted=True, item_bias=True, lr=3e-2, weight_decay=5e-7,
    ),
}  # fmt: skip
