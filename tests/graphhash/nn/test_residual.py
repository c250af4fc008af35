"""ResidualEmbedding against a naive second implementation: vectors, gradients, bytes, and what waits for its turn in Adam."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphhash.errors import ArgumentError
from graphhash.maps.bucket_map import BucketMap
from graphhash.maps.embedding_spec import EmbeddingSpec
from graphhash.maps.quantization import rounded
from graphhash.models.mf import MatrixFactorization
from graphhash.nn.kinds import make_embeddings
from pipeline.retrieval.objective import LossSettings, seldom_read
from pipeline.retrieval.stored import count_bytes, store_rounded
from tests.helpers.small_models import soft_map

N_USERS, N_ITEMS, DIM, OWN, ROWS = 40, 30, 8, 4, 9
SPEC = EmbeddingSpec("residual", {"own_dim": OWN, "own_bits": 4})


def shared_maps() -> tuple[BucketMap, BucketMap]:
    rng, maps = np.random.default_rng(0), []
    for n, oov in ((N_USERS, ROWS), (N_ITEMS, ROWS + 1)):
        soft = soft_map(n, ROWS, 3, rng)
        rows = soft.rows.copy()
        rows[-1] = oov
        maps.append(BucketMap(rows, ROWS + 2, "residual", codebook=soft.codebook, codes=soft.codes, shared=True))
    return maps[0], maps[1]


def made():
    return make_embeddings(*shared_maps(), DIM, SPEC, std=0.1, seed=3)


def model_of(**settings) -> MatrixFactorization:
    model = MatrixFactorization(*shared_maps(), DIM, item_bias=False, seed=3, embedding=SPEC, **settings)
    with torch.no_grad():
        for side in (model.user_embedding, model.item_embedding):
            side.own.table[:-1].normal_(generator=torch.Generator().manual_seed(1))
    return model


def naive(embedding, id_: int, bucket_map: BucketMap) -> torch.Tensor:
    """The same of dense tensors, one id at a time."""
    table, own = embedding.mixture.table, embedding.own.table
    weights = bucket_map.weights[id_].tolist()
    vector = sum(w * table[row] for w, row in zip(weights, bucket_map.rows[id_].tolist(), strict=True))
    return vector + sum(own[id_, k] * embedding.projection[k] for k in range(own.shape[1]))


def test_vectors_and_gradients_are_those_of_the_naive_implementation():
    both, maps = made(), shared_maps()
    for part in (part for embedding in both for part in embedding.bucket_parts()):
        part.trains_oov = True
    ids = [torch.tensor([3, 0, 3, N_USERS]), torch.tensor([7, N_ITEMS, 1])]
    factors = [torch.randn(len(i), DIM, generator=torch.Generator().manual_seed(2)) for i in ids]
    parameters = [both[0].mixture.table, both[0].projection, both[0].own.table, both[1].own.table]

    def gradients(vectors):
        total = sum((v * f).sum() for v, f in zip(vectors, factors, strict=True))
        return torch.autograd.grad(total, parameters)

    expected = [torch.stack([naive(e, i, m) for i in of.tolist()]) for e, m, of in zip(both, maps, ids, strict=True)]
    wanted = gradients(expected)
    for vectors in (both[0].read_with(ids[0], both[1], ids[1]), [e(i) for e, i in zip(both, ids, strict=True)]):
        for found, vector in zip(vectors, expected, strict=True):
            torch.testing.assert_close(found, vector)
        for found, gradient in zip(gradients(vectors), wanted, strict=True):
            torch.testing.assert_close(found, gradient)


def test_both_sides_share_table_and_projection_and_an_id_begins_as_its_mixture():
    users, items = made()
    assert users.mixture.table is items.mixture.table
    assert users.projection is items.projection
    residual = users.all() - users.mixture.all()
    assert 0 < residual.std() < 0.2 * users.mixture.all().std()


def test_oov_ids_read_the_mean_vector_and_nothing_of_their_own():
    users, items = made()
    frequencies = torch.arange(1.0, N_ITEMS + 1)
    before = users.all().detach().clone()
    items.fill_oov(frequencies)
    mean = (frequencies / frequencies.sum()) @ items.all()
    torch.testing.assert_close(items(torch.tensor(N_ITEMS)), mean)
    assert not items.own.table[-1].any()
    assert torch.equal(users.all(), before)


def test_bytes_are_those_of_the_parts_and_shared_ones_count_once():
    model = model_of()
    maps = sum(m.nbytes for m in shared_maps())
    rows, ids = ROWS + 2, N_USERS + N_ITEMS + 2
    # A float16 scale per row of int4; the projection in float16.
    tables = rows * (DIM // 2 + 2) + ids * (OWN // 2 + 2) + OWN * DIM * 2
    assert count_bytes(model, "int4") == {"tables": tables, "maps": maps, "bias": 0}
    tables = 4 * (rows * DIM + ids * OWN + OWN * DIM)
    assert count_bytes(model, "float32") == {"tables": tables, "maps": maps, "bias": 0}


def test_what_is_stored_is_rounded_each_in_its_precision():
    model = model_of()
    before = {name: weight.detach().clone().numpy() for name, weight in model.named_parameters()}
    store_rounded(model, "int8")
    kept = {"mixture.table": "int8", "own.table": "int4", "projection": "float16"}
    for name, weight in model.named_parameters():
        precision = kept[name.split(".", 1)[1]]
        np.testing.assert_array_equal(weight.detach().numpy(), rounded(before[name], precision))


@pytest.mark.parametrize("sizes", [{"own_dim": 0, "own_bits": 8}, {"own_dim": 4, "own_bits": 2}, {"own_dim": 4}])
def test_sizes_that_cannot_be_are_refused(sizes):
    with pytest.raises(ArgumentError, match="own_"):
        make_embeddings(*shared_maps(), DIM, EmbeddingSpec("residual", sizes), std=0.1, seed=0)


def test_numbers_that_few_ids_of_a_batch_read_wait_for_their_turn():
    model = model_of(cosine=True)
    found = seldom_read(model, LossSettings("softmax", negatives=1), batch_size=2)
    assert found == [model.user_embedding.own, model.item_embedding.own]
