"""Fold-in of new ids, each rule against the obvious second implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from scipy.special import softmax

import graphhash
from graphhash.clustering.labels import Labels
from graphhash.graph.bipartite import SIDES
from graphhash.maps import fold_in_vectors
from graphhash.maps.bucket_map import BucketMap, full_map
from graphhash.maps.codebook import nearest_codes
from graphhash.maps.fold_in import (
    OpenCommunities,
    assign_communities,
    best_communities,
    soft_entries,
    with_new_ids,
    with_own_rows,
    without_unassigned,
)
from graphhash.maps.fold_in_vectors import fair_bias, fitted_items, fitted_users, mean_of_similar, score_scale
from graphhash.maps.soft_maps import ITEM_DAMPING, soft_maps
from tests.helpers import graphs


def degrees_of(graph: csr_array) -> dict[str, np.ndarray]:
    return {side: np.asarray(graph.sum(axis=axis), np.float64).ravel() for side, axis in (("users", 1), ("items", 0))}


def new_edges(edges: dict[tuple[int, int], float], n_users: int, n_items: int) -> csr_array:
    """Interactions of new ids, in the shape of the graph with them."""
    pairs = np.array(list(edges)).reshape(-1, 2)
    return csr_array((np.array(list(edges.values()), np.float32), pairs.T), shape=(n_users, n_items))


def none_yet() -> dict[str, np.ndarray]:
    """Communities of ids folded in earlier: there are none."""
    return {side: np.empty(0, np.int32) for side in SIDES}


def modularity_with(graph, degrees, labels, row, row_degree, community) -> float:
    """Q times m of a new user's pairs alone, with the trained degrees: what its community adds to the sum over pairs."""
    m, q = graph.sum(), 0.0
    for item, label in enumerate(labels.items):
        if label == community:
            q += row.get(item, 0.0) - labels.resolution * row_degree * degrees["items"][item] / m
    return q


@pytest.mark.parametrize("seed", range(5))
def test_a_new_user_joins_the_community_of_largest_change_in_modularity(seed):
    rng = np.random.default_rng(seed)
    graph = graphs.covering_graph(rng)
    labels = graphhash.cluster(graph, resolution=3.0)
    degrees = degrees_of(graph)
    rows = [{int(i): float(rng.integers(1, 4)) for i in rng.choice(24, 6, replace=False)} for _ in range(8)]
    edges = new_edges({(30 + n, i): w for n, row in enumerate(rows) for i, w in row.items()}, 38, 24)
    communities = assign_communities(graph, labels, none_yet(), edges)
    assert (communities["items"] == labels.items).all()
    assert (communities["users"][:30] == labels.users).all()
    for row, community in zip(rows, communities["users"][30:], strict=True):
        reached = sorted({int(labels.items[i]) for i in row} & set(labels.users.tolist()))
        gains = [modularity_with(graph, degrees, labels, row, sum(row.values()), c) for c in reached]
        if not gains:
            continue
        best = max(gains)
        # Ties go to the lowest.
        assert community == next(c for c, gain in zip(reached, gains, strict=True) if gain > best - 1e-9)


def test_second_best_communities_and_ties():
    rows = csr_array(np.array([[1.0, 1, 0, 0], [0, 0, 2, 1], [0, 0, 0, 0]]))
    labels = np.array([2, 0, 1, -1], np.int32)
    best = best_communities(rows, labels, OpenCommunities(np.ones(3), 10.0, 1.0, np.array([True, True, True])), 2)
    assert best.tolist() == [[0, 2], [1, -1], [-1, -1]]
    closed = best_communities(rows, labels, OpenCommunities(np.ones(3), 10.0, 1.0, np.array([False, True, True])), 2)
    assert closed.tolist() == [[2, -1], [1, -1], [-1, -1]]


