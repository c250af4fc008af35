"""Bucket maps that follow from communities: hard, doubled, of several resolutions, and soft.

A soft map lets every id read a mixture of buckets, its affinities: one or two steps of graph convolution, taken once, at the size
of the table. They are computed row by row, so ranges of rows can be made apart (:func:`affinity_rows`), and nothing of the size
users x buckets is ever held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, diags_array

from graphhash.clustering.labels import Labels
from graphhash.clustering.row_budget import fit_rows
from graphhash.errors import ArgumentError
from graphhash.graph.bipartite import balanced_chunks
from graphhash.graph.local import LocalGraph
from graphhash.maps import _kernels as _map_kernels
from graphhash.maps.bucket_map import BucketMap, plain_map
from graphhash.maps.codebook import weight_codebook
from graphhash.maps.hashes import frequency_rows, universal_hash

HOPS = ("1", "2", "1+2")
# Items hand on to users as if this many mean degrees were added to the degree of each: what a rare item hands on is in good part what
# its few users are. Validation recall on Gowalla: 0 .1749, 1 .1779, 4 .1801, 16 .1785. Users stay as they are: 1 .1796.
ITEM_DAMPING = 4.0
# Of affinities, before they are scaled: 1 gives the first lookups nearly all the weight. With 16 lookups, validation recall is .1723
# for 1, .1742 for 0.7, .1731 for 0.5.
POWER = 0.7
SIDES = ("users", "items")

# indptr, indices, data
CsrArrays = tuple[NDArray[np.integer], NDArray[np.integer], NDArray[np.floating]]


def graph_maps(labels: Labels) -> tuple[BucketMap, BucketMap]:
    """GraphHash: ids of one community share a row (Wu et al., WWW 2025, eq. 6).

    Returns:
        User map and item map; each table has a row per community that holds ids of that side, and the unknown ids' row.
    """
    sides = []
    for side in (labels.users, labels.items):
        buckets, n_buckets = compact_side(side)
        sides.append(plain_map(buckets[:, None], n_buckets + 1, "graph"))
    return sides[0], sides[1]


def double_graph_maps(labels: Labels, *, seed: int) -> tuple[BucketMap, BucketMap]:
    """The community's row plus a row hashed from the id, of the same table (Wu et al., WWW 2025, section 4).

    Args:
        seed: draws the hash functions.
    """
    sides = []
    for number, side in enumerate((labels.users, labels.items)):
        buckets, n_buckets = compact_side(side)
        hashed = universal_hash(np.arange(len(side)), n_buckets, np.random.default_rng([seed, number]))
        sides.append(plain_map(np.stack([buckets, hashed], axis=1), n_buckets + 1, "double_graph"))
    return sides[0], sides[1]


def multilevel_maps(levels: list[Labels]) -> tuple[BucketMap, BucketMap]:
    """The sum of one row per level, each with rows of its own in the table.

    Args:
        levels: communities of the same users and items, coarse to fine.
    """
    sides = []
    for side in ("users", "items"):
        rows, n_buckets = [], 0
        for labels in levels:
            buckets, n_level = compact_side(getattr(labels, side))
            rows.append(n_buckets + buckets)
            n_buckets += n_level
        sides.append(plain_map(np.stack(rows, axis=1), n_buckets + 1, "multilevel"))
    return sides[0], sides[1]


def soft_maps(
    biadjacency: csr_array,
    labels: Labels,
    *,
    indices_per_id: int = 16,
    hops: str = "1+2",
    folds: Sequence[csr_array] = (),
) -> tuple[BucketMap, BucketMap]:
    """Every id reads the buckets around it.

    With ``A = K^-1/2 B D^-1/2`` the normalised biadjacency (of ``S_user`` with ITEM_DAMPING mean degrees added to D) and C the one-hot community assignment, affinities are, by ``hops``:

    - ``"1"``: ``S_user = A C_item`` and ``S_item = A^T C_user``: how much of an id's normalised interactions falls on each community
      of the other side. The user table has a row per *item* community, and the reverse.
    - ``"2"``: ``S_user = A (A^T C_user)`` and ``S_item = A^T (A C_item)``: the communities of those who share neighbours.
    - ``"1+2"``: both, each scaled to unit length, over one table that users and items share, with a row for every community of
      either side: the layers of LightGCN (He et al., SIGIR 2020), taken once, before training.

    The largest ``indices_per_id`` entries are kept (ties to the lowest bucket), raised to POWER, scaled to unit length and rounded to
    the nearest of 256 codebook (``graphhash.maps.codebook``). Both sides together have as many rows as ``graph_maps`` gives them.

    Args:
        biadjacency: training interactions, shape (n_users, n_items), weights > 0.
        labels: one community per user and item.
        indices_per_id: rows read per id.
        hops: "1", "2" or "1+2".
        folds: graphs of the same users and items to take affinities from instead, each for a fold of the training rows: the maps have
            ``len(folds) * n`` ids, and number ``f * n + id`` is ``id`` as it looks in ``folds[f]`` (cross-fitting, see below).

    A classifier that is trained on the clicks that its mixtures were made from is told its labels: it sees no click between ids that do not
    know each other, is sure that there is none, and errs dearly on the next day's. If each fold of the rows reads mixtures that were made
    without that fold's clicks, training rows look like those to come.

    Raises:
        ArgumentError: shapes of graphs and labels differ, indices_per_id is below 1, or hops is none of the three.
    """
    found: dict[str, list[tuple[NDArray[np.int32], NDArray[np.float32]]]] = {side: [] for side in SIDES}
    for graph in (biadjacency, *folds):
        check_soft(graph.shape, labels, indices_per_id, hops)
    for graph in folds or (biadjacency,):
        graphs = {"users": graph, "items": graph.T.tocsr()}
        plan = SoftPlan.of(labels, *(row_degrees(graphs[side]) for side in SIDES), hops)
        for side, other in (SIDES, SIDES[::-1]):
            sources = plan.sources(other, graphs[other], 0)
            found[side].append(affinity_rows(graphs[side], sources, indices_per_id, split=plan.n_user_buckets))
    users, items = (
        plan.bucket_map(side, *map(np.concatenate, zip(*found[side], strict=True)), "soft") for side in SIDES
    )
    return users, items


def double_soft_maps(
    biadjacency: csr_array,
    labels: Labels,
    *,
    indices_per_id: int = 16,
    hops: str = "1+2",
    share: float = 0.0,
    own: float = 0.5,
    frequencies: tuple[NDArray, NDArray] | None = None,
    folds: Sequence[csr_array] = (),
    seed: int,
) -> tuple[BucketMap, BucketMap]:
    """:func:`soft_maps` with one more lookup of weight 1, hashed from the id, so that ids stay distinguishable.

    With ``share`` 0 it reads the communities' rows, and disturbs them. Otherwise communities merge until that share of each side's rows is
    free for the ids alone: the most frequent have a row of their own, the others hash into the rest, as in
    ``graphhash.maps.hashes.frequency_map``. The tables have as many rows in any case.

    Args:
        indices_per_id: rows read per id, the hashed one among them; at least 2.
        share: of each side's rows, in [0, 1), that are for the hashed lookup alone.
        own: part of these, in [0, 1), that belongs to one frequent id each.
        frequencies: how often each user and each item occurs in training, clicked or not; None: weight of their edges.
        seed: draws the hash functions.  biadjacency, labels, hops, folds: as in :func:`soft_maps`.

    Raises:
        ArgumentError: as :func:`soft_maps`; ``share`` or ``own`` is out of range, or ``share`` leaves a side no row to hash into.
    """
    if not 0 <= share < 1 or not 0 <= own < 1:
        raise ArgumentError(f"share and own must be in [0, 1), got {share} and {own}")
    check_soft(biadjacency.shape, labels, unhashed_lookups(indices_per_id), hops)
    n_free = [int(share * labels.user_rows), int(share * labels.item_rows)]
    if share:
        if min(n_free) < 1:
            raise ArgumentError(
                f"share {share} of {labels.user_rows} user rows and {labels.item_rows} item rows leaves a side no row to hash into; raise it"
            )
        kept = {"user_rows": labels.user_rows - n_free[0], "item_rows": labels.item_rows - n_free[1]}
        labels = fit_rows(LocalGraph(biadjacency), labels, **kept)
    softs = soft_maps(biadjacency, labels, indices_per_id=indices_per_id - 1, hops=hops, folds=folds)
    n_folds = max(1, len(folds))
    if not share:
        users, items = (with_hashed_row(soft, number, n_folds=n_folds, seed=seed) for number, soft in enumerate(softs))
        return users, items
    if frequencies is None:
        frequencies = row_degrees(biadjacency), row_degrees(biadjacency.T.tocsr())
    maps = []
    for number, (soft, degrees) in enumerate(zip(softs, frequencies, strict=True)):
        rows = frequency_rows(degrees, n_free[number], int(own * n_free[number]), np.random.default_rng([seed, number]))
        # Behind all communities lie the users' rows, then the items' where they share a table.
        n_communities = soft.n_buckets - (2 if soft.shared else 1)
        start = n_communities + (n_free[0] if soft.shared and number else 0)
        n_rows = n_communities + (sum(n_free) if soft.shared else n_free[number])
        maps.append(_with_last_row(soft, np.tile(start + rows, n_folds), n_rows))
    return maps[0], maps[1]


def unhashed_lookups(indices_per_id: int) -> int:
    """Lookups of the soft map inside a double one; ArgumentError where none is left."""
    if indices_per_id < 2:
        raise ArgumentError(f"indices_per_id must be at least 2, one of them hashed, got {indices_per_id}")
    return indices_per_id - 1


def with_hashed_row(soft: BucketMap, number: int, *, n_folds: int = 1, seed: int) -> BucketMap:
    """A soft map with a row hashed from the id appended, at weight 1; ``number`` tells the hash functions of two sides apart."""
    n_rows = soft.n_buckets - (2 if soft.shared else 1)
    hashed = universal_hash(np.arange(soft.n_ids // n_folds), n_rows, np.random.default_rng([seed, number]))
    hashed = np.tile(hashed, n_folds)
    rows = np.column_stack([soft.rows, np.append(hashed, soft.unknown_row)]).astype(np.int32)
    codebook = np.column_stack([soft.codebook, np.ones(len(soft.codebook), np.float32)])
    # The unknown ids' profile is theirs alone.
    codebook[soft.codes[-1], -1] = 0
    return replace(soft, rows=rows, method="double_soft", codebook=codebook)


def _with_last_row(soft: BucketMap, last: NDArray[np.int64], n_rows: int) -> BucketMap:
    """A soft map with one more lookup of weight 1, row ``last[id]`` of ``n_rows``, behind which come the unknown ids' rows."""
    n_unknown = 2 if soft.shared else 1
    moved = n_rows + n_unknown - soft.n_buckets
    # Ids without neighbours read the unknown ids' row, which moves.
    rows = np.where(soft.rows == soft.unknown_row, soft.unknown_row + moved, soft.rows)
    rows = np.column_stack([rows, np.append(last, soft.unknown_row + moved)]).astype(np.int32)
    codebook = np.column_stack([soft.codebook, np.ones(len(soft.codebook), np.float32)])
    codebook[soft.codes[-1], -1] = 0
    return replace(soft, rows=rows, n_buckets=n_rows + n_unknown, method="double_soft", codebook=codebook)


