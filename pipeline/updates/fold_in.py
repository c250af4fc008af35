"""Fold-in: new users and items of a later log get rows in a trained model, and nothing is trained.

Tables, the rows of known ids and their biases stay as they are. A new id that interacted with assigned ids is assigned by the rule of the
run's method (``pipeline.updates.rules``); any other stays unassigned and reads the out-of-vocabulary row.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graphhash.graph.bipartite import SIDES
from graphhash.maps.bucket_map import BucketMap
from graphhash.maps.fold_in import with_own_rows, without_unassigned
from graphhash.maps.fold_in_vectors import fair_bias, fitted_items, fitted_users, mean_of_similar, score_scale
from graphhash.models.mf import MatrixFactorization
from pipeline.config.run_config import RunConfig
from pipeline.maps.methods import Inputs
from pipeline.retrieval.folded_in import FoldedIn
from pipeline.retrieval.weights import with_more_ids
from pipeline.runs.folder import RunFolder, StageResult
from pipeline.task import model_stage
from pipeline.updates.log import NewLog
from pipeline.updates.rules import RULES, Assignment, NewIds

_log = logging.getLogger(__name__)

# Table rows per trained id from which on new ids get table rows of their own.
OWN_ROWS = 0.8


@dataclass(frozen=True, eq=False)
class Trained:
    """A run's method as it was trained, and the stages that made it.

    Args:
        config: of the run.
        folder: the run's, locked.
        stages: by name: ingest, cluster, and the method's training, refit and evaluation, each intact and of these settings.
        inputs: what the method's maps were made from.
        model, maps: as trained; maps by side.
    """

    config: RunConfig
    method: str
    folder: RunFolder
    stages: dict[str, StageResult]
    inputs: Inputs
    model: MatrixFactorization
    maps: dict[str, BucketMap]

    @property
    def train_key(self) -> str:
        """The key of the training that made the model, the refit where there is one, to which updates belong."""
        return self.stages[model_stage(self.config, self.method)].key

    @property
    def fitted_sides(self) -> tuple[str, ...]:
        """Sides whose new ids get rows of their own, fitted to their interactions.

        There nearly every trained id has a vector of its own, or a table row that it reads before those of others, and a mixture of
        others' rows would be a poor vector.
        """
        if RULES[self.method].fits:
            return SIDES
        if self.method != "soft" or self.inputs.hops != "2":
            return ()
        own = {side: bucket_map.n_buckets > OWN_ROWS * bucket_map.n_ids for side, bucket_map in self.maps.items()}
        return tuple(side for side in SIDES if own["users"] and own[side])

    @property
    def rule(self) -> str:
        """How new ids are assigned, for the user: completes "new ids are assigned ..."."""
        description, sides = RULES[self.method].description, self.fitted_sides
        if RULES[self.method].fits or not sides:
            return description
        return f"{description}; {' and '.join(sides)} to rows of their own, fitted to their interactions"


class SideCounts(TypedDict):
    """New ids of a side: all, those folded in, and those that stay unassigned."""

    new: int
    folded_in: int
    unassigned: int


class FoldInCounts(TypedDict):
    """What a later log brought.

    ``n_interactions``: distinct pairs; of these ``n_used``: with a new end, both ends assigned; ``n_unused``: with a new end, one end
    unassigned; ``n_known``: between known ids. ``n_rejected``: bad rows left out.
    """

    users: SideCounts
    items: SideCounts
    n_interactions: int
    n_used: int
    n_unused: int
    n_known: int
    n_rejected: int


def fold_in(trained: Trained, known: FoldedIn, new: NewLog) -> tuple[FoldedIn, FoldInCounts]:
    """The run with those new ids that are assigned, and what the log brought."""
    interactions = with_unseen(known.seen, new.graph)
    assignment = assign(trained, known, interactions)
    is_assigned = assignment.is_assigned
    kept = {side: np.concatenate([np.ones(new.n_known[side], np.bool_), is_assigned[side]]) for side in SIDES}
    n_trained = known.n_trained
    biases = assigned_biases(trained, known, interactions, assignment)[is_assigned["items"]]
    now = FoldedIn(
        vocabularies={
            side: ids.only(kept[side]) if not kept[side].all() else ids for side, ids in new.vocabularies.items()
        },
        maps={side: without_unassigned(assignment.maps[side], new.n_known[side], is_assigned[side]) for side in SIDES},
        labels={side: assignment.labels[side][:, kept[side][n_trained[side] :]] for side in SIDES},
        item_bias=np.concatenate([known.item_bias, biases]),
        rows=all_rows(known, assignment),
        seen=csr_array(interactions[kept["users"]][:, kept["items"]]),
        updates=known.updates,
    )
    return now, _counts(new, kept, is_assigned)


def _counts(new: NewLog, kept: dict[str, NDArray[np.bool_]], is_assigned: dict[str, NDArray[np.bool_]]) -> FoldInCounts:
    users, items = new.graph.tocoo().coords
    is_known = (users < new.n_known["users"]) & (items < new.n_known["items"])
    is_used = ~is_known & kept["users"][users] & kept["items"][items]

    def of_side(side: str) -> SideCounts:
        n_assigned = int(is_assigned[side].sum())
        return {"new": new.n_new[side], "folded_in": n_assigned, "unassigned": len(is_assigned[side]) - n_assigned}

    return {
        "users": of_side("users"),
        "items": of_side("items"),
        "n_interactions": len(users),
        "n_used": int(is_used.sum()),
        "n_unused": int((~is_known & ~is_used).sum()),
        "n_known": int(is_known.sum()),
        "n_rejected": new.n_rejected,
    }


def assign(trained: Trained, known: FoldedIn, interactions: csr_array) -> Assignment:
    """Assign those ids of ``interactions``, which are of all ids, that follow the known ones."""
    edges = _untrained(interactions, known)
    assignment = RULES[trained.method].assign(NewIds(trained.inputs, edges, known.maps, known.labels))
    if trained.fitted_sides == SIDES:
        return _with_fitted_ids(trained, known, interactions, assignment)
    return _with_fitted_users(trained, known, interactions, assignment) if trained.fitted_sides else assignment


def all_rows(known: FoldedIn, assignment: Assignment) -> dict[str, NDArray[np.float32]]:
    """Table rows of all folded-in ids that have their own, by side, float32, shape (n, dim): of earlier updates, then of this one."""
    return {side: np.concatenate([rows, assignment.rows.get(side, rows[:0])]) for side, rows in known.rows.items()}


def new_biases(trained: Trained, interactions: csr_array, n_known: int) -> NDArray[np.float32]:
    """Biases of the items after the first ``n_known``, shape (n_new,); zeros where the model has none."""
    degrees = np.asarray(interactions.sum(axis=0), np.float64).ravel()[n_known:]
    if trained.model.item_bias is None:
        return np.zeros(len(degrees), np.float32)
    of_trained = np.asarray(trained.inputs.degrees[1], np.float64)
    return mean_of_similar(of_trained, trained.model.item_bias.detach().cpu().numpy(), degrees)


def assigned_biases(
    trained: Trained, known: FoldedIn, interactions: csr_array, assignment: Assignment
) -> NDArray[np.float32]:
    """Biases of the new items, float32, shape (n_new,). Where vectors are mixed, and not fitted, the biases are shifted so that the items
    take as many places in rankings as trained ones of their degrees."""
    n_known, is_assigned = known.maps["items"].n_ids, assignment.is_assigned["items"]
    biases = new_biases(trained, interactions, n_known)
    if "items" in trained.fitted_sides or not is_assigned.any():
        return biases
    bias = np.concatenate([known.item_bias, biases])
    model = with_more_ids(trained.model, assignment.maps, bias, all_rows(known, assignment))
    with torch.no_grad():
        users, items = (vectors.numpy() for vectors in model.vectors())
    graph, assigned = trained.inputs.graph, n_known + np.flatnonzero(is_assigned)
    n_trained, of_trained = graph.shape[1], trained.model.item_bias
    biases[is_assigned] = fair_bias(
        csr_array(interactions[:, assigned].T),
        graph,
        items[:n_trained],
        users,
        np.zeros(n_trained, np.float32) if of_trained is None else of_trained.detach().numpy(),
        items[assigned],
        biases[is_assigned],
    )
    return biases


def with_unseen(seen: csr_array, graph: csr_array) -> csr_array:
    """The interactions ``seen`` before, and those of ``graph`` that are new, in the shape of ``graph``, which has more ids."""
    users, items = seen.tocoo().coords
    known = csr_array((np.ones(len(users), np.float32), (users, items)), shape=graph.shape)
    fresh = csr_array(graph - graph * known)
    fresh.eliminate_zeros()
    both = csr_array((seen.data, (users, items)), shape=graph.shape) + fresh
    both.sort_indices()
    return csr_array(both, dtype=np.float32)


@dataclass(frozen=True, eq=False)
class _Frozen:
    """What vectors of new ids are fitted to: vectors of all known ids, float32, shapes (n_users, dim) and (n_items, dim), biases of these
    items, the scale of the scores, and whether these are cosines."""

    users: NDArray[np.float32]
    items: NDArray[np.float32]
    bias: NDArray[np.float32]
    scale: float
    unit: bool

    @classmethod
    def of(cls, trained: Trained, maps: Mapping[str, BucketMap], bias: NDArray[np.float32], known: FoldedIn) -> _Frozen:
        """Of the ids of ``maps``, which begin with the trained ones."""
        model, graph = with_more_ids(trained.model, maps, bias, known.rows), trained.inputs.graph
        with torch.no_grad():
            users, items = (vectors.numpy() for vectors in model.vectors())
        biases = np.zeros(len(items), np.float32) if model.item_bias is None else model.item_bias.detach().numpy()
        n_users, n_items = graph.shape
        scale = score_scale(graph, users[:n_users], items[:n_items], biases[:n_items])
        return cls(users, items, biases, scale, model.cosine)


def _with_fitted_users(
    trained: Trained, known: FoldedIn, interactions: csr_array, assignment: Assignment
) -> Assignment:
    """The assignment with a table row for every assigned new user, fitted to the assigned items that it used."""
    n_known, is_assigned = {side: known.maps[side].n_ids for side in SIDES}, assignment.is_assigned["users"]
    if not is_assigned.any():
        return assignment
    _log.info("update: fitting vectors of %s users ...", f"{int(is_assigned.sum()):,}")
    bias = np.concatenate([known.item_bias, new_biases(trained, interactions, n_known["items"])])
    frozen = _Frozen.of(trained, assignment.maps, bias, known)
    is_there = np.concatenate([np.ones(n_known["items"], np.bool_), assignment.is_assigned["items"]])
    used = csr_array(interactions[n_known["users"] + np.flatnonzero(is_assigned)][:, is_there])
    of_trained = frozen.users[: trained.inputs.graph.shape[0]]
    items, biases = frozen.items[is_there], frozen.bias[is_there]
    rows = fitted_users(used, of_trained, items, biases, frozen.scale, unit=frozen.unit)
    maps = assignment.maps | {"users": with_own_rows(assignment.maps["users"], n_known["users"], is_assigned)}
    return dataclasses.replace(assignment, maps=maps, rows={"users": rows})


def _with_fitted_ids(trained: Trained, known: FoldedIn, interactions: csr_array, assignment: Assignment) -> Assignment:
    """The assignment with a table row for every assigned new id: users are fitted to known items, new items to known users and these, and
    then the new users once more, to all items."""
    n_known, is_assigned = {side: known.maps[side].n_ids for side in SIDES}, assignment.is_assigned
    new = {side: n_known[side] + np.flatnonzero(is_assigned[side]) for side in SIDES}
    if not any(map(len, new.values())):
        return assignment
    _log.info(
        "update: fitting vectors of %s users and %s items ...", f"{len(new['users']):,}", f"{len(new['items']):,}"
    )
    frozen = _Frozen.of(trained, known.maps, known.item_bias, known)
    scale, unit = frozen.scale, frozen.unit
    of_trained = {
        side: vectors[:n]
        for side, vectors, n in zip(SIDES, (frozen.users, frozen.items), trained.inputs.graph.shape, strict=True)
    }

    def of_users(
        users: NDArray[np.int64], there: NDArray[np.int64], items: NDArray[np.float32], bias: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        edges = csr_array(csr_array(interactions[users])[:, there])
        return fitted_users(edges, of_trained["users"], items, bias, scale, unit=unit)

    known_items, known_users = np.arange(n_known["items"]), np.arange(n_known["users"])
    has_known = csr_array(interactions[new["users"]])[:, known_items].sum(axis=1) > 0
    first = new["users"][has_known]
    vectors = np.concatenate([frozen.users, of_users(first, known_items, frozen.items, frozen.bias)])
    there = np.concatenate([known_users, first])
    item_bias = new_biases(trained, interactions, n_known["items"])[is_assigned["items"]]
    item_rows = fitted_items(
        csr_array(csr_array(interactions[:, new["items"]].T)[:, there]),
        trained.inputs.graph,
        of_trained["items"],
        vectors,
        frozen.bias[: len(of_trained["items"])],
        np.diff(interactions.indptr)[there].astype(np.float64),
        scale,
        own_bias=item_bias,
        unit=unit,
    )
    items, bias = np.concatenate([frozen.items, item_rows]), np.concatenate([frozen.bias, item_bias])
    user_rows = of_users(new["users"], np.concatenate([known_items, new["items"]]), items, bias)
    maps = {side: with_own_rows(assignment.maps[side], n_known[side], is_assigned[side]) for side in SIDES}
    return dataclasses.replace(assignment, maps=maps, rows={"users": user_rows, "items": item_rows})


def _untrained(interactions: csr_array, known: FoldedIn) -> csr_array:
    """The interactions with at least one end that is not trained."""
    edges = interactions.tocoo()
    users, items = edges.coords
    kept = (users >= known.n_trained["users"]) | (items >= known.n_trained["items"])
    return csr_array((edges.data[kept], (users[kept], items[kept])), shape=edges.shape)