def test_new_ids_are_assigned_through_new_ids_that_are_assigned():
    """Trained user 0 -> new item 3 -> new user 4 -> new item 4 -> new user 5; new user 6 has new item 5 alone."""
    graph = graphhash.biadjacency([0, 0, 1, 2, 3], [0, 1, 1, 2, 2])
    labels = Labels(np.array([0, 0, 1, 1], np.int32), np.array([0, 0, 1], np.int32), 1.0, 0.0)
    edges = new_edges({(0, 3): 1, (4, 3): 1, (4, 4): 1, (5, 4): 1, (6, 5): 1}, 7, 6)
    communities = assign_communities(graph, labels, none_yet(), edges)
    assert communities["items"].tolist() == [0, 0, 1, 0, 0, -1]
    assert communities["users"].tolist() == [0, 0, 1, 1, 0, 0, -1]


def test_where_no_community_is_open_it_is_that_of_ids_that_share_neighbours():
    graph = graphhash.biadjacency([0, 1, 1, 2], [0, 0, 1, 1], [3, 1, 1, 1])
    labels = Labels(np.array([0, 1, 2], np.int32), np.array([3, 3], np.int32), 1.0, 0.0)
    communities = assign_communities(graph, labels, none_yet(), new_edges({(3, 0): 1, (4, 1): 1, (5, 2): 1}, 6, 3))
    # Item 2 has one user, which is unassigned as well.
    assert communities["users"].tolist() == [0, 1, 2, 0, 1, -1]
    assert communities["items"].tolist() == [3, 3, -1]


def test_a_community_does_not_depend_on_the_rest_of_the_log():
    rng = np.random.default_rng(3)
    graph = graphs.covering_graph(rng)
    labels = graphhash.cluster(graph, resolution=2.0)
    rows = {(30 + n, int(i)): 1.0 for n in range(10) for i in rng.choice(24, 4, replace=False)}
    together = assign_communities(graph, labels, none_yet(), new_edges(rows, 40, 24))["users"][30:]
    for n in range(10):
        single = {(30, i): w for (u, i), w in rows.items() if u == 30 + n}
        assert assign_communities(graph, labels, none_yet(), new_edges(single, 31, 24))["users"][30] == together[n]


@pytest.mark.parametrize("hops", ["1", "2", "1+2"])
@pytest.mark.parametrize("side", SIDES)
def test_soft_entry_of_a_trained_ids_twin_is_its_trained_one(hops, side):
    """A twin of a trained id, with the same interactions, reads the same rows with the same code."""
    rng = np.random.default_rng(0)
    graph = graphs.covering_graph(rng)
    labels = graphhash.cluster(graph, resolution=4.0)
    maps = dict(zip(SIDES, soft_maps(graph, labels, indices_per_id=4, hops=hops), strict=True))
    if side == "users":
        edges = csr_array(np.concatenate([np.zeros(graph.shape, np.float32), graph.toarray()]))
    else:
        edges = csr_array(np.concatenate([np.zeros(graph.shape, np.float32), graph.toarray()], axis=1))
    communities = assign_communities(graph, labels, none_yet(), edges)
    rows, codes, assigned = soft_entries(graph, labels, communities, edges, maps, hops)[side]
    known = maps[side]
    assert assigned.all()
    assert np.array_equal(rows, known.rows[:-1])
    assert np.array_equal(codes, known.codes[:-1])


