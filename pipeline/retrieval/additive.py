"""Method ``additive``: a mixture of communities plus a row for every id, trained with noise, then stored as additive codes.

The mixture is what makes the vectors better than those of full tables: an id begins as what its communities say of it, and few interactions
move its own row. Only the sum is stored, so the mixture costs memory in training alone.

Noise in training is what codes of a stated length do to a vector, before there are codes: a Gaussian source of variance 1 that is stored
in R bits per number keeps a squared error of at least 2^(-2R) (Cover and Thomas, Elements of Information Theory, theorem 10.3.2). Vectors
that rank well in spite of it lie so that their codes rank well.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from scipy.sparse import csr_array

from graphhash.maps.additive_codes import additive_codes
from graphhash.maps.bucket_map import full_map
from graphhash.maps.embedding_spec import EmbeddingSpec
from graphhash.models.mf import MatrixFactorization, RetrievalModel
from graphhash.nn.codes import CodeEmbedding
from pipeline.retrieval.models import ModelSpec

BITS_PER_CODE = 8


def expected_error(n_codes: int, dim: int) -> float:
    """Squared error that ``n_codes`` codes of one byte leave of a vector of length 1 and ``dim`` numbers."""
    return float(2.0 ** (-2 * BITS_PER_CODE * n_codes / dim))


def trained_embedding(dim: int) -> EmbeddingSpec:
    """What is trained: a mixture, and a row of ``dim`` numbers for every id."""
    return EmbeddingSpec("residual", {"own_dim": dim, "own_bits": 8, "projected": 0})


@torch.no_grad()
def encoded(
    trained: RetrievalModel, spec: ModelSpec, codes: EmbeddingSpec, graph: csr_array
) -> tuple[MatrixFactorization, ModelSpec]:
    """A trained model with its vectors stored as additive codes, and its spec.

    Args:
        trained: matrix factorization.
        spec: of the trained model.
        codes: kind "additive"; its sizes are those of ``pipeline.maps.sizes``.
        graph: training interactions, users x items.
    """
    assert isinstance(trained, MatrixFactorization)
    vectors = np.concatenate([vectors.cpu().numpy() for vectors in trained.vectors()])
    sizes = codes.sizes
    found = additive_codes(
        vectors, sizes["codes_per_id"], n_groups=sizes["n_groups"], precision=f"int{sizes['codeword_bits']}", seed=codes.seed
    )  # fmt: skip
    spec = replace(spec, embedding=codes)
    model = spec.build(full_map(graph.shape[0]), full_map(graph.shape[1]), None)
    assert isinstance(model, MatrixFactorization)
    model.item_bias = trained.item_bias
    starts = 0
    for axis, embedding in ((1, model.user_embedding), (0, model.item_embedding)):
        assert isinstance(embedding, CodeEmbedding)
        # The OOV id has any code until it gets that of the mean vector.
        own = found.codes[starts : starts + embedding.n_ids]
        embedding.set_codes(replace(found, codes=np.pad(own, ((0, 1), (0, 0)))))
        embedding.fill_oov(torch.from_numpy(np.asarray(graph.sum(axis=axis), np.float32).ravel()))
        starts += embedding.n_ids
    return model, spec
