"""Cold-start assignment of CTR columns: the rules of ``pipeline.updates.rules``, and the one of ``double_soft`` as CTR makes it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from graphhash.clustering.row_budget import fit_rows
from graphhash.errors import DataError
from graphhash.graph.bipartite import SIDES
from graphhash.graph.local import LocalGraph
from graphhash.maps.fold_in import soft_entries, with_new_ids
from graphhash.maps.hashes import frequency_rows
from pipeline.ctr.models import MAP_SETTINGS
from pipeline.updates.rules import FULL_TABLES, RULES, Assignment, NewIds, Rule, untrained_labels


def _double_soft(new: NewIds) -> Assignment:
    """The indices of the soft map over merged communities, and a row among those that infrequent ids hash into."""
    settings, inputs, graph = MAP_SETTINGS["double_soft"], new.inputs, new.inputs.graph
    assert inputs.frequencies is not None, "double_soft of CTR knows how often values occur"
    labels = inputs.labels
    n_free = int(settings["share"] * labels.user_rows), int(settings["share"] * labels.item_rows)
    kept = labels.user_rows - n_free[0], labels.item_rows - n_free[1]
    labels = fit_rows(LocalGraph(graph), labels, user_rows=kept[0], item_rows=kept[1])
    inner = {}
    for side, known in new.maps.items():
        assert known.codebook is not None, "a soft map has a codebook"
        inner[side] = replace(known, rows=known.rows[:, :-1], codebook=np.ascontiguousarray(known.codebook[:, :-1]))
    communities = new.communities(labels, 0)
    entries = soft_entries(graph, labels, communities, new.edges, inner, inputs.hops)
    maps = {}
    for number, side in enumerate(SIDES):
        known, (rows, codes, is_assigned) = new.maps[side], entries[side]
        n_soft = known.n_buckets - (2 if known.shared else 1) - (sum(n_free) if known.shared else n_free[number])
        own = frequency_rows(
            inputs.frequencies[number],
            n_free[number],
            int(settings["own"] * n_free[number]),
            np.random.default_rng([inputs.seed, number]),
        )
        own = own + n_soft + (n_free[0] if known.shared and number else 0)
        if not np.array_equal(own[: known.n_ids], known.rows[:-1, -1]):
            raise DataError(
                f"the {side} map of method 'double_soft' is not what this program makes of the run's data and settings; "
                "run 'graphhash train' again"
            )
        # Indices without a weight stand where the soft map has its OOV row.
        rows = np.where(rows >= n_soft, known.oov_row, rows)
        added = np.column_stack([rows, own[known.n_ids :]]).astype(np.int32)
        maps[side] = with_new_ids(known, added, codes, is_assigned)
    return Assignment(maps, {side: entries[side][2] for side in SIDES}, untrained_labels(new, communities))


_TABLES = (*FULL_TABLES, "additive", "full_additive", "lsh", "residual")
# Methods that store full rows, which began as mixtures: a new value's row is its mixture.
MIXED = ("full_soft", "full_soft_int8", "full_soft_int4", "full_soft_small_dim")
_MIXED = Rule(RULES["soft"].assign, f"{RULES['soft'].description}, as their mixture", 1)
CTR_RULES: dict[str, Rule] = {name: rule for name, rule in RULES.items() if name not in _TABLES} | {
    "double_soft": Rule(_double_soft, RULES["double_soft"].description, 1),
    **dict.fromkeys(MIXED, _MIXED),
}