@dataclass(frozen=True, eq=False)
class SoftPlan:
    """What soft maps are made from, small enough to be given to every task that makes a range of their rows.

    Args:
        buckets: table rows of the communities by side, and by id: ``buckets["users"][u]`` is the row of u's community in the table
            that has rows for communities of users.
        degrees: weight of every id's interactions by side, float64.
        damping: added to an id's degree, by side, before it scales what the id hands on.
        n_buckets: rows of the table that each side reads, without those of unknown ids.
        hops: as in :func:`soft_maps`.
    """

    buckets: dict[str, NDArray[np.int32]]
    degrees: dict[str, NDArray[np.float64]]
    damping: dict[str, float]
    n_buckets: dict[str, int]
    hops: str

    @classmethod
    def of(cls, labels: Labels, user_degrees: NDArray, item_degrees: NDArray, hops: str) -> SoftPlan:
        """The plan for these labels; degrees are those of the graph, one per user and item."""
        (users, n_users), (items, n_items) = compact_side(labels.users), compact_side(labels.items)
        n_buckets = {"1": (n_items, n_users), "2": (n_users, n_items), "1+2": (n_users + n_items,) * 2}[hops]
        if hops == "1+2":
            items = items + np.int32(n_users)
        return cls(
            {"users": users, "items": items},
            {"users": user_degrees, "items": item_degrees},
            {"users": 0.0, "items": ITEM_DAMPING * float(item_degrees.mean())},
            dict(zip(SIDES, n_buckets, strict=True)),
            hops,
        )

    @property
    def n_user_buckets(self) -> int:
        """In a shared table, the first row of items' communities; else a table's number of rows or more."""
        return int(self.buckets["items"].min()) if self.hops == "1+2" else max(self.n_buckets.values())

    def sources(self, side: str, graph: csr_array, start: int) -> csr_array:
        """What ids of ``side`` give to each bucket of those who used them, or whom they used: float64, shape (n_rows, n_buckets).

        Args:
            graph: rows ``start, start + 1, ...`` of the graph as seen from ``side``.
        """
        other = SIDES[1 - SIDES.index(side)]
        degrees = self.degrees[side][start : start + graph.shape[0]]
        # The reading row's own degree is a common factor of its affinities: unit length removes it.
        step = 1.0 / np.sqrt(np.maximum(degrees + self.damping[side], 1e-300))
        n_buckets = self.n_buckets[other]
        total = csr_array((graph.shape[0], n_buckets), dtype=np.float64)
        if self.hops != "1":
            back = one_hot(self.buckets[other], n_buckets, 1.0 / np.sqrt(np.maximum(self.degrees[other], 1e-300)))
            total = csr_array(diags_array(step**2) @ (graph.astype(np.float64) @ back))
        if self.hops != "2":
            own = self.buckets[side][start : start + graph.shape[0]]
            total = csr_array(total + one_hot(own, n_buckets, step))
        # scipy leaves rows in an order that depends on the rows beside them, and lengths are sums in that order.
        total.sort_indices()
        return total

    def bucket_map(self, side: str, rows: NDArray[np.int32], weights: NDArray[np.float32], method: str) -> BucketMap:
        """The map of the :func:`affinity_rows` of all ids of ``side``, with the unknown ids' entry and table row appended."""
        shared = self.hops == "1+2"
        n_buckets = self.n_buckets[side] + (2 if shared else 1)
        unknown = self.n_buckets[side] + (SIDES.index(side) if shared else 0)
        # Ids without neighbours read the unknown ids' row of their side.
        rows = np.where(rows == self.n_buckets[side], unknown, rows)
        rows = np.concatenate([rows, np.full((1, rows.shape[1]), unknown)]).astype(np.int32)
        of_unknown = np.zeros((1, rows.shape[1]), np.float32)
        of_unknown[0, 0] = 1
        codebook, codes = weight_codebook(np.concatenate([weights, of_unknown]))
        return BucketMap(rows, n_buckets, method, codebook=codebook, codes=codes, shared=shared)