def test_soft_entries_against_dense_algebra():
    """New users with new items, every product written out."""
    rng = np.random.default_rng(1)
    graph = graphs.covering_graph(rng)
    labels = graphhash.cluster(graph, resolution=4.0)
    hops, indices_per_id = "1+2", 5
    maps = dict(zip(SIDES, soft_maps(graph, labels, indices_per_id=indices_per_id, hops=hops), strict=True))
    dense = np.zeros((33, 26))
    dense[30:, :] = rng.random((3, 26)) < 0.3
    dense[:30, 24:] = rng.random((30, 2)) < 0.2
    edges = csr_array(dense.astype(np.float32))
    communities = assign_communities(graph, labels, none_yet(), edges)
    read = soft_entries(graph, labels, communities, edges, maps, hops)

    user_labels, item_labels = np.unique(labels.users), np.unique(labels.items)
    n_user, n_buckets = len(user_labels), len(user_labels) + len(item_labels)
    b = graph.toarray().astype(float)
    k = np.concatenate([b.sum(1), dense[30:].sum(1)])
    d = np.concatenate([b.sum(0), dense[:, 24:].sum(0)])
    of_user = np.array([list(user_labels).index(c) for c in communities["users"]])
    of_item = n_user + np.array([list(item_labels).index(c) for c in communities["items"]])
    # What an item passes on: its training interactions, or those of a new item.
    columns = np.concatenate([np.vstack([b, np.zeros((3, 24))]), dense[:, 24:]], axis=1)
    # The trained items' mean degree, so that new ones change nothing.
    d += ITEM_DAMPING * b.sum(0).mean()
    for user in range(30, 33):
        affinity = np.zeros(n_buckets)
        for item in np.flatnonzero(dense[user]):
            affinity[of_item[item]] += dense[user, item] / np.sqrt(d[item])
            for other in np.flatnonzero(columns[:, item]):
                affinity[of_user[other]] += dense[user, item] / d[item] * columns[other, item] / np.sqrt(k[other])
        for part in (slice(0, n_user), slice(n_user, None)):
            affinity[part] /= max(np.linalg.norm(affinity[part]), 1e-300)
        order = np.argsort(-affinity, kind="stable")[:indices_per_id]
        order = order[affinity[order] > 0]
        assert read["users"][0][user - 30][: len(order)].tolist() == order.tolist()
        weights = np.zeros(indices_per_id)
        weights[: len(order)] = (affinity[order] / affinity[order[0]]) ** 0.7
        weights /= np.linalg.norm(weights)
        distances = np.linalg.norm(maps["users"].codebook[:-1] - weights, axis=1)
        assert distances[read["users"][1][user - 30]] == pytest.approx(distances.min(), abs=1e-6)


def test_nearest_codes_against_all_distances():
    rng = np.random.default_rng(2)
    weights, codebook = rng.random((50, 3), np.float32), rng.random((9, 3), np.float32)
    expected = np.linalg.norm(weights[:, None] - codebook[None], axis=2).argmin(1)
    assert np.array_equal(nearest_codes(weights, codebook), expected)
    assert len(nearest_codes(weights[:0], codebook)) == 0


def frozen(seed=4, n_users=40, n_items=30, dim=5):
    """Vectors and biases of a trained model, and interactions that are drawn from the softmax of twice its scores."""
    rng = np.random.default_rng(seed)
    users, items = (rng.normal(size=(n, dim)).astype(np.float32) for n in (n_users, n_items))
    bias = rng.normal(size=n_items).astype(np.float32)
    chances = softmax(2 * (users @ items.T + bias).astype(np.float64), axis=1)
    return users, items, bias, np.array([rng.multinomial(20, chance) for chance in chances])


def graph_of(counts) -> csr_array:
    return csr_array((counts > 0).astype(np.float32))


@pytest.mark.parametrize("unit", [False, True])
def test_a_new_users_vector_is_the_minimum_of_its_loss(unit, monkeypatch):
    monkeypatch.setattr(fold_in_vectors, "_STEPS", 2000)
    users, items, bias, counts = frozen()
    used = csr_array((counts[:4] > 0).astype(np.float32) * 3)
    found = fitted_users(used, users, items, bias, 1.5, unit=unit)
    taken = torch.from_numpy(used.toarray() > 0).double()

    def loss(vectors):
        scores = 1.5 * (vectors @ torch.from_numpy(items).double().T + torch.from_numpy(bias).double())
        return (taken.sum(1) * scores.logsumexp(1) - (taken * scores).sum(1)).sum()

    check_minimum(found, users, loss, unit)


@pytest.mark.parametrize("unit", [False, True])
def test_a_new_items_vector_is_the_minimum_of_its_loss(unit, monkeypatch):
    monkeypatch.setattr(fold_in_vectors, "_STEPS", 2000)
    # The factor of the exposure is 1.
    monkeypatch.setattr(fold_in_vectors, "_MOST_LOG_FACTOR", 0.0)
    users, items, bias, counts = frozen()
    edges, exposure = csr_array((counts.T[:3] > 0).astype(np.float32)), counts.sum(1) + np.arange(40.0)
    # Users without any interaction are not there.
    exposure[7], own = 0, np.array([0.5, -1, 0], np.float32)
    found = fitted_items(edges, graph_of(counts), items, users, bias, exposure, 1.5, own_bias=own, unit=unit)
    wide = torch.from_numpy(users).double()
    totals = (1.5 * (wide @ torch.from_numpy(items).double().T + torch.from_numpy(bias).double())).logsumexp(1)
    pulled = torch.from_numpy(edges.toarray()).double()

    def loss(vectors):
        scores = 1.5 * (vectors @ wide.T + torch.from_numpy(own).double()[:, None])
        return ((scores - totals).exp() * torch.from_numpy(exposure) - pulled * scores).sum()

    check_minimum(found, items, loss, unit)


