"""Method ``full_soft``: a row for every id, trained beside a mixture of communities, and stored as their sum.

The mixture makes the vectors better than those of full tables: an id begins as what its communities say of it, and few interactions move
its own row. It costs memory in training alone. Other methods store the sums in fewer bits (``pipeline.retrieval.derived``).

Its communities are its own, because the budget of a run decides about nothing that it stores: the training is the same for every budget.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from scipy.sparse import csr_array

from graphhash.clustering.labels import Labels
from graphhash.clustering.resolution_search import cluster_to_rows
from graphhash.graph.local import LocalGraph
from graphhash.maps.bucket_map import full_map
from graphhash.maps.embedding_spec import BUCKET, EmbeddingSpec
from graphhash.models.mf import MatrixFactorization, RetrievalModel
from graphhash.nn.embedding import BucketEmbedding
from pipeline.retrieval.models import ModelSpec


def trained_embedding(dim: int) -> EmbeddingSpec:
    """What is trained: a mixture, and a row of ``dim`` numbers for every id."""
    return EmbeddingSpec("residual", {"own_dim": dim, "own_bits": 8, "projected": 0})


def mixture_labels(train: csr_array, n_rows: int) -> Labels:
    """Communities for the mixture.

    Args:
        train: training interactions, users x items, also where the model is trained on more of them.
        n_rows: of both sides together.
    """
    return cluster_to_rows(LocalGraph(train), n_rows)


@torch.no_grad()
def summed(trained: RetrievalModel, spec: ModelSpec) -> tuple[MatrixFactorization, ModelSpec]:
    """A trained model with full tables, whose rows are the trained vectors, and its spec.

    Args:
        trained: matrix factorization of mixtures beside full rows.
        spec: its own.
    """
    assert isinstance(trained, MatrixFactorization)
    spec = replace(spec, embedding=BUCKET)
    model = spec.build(full_map(trained.user_embedding.n_ids), full_map(trained.item_embedding.n_ids), None)
    assert isinstance(model, MatrixFactorization)
    model.item_bias = trained.item_bias
    for made, embedding in (
        (model.user_embedding, trained.user_embedding),
        (model.item_embedding, trained.item_embedding),
    ):
        assert isinstance(made, BucketEmbedding)
        made.table.copy_(embedding(torch.arange(embedding.n_ids + 1)))
    return model.eval(), spec
