"""A trained CTR model with the vectors of some columns stored in another way: as full tables, or as product codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from graphhash.maps.bucket_map import full_map
from graphhash.maps.embedding_spec import EmbeddingSpec
from graphhash.models.ctr import CtrModel
from graphhash.models.ctr_fields import TableSlice
from graphhash.nn.codes import CodeEmbedding
from graphhash.nn.compressed import CompressedEmbedding
from graphhash.nn.embedding import BucketEmbedding
from pipeline.maps.derived import product_coded


@torch.no_grad()
def with_embeddings(model: CtrModel, embeddings: Sequence[tuple[int, EmbeddingSpec]] = ()) -> CtrModel:
    """A model that answers as ``model`` does, up to what codes lose: every column as a full table, or as an embedding that is given.

    Args:
        model: on the CPU; columns with a table of fewer rows than ids have first-order weights and biases per id.
        embeddings: kind "product", of columns by number.

    Raises:
        ArgumentError: the codes do not divide the dim, or FAISS is not installed.
    """
    full = [full_map(n_ids) for n_ids in model.fields.n_ids]
    n_multi_valued = len(full) - model.fields.n_categorical
    spec = replace(model.spec, embeddings=tuple(embeddings), id_bias=False)
    made, seeds = spec.build(full, model.n_dense, n_multi_valued), dict(embeddings)
    rest = {name: weight for name, weight in model.state_dict().items() if not name.startswith("fields.")}
    made.load_state_dict(rest, strict=False)
    for number, (new, old) in enumerate(zip(made.embeddings, model.embeddings, strict=True)):
        vectors = all_vectors(old)
        if isinstance(new, CodeEmbedding):
            coded = product_coded(vectors.numpy(), seeds[number], seed=seeds[number].seed)
            new.set_codes(coded.vector_codes())
        else:
            assert isinstance(new, (BucketEmbedding, TableSlice))
            new.table.copy_(vectors)
    return made.eval()


def all_vectors(embedding: CompressedEmbedding | TableSlice) -> Tensor:
    """Vectors of all ids, that of the OOV id last, shape (n_ids + 1, dim)."""
    if isinstance(embedding, TableSlice):
        return embedding.table
    return embedding(torch.arange(embedding.n_ids + 1, device=embedding.device))
