"""Method `additive`: noise in training as large as the error of its codes, and vectors that are decoded from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from graphhash.errors import ArgumentError
from graphhash.maps.additive_codes import additive_codes
from graphhash.maps.bucket_map import full_map
from graphhash.maps.embedding_spec import EmbeddingSpec
from pipeline.config.run_config import RunConfig
from pipeline.errors import ConfigError
from pipeline.maps.methods import METHODS, ResolvedMethod
from pipeline.retrieval.additive import encoded, expected_error
from pipeline.retrieval.models import ModelSpec
from pipeline.retrieval.objective import _noisy
from pipeline.retrieval.train import _vector_noise
from tests.helpers import graphs

CODES = EmbeddingSpec("additive", {"codes_per_id": 4, "n_groups": 2, "codeword_bits": 8})


def test_a_code_of_one_byte_per_eight_numbers_leaves_a_quarter():
    # One bit per number: 2^-2. Two bits: 2^-4.
    assert expected_error(8, 64) == 0.25
    assert expected_error(16, 64) == 0.0625
    # No code of so many bits does better on Gaussian vectors, which have no structure to find.
    vectors = np.random.default_rng(0).normal(size=(20_000, 8)).astype(np.float32)
    error = float(((additive_codes(vectors, 1).decoded() - vectors) ** 2).sum() / (vectors**2).sum())
    assert expected_error(1, 8) < error < 1.5 * expected_error(1, 8)


def test_noise_takes_its_share_of_the_squared_length_and_keeps_the_rest():
    vectors = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0)) * 3
    noisy = _noisy(vectors, 0.2, torch.Generator().manual_seed(1))
    assert float(noisy.square().sum() / vectors.square().sum()) == pytest.approx(1, abs=0.02)
    kept = float((noisy * vectors).sum() / vectors.square().sum())
    assert kept == pytest.approx(math.sqrt(0.8), abs=0.02)


@pytest.mark.parametrize(
    ("settings", "method", "wanted"),
    [
        ({"train.loss": "softmax"}, "additive", expected_error(4, 64)),
        ({"train.loss": "bsl", "train.vector_noise": 0.1}, "additive", 0.1),
        ({"train.loss": "softmax", "train.vector_noise": 0.0}, "additive", 0.0),
        ({"train.loss": "bpr"}, "additive", 0.0),
        ({"train.loss": "softmax"}, "full", 0.0),
        ({"train.loss": "softmax", "train.vector_noise": 0.3}, "full", 0.3),
    ],
)
def test_the_noise_is_the_error_of_the_codes_unless_it_is_set(settings, method, wanted):
    config = RunConfig.from_flat(settings)
    embedding = CODES if method == "additive" else EmbeddingSpec()
    resolved = ResolvedMethod(
        name=method, indices_per_id=1, hops="1", precision=METHODS[method].precision, lr=1.0, l2_total=0.0,
        embedding=embedding,
    )  # fmt: skip
    assert _vector_noise(config.train, resolved) == wanted


def test_noise_with_a_loss_without_cosines_is_refused():
    with pytest.raises(ConfigError, match=r"train.vector_noise=0.1 is not supported with train.loss=bpr; use softmax"):
        RunConfig.from_flat({"train.loss": "bpr", "train.vector_noise": 0.1})


def test_a_trained_model_is_decoded_from_its_codes():
    graph, _, _ = graphs.planted(0, 6, 60, 0.3, 0.02)
    spec = ModelSpec("mf", 16, False, 0, 0, cosine=True, std=1.0)
    trained = spec.build(full_map(graph.shape[0]), full_map(graph.shape[1]), None)
    model, coded = encoded(trained, spec, CODES, graph)
    assert coded.embedding == CODES
    assert model.user_embedding.codebooks is model.item_embedding.codebooks
    for wanted, found in zip(trained.vectors(), model.vectors(), strict=True):
        # Of 360 and fewer vectors, 256 codewords of 8 numbers, two of them in a group, describe all but a little.
        assert float((found - wanted).square().sum(1).mean()) < 0.1
    # The OOV id is near to the mean user, by interactions.
    degrees = torch.from_numpy(np.asarray(graph.sum(axis=1), np.float32))
    mean = (degrees / degrees.sum()) @ model.user_embedding.all()
    oov = model.user_embedding(torch.tensor([graph.shape[0]]))[0]
    assert float((oov - mean).square().sum()) < 0.5 * float(model.user_embedding.all().square().sum(1).mean())


def test_a_model_with_more_groups_than_the_dim_allows_is_refused():
    with pytest.raises(ArgumentError, match="do not divide the dim"):
        ModelSpec("mf", 9, False, 0, 0, CODES).build(full_map(3), full_map(3), None)
