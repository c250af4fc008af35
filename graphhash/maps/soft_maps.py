"""Soft maps: every id reads a weighted mixture of the buckets around it in the graph.

An id's weights are its affinities: one or two steps of graph convolution, taken once, before training, at the size of the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, diags_array

from graphhash.clustering.labels import Labels, compact_side
from graphhash.clustering.row_budget import fit_rows
from graphhash.errors import ArgumentError
from graphhash.graph.bipartite import SIDES
from graphhash.graph.local import LocalGraph
from graphhash.maps.affinities import affinity_rows, one_hot, row_degrees
from graphhash.maps.bucket_map import BucketMap
from graphhash.maps.codebook import weight_codebook
from graphhash.maps.folded_map import FoldIndex
from graphhash.maps.hashes import frequency_rows, universal_hash

HOPS = ("1", "2", "1+2")
# An item passes on to its users as if its degree were larger by this many mean degrees: what a rare item passes on reflects mostly its
# few users. Validation recall on Gowalla: 0 .1749, 1 .1779, 4 .1801, 16 .1785. Damping users by 1 gives .1796.
ITEM_DAMPING = 4.0


def soft_maps(
    biadjacency: csr_array,
    labels: Labels,
    *,
    indices_per_id: int = 16,
    hops: str = "1+2",
    folds: Sequence[csr_array] = (),
    fold_indices: tuple[FoldIndex, FoldIndex] | None = None,
) -> tuple[BucketMap, BucketMap]:
    """Every id reads the buckets around it.

    With ``A = K^-1/2 B D^-1/2`` the normalised biadjacency (for ``S_user``, ITEM_DAMPING mean degrees are added to D) and C the one-hot
    community assignment, affinities are, by ``hops``:

    - ``"1"``: ``S_user = A C_item`` and ``S_item = A^T C_user``: how much of an id's normalised interactions falls on each community
      of the other side. The user table has a row per *item* community, and the reverse.
    - ``"2"``: ``S_user = A (A^T C_user)`` and ``S_item = A^T (A C_item)``: the communities of ids that share neighbours.
    - ``"1+2"``: both, each scaled to unit length, over one table that users and items share, with a row for every community of
      either side: the layers of LightGCN (He et al., SIGIR 2020), taken once, before training.

    The largest ``indices_per_id`` entries are kept (ties go to the lowest bucket), raised to POWER, scaled to unit length and rounded to
    the nearest row of a weight codebook (``graphhash.maps.codebook``). Both sides together have as many rows as with ``graph_maps``.

    **Cross-fitting** (``folds``): a classifier that is trained on the interactions that its mixtures were made from sees its labels in
    its inputs. It sees no positive between ids that are not connected, learns that there is none, and errs on later data. If each fold of
    the training rows reads mixtures that were made without that fold's interactions, training rows look like later ones.

    Args:
        biadjacency: training interactions, shape (n_users, n_items), weights > 0.
        labels: one community per user and item.
        indices_per_id: table rows read per id.
        hops: "1", "2" or "1+2".
        folds: graphs of the same users and items to take affinities from instead, each for a fold of the training rows: the maps have
            ``len(folds) * n`` ids, and number ``f * n + id`` is ``id`` as it looks in ``folds[f]``. They are taken one after the other,
            so that a sequence may make each when it is asked for.
        fold_indices: of users and of items, with ``folds``: the maps have the entries of these alone
            (``graphhash.maps.folded_map.FoldedMap``), and so take fewer bytes where most ids occur in few folds.

    Returns: user map and item map.

    Raises:
        ArgumentError: shapes of graphs and labels differ, indices_per_id is below 1, or hops is none of the three.
    """
    check_soft(biadjacency.shape, labels, indices_per_id, hops)
    indices = dict(zip(SIDES, fold_indices, strict=True)) if fold_indices is not None else {}
    n_ids = dict(zip(SIDES, biadjacency.shape, strict=True))
    found: dict[str, tuple[NDArray[np.int32], NDArray[np.float32]]] = {}
    for side in SIDES:
        n = indices[side].n_entries if indices else max(1, len(folds)) * n_ids[side]
        found[side] = np.empty((n, indices_per_id), np.int32), np.empty((n, indices_per_id), np.float32)
    for number, graph in enumerate(folds or (biadjacency,)):
        check_soft(graph.shape, labels, indices_per_id, hops)
        graphs = {"users": graph, "items": graph.T.tocsr()}
        plan = SoftPlan.of(labels, row_degrees(graphs["users"]), row_degrees(graphs["items"]), hops)
        for side, other in (SIDES, SIDES[::-1]):
            place: slice | NDArray = slice(number * n_ids[side], (number + 1) * n_ids[side])
            read = graphs[side]
            if indices:
                ids, place = indices[side].of_fold(number)
                read = csr_array(read[ids])
            sources = plan.sources(other, graphs[other], 0)
            top = affinity_rows(read, sources, indices_per_id, split=plan.n_user_buckets)
            for array, part in zip(found[side], top, strict=True):
                array[place] = part
    samples = {side: index.sample for side, index in indices.items()}
    users, items = (plan.bucket_map(side, *found.pop(side), "soft", samples.get(side)) for side in SIDES)
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
    fold_indices: tuple[FoldIndex, FoldIndex] | None = None,
    seed: int,
) -> tuple[BucketMap, BucketMap]:
    """:func:`soft_maps` with one more index of weight 1, hashed from the id, so that ids stay distinguishable.

    With ``share`` 0 the hashed index reads rows of communities. Otherwise communities are merged until that share of each side's rows is
    free for hashed indices alone: the most frequent ids have a row of their own, the others hash into the rest, as in
    ``graphhash.maps.hashes.frequency_map``. The number of table rows is the same in any case.

    Args:
        biadjacency, labels, hops, folds, fold_indices: as in :func:`soft_maps`.
        indices_per_id: table rows read per id, the hashed one among them; at least 2.
        share: of each side's rows, in [0, 1), for hashed indices alone.
        own: part of these, in [0, 1), that belongs to one frequent id each.
        frequencies: how often each user and each item occurs in training, shapes (n_users,) and (n_items,); None: weighted degrees.
        seed: draws the hash functions.

    Returns: user map and item map.

    Raises:
        ArgumentError: as :func:`soft_maps`; ``share`` or ``own`` is out of range, or ``share`` leaves a side no row to hash into.
    """
    if not 0 <= share < 1 or not 0 <= own < 1:
        raise ArgumentError(f"share and own must be in [0, 1), got {share} and {own}")
    check_soft(biadjacency.shape, labels, n_soft_indices(indices_per_id), hops)
    n_free = int(share * labels.user_rows), int(share * labels.item_rows)
    if share:
        if min(n_free) < 1:
            raise ArgumentError(
                f"share {share} of {labels.user_rows} user rows and {labels.item_rows} item rows leaves a side no row to hash "
                "into; raise it"
            )
        kept = {"user_rows": labels.user_rows - n_free[0], "item_rows": labels.item_rows - n_free[1]}
        labels = fit_rows(LocalGraph(biadjacency), labels, **kept)
    softs = soft_maps(
        biadjacency, labels, indices_per_id=indices_per_id - 1, hops=hops, folds=folds, fold_indices=fold_indices
    )
    n_folds, indices = max(1, len(folds)), fold_indices or (None, None)
    # Of every entry of the maps, the id that it stands for.
    ids = [
        np.tile(np.arange(n), n_folds) if index is None else index.ids()
        for n, index in zip(biadjacency.shape, indices, strict=True)
    ]
    if not share:
        users, items = (with_hashed_row(soft, number, ids[number], seed=seed) for number, soft in enumerate(softs))
        return users, items
    if frequencies is None:
        frequencies = row_degrees(biadjacency), row_degrees(biadjacency.T.tocsr())
    maps = []
    for number, (soft, degrees) in enumerate(zip(softs, frequencies, strict=True)):
        rows = frequency_rows(degrees, n_free[number], int(own * n_free[number]), np.random.default_rng([seed, number]))
        maps.append(_with_own_rows(soft, number, rows[ids[number]], n_free))
    return maps[0], maps[1]


def n_soft_indices(indices_per_id: int) -> int:
    """Indices per id of the soft map inside a double one: all but the hashed one.

    Raises:
        ArgumentError: none is left.
    """
    if indices_per_id < 2:
        raise ArgumentError(f"indices_per_id must be at least 2, one of them hashed, got {indices_per_id}")
    return indices_per_id - 1


def with_hashed_row(soft: BucketMap, number: int, ids: NDArray[np.int64] | None = None, *, seed: int) -> BucketMap:
    """A soft map with an index hashed from the id appended, of weight 1, into all rows of its table.

    Args:
        number: 0 for users and 1 for items, whose hash functions differ.
        ids: of every entry of a map by folds, shape (soft.n_ids,): an id has the same hashed index in all of them. None: 0, 1, ...
        seed: draws the hash functions.
    """
    n_rows = soft.n_buckets - (2 if soft.shared else 1)
    ids = np.arange(soft.n_ids) if ids is None else ids
    hashed = universal_hash(ids, n_rows, np.random.default_rng([seed, number]))
    return _with_last_index(soft, soft.rows, np.append(hashed, soft.oov_row), soft.n_buckets)


def _with_own_rows(soft: BucketMap, number: int, rows: NDArray[np.int64], n_free: tuple[int, int]) -> BucketMap:
    """A soft map with one more index of weight 1, into new rows behind those of communities: users' first, then items'.

    Args:
        number: 0 for users, 1 for items.
        rows: of every id, shape (n_ids,), in [0, n_free[number]).
        n_free: new rows of users and of items, which lie in one table if the map is shared.
    """
    n_oov = 2 if soft.shared else 1
    n_new = sum(n_free) if soft.shared else n_free[number]
    start = soft.n_buckets - n_oov + (n_free[0] if soft.shared and number else 0)
    last = np.append(start + rows, soft.oov_row + n_new)
    # The OOV row moves to the end, also for ids without neighbours, which read it.
    return _with_last_index(
        soft,
        np.where(soft.rows == soft.oov_row, np.int32(soft.oov_row + n_new), soft.rows),
        last,
        soft.n_buckets + n_new,
    )


def _with_last_index(soft: BucketMap, rows: NDArray, last: NDArray, n_buckets: int) -> BucketMap:
    """A soft map with ``rows`` and the column ``last`` of weight 1; its table has ``n_buckets`` rows."""
    assert soft.codebook is not None
    assert soft.codes is not None
    codebook = np.column_stack([soft.codebook, np.ones(len(soft.codebook), np.float32)])
    # The OOV entry has a codebook row to itself.
    codebook[soft.codes[-1], -1] = 0
    longer = np.empty((len(rows), rows.shape[1] + 1), np.int32)
    longer[:, :-1], longer[:, -1] = rows, last
    return replace(soft, rows=longer, n_buckets=n_buckets, method="double_soft", codebook=codebook)


@dataclass(frozen=True, eq=False)
class SoftPlan:
    """What soft maps are made from, small enough to be passed to every task that makes a range of their rows.

    Args:
        buckets: table rows of the communities by side, int32: ``buckets["users"][u]`` is the row of u's community in the table that has
            rows for communities of users.
        degrees: weight of every id's interactions by side, float64.
        damping: added to an id's degree, by side, before it scales what the id passes on.
        n_buckets: rows of the table that each side reads, without OOV rows.
        hops: as in :func:`soft_maps`.
    """

    buckets: dict[str, NDArray[np.int32]]
    degrees: dict[str, NDArray[np.float64]]
    damping: dict[str, float]
    n_buckets: dict[str, int]
    hops: str

    @classmethod
    def of(cls, labels: Labels, user_degrees: NDArray, item_degrees: NDArray, hops: str) -> SoftPlan:
        """The plan for these communities; degrees are those of the graph, shapes (n_users,) and (n_items,)."""
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
        """What ids of ``side`` pass on to each bucket of their neighbours: float64, shape (n_rows, n_buckets).

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
        # scipy leaves a row's entries in an order that depends on other rows, and lengths are sums in that order.
        total.sort_indices()
        return total

    def bucket_map(
        self,
        side: str,
        rows: NDArray[np.int32],
        weights: NDArray[np.float32],
        method: str,
        sample: NDArray[np.integer] | None = None,
    ) -> BucketMap:
        """The map of ``side``, with the OOV entry and row appended.

        Args:
            rows, weights: :func:`graphhash.maps.affinities.affinity_rows` of all ids, shape (n_ids, indices_per_id).
            method: name of the method, for reports.
            sample: of the weight codebook (:func:`graphhash.maps.codebook.weight_codebook`).
        """
        shared = self.hops == "1+2"
        n_buckets = self.n_buckets[side] + (2 if shared else 1)
        oov_row = self.n_buckets[side] + (SIDES.index(side) if shared else 0)
        rows = np.concatenate([rows, np.full((1, rows.shape[1]), oov_row, np.int32)])
        # Ids without neighbours read the OOV row of their side.
        rows[rows == self.n_buckets[side]] = oov_row
        of_oov = np.zeros((1, rows.shape[1]), np.float32)
        of_oov[0, 0] = 1
        codebook, codes = weight_codebook(np.concatenate([weights, of_oov]), sample)
        return BucketMap(rows, n_buckets, method, codebook=codebook, codes=codes, shared=shared)


def check_soft(shape: tuple[int, int], labels: Labels, indices_per_id: int, hops: str) -> None:
    """Check the arguments of :func:`soft_maps` for a graph of this shape.

    Raises:
        ArgumentError: as there.
    """
    if indices_per_id < 1:
        raise ArgumentError(f"indices_per_id must be at least 1, got {indices_per_id}")
    if hops not in HOPS:
        raise ArgumentError(f"hops is {hops!r}; use one of {', '.join(map(repr, HOPS))}")
    if shape != (len(labels.users), len(labels.items)):
        raise ArgumentError(
            f"biadjacency is {shape[0]} x {shape[1]}, labels hold {len(labels.users)} users and {len(labels.items)} items"
        )
