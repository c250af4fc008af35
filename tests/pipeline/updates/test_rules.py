"""Cold-start assignment rules of all methods, against maps that had the new ids from the start."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.sparse import csr_array

import graphhash
from graphhash.graph.bipartite import SIDES
from graphhash.maps.fold_in import without_unassigned
from pipeline.maps.methods import METHODS, Inputs
from pipeline.updates.rules import RULES, NewIds


def random_graph(rng, n_users=30, n_items=24, n_edges=150, weighted=True) -> csr_array:
    weights = rng.integers(1, 4, n_edges).astype(np.float32) if weighted else None
    # Every id has an interaction.
    users = np.concatenate([np.arange(n_users), rng.integers(0, n_users, n_edges - n_users)])
    items = np.concatenate([rng.permutation(n_items), rng.integers(0, n_items, n_edges - n_items)])
    return graphhash.biadjacency(users, items, weights, n_users=n_users, n_items=n_items)


def new_ids_of(method, graph, n_users, n_items, edges, *, indices_per_id=4, seed=5) -> NewIds:
    labels = graphhash.cluster(graph, rows=(13, 11))
    inputs = Inputs(graph, labels, indices_per_id, "1+2", seed)
    n_levels = RULES[method].n_levels
    earlier = {side: np.empty((n_levels, 0), np.int32) for side in SIDES}
    return NewIds(inputs, edges, dict(zip(SIDES, METHODS[method].make(inputs), strict=True)), earlier)


FULL = [name for name in RULES if name.startswith("full")]


def some_edges(rng, graph) -> csr_array:
    dense = np.zeros((36, 28), np.float32)
    dense[30:, :] = rng.random((6, 28)) < 0.4
    dense[:30, 24:] = rng.random((30, 4)) < 0.3
    # The last new user met nobody.
    dense[35] = 0
    return csr_array(dense)


def test_every_method_of_bucket_maps_or_additive_codes_has_a_rule():
    of_retrieval = {name: method for name, method in METHODS.items() if method.task in (None, "retrieval")}
    read = ("bucket", "residual", "additive")
    assert RULES.keys() == {n for n, method in of_retrieval.items() if method.embedding in read}


# `lsh` needs features, and assigns nothing. What `full_soft` trains is mixed, and what it stores has the maps of `full`.
@pytest.mark.parametrize("method", sorted(RULES.keys() - {"lsh", "full_soft"}))
def test_known_ids_keep_their_entries_and_unknown_ids_stay_last(method):
    rng = np.random.default_rng(7)
    graph = random_graph(rng)
    new = new_ids_of(method, graph, 36, 28, some_edges(rng, graph))
    assignment = RULES[method].assign(new)
    for side, n_new in (("users", 6), ("items", 4)):
        before, after = new.maps[side], assignment.maps[side]
        assert (after.n_ids, after.n_buckets, after.method) == (before.n_ids + n_new, before.n_buckets, before.method)
        assert np.array_equal(after.rows[: before.n_ids], before.rows[:-1])
        assert np.array_equal(after.weights[: before.n_ids], before.weights[:-1])
        assert np.array_equal(after.rows[-1], before.rows[-1])
        assert np.array_equal(after.weights[-1], before.weights[-1])
        lost = after.rows[before.n_ids : -1][~assignment.is_assigned[side]]
        assert (lost == before.rows[-1]).all()
        if assignment.is_assigned[side].any() and not RULES[method].fits:
            assert (after.rows[before.n_ids : -1][assignment.is_assigned[side], 0] != before.oov_row).all()
        kept = without_unassigned(after, before.n_ids, assignment.is_assigned[side])
        assert kept.n_ids == before.n_ids + assignment.is_assigned[side].sum()
    expected = {"lsh": [0, 0], **{name: [5, 4] for name in (*FULL, "additive")}}.get(
        method, [6, 4] if RULES[method].n_levels == 0 and method != "lsh_structure" else [5, 4]
    )
    if method != "quotient_remainder":
        assert [int(assignment.is_assigned[side].sum()) for side in SIDES] == expected


@pytest.mark.parametrize("method", ["modulo", "double", "frequency", "double_frequency"])
def test_hashes_extend_as_if_the_new_ids_had_been_there(method):
    rng = np.random.default_rng(8)
    graph = random_graph(rng)
    new = new_ids_of(method, graph, 36, 28, some_edges(rng, graph))
    assignment = RULES[method].assign(new)
    wide = csr_array((graph.data, graph.tocoo().coords), shape=(36, 28))
    whole = METHODS[method].make(dataclasses.replace(new.inputs, graph=wide))
    for side, expected in zip(SIDES, whole, strict=True):
        assert np.array_equal(assignment.maps[side].rows, expected.rows)
        assert np.array_equal(assignment.maps[side].weights, expected.weights)


def test_quotients_run_out():
    rng = np.random.default_rng(9)
    graph = random_graph(rng)
    edges = csr_array((60, 24), dtype=np.float32)
    new = new_ids_of("quotient_remainder", graph, 60, 24, edges)
    assignment = RULES["quotient_remainder"].assign(new)
    known = new.maps["users"]
    remainders = int(known.rows[:-1, 1].min())
    room = (known.n_buckets - 1 - remainders) * remainders
    assert assignment.is_assigned["users"].tolist() == [row < room for row in range(30, 60)]
    pairs = assignment.maps["users"].rows[: min(room, 60)]
    assert len(np.unique(pairs, axis=0)) == len(pairs)


def test_lsh_assigns_a_twin_as_its_trained_self():
    rng = np.random.default_rng(10)
    graph = random_graph(rng)
    edges = csr_array(np.concatenate([np.zeros(graph.shape, np.float32), graph.toarray()]))
    assignment = RULES["lsh_structure"].assign(new_ids_of("lsh_structure", graph, 60, 24, edges))
    rows = assignment.maps["users"].rows
    assert np.array_equal(rows[:30], rows[30:-1])


def test_a_user_of_baco_reads_its_second_best_community():
    rng = np.random.default_rng(11)
    graph = random_graph(rng)
    edges = csr_array(np.concatenate([np.zeros(graph.shape, np.float32), graph.toarray()]))
    new = new_ids_of("baco", graph, 60, 24, edges)
    known = new.maps["users"]
    users = RULES["baco"].assign(new).maps["users"]
    twins = users.rows[30:-1]
    same = twins[:, 0] == known.rows[:-1, 0]
    # Propagation stops before everybody is where it gains most; those who are have the second row that training gave them.
    assert same.sum() > 10
    assert np.array_equal(twins[same], known.rows[:-1][same])
    assert np.array_equal(users.weights[30:-1][same], known.weights[:-1][same])


def test_double_soft_is_soft_with_the_hashed_row_of_its_number():
    rng = np.random.default_rng(12)
    graph = random_graph(rng)
    edges = some_edges(rng, graph)
    double = RULES["double_soft"].assign(new_ids_of("double_soft", graph, 36, 28, edges, indices_per_id=5))
    soft = RULES["soft"].assign(new_ids_of("soft", graph, 36, 28, edges, indices_per_id=4))
    for side in SIDES:
        is_assigned = soft.is_assigned[side]
        new = slice(soft.maps[side].n_ids - len(is_assigned), -1)
        assert np.array_equal(double.maps[side].rows[new, :-1][is_assigned], soft.maps[side].rows[new][is_assigned])
        assert (double.maps[side].weights[new, -1][is_assigned] == 1).all()


def test_ids_folded_in_earlier_help_to_assign_later_ones():
    rng = np.random.default_rng(13)
    graph = random_graph(rng)
    first = csr_array((np.ones(3, np.float32), ([0, 1, 2], [24, 24, 24])), shape=(30, 25))
    new = new_ids_of("soft", graph, 30, 25, first)
    assignment = RULES["soft"].assign(new)
    both = csr_array((np.ones(4, np.float32), ([0, 1, 2, 30], [24, 24, 24, 24])), shape=(31, 25))
    later = RULES["soft"].assign(NewIds(new.inputs, both, assignment.maps, assignment.labels))
    assert later.is_assigned["users"].tolist() == [True]
    assert len(later.is_assigned["items"]) == 0
    assert np.array_equal(later.maps["items"].rows, assignment.maps["items"].rows)
    assert later.labels["users"].shape == (1, 1)
    assert later.labels["users"][0, 0] == later.labels["items"][0, 0]
