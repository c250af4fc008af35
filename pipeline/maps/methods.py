"""The methods of a run by name: how each makes its bucket maps, and the settings it takes by default.

The defaults of learning rate and weight decay were chosen on the validation recall of Gowalla (MF, BPR, full batch); MovieLens-1M agrees:
there the best weight decay is seven times as large for a seventh of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graphhash.clustering.balanced import balanced_labels
from graphhash.clustering.connected import cluster_connected
from graphhash.clustering.labels import Labels
from graphhash.clustering.row_budget import fit_rows
from graphhash.errors import ArgumentError
from graphhash.graph.local import LocalGraph
from graphhash.maps.balanced_maps import balanced_maps
from graphhash.maps.bucket_map import BucketMap, full_map
from graphhash.maps.community_maps import double_graph_maps, graph_maps, multilevel_maps
from graphhash.maps.embedding_spec import BUCKET, EmbeddingSpec
from graphhash.maps.hashes import (
    double_frequency_map,
    double_map,
    frequency_map,
    lsh_map,
    lsh_structure_map,
    modulo_map,
    quotient_remainder_map,
)
from graphhash.maps.soft_maps import double_soft_maps, soft_maps
from pipeline.distributed import maps as ray_maps
from pipeline.distributed.maps import StoredGraph

# Ids with fewer neighbours on average: a bias per item beside cosines. Validation capped recall@20 of `soft`, softmax, without and with
# it: a third of Gowalla's interactions (8 neighbours) .098, .113 (10 epochs); Gowalla (23) .198, .206 (10 epochs); MovieLens-1M (164)
# .298, .294. Of `full`: Gowalla .202, .207.
BIASED_NEIGHBOURS = 50
BIASED_COSINES = ("softmax", "bsl")
# The coarse level of ``multilevel`` has this part of the resolution.
COARSER = 8

Maps = tuple[BucketMap, BucketMap]


@dataclass(frozen=True)
class Inputs:
    """What maps are made from.

    Args:
        graph: training interactions, users x items.
        labels: their communities; every compressed method gets as many rows as they have, per side.
        indices_per_id: rows read per id, where the method is free in it.
        hops: of the soft methods.
        seed: of the hash functions.
        features: reads those of users and of items, shape (n_ids, n_features) each, for the method that needs some.
        stored: the same graph in files, where Ray tasks are to make the maps of soft methods; None: this process makes them.
        frequencies: how often every user and every item occurs, where that is another number than its ``degrees``.
        n_rows: most communities, of both sides together, that a method sized by its own budget reads; None: all.
    """

    graph: csr_array
    labels: Labels
    indices_per_id: int
    hops: str
    seed: int
    features: Callable[[], tuple[NDArray, NDArray]] | None = None
    stored: StoredGraph | None = None
    frequencies: tuple[NDArray, NDArray] | None = None
    n_rows: int | None = None

    @property
    def rows(self) -> tuple[int, int]:
        """Rows of the user table and of the item table, the OOV rows among them."""
        return self.labels.user_rows + 1, self.labels.item_rows + 1

    @property
    def degrees(self) -> tuple[NDArray, NDArray]:
        """Weight of every user's and of every item's interactions."""
        return np.asarray(self.graph.sum(axis=1)).ravel(), np.asarray(self.graph.sum(axis=0)).ravel()


@dataclass(frozen=True)
class Method:
    """How a method compresses, and what it trains with unless told otherwise.

    Args:
        make: maps of users and items.
        summary: one line for tables and help.
        indices_per_id: rows read per id.
        free_indices: whether ``map.indices_per_id`` changes that number.
        least_indices: fewest that it can do with.
        n_codes: most rows of stored weights per side; 0: none is stored.
        plain_items: whether all of this is said of users alone, and items read one row without a weight.
        item_bias: whether items get a trained scalar each by default, beside inner products.
        ours: whether it is of GraphHash or this package; the others are what it is compared with.
        lr: of Adam.
        l2_total: its weight decay times the rows of the tables.
        embedding: kind of the embeddings, one of ``graphhash.nn.kinds.KINDS``.
        reads_communities: whether maps, or their numbers of rows, come from the clustering.
        sized: whether sizes of the embedding, or its dim, follow from the budget in bytes.
        trained_as: the method whose trained weights are stored otherwise; None: this one is trained itself.
        precision: of the stored tables, unless the configuration names one.
        fixed_precision: whether the configuration cannot name another.
        task: the one task that supports it; None: all do.
    """

    make: Callable[[Inputs], Maps]
    summary: str
    indices_per_id: int = 1
    free_indices: bool = False
    least_indices: int = 1
    n_codes: int = 0
    plain_items: bool = False
    item_bias: bool = False
    ours: bool = False
    lr: float = 1e-2
    l2_total: float = 1e-4
    embedding: str = "bucket"
    reads_communities: bool = True
    sized: bool = False
    trained_as: str | None = None
    precision: str = "int8"
    fixed_precision: bool = False
    task: str | None = None

    @property
    def trains_full_soft(self) -> bool:
        """Whether it trains a row for every id beside a mixture, and stores their sums as full tables."""
        return self.embedding == "residual" and not self.sized

    @property
    def stores_codes(self) -> bool:
        """Whether vectors are stored as codes and codewords."""
        return self.embedding in ("product", "additive")

    def resolve_indices(self, requested: int | None) -> int:
        """Indices per id where the configuration requests a number, or None."""
        return requested if requested is not None and self.free_indices else self.indices_per_id

    def map_bytes(self, requested: int | None, row_bytes: int, n_users: int, n_items: int) -> int:
        """Bytes of both maps, with ``row_bytes`` for a row number; codebooks are counted as large as they can be."""
        indices_per_id = self.resolve_indices(requested)

        def side(n_ids: int) -> int:
            n_codes = min(self.n_codes, n_ids + 1)
            return (n_ids + 1) * (indices_per_id * row_bytes + (1 if n_codes else 0)) + 4 * indices_per_id * n_codes

        return side(n_users) + ((n_items + 1) * row_bytes if self.plain_items else side(n_items))

    def with_bias(self, requested: bool | None, loss: str, neighbours: float) -> bool:
        """Whether the model has an item bias when the configuration requests it, or not, or None: then the method decides beside inner
        products, and the graph beside cosines.

        Args:
            neighbours: of an id, on average.
        """
        if requested is not None:
            return requested
        if loss in BIASED_COSINES:
            return neighbours < BIASED_NEIGHBOURS
        return self.item_bias and loss in ("bpr", "ials")


@dataclass(frozen=True)
class ResolvedMethod:
    """A method of a run with every number decided: by the settings, the task's presets, the graph and the budget.

    Args:
        indices_per_id: table rows read per id.
        hops: steps of the graph that soft methods mix over.
        precision: of the stored tables, in which a byte budget counts rows.
        lr: of Adam.
        l2_total: weight decay times the rows of the tables (retrieval), or of the training log (CTR).
        dim: length of an embedding; None: that of the configuration.
        embedding: kind and sizes of the embeddings.
        n_rows: as in :class:`Inputs`.
        item_bias: items have a trained scalar each (retrieval).
    """

    name: str
    indices_per_id: int
    hops: str
    precision: str
    lr: float
    l2_total: float
    dim: int | None = None
    embedding: EmbeddingSpec = BUCKET
    n_rows: int | None = None
    item_bias: bool = False


def _full(inputs: Inputs) -> Maps:
    return full_map(inputs.graph.shape[0]), full_map(inputs.graph.shape[1])


def _by_size(make: Callable[..., BucketMap], seeded: bool = True) -> Callable[[Inputs], Maps]:
    """A hash of an id's number alone."""

    def maps(inputs: Inputs) -> Maps:
        users, items = (
            make(n, rows, **({"seed": inputs.seed + side} if seeded else {}))
            for side, (n, rows) in enumerate(zip(inputs.graph.shape, inputs.rows, strict=True))
        )
        return users, items

    return maps