def check_soft(shape: tuple[int, int], labels: Labels, indices_per_id: int, hops: str) -> None:
    """The ArgumentErrors of :func:`soft_maps` for a graph of this shape."""
    if indices_per_id < 1:
        raise ArgumentError(f"indices_per_id must be at least 1, got {indices_per_id}")
    if hops not in HOPS:
        raise ArgumentError(f"hops is {hops!r}; use one of {', '.join(map(repr, HOPS))}")
    if shape != (len(labels.users), len(labels.items)):
        raise ArgumentError(
            f"biadjacency is {shape[0]} x {shape[1]}, labels hold {len(labels.users)} users and {len(labels.items)} items"
        )


def row_degrees(graph: csr_array) -> NDArray[np.float64]:
    """Weight of every row, shape (n_rows,): the same bits whichever rows ``graph`` holds beside it."""
    return np.asarray(graph.sum(axis=1), np.float64).ravel()


def affinity_rows(
    graph: csr_array, sources: csr_array, indices_per_id: int, *, split: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Largest entries of each row of ``graph @ sources``, by falling size, raised to POWER and scaled to unit length.

    The entries of buckets below ``split`` and those of the others are scaled to unit length before: neither group drowns the other.

    Args:
        graph: some rows of the graph or of its transpose.
        sources: what each neighbour gives to each bucket, shape (n_neighbours, n_buckets), above 0.
        split: a number of buckets; all of them makes one group.

    Returns:
        Buckets, int32, and weights, float32, both of shape (n_rows, indices_per_id). Lookups of weight 0 repeat the row's best bucket; a row
        without neighbours has bucket ``n_buckets``, the unknown ids' own, at weight 1.
    """
    arrays = ((matrix.indptr, matrix.indices, matrix.data) for matrix in (graph, sources))
    return csr_affinity_rows(*arrays, sources.shape[1], indices_per_id, split=split)


def csr_affinity_rows(
    graph: CsrArrays, sources: CsrArrays, n_buckets: int, indices_per_id: int, *, split: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """:func:`affinity_rows` of plain ``(indptr, indices, data)``.

    Memory maps are read where they lie; a csr_array would copy their indices wherever indptr is of another type.
    """
    indptr, *edges = graph
    indptr, n_rows = indptr.astype(np.int64, copy=False), len(indptr) - 1
    rows = np.full((n_rows, indices_per_id), n_buckets, np.int32)
    weights = np.zeros((n_rows, indices_per_id), np.float32)
    entries = sources[0].astype(np.int64, copy=False), sources[1], sources[2].astype(np.float64, copy=False)
    _map_kernels.top_affinities(
        *map(_read_only, (indptr, *edges, *entries)),
        n_buckets, split, POWER, balanced_chunks(indptr, 32), rows, weights,
    )  # fmt: skip
    rows = np.where(weights > 0, rows, rows[:, :1])
    weights[weights[:, 0] == 0, 0] = 1
    return rows, weights


def _read_only(array: NDArray) -> NDArray:
    """A view like a memory map's, so that the kernel is compiled once for both."""
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view


def one_hot(buckets: NDArray[np.int32], n_buckets: int, values: NDArray[np.float64]) -> csr_array:
    """One entry a row: ``values[i]`` at ``buckets[i]``, shape (n_ids, n_buckets)."""
    return csr_array((values, buckets, np.arange(len(buckets) + 1)), shape=(len(buckets), n_buckets))


def compact_side(side: NDArray) -> tuple[NDArray[np.int32], int]:
    """Labels of one side renumbered 0..n-1 in ascending order, and n."""
    present, buckets = np.unique(side, return_inverse=True)
    return buckets.astype(np.int32).ravel(), len(present)