def check_minimum(found, trained, loss_of, unit):
    """The gradient of the loss and of the distribution of trained vectors is zero; on the sphere, what is left of it there."""
    if unit:
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    vectors = torch.from_numpy(found).double().requires_grad_()
    mean = torch.from_numpy(trained).double().mean(0)
    variance = ((torch.from_numpy(trained).double() - mean) ** 2).mean()
    loss = loss_of(vectors) + fold_in_vectors._PRIOR * ((vectors - mean) ** 2).sum() / (2 * variance)
    loss.backward()
    gradient = vectors.grad
    if unit:
        gradient = gradient - (gradient * vectors).sum(1, keepdim=True) * vectors
    assert gradient.abs().max() < 2e-3 * float(torch.linalg.norm(torch.from_numpy(trained).double()))


def test_rates_of_a_fitted_item_add_up_to_its_interactions(monkeypatch):
    """Of users who all have one number in common, as an intercept has it, and vectors that may have any length."""
    monkeypatch.setattr(fold_in_vectors, "_STEPS", 2000)
    monkeypatch.setattr(fold_in_vectors, "_PRIOR", 1e-9)
    monkeypatch.setattr(fold_in_vectors, "_MOST_LOG_FACTOR", 0.0)
    users, items, bias, counts = frozen()
    users[:, 0] = 1
    edges, own = csr_array((counts.T[:3] > 0).astype(np.float32)), np.zeros(3, np.float32)
    exposure = counts.sum(1).astype(float)
    found = fitted_items(edges, graph_of(counts), items, users, bias, exposure, 1.0, own_bias=own)
    rates = 20 * np.exp(users @ found.T) / np.exp(users @ items.T + bias).sum(1, keepdims=True)
    np.testing.assert_allclose(rates.sum(0), edges.sum(1), rtol=0.01)


def test_new_items_take_as_many_places_as_trained_ones_of_their_degrees():
    users, items, bias, counts = frozen(n_users=600, n_items=200)
    graph, own = graph_of(counts), np.zeros(40, np.float32)
    # The new items are copies of trained ones, of which the scores say nothing of their bias.
    twins = np.random.default_rng(0).choice(200, 40, replace=False)
    edges = csr_array(graph.T)[twins]
    exposure = counts.sum(1).astype(float)
    found = fitted_items(edges, graph, items, users, bias, exposure, 2.0, own_bias=own)
    scores = users @ items.T + bias
    scores[graph.toarray() > 0] = -np.inf
    last = np.sort(scores, axis=1)[:, -20]
    trained_places = (scores >= last[:, None]).sum(0)
    of_new = ((users @ found.T > last[:, None]) & (edges.toarray().T == 0)).sum()
    wanted = mean_of_similar(
        np.asarray(graph.sum(0), float).ravel(), trained_places.astype(np.float32), np.diff(edges.indptr)
    )
    assert of_new == pytest.approx(wanted.sum(), rel=0.1)


def test_shifted_biases_give_new_items_the_places_of_trained_ones():
    users, items, bias, counts = frozen(n_users=600, n_items=200)
    graph, twins = graph_of(counts), np.random.default_rng(0).choice(200, 40, replace=False)
    edges, too_high = csr_array(graph.T)[twins], bias[twins] + 3
    found = fair_bias(edges, graph, items, users, bias, items[twins], too_high)
    # Copies of trained items take the places of those that they are copies of, up to what the degrees tell of these.
    assert np.ptp(found - bias[twins]) < 1e-5
    assert (found - bias[twins]).mean() == pytest.approx(0, abs=0.5)
    assert len(fair_bias(edges[:0], graph, items, users, bias, items[:0], bias[:0])) == 0


