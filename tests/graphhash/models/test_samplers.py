"""Negative samplers: what they draw, in which proportions, and the same per seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from graphhash.maps.bucket_map import full_map
from graphhash.metrics.ranking import recall_at_k
from graphhash.models.mf import MatrixFactorization
from graphhash.models.samplers import PAIR_SAMPLERS, SAMPLERS, NegativeSampler
from pipeline.config import choices as config
from pipeline.config.run_config import RunConfig
from pipeline.errors import ConfigError
from pipeline.retrieval.evaluate import rank_users
from pipeline.retrieval.objective import RetrievalSettings, TrainingPairs, fit_retrieval
from tests.helpers import graphs

# Degrees 3, 1, 2, 0; user 2 has all but item 3.
GRAPH = csr_array(np.array([[1, 0, 1, 0], [1, 0, 0, 0], [1, 1, 1, 0]], np.float32))
N = 40_000


def draw(kind, users, graph=GRAPH, seed=0, **options):
    return NegativeSampler(graph, kind, **options)(users, torch.Generator().manual_seed(seed))


def shares(items, n_items=4):
    return np.bincount(items.numpy(), minlength=n_items) / len(items)


def test_uniform_draws_the_whole_catalogue():
    assert shares(draw("uniform", torch.zeros(N, dtype=torch.int64))) == pytest.approx([0.25] * 4, abs=0.02)


def test_rejecting_draws_only_what_a_user_has_not_used_and_uniformly():
    users = torch.arange(3).repeat_interleave(N)
    items = draw("uniform_rejecting", users)
    assert shares(items[users == 0]) == pytest.approx([0, 0.5, 0, 0.5], abs=0.02)
    assert shares(items[users == 1]) == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3], abs=0.02)
    assert (items[users == 2] == 3).float().mean() > 0.999


def test_a_user_who_has_everything_gets_an_answer():
    everything = csr_array(np.ones((1, 3), np.float32))
    assert draw("uniform_rejecting", torch.zeros(5, dtype=torch.int64), everything).max() < 3


@pytest.mark.parametrize("power", [0.0, 0.75, 1.0])
def test_popularity_draws_in_proportion_to_a_power_of_the_degree(power):
    weights = np.array([3.0, 1.0, 2.0, 0.0]) ** power
    items = draw("popularity", torch.zeros(N, dtype=torch.int64), power=power)
    assert shares(items) == pytest.approx(weights / weights.sum(), abs=0.02)


@pytest.mark.parametrize("kind", PAIR_SAMPLERS)
def test_the_seed_decides(kind):
    users = torch.arange(3).repeat(50)
    assert torch.equal(draw(kind, users, seed=1), draw(kind, users, seed=1))
    # Items of user 2 are fixed under rejection; the others still change with the seed.
    assert not torch.equal(draw(kind, users, seed=1), draw(kind, users, seed=2))


def test_the_configuration_knows_the_same_samplers():
    assert config.SAMPLERS == SAMPLERS
    with pytest.raises(ConfigError, match=r"train\.sampler"):
        RunConfig.from_flat({"train.sampler": "hard"})


@pytest.mark.parametrize("kind", PAIR_SAMPLERS)
def test_every_sampler_trains_a_model_that_ranks_what_was_used(kind):
    graph = graphs.planted(0, 6, 30, 0.3, 0.02)[0]
    model = MatrixFactorization(full_map(graph.shape[0]), full_map(graph.shape[1]), 16, item_bias=False, seed=0)
    users, items = (torch.from_numpy(side.astype(np.int64)) for side in graph.nonzero())
    settings = RetrievalSettings(
        lr=0.05, weight_decay=1e-6, epochs=60, eval_every=60, patience=1, batch_size=None, seed=0
    )
    everyone, nothing = np.arange(graph.shape[0]), csr_array(graph.shape, dtype=np.float32)
    before = recall_at_k(rank_users(model, everyone, nothing, 20), graph).mean()
    fit_retrieval(model, TrainingPairs(users, items, NegativeSampler(graph, kind)), settings, None)
    assert recall_at_k(rank_users(model, everyone, nothing, 20), graph).mean() > 2 * before


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="'random'; use one of"):
        NegativeSampler(GRAPH, "random")
    with pytest.raises(ValueError, match="power is nan"):
        NegativeSampler(GRAPH, "popularity", power=float("nan"))
    with pytest.raises(ValueError, match="catalogue is empty"):
        NegativeSampler(csr_array((3, 0)))