def _by_frequency(make: Callable[..., BucketMap]) -> Callable[[Inputs], Maps]:
    def maps(inputs: Inputs) -> Maps:
        users, items = (
            make(frequencies, rows, seed=inputs.seed + side)
            for side, (frequencies, rows) in enumerate(
                zip(inputs.frequencies or inputs.degrees, inputs.rows, strict=True)
            )
        )
        return users, items

    return maps


def _lsh_structure(inputs: Inputs) -> Maps:
    (user_degrees, item_degrees), (user_rows, item_rows) = inputs.degrees, inputs.rows
    users = lsh_structure_map(inputs.graph, item_degrees, user_rows, seed=inputs.seed)
    return users, lsh_structure_map(inputs.graph.T.tocsr(), user_degrees, item_rows, seed=inputs.seed + 1)


def _lsh(inputs: Inputs) -> Maps:
    if inputs.features is None:
        raise ArgumentError("it needs features of users and items; name files of them, or use lsh_structure")
    (user_rows, item_rows), (users, items) = inputs.rows, inputs.features()
    return lsh_map(users, user_rows, seed=inputs.seed), lsh_map(items, item_rows, seed=inputs.seed + 1)


def multilevel_labels(inputs: Inputs) -> list[Labels]:
    """The coarse and the fine level of ``multilevel``."""
    # The fine level gives up as many rows as the coarse one takes.
    labels = inputs.labels
    coarse = cluster_connected(inputs.graph, resolution=labels.resolution / COARSER)
    fine = fit_rows(
        LocalGraph(inputs.graph),
        labels,
        user_rows=max(1, labels.user_rows - coarse.user_rows),
        item_rows=max(1, labels.item_rows - coarse.item_rows),
    )
    return [coarse, fine]


