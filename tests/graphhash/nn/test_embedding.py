"""BucketEmbedding and matrix factorisation against plain dense algebra."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import graphhash
from graphhash.maps.bucket_map import BucketMap
from graphhash.maps.hashes import double_map
from graphhash.models.losses import bpr_loss, pairwise_logistic_loss
from graphhash.models.mf import MatrixFactorization, dot_differences, dot_pairs
from graphhash.nn.embedding import BucketEmbedding, read_both
from tests.graphhash.maps.test_bucket_map import every_map

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]
MAPS = every_map()


def dense_map(bucket_map) -> torch.Tensor:
    """The map as a matrix, (n_ids + 1, n_buckets)."""
    matrix = np.zeros((bucket_map.n_ids + 1, bucket_map.n_buckets))
    for id_ in range(bucket_map.n_ids + 1):
        for j in range(bucket_map.indices_per_id):
            matrix[id_, bucket_map.rows[id_, j]] += bucket_map.weights[id_, j]
    return torch.from_numpy(matrix).float()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bucket_map", MAPS, ids=lambda m: m.method)
def test_vectors_and_gradients_equal_those_of_the_dense_product(bucket_map, device):
    torch.manual_seed(0)
    layer = BucketEmbedding(bucket_map, 20).to(device)
    ids = torch.randint(0, bucket_map.n_ids + 1, (7, 3), device=device)
    target = torch.randn(7, 3, 20, device=device)
    (layer(ids) * target).sum().backward()
    table = layer.table.detach().clone().requires_grad_()
    expected = (dense_map(bucket_map).to(device) @ table)[ids]
    (expected * target).sum().backward()
    table.grad[bucket_map.rows[-1]] = 0  # The OOV row is not trained.
    torch.testing.assert_close(layer(ids), expected)
    torch.testing.assert_close(layer.table.grad, table.grad)


@pytest.mark.parametrize("device", DEVICES)
def test_a_fold_is_read_through_its_map(device):
    plain, other = double_map(30, 10, seed=0), double_map(30, 10, seed=1)
    rows = np.concatenate([plain.rows[:-1], other.rows])
    folded = BucketMap(
        rows,
        plain.n_buckets,
        "double",
        codebook=plain.codebook,
        codes=np.concatenate([plain.codes[:-1], other.codes]),
    )
    layer, second = BucketEmbedding(plain, 8).to(device), BucketEmbedding(other, 8).to(device)
    second.table = layer.table
    ids = torch.randint(0, 31, (9, 4), device=device)
    before = layer(ids, torch.ones(9, 1, dtype=torch.int64, device=device))
    assert layer.n_folds == 0
    assert torch.equal(before, layer(ids))
    layer.use_folds(folded)
    fold = torch.randint(0, 2, (9, 1), device=device)
    expected = torch.where(fold.unsqueeze(2) == 0, layer(ids), second(ids))
    assert layer.n_folds == 2
    torch.testing.assert_close(layer(ids, fold), expected)
    torch.testing.assert_close(layer(ids), before)
    assert not any("fold" in name for name in layer.state_dict())
    with pytest.raises(ValueError, match=r"a map of 31 ids, .* is none of folds of 30 ids"):
        layer.use_folds(double_map(31, 10, seed=0))


@pytest.mark.parametrize("bucket_map", MAPS, ids=lambda m: m.method)
def test_the_cpu_kernels_agree_with_torch_operations(bucket_map):
    layer = BucketEmbedding(bucket_map, 8)
    double = copy.deepcopy(layer).double()  # Not float32: takes torch's own path.
    ids = torch.arange(bucket_map.n_ids + 1)
    torch.testing.assert_close(layer(ids), double(ids).float())


def mixed_map(n_buckets: int, indices_per_id: int, n_ids: int = 40) -> BucketMap:
    """Random rows, and weights of a codebook as large as there is."""
    rng = np.random.default_rng(indices_per_id)
    rows = rng.integers(0, n_buckets - 1, (n_ids + 1, indices_per_id)).astype(np.int32)
    codebook = rng.random((256, indices_per_id), np.float32)
    codes = rng.integers(0, 255, n_ids + 1).astype(np.uint8)
    rows[-1], codes[-1], codebook[-1] = n_buckets - 1, 255, np.eye(1, indices_per_id)
    return BucketMap(rows, n_buckets, "soft", codebook=codebook, codes=codes)


def terms(weights: np.ndarray, weighted: bool) -> list[slice]:
    """The indices whose weighted rows the kernels add up before they add them to a vector."""
    n_fours = len(weights) // 4 if weighted else 0
    return [slice(4 * i, 4 * i + 4) for i in range(n_fours)] + [
        slice(j, j + 1) for j in range(4 * n_fours, len(weights)) if weights[j] != 0
    ]


@pytest.mark.parametrize(
    "bucket_map",
    [
        graphhash.full_map(40),
        graphhash.modulo_map(40, 7),
        *(mixed_map(30, k) for k in (1, 3, 4, 6, 25)),
        mixed_map(2**16, 6),
        mixed_map(2**16 + 1, 6),
    ],
    ids=lambda m: f"{m.method}-{m.indices_per_id}-{m.n_buckets}",
)
def test_reads_through_the_held_map_are_those_of_wide_arrays_bit_for_bit(bucket_map):
    """The same sums in the same order, in float32, over the rows and weights that the map means."""
    torch.manual_seed(0)
    layer = BucketEmbedding(bucket_map, 5)
    ids, gradients = torch.randint(0, 40, (100,)), torch.randn(100, 5)
    vectors = layer(ids)
    vectors.backward(gradients)
    rows, weights, table = bucket_map.rows, bucket_map.weights, layer.table.detach().numpy()
    expected, expected_gradient = np.zeros((100, 5), np.float32), np.zeros_like(table)
    for place, id_ in enumerate(ids.tolist()):
        scaled = weights[id_][:, None] * table[rows[id_]]
        for part in terms(weights[id_], bucket_map.codebook is not None):
            few = scaled[part]
            expected[place] += (few[0] + few[1]) + (few[2] + few[3]) if len(few) == 4 else few[0]
            for row, weight in zip(rows[id_][part], weights[id_][part], strict=True):
                expected_gradient[row] += weight * gradients[place].numpy()
    assert np.array_equal(vectors.detach().numpy(), expected)
    assert np.array_equal(layer.table.grad.numpy(), expected_gradient)
    # PyTorch's own operations, in double precision.
    double = copy.deepcopy(layer).double()
    wide = torch.from_numpy(weights[ids].astype(np.float64)).unsqueeze(2)
    read = double.table[torch.from_numpy(rows[ids]).long()]
    assert torch.equal(double(ids), (read * wide).sum(1))


@pytest.mark.parametrize("bucket_map", [*MAPS, mixed_map(2**16 + 1, 6)], ids=lambda m: m.method)
def test_a_map_is_held_in_the_bytes_in_which_it_is_stored(bucket_map):
    layer = BucketEmbedding(bucket_map, 8)
    rest = 0 if bucket_map.codebook is None else (256 - len(bucket_map.codebook)) * bucket_map.indices_per_id * 4
    assert sum(buffer.nbytes for buffer in layer.buffers()) == bucket_map.nbytes + rest
    assert layer.rows.dtype == torch.int32
    assert layer.row_weights.dtype == torch.float32
    assert np.array_equal(layer.rows.numpy(), bucket_map.rows)
    assert np.array_equal(layer.row_weights.numpy(), bucket_map.weights)
    assert copy.deepcopy(layer).half().row_weights.dtype == torch.float16


@pytest.mark.parametrize("bucket_map", MAPS[-2:], ids=["users", "items"])
def test_gradient_of_the_table_passes_gradcheck(bucket_map):
    layer = BucketEmbedding(bucket_map, 3).double()
    layer.trains_oov = True
    ids = torch.tensor([0, 1, 1, bucket_map.n_ids])
    table = layer.table.detach().clone().requires_grad_()

    def read(values):
        return torch.func.functional_call(layer, {"table": values}, (ids,))

    assert torch.autograd.gradcheck(read, (table,))


def test_it_stands_in_for_an_embedding_layer():
    class Model(nn.Module):
        def __init__(self, embedding):
            super().__init__()
            self.embedding = embedding
            self.out = nn.Linear(16, 1)

        def forward(self, ids):
            return self.out(self.embedding(ids)).squeeze(-1)

    ids, target = torch.arange(30) % 10, torch.linspace(-1, 1, 30)
    for embedding in (nn.Embedding(10, 16), BucketEmbedding(graphhash.modulo_map(10, 5), 16)):
        model = Model(embedding)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(ids), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
    state = model.state_dict()
    assert {"embedding.table", "embedding.held_rows"} <= state.keys()


def test_ids_of_one_bucket_share_a_vector_and_its_training():
    layer = BucketEmbedding(graphhash.modulo_map(10, 5), 4)
    torch.testing.assert_close(layer(torch.tensor([1])), layer(torch.tensor([5])))
    layer(torch.tensor([1])).sum().backward()
    assert layer.table.grad[1].eq(1).all()
    assert layer.table.grad[[0, 2, 3, 4]].eq(0).all()


def test_unknown_ids_get_the_weighted_mean_vector():
    layer = BucketEmbedding(graphhash.modulo_map(4, 3), 2)
    frequencies = torch.tensor([1.0, 2.0, 3.0, 4.0])
    expected = (frequencies[:, None] * layer(torch.arange(4))).sum(0) / 10
    assert layer(torch.tensor([4])).eq(0).all()
    layer.fill_oov(frequencies)
    torch.testing.assert_close(layer(torch.tensor([4]))[0], expected)


def test_an_id_outside_the_map_is_refused():
    layer = BucketEmbedding(graphhash.modulo_map(4, 3), 2)
    with pytest.raises(IndexError, match=r"ids span -1..0, the bucket map has entries 0..4"):
        layer(torch.tensor([0, -1]))
    with pytest.raises(IndexError, match=r"ids span 5..5"):
        layer(torch.tensor([5]))
    assert layer(torch.empty(0, dtype=torch.int64)).shape == (0, 2)


@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_do_not_depend_on_threads(threads, monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        layer = BucketEmbedding(MAPS[-1], 64)
        layer(torch.randint(0, MAPS[-1].n_ids, (5000,))).square().sum().backward()
    finally:
        torch.set_num_threads(before)
    reference = torch.zeros_like(layer.table)
    torch.manual_seed(0)
    again = BucketEmbedding(MAPS[-1], 64)
    again(torch.randint(0, MAPS[-1].n_ids, (5000,))).square().sum().backward()
    assert torch.equal(again.table.grad, layer.table.grad)
    assert not torch.equal(layer.table.grad, reference)


@pytest.mark.parametrize("item_bias", [False, True])
@pytest.mark.parametrize("method", ["full", "soft"])
def test_scores_of_pairs_catalogue_and_dense_algebra_agree(method, item_bias):
    users, items = (MAPS[0], MAPS[0]) if method == "full" else MAPS[-2:]
    model = MatrixFactorization(users, items, 16, item_bias=item_bias, seed=0)
    if item_bias:
        nn.init.normal_(model.item_bias)
    p = dense_map(users)[:-1] @ model.user_embedding.table
    q = dense_map(items)[:-1] @ model.item_embedding.table
    expected = p @ q.T + (model.item_bias if item_bias else 0)
    torch.testing.assert_close(model.score_all_items()(torch.arange(users.n_ids)), expected)
    u, i = torch.randint(0, users.n_ids, (50,)), torch.randint(0, items.n_ids, (50,))
    torch.testing.assert_close(model(u, i), expected[u, i])
    torch.testing.assert_close(model.all_pairs()(u, i), expected[u, i])


@pytest.mark.parametrize("method", ["full", "soft"])
def test_gradients_of_all_pairs_equal_those_of_pairs(method):
    users, items = (MAPS[0], MAPS[0]) if method == "full" else MAPS[-2:]
    model = MatrixFactorization(users, items, 16, item_bias=True, seed=0)
    u, p, n = (torch.randint(0, limit, (200,)) for limit in (users.n_ids, items.n_ids, items.n_ids))
    gradients = []
    for score in (model, model.all_pairs()):
        model.zero_grad()
        bpr_loss(score(u, p), score(u, n)).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_dot_pairs_equal_einsum_with_gradients():
    left, right = torch.randn(5, 33, requires_grad=True), torch.randn(6, 33, requires_grad=True)
    a, b = torch.randint(0, 5, (40,)), torch.randint(0, 6, (40,))
    weight = torch.randn(40)
    expected = torch.einsum("ed,ed->e", left[a], right[b])
    torch.testing.assert_close(dot_pairs(left, right, a, b), expected)
    expected_gradients = torch.autograd.grad(expected @ weight, (left, right))
    gradients = torch.autograd.grad(dot_pairs(left, right, a, b) @ weight, (left, right))
    for x, y in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("n", [40, 40_000])
def test_the_margin_kernel_equals_the_loss_of_two_products_with_gradients(n):
    left, right = (torch.randn(m, 33, requires_grad=True) for m in (5, 6))
    a, b, c = (torch.randint(0, m, (n,)) for m in (5, 6, 6))
    products = [torch.einsum("ed,ed->e", left.double()[a], right.double()[x]) for x in (b, c)]
    expected = bpr_loss(*products)
    loss = pairwise_logistic_loss(dot_differences(left, right, a, b, c))
    torch.testing.assert_close(loss, expected.float())
    expected_gradients = torch.autograd.grad(expected, (left, right))
    for x, y in zip(torch.autograd.grad(loss, (left, right)), expected_gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    # In double precision torch's own operations are taken, as on a GPU.
    other = dot_differences(left.double(), right.double(), a, b, c)
    torch.testing.assert_close(other.float(), dot_differences(left, right, a, b, c))


@pytest.mark.parametrize("whole", [False, True])
def test_no_gradient_depends_on_threads(whole):
    gradients = []
    before = torch.get_num_threads()
    users, items = MAPS[-2:]
    generator = torch.Generator().manual_seed(0)
    u, p, n = (torch.randint(0, m, (50_000,), generator=generator) for m in (users.n_ids, items.n_ids, items.n_ids))
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            model = MatrixFactorization(users, items, 64, item_bias=True, seed=0)
            model.score_differences(u, p, n, read_all=whole).square().sum().backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_bpr_has_its_closed_form_and_no_overflow():
    assert bpr_loss(torch.tensor([0.0]), torch.tensor([0.0])).item() == pytest.approx(math.log(2))
    assert bpr_loss(torch.tensor([2.0]), torch.tensor([0.5])).item() == pytest.approx(math.log1p(math.exp(-1.5)))
    assert bpr_loss(torch.tensor([-1e4]), torch.tensor([1e4])).item() == pytest.approx(2e4)


def test_the_seed_decides_the_initial_weights():
    a, b, c = (MatrixFactorization(MAPS[1], MAPS[1], 8, item_bias=False, seed=s) for s in (0, 0, 1))
    assert torch.equal(a.user_embedding.table, b.user_embedding.table)
    assert not torch.equal(a.user_embedding.table, c.user_embedding.table)
    assert a.user_embedding.table[-1].eq(0).all()


@pytest.mark.parametrize("indices_per_id", [1, 3, 4, 6])
def test_two_lookups_of_one_table_at_once_are_the_two_lookups(indices_per_id):
    rng = np.random.default_rng(0)
    graph = graphhash.biadjacency(rng.integers(0, 20, 120), rng.integers(0, 15, 120))
    users, items = graphhash.soft_maps(graph, graphhash.cluster(graph, resolution=2.0), indices_per_id=indices_per_id)
    left, other = BucketEmbedding(users, 40), BucketEmbedding(items, 40)
    right = BucketEmbedding(items, 40, table=left.table)
    ids = torch.tensor([3, 3, 20, 0, 7]), torch.tensor([14, 15, 2])
    target = torch.randn(5, 40), torch.randn(3, 40)
    for first, second in (left, right), (left, other):
        first.table.grad = second.table.grad = None
        expected = first(ids[0]), second(ids[1])
        ((expected[0] * target[0]).sum() + (expected[1] * target[1]).sum()).backward()
        gradients = first.table.grad.clone(), second.table.grad.clone()
        first.table.grad = second.table.grad = None
        got = read_both(first, ids[0], second, ids[1])
        ((got[0] * target[0]).sum() + (got[1] * target[1]).sum()).backward()
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        torch.testing.assert_close((first.table.grad, second.table.grad), gradients)
    with pytest.raises(IndexError, match=r"ids span 2..16, the bucket map has entries 0..15"):
        read_both(left, ids[0], right, torch.tensor([2, 16]))
