"""Methods `full_soft` and `additive`: full rows beside a mixture, their sums, and codes of these."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphhash.errors import ArgumentError
from graphhash.maps.bucket_map import full_map
from graphhash.maps.embedding_spec import BUCKET, EmbeddingSpec
from graphhash.maps.soft_maps import soft_maps
from pipeline.config.run_config import RunConfig
from pipeline.retrieval.additive import encoded
from pipeline.retrieval.budget import GraphSize, resolve_method
from pipeline.retrieval.full_soft import mixture_labels, summed, trained_embedding
from pipeline.retrieval.models import ModelSpec
from pipeline.retrieval.task import Retrieval
from tests.helpers import graphs

CODES = EmbeddingSpec("additive", {"codes_per_id": 4, "n_groups": 2, "codeword_bits": 8})


def test_the_sum_of_mixture_and_row_scores_as_the_trained_model():
    graph, _, _ = graphs.planted(0, 6, 60, 0.3, 0.02)
    labels = mixture_labels(graph, 20)
    assert labels.rows <= 20
    spec = ModelSpec("mf", 8, True, 0, 0, trained_embedding(8), cosine=True, std=1.0)
    trained = spec.build(*soft_maps(graph, labels, indices_per_id=3), None)
    torch.nn.init.normal_(trained.item_bias, generator=torch.Generator().manual_seed(0))
    for axis, embedding in ((1, trained.user_embedding), (0, trained.item_embedding)):
        embedding.fill_oov(torch.from_numpy(np.asarray(graph.sum(axis=axis), np.float32).ravel()))
    model, stored = summed(trained, spec)
    assert stored.embedding == BUCKET
    assert model.user_embedding.n_buckets == graph.shape[0] + 1
    users = torch.arange(graph.shape[0])
    torch.testing.assert_close(model.score_all_items()(users), trained.score_all_items()(users))
    unknown = torch.tensor([graph.shape[0]])
    torch.testing.assert_close(model.user_embedding(unknown), trained.user_embedding(unknown))


def test_a_budget_and_other_methods_change_nothing_that_full_soft_trains():
    size = GraphSize(30_000, 40_000, 800_000)
    runs = [
        RunConfig.from_flat({"run.methods": methods, "cluster.ratio": ratio})
        for methods, ratio in ((["full_soft"], 0.25), (["additive"], 0.02), (["soft", "additive"], 0.125))
    ]
    assert (
        len(
            {
                str(resolve_method(config, "full_soft", size, n_rows))
                for config, n_rows in zip(runs, (9, 99, 9999), strict=True)
            }
        )
        == 1
    )
    task = Retrieval()
    assert all(
        task.settings("train", config, "full_soft") == task.settings("train", runs[0], "full_soft") for config in runs
    )
    assert not any(task.needs_clusters(config, method) for config in runs for method in ("full_soft", "additive"))


@pytest.mark.parametrize("cosine", [True, False])
def test_a_trained_model_is_decoded_from_its_codes(cosine):
    graph, _, _ = graphs.planted(0, 6, 60, 0.3, 0.02)
    spec = ModelSpec("mf", 16, False, 0, 0, cosine=cosine, std=1.0)
    trained = spec.build(full_map(graph.shape[0]), full_map(graph.shape[1]), None)
    degrees = np.asarray(graph.sum(axis=0)).ravel()
    model = encoded(trained, ModelSpec("mf", 16, False, 0, 0, CODES, cosine=cosine, std=1.0), CODES, degrees)
    assert model.user_embedding.codebooks is model.item_embedding.codebooks
    for side in ("user_embedding", "item_embedding"):
        embedding = getattr(trained, side)
        ids = torch.arange(embedding.n_ids + 1)  # The OOV id among them.
        wanted, found = trained.scaled(embedding(ids)).detach(), getattr(model, side)(ids).detach()
        # Of 360 and fewer vectors, 256 codewords of 8 numbers, two of them in a group, describe all but a little.
        assert float((found - wanted).square().sum() / wanted.square().sum().clamp(min=1)) < 0.1


def test_a_model_with_more_groups_than_the_dim_allows_is_refused():
    with pytest.raises(ArgumentError, match="do not divide the dim"):
        ModelSpec("mf", 9, False, 0, 0, CODES).build(full_map(3), full_map(3), None)
