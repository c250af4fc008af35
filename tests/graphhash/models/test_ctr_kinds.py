"""CTR models with columns that are compressed in another way than by a bucket map alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import graphhash
from graphhash.maps.bucket_map import full_map
from graphhash.maps.embedding_spec import EmbeddingSpec
from graphhash.models.ctr import HEADS, CtrSpec, FeatureBatch
from graphhash.models.ctr_bytes import column_bytes, layer_bytes, store_rounded, stored_bytes
from tests.helpers import graphs

GRAPH = graphs.planted(0, 3, 12, 0.4, 0.05)[0]
N_USERS, N_ITEMS = GRAPH.shape
# User, a small column, item, another small one, and a multi-valued one.
FULL = [full_map(n) for n in (N_USERS, 2, N_ITEMS, 7, 5)]
DIM = 8
SIZES = {
    "product": {"codes_per_id": 4, "users_codewords": 8, "rotated": 0},
    "cce": {"n_chunks": 2, "user_rows": 5, "n_clusterings": 1},
    "cafe": {"user_hot_rows": 5, "user_shared_rows": 4, "steps": 4},
    "robe": {"rows": 6, "block": 4},
    "dhe": {"n_hashes": 6, "width": 6, "n_layers": 2},
    "residual": {"own_dim": DIM, "own_bits": 8, "projected": 0},
}


def spec_of(kind: str, model: str = "deepfm", **changes) -> CtrSpec:
    specs = tuple((column, EmbeddingSpec(kind, SIZES[kind], seed=column)) for column in (0, 2))
    return CtrSpec(model, dim=DIM, hidden=(6,), embeddings=specs, **changes)


def maps_of(kind: str):
    if kind != "residual":
        return FULL
    users, items = graphhash.soft_maps(GRAPH, graphhash.cluster(GRAPH, resolution=1.0), indices_per_id=3)
    return [users, FULL[1], items, *FULL[3:]]


def built(kind: str, model: str = "deepfm", **changes):
    made = spec_of(kind, model, **changes).build(maps_of(kind), 1, 1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.4, generator=generator)
        for name, buffer in made.learned_buffers().items():
            if name.endswith("codes"):
                buffer.random_(0, 8, generator=generator)
    return made.eval()


def batch_of(n: int, seed: int = 0) -> FeatureBatch:
    rng = np.random.default_rng(seed)
    categorical = np.stack([rng.integers(0, m.n_ids + 1, n) for m in FULL[:4]], 1)
    bag = torch.from_numpy(rng.integers(-1, 6, (n, 3)))
    return FeatureBatch(
        torch.from_numpy(categorical), torch.from_numpy(rng.normal(size=(n, 1)).astype(np.float32)), (bag,)
    )


@pytest.mark.parametrize("model", list(HEADS))
@pytest.mark.parametrize("kind", list(SIZES))
def test_a_model_answers_like_one_with_full_tables_that_hold_the_same_vectors(kind, model):
    compressed = built(kind, model, id_bias=kind in ("cce", "cafe"))
    full = replace(compressed.spec, embeddings=(), id_bias=False).build(FULL, 1, 1).eval()
    weights = {name: value for name, value in compressed.state_dict().items() if name.startswith(("head", "wide"))}
    full.load_state_dict(weights, strict=False)
    with torch.no_grad():
        for column, (ours, theirs) in enumerate(zip(compressed.embeddings, full.embeddings, strict=True)):
            entries = torch.arange(FULL[column].n_ids + 1)
            theirs.table.copy_(ours(entries) if column in (0, 2) else ours.table)
    batch = batch_of(50)
    wanted = full(batch)
    if compressed.bias is not None:
        biased = batch.categorical.index_select(1, compressed.bias_columns)
        wanted = wanted + compressed.bias(biased, ()).sum((1, 2))
    torch.testing.assert_close(compressed(batch), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", list(SIZES))
def test_bytes_are_those_of_every_parameter_and_code(kind):
    model, maps = built(kind, id_bias=True), maps_of(kind)
    columns = stored_bytes(model, maps, ["float32"] * 5)
    # Codebooks are always in float16.
    halved = (
        sum(2 * e.codebooks.numel() for e in (model.embeddings[0], model.embeddings[2])) if kind == "product" else 0
    )
    in_maps = sum(column.map for column in columns)
    # The calibration is two numbers.
    expected = 4 * sum(p.numel() for p in model.parameters()) + 8
    assert sum(c.total for c in columns) - in_maps + halved + layer_bytes(model) == expected
    assert in_maps == sum(model.embeddings[c].map_bytes for c in (0, 2))
    assert columns[1] == column_bytes(model.spec, FULL, ["float32"] * 5, 1)[1]
    small = stored_bytes(model, maps, ["int8", "float32", "int8", "float32", "float32"])
    assert sum(c.table for c in small) <= sum(c.table for c in columns)


def test_all_columns_of_robe_read_one_array_in_other_places():
    model = built("robe")
    users, items = model.embeddings[0], model.embeddings[2]
    assert users.array is items.array
    n = min(N_USERS, N_ITEMS)
    assert not torch.equal(users.starts[:n], items.starts[:n])
    first, second = (stored_bytes(model, FULL, ["int8"] * 5)[c].table for c in (0, 2))
    assert (first, second) == (6 * (DIM + 2), 0)


def test_rounding_touches_a_shared_array_once():
    model = built("robe")
    store_rounded(model, ["int8"] * 5)
    once = model.embeddings[0].array.detach().clone()
    assert len(once.unique()) > 1
    store_rounded(model, ["float32"] * 5)
    assert torch.equal(model.embeddings[0].array, once)


def test_folds_change_the_mixture_and_leave_own_rows():
    labels = graphhash.cluster(GRAPH, resolution=1.0)
    folds = [GRAPH.copy(), GRAPH.copy()]
    folds[1].data = np.where(np.arange(GRAPH.nnz) % 3 == 0, 0, 1).astype(np.float32)
    folds[1].eliminate_zeros()
    folded = graphhash.soft_maps(GRAPH, labels, indices_per_id=3, folds=folds)
    model = built("residual")
    model.use_folds({0: folded[0], 2: folded[1]})
    batch = batch_of(40)
    of_first = replace(batch, fold=torch.zeros(40, dtype=torch.int64))
    of_second = replace(batch, fold=torch.ones(40, dtype=torch.int64))
    torch.testing.assert_close(model(of_first), model(batch))
    assert not torch.allclose(model(of_second), model(batch))
    assert model.wide.folded == set()


def test_clusterings_of_cce_are_made_by_the_model():
    pytest.importorskip("faiss")
    model = built("cce")
    before = model.embeddings[0].clusters.clone()
    for epoch in range(1, 9):
        model.before_epoch(epoch, 8)
    assert int(model.embeddings[0].clustered[0]) == 1
    assert not torch.equal(model.embeddings[0].clusters, before)
    assert any(name.endswith("clusters") for name in model.learned_buffers())
