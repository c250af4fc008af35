"""Embeddings that are no bucket map, each against a naive second implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphhash.errors import ArgumentError
from graphhash.maps.bucket_map import full_map
from graphhash.maps.embedding_spec import EmbeddingSpec
from graphhash.maps.quantization import row_bytes
from graphhash.nn.kinds import make_embeddings

N_USERS, N_ITEMS, DIM = 40, 30, 8
SPECS = {
    "cce": EmbeddingSpec("cce", {"n_chunks": 4, "user_rows": 5, "item_rows": 3, "n_clusterings": 2}, seed=1),
    "cafe": EmbeddingSpec(
        "cafe",
        {"user_hot_rows": 5, "user_shared_rows": 4, "item_hot_rows": 3, "item_shared_rows": 2, "steps": 4},
        seed=1,
    ),
    "robe": EmbeddingSpec("robe", {"rows": 6, "block": 4}, seed=1),
    "dhe": EmbeddingSpec("dhe", {"n_hashes": 7, "width": 6, "n_layers": 2}, seed=1),
    "product": EmbeddingSpec(
        "product", {"codes_per_id": 4, "users_codewords": 32, "items_codewords": 16, "rotated": 1}
    ),
    "additive": EmbeddingSpec("additive", {"codes_per_id": 4, "n_groups": 2, "codeword_bits": 8}),
}


def make(kind, seed=3):
    return make_embeddings(full_map(N_USERS), full_map(N_ITEMS), DIM, SPECS[kind], std=0.1, seed=seed)


def naive_robe(embedding, user):
    numbers = embedding.array.detach().numpy().ravel()
    vector = []
    for start, sign in zip(embedding.starts[user].tolist(), embedding.signs[user].tolist(), strict=True):
        vector += [sign * numbers[(start + j) % len(numbers)] for j in range(embedding.block)]
    return vector


def naive_cce(embedding, user):
    tables = embedding.table.detach().numpy().reshape(2, embedding.n_chunks, embedding.n_rows, -1)
    vector = []
    for chunk in range(embedding.n_chunks):
        hashed = int(embedding.rows[user * embedding.n_chunks + chunk, 1]) % embedding.n_rows
        vector += (tables[0, chunk, embedding.clusters[user, chunk]] + tables[1, chunk, hashed]).tolist()
    return vector


def naive_cafe(embedding, user):
    hot, table = embedding.hot.tolist(), embedding.table.detach().numpy()
    if user in hot:
        return table[hot.index(user)]
    rng = np.random.default_rng(embedding.seed)
    a, b = rng.integers(1, 2**31 - 1), rng.integers(0, 2**31 - 1)
    return table[len(hot) + (a * user + b) % (2**31 - 1) % embedding.n_shared]


def naive_dhe(embedding, user):
    hashes = [
        (user * a + b) % (2**31 - 1) % 1_000_000
        for a, b in zip(embedding.factors.tolist(), embedding.offsets.tolist(), strict=True)
    ]
    values = np.array([2 * h / 999_999 - 1 for h in hashes])
    *hidden, last = [layer for layer in embedding.network if isinstance(layer, torch.nn.Linear)]
    norms = [layer for layer in embedding.network if isinstance(layer, torch.nn.BatchNorm1d)]
    for layer, norm in zip(hidden, norms, strict=True):
        values = layer.weight.detach().numpy() @ values
        values = (values - norm.running_mean.numpy()) / np.sqrt(norm.running_var.numpy() + norm.eps)
        values = values * norm.weight.detach().numpy() + norm.bias.detach().numpy()
        values = values * np.tanh(np.log1p(np.exp(values)))
    return last.weight.detach().numpy() @ values + last.bias.detach().numpy()


def naive_additive(embedding, user):
    books = embedding.codebooks.detach().numpy().reshape(4, 256, 4)
    words = [books[number][code] for number, code in enumerate(embedding.codes[user].tolist())]
    return np.concatenate([words[0] + words[1], words[2] + words[3]]) @ embedding.rotation.detach().numpy()


def naive_product(embedding, user):
    books = embedding.codebooks.detach().numpy().reshape(embedding.n_codes, embedding.n_codewords, -1)
    decoded = np.concatenate([books[chunk][code] for chunk, code in enumerate(embedding.codes[user].tolist())])
    return decoded @ embedding.rotation.detach().numpy()


NAIVE = {
    "robe": naive_robe, "cce": naive_cce, "cafe": naive_cafe, "dhe": naive_dhe, "product": naive_product, "additive": naive_additive,
}  # fmt: skip


@pytest.mark.parametrize("kind", SPECS)
def test_vectors_are_those_of_the_naive_implementation(kind):
    for embedding in make(kind):
        if kind in ("product", "additive"):
            rng = np.random.default_rng(0)
            with torch.no_grad():
                embedding.codes.copy_(torch.from_numpy(rng.integers(0, 16, embedding.codes.shape).astype(np.uint8)))
                embedding.codebooks.normal_()
                if embedding.rotation is not None:
                    embedding.rotation.normal_()
        embedding.eval()
        ids = torch.tensor([[0, 5], [29, 7]])
        with torch.no_grad():
            found = embedding(ids)
        assert found.shape == (2, 2, DIM)
        for one, vector in zip(ids.ravel().tolist(), found.reshape(-1, DIM), strict=True):
            np.testing.assert_allclose(vector, NAIVE[kind](embedding, one), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(embedding.all()[:2], embedding(torch.tensor([0, 1])))


@pytest.mark.parametrize("kind", SPECS)
def test_the_oov_id_gets_the_mean_vector_and_state_comes_back(kind):
    for embedding, again in zip(make(kind), make(kind, seed=4), strict=True):
        embedding.eval()
        frequencies = torch.arange(1, embedding.n_ids + 1).float()
        embedding.fill_oov(frequencies)
        mean = (frequencies / frequencies.sum()) @ embedding.all()
        oov = embedding(torch.tensor([embedding.n_ids]))[0]
        torch.testing.assert_close(oov, mean, rtol=1e-4, atol=1e-6)
        again.eval().load_state_dict(embedding.state_dict())
        assert torch.equal(again(torch.tensor([0, embedding.n_ids])), embedding(torch.tensor([0, embedding.n_ids])))


def test_users_and_items_of_robe_read_one_array():
    users, items = make("robe")
    assert users.array is items.array
    assert not torch.equal(users.starts[:10], items.starts[:10])


def test_robe_reads_its_array_once_for_users_and_items():
    users, items = make("robe")
    ids = torch.tensor([0, 29, users.n_ids]), torch.tensor([[5, 5], [items.n_ids, 1]])
    together = users.read_with(ids[0], items, ids[1])
    one_by_one = users(ids[0]), items(ids[1])
    weights = [torch.randn(vectors.shape) for vectors in together]

    def gradient(vectors):
        loss = sum((v * w).sum() for v, w in zip(vectors, weights, strict=True))
        return torch.autograd.grad(loss, users.array)[0]

    for ours, theirs in zip(together, one_by_one, strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(gradient(together), gradient(one_by_one))
    assert n_gradients(together, users.array) == 1
    assert n_gradients(one_by_one, users.array) == 2


def n_gradients(vectors, parameter) -> int:
    """How many gradients of the parameter's size a backward pass of the vectors adds up."""
    seen, waiting, found = set(), [v.grad_fn for v in vectors], 0
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += sum(getattr(after, "variable", None) is parameter for after, _ in node.next_functions)
        waiting += [after for after, _ in node.next_functions]
    return found