def test_many_are_fitted_as_one_at_a_time(monkeypatch):
    users, items, bias, counts = frozen()
    used = csr_array((counts > 0).astype(np.float32))
    of_users = fitted_users(used, users, items, bias, 1.0)
    of_items = [csr_array(used.T), graph_of(counts), items, users, bias, np.full(40, 20.0), 1.0]
    together = fitted_items(*of_items, own_bias=bias)
    monkeypatch.setattr(fold_in_vectors, "_SCORES", 1)
    np.testing.assert_allclose(fitted_users(used, users, items, bias, 1.0), of_users, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(fitted_items(*of_items, own_bias=bias), together, rtol=1e-3, atol=1e-4)


def test_the_scale_is_the_likeliest_one():
    users, items, bias, counts = frozen(n_users=400, n_items=50)
    # Draws of the same item count once in a graph, so that the factor of 2 is found from each draw as a user of its own.
    rows, columns = np.repeat(np.arange(400), 20), np.concatenate([np.repeat(np.arange(50), row) for row in counts])
    graph = csr_array((np.ones(len(columns)), (np.arange(len(columns)), columns)), shape=(len(columns), 50))
    assert score_scale(graph, users[rows], items, bias) == pytest.approx(2, rel=0.1)


def test_a_part_of_the_other_side_does_where_there_are_many(monkeypatch):
    users, items, bias, counts = frozen(n_users=900, n_items=300)
    used = csr_array((counts > 0).astype(np.float32))
    of_items = [csr_array(used.T)[:20], graph_of(counts), items, users, bias, np.full(900, 20.0), 1.0]
    whole = fitted_users(used[:30], users, items, bias, 1.0), fitted_items(*of_items, own_bias=bias[:20])
    monkeypatch.setattr(fold_in_vectors, "_DRAWN", 250)
    parts = fitted_users(used[:30], users, items, bias, 1.0), fitted_items(*of_items, own_bias=bias[:20])
    for part, of_all in zip(parts, whole, strict=True):
        cosines = (part * of_all).sum(1) / np.linalg.norm(part, axis=1) / np.linalg.norm(of_all, axis=1)
        assert np.median(cosines) > 0.9


def test_own_rows_come_before_the_oov_row():
    rows = np.array(
        [[0, 1], [1, 2], [2, 0], [3, 3], [0, 2], [3, 3]], np.int32
    )  # 3 known ids and 2 new ones, of which one is assigned.
    codebook = np.array([[0.8, 0.6], [1, 0]], np.float32)
    bucket_map = BucketMap(rows, 4, "soft", codebook=codebook, codes=np.array([0, 0, 0, 1, 0, 1], np.uint8))
    own = with_own_rows(bucket_map, 3, np.array([False, True]))
    assert own.rows.tolist() == [[0, 1], [1, 2], [2, 0], [4, 4], [3, 3], [4, 4]]
    assert own.n_buckets == 5
    assert own.codes.tolist() == [0, 0, 0, 1, 1, 1]
    assert own.weights[4].tolist() == [1, 0]
    assert np.array_equal(with_own_rows(bucket_map, 3, np.zeros(2, bool)).rows, rows)


def test_bias_is_that_of_items_next_in_degree():
    degrees, bias = np.arange(1000.0), np.arange(1000, dtype=np.float32)
    assert mean_of_similar(degrees, bias, np.array([500.0, 0.0, 5000.0])) == pytest.approx([500, 31.5, 967.5], abs=1)
    assert mean_of_similar(np.ones(3), np.array([1, 2, 6], np.float32), np.array([9.0])) == pytest.approx([3])


def test_a_full_map_without_new_ids_stays_an_identity():
    known = full_map(3)
    assert with_new_ids(known, np.zeros((0, 1)), None, np.zeros(0, np.bool_)).identity
    longer = with_new_ids(known, np.zeros((2, 1)), None, np.zeros(2, np.bool_))
    assert longer.rows[:, 0].tolist() == [0, 1, 2, 3, 3, 3]
    assert not longer.identity
    assert without_unassigned(longer, 3, np.zeros(2, np.bool_)).rows[:, 0].tolist() == [0, 1, 2, 3]
