"""Sizes of method `residual`: within the budget in bytes, as they are set, and refused where nothing fits."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import graphhash
from graphhash.errors import DataError
from graphhash.graph.bipartite import SIDES
from graphhash.maps.bucket_map import BucketMap
from graphhash.maps.embedding_spec import EmbeddingSpec
from graphhash.models.mf import MatrixFactorization
from pipeline.config.run_config import MapConfig, RunConfig
from pipeline.maps.methods import METHODS, Inputs, residual_labels
from pipeline.maps.sizes import SizeBudget
from pipeline.retrieval.budget import BudgetSettings, GraphSize, resolve_method, rows_for_ratio
from pipeline.retrieval.residual_sizes import LEAST_ROWS, residual_sizes
from pipeline.retrieval.stored import count_bytes
from pipeline.retrieval.weights import with_more_ids
from tests.helpers import graphs

N_USERS, N_ITEMS, DIM = 3_000, 4_000, 64
FULL = 4 * DIM * (N_USERS + N_ITEMS + 2)


def budget_of(ratio: float, precision: str = "int4") -> SizeBudget:
    return SizeBudget(int(ratio * FULL), N_USERS, N_ITEMS, DIM, precision)


def maps(n_users: int, n_items: int, n_rows: int, n_indices: int) -> tuple[BucketMap, BucketMap]:
    """Two maps into one table, with full codebooks."""
    rng, made = np.random.default_rng(0), []
    for n_ids, oov in ((n_users, n_rows), (n_items, n_rows + 1)):
        rows = np.vstack([rng.integers(0, n_rows, (n_ids, n_indices)), np.full((1, n_indices), oov)]).astype(np.int32)
        codebook = np.vstack([rng.random((255, n_indices)), np.eye(1, n_indices)]).astype(np.float32)
        codes = np.append(rng.integers(0, 255, n_ids), 255).astype(np.uint8)
        made.append(BucketMap(rows, n_rows + 2, "soft", codebook=codebook, codes=codes, shared=True))
    return made[0], made[1]


def model_of(both, dim: int, own_dim: int, own_bits: int) -> MatrixFactorization:
    spec = EmbeddingSpec("residual", {"own_dim": own_dim, "own_bits": own_bits})
    return MatrixFactorization(*both, dim, item_bias=False, seed=0, embedding=spec)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "int4"])
@pytest.mark.parametrize("ratio", [0.25, 0.125, 0.07, 0.04])
def test_the_model_of_these_sizes_fills_the_budget_and_stays_within_it(ratio, precision):
    budget = budget_of(ratio, precision)
    try:
        sizes = residual_sizes(budget, MapConfig())
    except DataError:
        assert precision in ("float32", "float16")
        return
    both = maps(N_USERS, N_ITEMS, sizes.n_rows, sizes.indices_per_id)
    parts = count_bytes(model_of(both, sizes.dim, sizes.own_dim, sizes.own_bits), precision)
    row = 4 * sizes.dim + 2
    assert budget.n_bytes - row < sum(parts.values()) <= budget.n_bytes


def test_own_numbers_and_dim_fall_with_the_budget():
    chosen = [residual_sizes(budget_of(ratio), MapConfig()) for ratio in (0.25, 0.125, 0.07, 0.045)]
    assert [(s.own_dim, s.own_bits, s.dim) for s in chosen] == [(16, 8, 128), (16, 4, 128), (8, 4, 64), (4, 4, 64)]
    assert [s.indices_per_id for s in chosen] == sorted((s.indices_per_id for s in chosen), reverse=True)


def test_sizes_that_are_set_stay():
    settings = MapConfig(indices_per_id=3, own_dim=5, own_bits=8, residual_dim=32)
    sizes = residual_sizes(budget_of(0.25), settings)
    assert dataclasses.astuple(sizes)[:4] == (3, 32, 5, 8)


def test_the_least_budget_that_is_said_is_the_least():
    with pytest.raises(DataError, match=r"method 'residual' needs [\d,]+ bytes, .* raise the ratio") as error:
        residual_sizes(budget_of(0.001), MapConfig())
    least = int(str(error.value).split()[3].replace(",", ""))
    budget = dataclasses.replace(budget_of(0.1), n_bytes=least)
    assert residual_sizes(budget, MapConfig()).n_rows == LEAST_ROWS
    with pytest.raises(DataError):
        residual_sizes(dataclasses.replace(budget, n_bytes=least - 1), MapConfig())


def test_a_budget_of_rows_has_sizes_of_its_own():
    config = RunConfig.from_flat({"cluster.rows": 500, "run.methods": ("residual",), "train.dim": DIM})
    resolved = resolve_method(config, "residual", GraphSize(N_USERS, N_ITEMS, 60_000), 500)
    assert (resolved.indices_per_id, resolved.dim) == (10, DIM)
    assert resolved.embedding == EmbeddingSpec("residual", {"own_dim": 16, "own_bits": 8})


def test_new_ids_have_the_mixture_alone_and_known_ones_stay_as_they_are():
    known, longer = maps(20, 30, 9, 3), maps(24, 33, 9, 3)
    trained = model_of(known, 8, 4, 8)
    # The same entries for known ids.
    both = {}
    for side, old, new in zip(("users", "items"), known, longer, strict=True):
        rows, codes = new.rows.copy(), new.codes.copy()
        rows[: old.n_ids], codes[: old.n_ids] = old.rows[:-1], old.codes[:-1]
        both[side] = dataclasses.replace(old, rows=rows, codes=codes)
    model = with_more_ids(trained, both, np.zeros(3, np.float32), dict.fromkeys(SIDES, np.empty((0, 8), np.float32)))
    for side, n_known in (("user_embedding", 20), ("item_embedding", 30)):
        before, after = getattr(trained, side), getattr(model, side)
        assert torch.equal(after.all()[:n_known], before.all())
        assert torch.equal(after.all()[n_known:], after.mixture.all()[n_known:])
        assert torch.equal(after(torch.tensor([after.n_ids])), before(torch.tensor([n_known])))
    assert model.user_embedding.projection is model.item_embedding.projection


def test_a_model_without_biases_gets_those_of_new_items_beside_zeros():
    known, longer = maps(20, 30, 9, 3), maps(20, 33, 9, 3)
    trained = model_of(known, 8, 4, 8)
    trained.item_bias = None
    both, none = dict(zip(SIDES, longer, strict=True)), dict.fromkeys(SIDES, np.empty((0, 8), np.float32))
    model = with_more_ids(trained, both, np.array([0.5, -1, 2], np.float32), none)
    assert model.item_bias.tolist() == [0.0] * 30 + [0.5, -1, 2]
    assert with_more_ids(trained, both, np.zeros(3, np.float32), none).item_bias is None


def test_communities_of_other_methods_are_merged_to_its_rows():
    graph = graphs.planted(0, 6, 60, 0.3, 0.02)[0]
    labels = graphhash.cluster(graph, rows=(20, 20))
    inputs = Inputs(graph, labels, 3, "1+2", 0, n_rows=24)
    assert residual_labels(inputs).rows == 24
    assert METHODS["residual"].make(inputs)[0].n_buckets == 24 + 2
    assert residual_labels(dataclasses.replace(inputs, n_rows=50)) is labels
    config = RunConfig.from_flat({"run.methods": ("soft", "residual"), "train.dim": DIM, "cluster.ratio": 0.2})
    size = GraphSize(N_USERS, N_ITEMS, 60_000)
    rows = [
        rows_for_ratio(BudgetSettings.of(config), 0.2, dict.fromkeys(names, "int4"), size)
        for names in (("soft",), ("soft", "residual"), ("residual",))
    ]
    assert rows[0] == rows[1] > rows[2] == resolve_method(config, "residual", size, 0).n_rows