def _multilevel(inputs: Inputs) -> Maps:
    return multilevel_maps(multilevel_labels(inputs))


def _soft(inputs: Inputs) -> Maps:
    if inputs.stored is not None:
        return ray_maps.soft_maps(inputs.stored, inputs.labels, indices_per_id=inputs.indices_per_id, hops=inputs.hops)
    return soft_maps(inputs.graph, inputs.labels, indices_per_id=inputs.indices_per_id, hops=inputs.hops)


def residual_labels(inputs: Inputs) -> Labels:
    """The communities of ``residual``: those of the run, merged where they are more than its rows."""
    labels = inputs.labels
    if inputs.n_rows is None or labels.rows <= inputs.n_rows:
        return labels
    user_rows = min(max(1, labels.user_rows * inputs.n_rows // labels.rows), inputs.n_rows - 1)
    return fit_rows(LocalGraph(inputs.graph), labels, user_rows=user_rows, item_rows=inputs.n_rows - user_rows)


def _residual(inputs: Inputs) -> Maps:
    return _soft(replace(inputs, labels=residual_labels(inputs)))


def _double_soft(inputs: Inputs) -> Maps:
    n_indices, hops, seed = inputs.indices_per_id, inputs.hops, inputs.seed
    if inputs.stored is not None:
        return ray_maps.double_soft_maps(inputs.stored, inputs.labels, indices_per_id=n_indices, hops=hops, seed=seed)
    return double_soft_maps(inputs.graph, inputs.labels, indices_per_id=n_indices, hops=hops, seed=seed)


def _baco(inputs: Inputs) -> Maps:
    # It has its own communities, of as many rows.
    return balanced_maps(inputs.graph, balanced_labels(inputs.graph, rows=inputs.labels.rows))


def _stored_full(summary: str, precision: str, *, trained_as: str = "full", **changes: Any) -> Method:
    """The trained full tables of another method, stored otherwise."""
    return Method(
        _full, summary, lr=4e-2, l2_total=0.02, reads_communities=False, trained_as=trained_as, precision=precision,
        fixed_precision=True, **changes,
    )  # fmt: skip


def _stored_full_soft(how: str, precision: str, **changes: Any) -> Method:
    return _stored_full(f"full_soft, {how}", precision, trained_as="full_soft", ours=True, **changes)


def _not_in_rows(summary: str, embedding: str, **changes: Any) -> Method:
    """An embedding that is no bucket map; the identity map names its ids."""
    return Method(_full, summary, embedding=embedding, reads_communities=False, sized=True, **changes)


METHODS: dict[str, Method] = {
    "full": Method(
        _full, "no compression: a row for every id", lr=4e-2, l2_total=0.02, reads_communities=False, precision="float32"
    ),
    "full_float16": _stored_full("full, stored in float16 after training", "float16"),
    "full_int8": _stored_full("full, stored in int8 after training, a float16 scale per row", "int8"),
    "full_int4": _stored_full("full, stored in int4 after training, a float16 scale per row", "int4"),
    "full_pq": _stored_full("full, product-quantized after training", "float16", embedding="product", sized=True),
    "full_opq": _stored_full(
        "full, rotated and product-quantized after training", "float16", embedding="product", sized=True
    ),
    "full_small_dim": Method(
        _full, "a row for every id, of fewer numbers", lr=4e-2, l2_total=0.02, reads_communities=False, sized=True,
        precision="float32",
    ),
    "cce": _not_in_rows("CCE: chunks of clustered and hashed rows, clustered in training", "cce", lr=2e-2, l2_total=0.011),
    "cafe": _not_in_rows("CAFE: ids of large gradients keep a row, the others hash; chosen anew in training", "cafe"),
    "robe": _not_in_rows("ROBE: hashed blocks of one flat array", "robe"),
    "dhe": _not_in_rows("DHE: a network computes vectors from hashes", "dhe", lr=1e-3, l2_total=0.0, precision="float16"),
    "modulo": Method(_by_size(modulo_map, seeded=False), "row number modulo table size"),
    "double": Method(_by_size(double_map), "the sum of two hashed rows", indices_per_id=2, n_codes=2),
    "quotient_remainder": Method(
        _by_size(quotient_remainder_map, seeded=False), "the sum of a quotient's and a remainder's row", indices_per_id=2, n_codes=2
    ),
    "frequency": Method(_by_frequency(frequency_map), "frequent ids keep a row, the others hash"),
    "double_frequency": Method(
        _by_frequency(double_frequency_map), "frequent ids keep a row, the others hash twice", indices_per_id=2, n_codes=3
    ),
    "lsh": Method(_lsh, "ids with similar features share a row, by random projections", lr=2e-2, l2_total=0.011),
    "lsh_structure": Method(_lsh_structure, "ids with similar neighbours share a row, by random projections", lr=2e-2, l2_total=0.011),
    "graph": Method(
        lambda inputs: graph_maps(inputs.labels), "GraphHash: ids of one community share a row", ours=True, lr=2e-2, l2_total=0.011
    ),
    "double_graph": Method(
        lambda inputs: double_graph_maps(inputs.labels, seed=inputs.seed), "the community's row plus a hashed one",
        indices_per_id=2, n_codes=2, ours=True, lr=2e-2, l2_total=0.011,
    ),
    "multilevel": Method(
        _multilevel, "a coarse and a fine community's row", indices_per_id=2, n_codes=2, ours=True, lr=2e-2, l2_total=0.011
    ),
    "baco": Method(
        _baco, "BACO: balanced communities of its own, the mean of two rows per user", indices_per_id=2, n_codes=2, plain_items=True,
        lr=2e-2, l2_total=0.011,
    ),
    "soft": Method(
        _soft, "every id reads a mixture of its neighbours' communities",
        indices_per_id=20, free_indices=True, n_codes=256, item_bias=True, ours=True, lr=4e-2, l2_total=0.02, precision="int4",
    ),
    "double_soft": Method(
        _double_soft, "every id reads a mixture of its neighbours' communities plus a hashed row",
        indices_per_id=20, least_indices=2, free_indices=True, n_codes=256, item_bias=True, ours=True, lr=4e-2, l2_total=0.02,
        precision="int4",
    ),
    "residual": Method(
        _residual, "the mixture of soft, plus a few numbers of the id's own times one matrix",
        indices_per_id=10, free_indices=True, n_codes=256, item_bias=True, ours=True, lr=4e-2, l2_total=0.02, precision="int4",
        embedding="residual", sized=True, task="retrieval",
    ),
    "full_soft": Method(
        _soft, "a row for every id, trained beside the mixture of soft, stored as full tables",
        indices_per_id=20, free_indices=True, n_codes=256, ours=True, lr=4e-2, l2_total=0.02, embedding="residual",
        reads_communities=False, precision="float32",
    ),
    "full_soft_small_dim": Method(
        _soft, "a row for every id, of fewer numbers, trained beside the mixture of soft",
        indices_per_id=20, free_indices=True, n_codes=256, ours=True, lr=4e-2, l2_total=0.02, embedding="residual",
        reads_communities=False, sized=True, task="ctr",
    ),
    "full_soft_int8": _stored_full_soft("stored in int8 after training", "int8"),
    "full_soft_int4": _stored_full_soft("stored in int4 after training", "int4"),
    "full_soft_pq": _stored_full_soft("product-quantized after training", "float16", embedding="product", sized=True),
    "additive": _stored_full_soft(
        "stored after training as sums of codewords that users and items share", "int8", embedding="additive", sized=True,
        task="retrieval",
    ),
    "full_additive": _stored_full(
        "full, stored after training as sums of codewords that users and items share", "int8", embedding="additive", sized=True,
        ours=True, task="retrieval",
    ),
}  # fmt: skip
