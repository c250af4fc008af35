from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphhash.graph.interactions import (
    TEST,
    TRAIN,
    VALIDATION,
    edge_hash,
    lowest_hash,
    merge_duplicates,
    split_parts,
)  # fmt: skip

EDGES = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 9), st.floats(2**-10, 2**10, width=32)),
    min_size=1,
    max_size=60,
)
MASK = 2**64 - 1


def naive_mix(state):
    state = (state + 0x9E3779B97F4A7C15) & MASK
    state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ state >> 27) * 0x94D049BB133111EB) & MASK
    return state ^ state >> 31


def columns(edges):
    users, items, weights = zip(*edges, strict=True)
    return np.array(users), np.array(items), np.array(weights, np.float64)


def split(users, items, seed, validation=0.3, test=0.3):
    hashes = edge_hash(users, items, seed=seed)
    lowest = [lowest_hash(rows, hashes, 10)[rows] for rows in (users, items)]
    return split_parts(hashes, *lowest, validation=validation, test=test)


@given(EDGES)
def test_merging_is_a_dict_of_sums_in_log_order(edges):
    naive = {}
    for user, item, weight in edges:
        naive[user, item] = naive.get((user, item), 0.0) + weight
    users, items, weights = merge_duplicates(*columns(edges))
    assert dict(zip(zip(users, items, strict=True), weights, strict=True)) == naive
    assert list(zip(users, items, strict=True)) == sorted(naive)


@given(st.integers(0, 2**31), st.integers(0, 2**62), st.integers(0, 2**80))
def test_edge_hash_is_splitmix64_of_seed_user_and_item(user, item, seed):
    state = naive_mix((naive_mix(seed & MASK) + (seed >> 64)) & MASK)
    expected = naive_mix((naive_mix((state + user) & MASK) + item) & MASK)
    assert edge_hash(np.array([user]), np.array([item]), seed=seed).tolist() == [expected]


@given(EDGES, st.integers(0, 5))
def test_every_user_and_item_keeps_an_edge_in_train(edges, seed):
    users, items, _ = merge_duplicates(*columns(edges))
    train = split(users, items, seed, validation=0.45, test=0.5) == TRAIN
    assert set(users[train]) == set(users)
    assert set(items[train]) == set(items)


@given(EDGES, st.randoms())
def test_the_part_of_an_edge_does_not_depend_on_the_order_of_edges(edges, random):
    users, items, _ = merge_duplicates(*columns(edges))
    order = list(range(len(users)))
    random.shuffle(order)
    assert np.array_equal(split(users, items, 0)[order], split(users[order], items[order], 0))


def test_shares_are_those_of_the_edges_that_may_leave_train():
    rng = np.random.default_rng(0)
    users, items, _ = merge_duplicates(rng.integers(0, 2000, 200_000), rng.integers(0, 900, 200_000), np.ones(200_000))
    hashes = edge_hash(users, items, seed=1)
    user_lowest, item_lowest = lowest_hash(users, hashes, 2000)[users], lowest_hash(items, hashes, 900)[items]
    parts = split_parts(hashes, user_lowest, item_lowest, validation=0.1, test=0.2)
    free = (hashes != user_lowest) & (hashes != item_lowest)
    assert np.mean(parts[free] == VALIDATION) == pytest.approx(0.1, abs=0.004)
    assert np.mean(parts[free] == TEST) == pytest.approx(0.2, abs=0.004)
    assert np.all(parts[~free] == TRAIN)


def test_another_seed_is_another_split_and_no_share_leaves_all_in_train():
    users, items = np.divmod(np.arange(100), 10)
    assert not np.array_equal(split(users, items, 0), split(users, items, 1))
    assert np.all(split(users, items, 0, validation=0.0, test=0.0) == TRAIN)


@pytest.mark.parametrize(("validation", "test"), [(-0.1, 0.1), (0.5, 0.5), (0.0, 1.0)])
def test_impossible_shares_are_refused(validation, test):
    with pytest.raises(ValueError, match=f"validation={validation} and test={test}"):
        split(np.array([0]), np.array([0]), 0, validation=validation, test=test)