@pytest.mark.parametrize("kind", ["cce", "cafe", "robe", "dhe"])
def test_gradients_reach_every_parameter(kind):
    users, _ = make(kind)
    users.all().square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in users.parameters())


def test_bytes_count_what_is_stored():
    users, _ = make("cce")
    # Eight tables of five rows of two numbers, four assignments of 16 bits an id, and the OOV vector.
    assert users.stored_bytes("int8") == 40 * row_bytes(2, "int8") + 2 * 4 * N_USERS + 4 * DIM
    users, _ = make("cafe")
    assert users.stored_bytes("int8") == (5 + 4) * row_bytes(DIM, "int8") + 4 * 5 + 4 * DIM
    users, _ = make("robe")
    assert users.stored_bytes("float32") == 4 * 6 * DIM + 4 * DIM
    users, _ = make("dhe")
    weights, rest = 6 * 7 + 6 * 6 + 8 * 6, 2 * 6 * 2 + DIM
    assert users.stored_bytes("float16") == 2 * weights + 4 * rest + 2 * 6 * 8 + 4 * DIM
    users, _ = make("product")
    assert users.stored_bytes("int4") == 4 * (N_USERS + 1) + 2 * (4 * 32 * 2) + 2 * DIM * DIM


def test_clustering_keeps_vectors_where_there_are_rows_for_all():
    pytest.importorskip("faiss")
    spec = EmbeddingSpec("cce", {"n_chunks": 2, "user_rows": 64, "item_rows": 4, "n_clusterings": 2}, seed=1)
    users, items = make_embeddings(full_map(N_USERS), full_map(N_ITEMS), DIM, spec, std=0.1, seed=0)
    before, hashed = users.all(), users.rows[:, 1].clone()
    users.cluster()
    torch.testing.assert_close(users.all(), before)
    assert not torch.equal(users.rows[:, 1], hashed)

    def spread(vectors, clusters):
        return sum(float((vectors[clusters == c] - vectors[clusters == c].mean(0)).square().sum()) for c in range(4))

    chunks = items.all().detach().reshape(N_ITEMS, 2, -1)
    at_random = spread(chunks[:, 0], items.clusters[:, 0])
    items.cluster()
    assert spread(chunks[:, 0], items.clusters[:, 0]) < 0.5 * at_random


def test_clusterings_come_in_the_first_half_and_not_again_after_a_resumption():
    pytest.importorskip("faiss")
    users, _ = make("cce")
    found = []
    for epoch in range(1, 21):
        before = int(users.clustered[0])
        users.before_epoch(epoch, 20)
        users.before_epoch(epoch, 20)
        found += [epoch] * (int(users.clustered[0]) - before)
    assert found == [6, 11]


def test_sizes_and_kinds_that_do_not_fit_are_refused():
    maps = full_map(4), full_map(4)
    for spec, message in [
        (EmbeddingSpec("dhee"), "did you mean 'dhe'"),
        (EmbeddingSpec("robe", {"rows": 3}), "needs the size 'block'"),
        (EmbeddingSpec("robe", {"rows": 3, "block": 3}), "does not divide the dim"),
        (EmbeddingSpec("cce", {"n_chunks": 3, "user_rows": 1, "item_rows": 1, "n_clusterings": 1}), "do not divide"),
        (EmbeddingSpec("cafe", {"user_hot_rows": 5, "user_shared_rows": 1, "steps": 1}), "1 to 4 exclusive rows"),
        (EmbeddingSpec("dhe", {"n_hashes": 0, "width": 1, "n_layers": 1}), "must be at least 1"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            make_embeddings(*maps, DIM, spec, std=0.1, seed=0)
    with pytest.raises(IndexError, match=r"0\.\.40"):
        make("robe")[0](torch.tensor([41]))
