from __future__ import annotations

import numpy as np
import pytest

from graphhash.graph import _edge_kernels as kernels
from graphhash.graph.interactions import edge_hash, lowest_hash, merge_duplicates, seed_state, split_parts


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("n", [0, 1, 50, 20_000])
def test_rows_are_merged_as_by_sorting_all_pairs(n, weighted):
    rng = np.random.default_rng(n)
    # A few long rows, so that runs are merged, and many short ones.
    users, items = (rng.zipf(1.6, n) % 97 + 5).astype(np.int32), rng.integers(0, 900, n, dtype=np.int32)
    weights = rng.random(n) if weighted else np.empty(0)
    indptr, columns, grouped = kernels.group_rows(users, items, weights, 5, 100)
    totals = kernels.merge_rows(indptr, columns, grouped)
    expected = merge_duplicates(users, items, weights if weighted else np.ones(n))
    n_edges = indptr[-1]
    assert np.array_equal(np.repeat(np.arange(100), np.diff(indptr)) + 5, expected[0])
    assert np.array_equal(columns[:n_edges], expected[1])
    assert np.array_equal(totals if len(totals) else np.ones(n_edges), expected[2])


def test_hashes_and_parts_are_those_of_interactions():
    rng = np.random.default_rng(0)
    users, items, _ = merge_duplicates(rng.integers(0, 300, 9000), rng.integers(0, 200, 9000), np.ones(9000))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(users, minlength=300))])
    columns, low = items.astype(np.int32), 1000
    hashes = edge_hash(users + low, items, seed=2**70 + 3)
    state = seed_state(2**70 + 3)[0]
    lowest, counts = kernels.lowest_of_columns(indptr, columns, low, state, 200)
    assert np.array_equal(lowest, lowest_hash(items, hashes, 200))
    assert np.array_equal(counts, np.bincount(items, minlength=200))
    parts = np.empty(len(items), np.uint8)
    kernels.draw_parts(indptr, columns, low, state, lowest, 0.2, 0.3, parts)
    user_lowest = lowest_hash(users, hashes, 300)[users]
    assert np.array_equal(parts, split_parts(hashes, user_lowest, lowest[items], validation=0.2, test=0.3))
