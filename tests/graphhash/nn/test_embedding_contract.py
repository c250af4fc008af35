"""The behaviours of ``nn.Embedding``, each beside a :class:`BucketEmbedding`; docs/guides/embedding.md prints the list.

A verdict is one of three: "same", "more" (allowed here and refused there) or "differs" (and how, in the page).
"""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call

import graphhash
from graphhash.errors import ArgumentError
from graphhash.nn.embedding import BucketEmbedding

PAGE = Path(__file__).resolve().parents[3] / "docs" / "guides" / "embedding.md"
N_IDS, DIM = 12, 8
IDS = torch.tensor([[0, 5, 11], [5, 3, 3]])
MAPS = {
    "one row per id": graphhash.modulo_map(N_IDS, 7),
    "two rows per id": graphhash.double_map(N_IDS, 7, seed=0),
}


class Pair(NamedTuple):
    """A layer, and ``nn.Embedding`` of the table that it stands for."""

    layer: BucketEmbedding
    full: nn.Embedding

    @property
    def both(self) -> tuple[nn.Module, nn.Module]:
        return self.layer, self.full


def pair(bucket_map, **options) -> Pair:
    layer = BucketEmbedding(bucket_map, DIM, generator=torch.Generator().manual_seed(0), **options)
    full = nn.Embedding(N_IDS, DIM, padding_idx=layer.padding_idx)
    full.weight.data.copy_(layer.weight.detach())
    return Pair(layer, full)


CASES: list[tuple[str, str, Callable]] = []


def behaviour(verdict: str, name: str):
    def add(function):
        CASES.append((name, verdict, function))
        return function

    return add


def test_the_page_lists_every_behaviour_with_its_verdict():
    listed = re.findall(r"^\| \d+ \| (.+?) \| (same|more|differs)", PAGE.read_text(), re.MULTILINE)
    assert listed == [(name, verdict) for name, verdict, _ in CASES]


def table_gradient(p: Pair, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient of the full table, as the chain rule makes it one of the small table."""
    return torch.autograd.grad(p.layer.weight, p.layer.table, gradient)[0]


def equal_in_both(p: Pair, call: Callable) -> None:
    torch.testing.assert_close(*(call(module) for module in p.both))


def refused_by_both(p: Pair, call: Callable, of_layer, of_full) -> None:
    for module, errors in zip(p.both, (of_layer, of_full), strict=True):
        with pytest.raises(errors):
            call(module)


# Calls.


@behaviour("same", "vectors of a batch of ids")
def vectors(p):
    equal_in_both(p, lambda m: m(IDS))


for _shape in ((), (1,), (4,), (2, 3), (2, 1, 3, 2), (0,), (2, 0)):

    @behaviour("same", f"ids of shape `{_shape}`")
    def shapes(p, shape=_shape):
        ids = torch.randint(0, N_IDS, shape)
        assert p.layer(ids).shape == (*shape, DIM)
        equal_in_both(p, lambda m: m(ids))

    shapes.__name__ = f"shape_{_shape}"


@behaviour("same", "the keyword `input`")
def keyword(p):
    equal_in_both(p, lambda m: m(input=IDS))


@behaviour("same", "ids in int32")
def int32(p):
    equal_in_both(p, lambda m: m(IDS.int()))


@behaviour("more", "ids in int8, int16 and uint8")
def small_integers(p):
    for dtype in (torch.int8, torch.int16, torch.uint8):
        assert torch.equal(p.layer(IDS.to(dtype)), p.layer(IDS))


@behaviour("same", "ids that are not contiguous")
def transposed(p):
    equal_in_both(p, lambda m: m(IDS.t()))
    equal_in_both(p, lambda m: m(IDS[:, ::2]))


@behaviour("same", "repeated ids")
def repeated(p):
    equal_in_both(p, lambda m: m(torch.full((50,), 3)))


@behaviour("differs", "ids in a float type are refused")
def floats(p):
    refused_by_both(p, lambda m: m(IDS.float()), TypeError, RuntimeError)
    with pytest.raises(TypeError, match=r"got a tensor of torch.float32; pass ids.long\(\)"):
        p.layer(IDS.float())


@behaviour("differs", "boolean ids are refused")
def booleans(p):
    refused_by_both(p, lambda m: m(IDS > 3), TypeError, RuntimeError)


@behaviour("same", "lists and arrays are refused")
def lists(p):
    for ids in ([0, 1], np.array([0, 1])):
        refused_by_both(p, lambda m, ids=ids: m(ids), TypeError, TypeError)
    with pytest.raises(TypeError, match=r"got list; pass torch.tensor\(ids\)"):
        p.layer([0, 1])


@behaviour("same", "an id below 0 is refused")
def negative(p):
    refused_by_both(p, lambda m: m(torch.tensor([-1])), IndexError, IndexError)


@behaviour("differs", "an id of `num_embeddings` is refused")
def too_large(p):
    refused_by_both(p, lambda m: m(torch.tensor([N_IDS + 1])), IndexError, IndexError)
    # The OOV id.
    assert torch.equal(p.layer(torch.tensor([N_IDS])), torch.zeros(1, DIM))


@behaviour("same", "evaluation mode changes nothing")
def evaluation_mode(p):
    equal_in_both(p, lambda m: m.eval()(IDS))


@behaviour("same", "forward hooks see the ids and the vectors")
def hooks(p):
    for module in p.both:
        seen = []
        module.register_forward_hook(lambda _, ids, out, seen=seen: seen.append((ids[0], out)))
        out = module(IDS)
        assert seen[0][0] is IDS
        assert seen[0][1] is out


# The table.


@behaviour("same", "`weight` has shape (num_embeddings, embedding_dim)")
def weight_shape(p):
    for m in p.both:
        assert m.weight.shape == (m.num_embeddings, m.embedding_dim) == (N_IDS, DIM)


@behaviour("same", "`weight[ids]` are the vectors")
def weight_rows(p):
    equal_in_both(p, lambda m: m.weight[IDS])
    torch.testing.assert_close(p.layer.weight[IDS], p.layer(IDS))


@behaviour("same", "gradients flow through `weight`")
def weight_gradient(p):
    target = torch.randn(N_IDS, DIM)
    for m in p.both:
        (m.weight * target).sum().backward()
    torch.testing.assert_close(p.layer.table.grad, table_gradient(p, p.full.weight.grad))


@behaviour("same", "scores of all ids: `vectors @ layer.weight.T`")
def scores_of_all(p):
    equal_in_both(p, lambda m: m(IDS) @ m.weight.T)


@behaviour("differs", "`weight` is a parameter")
def weight_is_computed(p):
    assert isinstance(p.full.weight, nn.Parameter)
    assert not isinstance(p.layer.weight, nn.Parameter)
    assert [name for name, _ in p.layer.named_parameters()] == ["table"]


@behaviour("differs", "`weight` can be set")
def weight_cannot_be_set(p):
    for value in (torch.zeros(N_IDS, DIM), nn.Parameter(torch.zeros(N_IDS, DIM))):
        with pytest.raises(AttributeError, match="cannot be set; use from_pretrained or load_state_dict"):
            p.layer.weight = value
    assert "weight" not in p.layer.state_dict()


@behaviour("differs", "writing into `weight` in place")
def weight_in_place(p):
    before = p.layer.weight.detach().clone()
    with torch.no_grad():
        p.layer.weight.zero_()
        p.full.weight.zero_()
    assert torch.equal(p.layer.weight, before)


@behaviour("same", "`reset_parameters` draws the table again")
def reset(p):
    for m in p.both:
        before = m.weight.detach().clone()
        m.reset_parameters()
        assert not torch.equal(m.weight, before)
    assert p.layer(torch.tensor([N_IDS])).eq(0).all()


@behaviour("same", "`requires_grad_(False)` freezes the layer")
def frozen(p):
    for m in p.both:
        assert not m.requires_grad_(False)(IDS).requires_grad


@behaviour("same", "the global generator's seed decides the initial values")
def seeded(p):
    for make in (lambda: BucketEmbedding(MAPS["one row per id"], DIM), lambda: nn.Embedding(N_IDS, DIM)):
        tables = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            tables.append(make().weight)
        assert torch.equal(tables[0], tables[1])
        assert not torch.equal(tables[0], tables[2])


@behaviour("same", "`from_pretrained` keeps vectors that the table can hold")
def from_pretrained(p):
    bucket_map = next(m for m in MAPS.values() if np.array_equal(m.rows, p.layer.rows))
    made = BucketEmbedding.from_pretrained(p.layer.weight.detach(), bucket_map)
    torch.testing.assert_close(made.weight, p.full.weight, rtol=1e-5, atol=1e-6)
    exact = BucketEmbedding.from_pretrained(p.full.weight, graphhash.full_map(N_IDS))
    assert torch.equal(exact.weight, p.full.weight)
    with pytest.raises(ArgumentError, match=r"have shape \(3, 8\), the map needs \(12, dim\)"):
        BucketEmbedding.from_pretrained(torch.zeros(3, DIM), bucket_map)


@behaviour("same", "`from_pretrained` freezes, unless told not to")
def from_pretrained_freezes(p):
    vectors, identity = p.full.weight.detach(), graphhash.full_map(N_IDS)
    for freeze in (True, False):
        made = BucketEmbedding.from_pretrained(vectors, identity, freeze=freeze)
        assert made.table.requires_grad == nn.Embedding.from_pretrained(vectors, freeze=freeze).weight.requires_grad


@behaviour("differs", "`from_pretrained` takes the vectors alone")
def from_pretrained_needs_a_map(p):
    with pytest.raises(TypeError, match="bucket_map"):
        BucketEmbedding.from_pretrained(p.full.weight)


@behaviour("differs", "`max_norm`, `norm_type` and `scale_grad_by_freq`")
def no_norms(p):
    for name in ("max_norm", "norm_type", "scale_grad_by_freq"):
        with pytest.raises(TypeError, match=name):
            BucketEmbedding(MAPS["one row per id"], DIM, **{name: 1})


# Padding.


@behaviour("same", "the vector of `padding_idx` is zero")
def padding(p):
    q = pair(graphhash.double_map(N_IDS, 7, seed=0), padding_idx=3)
    assert q.layer(torch.tensor([3])).eq(0).all()
    equal_in_both(q, lambda m: m(IDS))
    assert q.layer.padding_idx == q.full.padding_idx == 3


@behaviour("same", "`padding_idx` has no gradient")
def padding_gradient(p):
    q = pair(graphhash.modulo_map(N_IDS, 7), padding_idx=3)
    for m in q.both:
        m(torch.tensor([3])).sum().backward()
    assert q.layer.table.grad.eq(0).all()
    assert q.full.weight.grad.eq(0).all()


@behaviour("same", "a negative `padding_idx` counts from the end")
def negative_padding(p):
    q = pair(graphhash.modulo_map(N_IDS, 7), padding_idx=-1)
    assert q.layer.padding_idx == nn.Embedding(N_IDS, DIM, padding_idx=-1).padding_idx == N_IDS - 1


@behaviour("differs", "a `padding_idx` out of range is refused")
def padding_out_of_range(p):
    with pytest.raises(ArgumentError, match=r"padding_idx is 12, ids are 0..11"):
        pair(graphhash.modulo_map(N_IDS, 7), padding_idx=N_IDS)
    with pytest.raises(AssertionError):
        nn.Embedding(N_IDS, DIM, padding_idx=N_IDS)


@behaviour("differs", "the vector of `padding_idx` can be set")
def padding_stays_zero(p):
    q = pair(graphhash.modulo_map(N_IDS, 7), padding_idx=3)
    q.layer.load_state_dict(p.layer.state_dict() if p.layer.rows.shape == (N_IDS + 1, 1) else q.layer.state_dict())
    assert q.layer(torch.tensor([3])).eq(0).all()


# Gradients.


@behaviour("same", "gradients of repeated ids add up")
def gradients(p):
    target = torch.randn(*IDS.shape, DIM)
    for m in p.both:
        (m(IDS) * target).sum().backward()
    torch.testing.assert_close(p.layer.table.grad, table_gradient(p, p.full.weight.grad))


@behaviour("same", "a row that no id of the batch reads has a zero gradient")
def untouched_rows(p):
    p.layer(torch.tensor([0])).sum().backward()
    read = p.layer.rows[0].long()
    others = [row for row in range(len(p.layer.table)) if row not in read.tolist()]
    assert p.layer.table.grad[others].eq(0).all()


@behaviour("same", "`sparse` gives the table a sparse gradient")
def sparse(p):
    full = nn.Embedding(N_IDS, DIM, sparse=True)
    p.layer.sparse = True
    for m in (p.layer, full):
        m(IDS).sum().backward()
    assert p.layer.table.grad.is_sparse
    assert full.weight.grad.is_sparse
    dense = copy.deepcopy(p.layer)
    dense.sparse, dense.table.grad = False, None
    dense(IDS).sum().backward()
    torch.testing.assert_close(p.layer.table.grad.to_dense(), dense.table.grad)


@behaviour("same", "gradients accumulate over backward passes")
def accumulate(p):
    for m in p.both:
        m(IDS).sum().backward()
        m(IDS).sum().backward()
    torch.testing.assert_close(p.layer.table.grad, table_gradient(p, p.full.weight.grad))


@behaviour("same", "`backward` twice with `retain_graph`")
def retained(p):
    for m in p.both:
        loss = m(IDS).sum()
        loss.backward(retain_graph=True)
        loss.backward()
    torch.testing.assert_close(p.layer.table.grad, table_gradient(p, p.full.weight.grad))


@behaviour("same", "`torch.no_grad` and `torch.inference_mode`")
def without_gradients(p):
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            equal_in_both(p, lambda m: m(IDS))
            assert not p.layer(IDS).requires_grad


@behaviour("same", "double backward")
def double_backward(p):
    def second(m):
        first = torch.autograd.grad(m(IDS).tanh().sum(), list(m.parameters()), create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), list(m.parameters()))[0]

    assert second(p.full).shape == p.full.weight.shape
    # In double precision PyTorch's own operations read the table.
    torch.testing.assert_close(second(p.layer).double(), second(copy.deepcopy(p.layer).double()), rtol=1e-4, atol=1e-5)


@behaviour("same", "gradients of gradients pass `gradgradcheck`")
def gradgrad(p):
    layer = copy.deepcopy(p.layer).double()
    table = layer.table.detach().clone().requires_grad_()
    call = lambda values: functional_call(layer, {"table": values}, (IDS,)).tanh()  # noqa: E731
    assert torch.autograd.gradgradcheck(call, (table,))


@behaviour("same", "any optimizer trains it")
def optimizers(p):
    for make in (torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad, torch.optim.AdamW):
        for m in copy.deepcopy(p).both:
            optimizer = make(m.parameters(), lr=0.1)
            losses = []
            for _ in range(5):
                optimizer.zero_grad()
                losses.append(m(IDS).sub(1).square().sum())
                losses[-1].backward()
                optimizer.step()
            assert losses[-1] < losses[0]


@behaviour("same", "SparseAdam trains it where `sparse` is set")
def sparse_adam(p):
    p.layer.sparse = True
    optimizer = torch.optim.SparseAdam(p.layer.parameters(), lr=0.1)
    before = p.layer(IDS).detach()
    p.layer(IDS).sum().backward()
    optimizer.step()
    assert (p.layer(IDS) < before).all()


@behaviour("differs", "every row that is read is trained")
def oov_is_not_trained(p):
    oov = torch.tensor([N_IDS])
    p.layer(oov).sum().backward()
    assert p.layer.table.grad.eq(0).all()
    for layer in (p.layer, copy.deepcopy(p.layer).double()):
        layer.table.grad, layer.sparse = None, True
        layer(torch.cat([oov, torch.tensor([0])])).sum().backward()
        assert layer.table.grad.to_dense()[layer.oov_row].eq(0).all()
        assert layer.table.grad.to_dense().abs().sum() > 0
    p.layer.sparse, p.layer.trains_oov, p.layer.table.grad = False, True, None
    p.layer(oov).sum().backward()
    assert p.layer.table.grad[p.layer.oov_row].eq(1).all()


# Devices, types, copies, files.


@behaviour("same", "`dtype=` at construction")
def dtype_keyword(p):
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        q = pair(MAPS["two rows per id"], dtype=dtype)
        assert q.layer(IDS).dtype == nn.Embedding(N_IDS, DIM, dtype=dtype)(IDS).dtype == dtype


@behaviour("same", "`device=` at construction")
def device_keyword(p):
    layer = BucketEmbedding(MAPS["two rows per id"], DIM, device="meta")
    assert {t.device.type for t in (layer.table, layer.rows, layer.row_weights)} == {"meta"}
    assert layer(IDS.to("meta")).shape == (*IDS.shape, DIM)


@behaviour("same", "`to_empty` and loading a state make a layer of `device='meta'` whole")
def to_empty(p):
    layer = BucketEmbedding(MAPS["two rows per id"], DIM, device="meta").to_empty(device="cpu")
    other = pair(MAPS["two rows per id"]).layer
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(IDS), other(IDS))


@behaviour("same", "`.double()`, `.half()` and `.to(dtype)`")
def converted(p):
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        a, b = (copy.deepcopy(m).to(dtype)(IDS) for m in p.both)
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@behaviour("same", "the default dtype")
def default_dtype(p):
    torch.set_default_dtype(torch.float64)
    try:
        assert BucketEmbedding(MAPS["two rows per id"], DIM)(IDS).dtype == nn.Embedding(N_IDS, DIM)(IDS).dtype
    finally:
        torch.set_default_dtype(torch.float32)


@behaviour("same", "autocast leaves the vectors in float32")
def autocast(p):
    with torch.autocast("cpu", torch.bfloat16):
        equal_in_both(p, lambda m: m(IDS))
        assert p.layer(IDS).dtype == p.full(IDS).dtype == torch.float32


@behaviour("same", "`copy.deepcopy` and `pickle`")
def copies(p):
    for m in p.both:
        for copied in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
            assert torch.equal(copied(IDS), m(IDS))
            next(copied.parameters()).data.zero_()
            assert m(IDS).abs().sum() > 0


@behaviour("same", "a state is saved and loaded, strictly")
def state(p):
    for m in p.both:
        file = io.BytesIO()
        torch.save(m.state_dict(), file)
        other = copy.deepcopy(m)
        next(other.parameters()).data.zero_()
        other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        assert torch.equal(other(IDS), m(IDS))


@behaviour("same", "`load_state_dict(assign=True)`")
def assigned(p):
    for m in p.both:
        other = copy.deepcopy(m)
        other.load_state_dict({name: value.clone() for name, value in m.state_dict().items()}, assign=True)
        assert torch.equal(other(IDS), m(IDS))


@behaviour("differs", "the names in a state")
def state_names(p):
    assert list(p.full.state_dict()) == ["weight"]
    weights = ["codebook", "codes"] if p.layer.indices_per_id > 1 else []
    assert sorted(p.layer.state_dict()) == [*weights, "held_rows", "table"]


@behaviour("same", "`share_memory`, for worker processes")
def shared_memory(p):
    for m in p.both:
        m.share_memory()
        assert all(parameter.is_shared() for parameter in m.parameters())
    equal_in_both(p, lambda m: m(IDS))


# What looks into a module, or records it.


@behaviour("same", "`torch.func.functional_call` with another table")
def called_with_another_table(p):
    table = torch.randn_like(p.layer.table)
    expected = copy.deepcopy(p.layer)
    expected.table.data.copy_(table)
    torch.testing.assert_close(functional_call(p.layer, {"table": table}, (IDS,)), expected(IDS))


@behaviour("same", "`torch.func.grad`")
def func_grad(p):
    loss = lambda table: functional_call(p.layer, {"table": table}, (IDS,)).square().sum()  # noqa: E731
    p.layer(IDS).square().sum().backward()
    torch.testing.assert_close(torch.func.grad(loss)(p.layer.table.detach()), p.layer.table.grad)


@behaviour("same", "`torch.func.vmap` over ids, and over tables")
def vmap(p):
    torch.testing.assert_close(torch.func.vmap(p.layer)(IDS), p.layer(IDS))
    tables = torch.stack([p.layer.table.detach(), 2 * p.layer.table.detach()])
    got = torch.func.vmap(lambda table: functional_call(p.layer, {"table": table}, (IDS,)))(tables)
    torch.testing.assert_close(got[1], 2 * got[0])


@behaviour("same", "`torch.func.jacrev`, `jvp` and `hessian`")
def func_derivatives(p):
    layer, table = copy.deepcopy(p.layer), p.layer.table.detach()
    call = lambda values: functional_call(layer, {"table": values}, (IDS[0, :1],))  # noqa: E731
    assert torch.func.jacrev(call)(table).shape == (1, DIM, *table.shape)
    torch.testing.assert_close(torch.func.jvp(call, (table,), (table,))[1], call(table))
    hessian = torch.func.hessian(lambda values: call(values).square().sum())(table)
    assert hessian.shape == (*table.shape, *table.shape)


@behaviour("same", "forward-mode derivatives")
def forward_mode(p):
    table = p.layer.table.detach()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(table, torch.ones_like(table))
        out = functional_call(p.layer, {"table": dual}, (IDS,))
        assert forward_ad.unpack_dual(out).tangent is not None


@behaviour("same", "`torch.export`, with a batch of any size")
def exported(p):
    for m in p.both:
        program = torch.export.export(m, (IDS,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        other = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
        torch.testing.assert_close(program.module()(other), m(other))


@behaviour("same", "`torch.compile(fullgraph=True)`, forward and backward")
def compiled(p):
    for m in p.both:
        call = torch.compile(m, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(call(IDS), m(IDS))
        call(IDS).sum().backward()
    torch.testing.assert_close(p.layer.table.grad, table_gradient(p, p.full.weight.grad))


@behaviour("same", "`torch.onnx.export`")
def onnx_export(p):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = io.BytesIO()
    torch.onnx.export(p.layer, (IDS,), file, dynamo=True, input_names=["ids"], verbose=False)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: IDS.numpy()})[0]
    np.testing.assert_allclose(got, p.layer(IDS).detach().numpy(), rtol=1e-5, atol=1e-6)


@behaviour("same", "`torch.jit.trace`")
def traced(p):
    for m in p.both:
        call = torch.jit.trace(m, (IDS,))
        other = torch.tensor([[1, 2], [3, 4], [5, 6]])
        torch.testing.assert_close(call(other), m(other))


@behaviour("differs", "`torch.jit.script`")
def scripted(p):
    torch.jit.script(p.full)
    with pytest.raises(Exception):  # noqa: B017, PT011  # TorchScript's errors have no common class.
        torch.jit.script(p.layer)


@behaviour("same", "`torch.fx.symbolic_trace`, as a leaf")
def fx(p):
    for m in p.both:

        class Leaves(torch.fx.Tracer):
            def is_leaf_module(self, module, name):
                return True

        holder = nn.Sequential(m)
        graph = torch.fx.GraphModule(holder, Leaves().trace(holder))
        torch.testing.assert_close(graph(IDS), m(IDS))


@behaviour("same", "fake tensors")
def fake_tensors(p):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for m in p.both:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert m(mode.from_tensor(IDS)).shape == (*IDS.shape, DIM)


@behaviour("differs", "`isinstance(layer, nn.Embedding)`")
def instance(p):
    assert isinstance(p.layer, nn.Module)
    assert not isinstance(p.layer, nn.Embedding)


@behaviour("same", "`repr` names the sizes")
def representation(p):
    assert f"dim={DIM}" in repr(p.layer)
    assert str(DIM) in repr(p.full)


@pytest.mark.parametrize("bucket_map", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("check", [c for _, _, c in CASES], ids=[c.__name__ for _, _, c in CASES])
def test_a_behaviour_of_embedding(check, bucket_map):
    torch.manual_seed(0)
    check(pair(bucket_map))


# What is no behaviour of nn.Embedding.


def full_codebook_map() -> graphhash.BucketMap:
    """300 ids, and as many distinct rows of weights as a codebook has room for."""
    rng = np.random.default_rng(0)
    rows, codebook = rng.integers(0, 6, (301, 2)).astype(np.int32), rng.random((256, 2)).astype(np.float32)
    rows[-1], codebook[-1], codes = 6, (1, 0), np.arange(301).clip(0, 255).astype(np.uint8)
    return graphhash.BucketMap(rows, 7, "soft", codebook=codebook, codes=codes)


EARLIER = {
    "identity": graphhash.full_map(N_IDS),
    **MAPS,
    "a full codebook": full_codebook_map(),
    "a large table": graphhash.double_map(N_IDS, 2**16 + 1, seed=0),
}


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("name", ["weights", "row_weights"])
@pytest.mark.parametrize("bucket_map", EARLIER.values(), ids=EARLIER)
def test_a_state_that_an_earlier_version_saved_is_loaded(bucket_map, name, padding_idx):
    layer = pair(bucket_map, padding_idx=padding_idx).layer if bucket_map.n_ids == N_IDS else None
    layer = layer or BucketEmbedding(bucket_map, DIM, padding_idx=padding_idx)
    state = {"item.table": layer.table.detach(), "item.rows": layer.rows, f"item.{name}": layer.row_weights}
    model, before = nn.ModuleDict({"item": copy.deepcopy(layer)}), dict(state)
    model["item"].table.data.zero_()
    for buffer in model["item"].buffers():
        buffer.zero_()
    result = model.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    every = torch.arange(bucket_map.n_ids + 1)
    assert torch.equal(model["item"](every), layer(every))
    assert torch.equal(model["item"].row_weights, layer.row_weights)
    assert state == before


def test_a_state_of_another_map_is_refused():
    layer = BucketEmbedding(graphhash.full_map(N_IDS), DIM)
    wide = {"table": layer.table.detach(), "row_weights": layer.row_weights}
    with pytest.raises(RuntimeError, match="this layer's ids read the rows of their own numbers"):
        layer.load_state_dict(wide | {"rows": layer.rows.flip(0)})
    layer = BucketEmbedding(MAPS["two rows per id"], DIM)
    wide = {"table": layer.table.detach(), "rows": layer.rows, "row_weights": layer.row_weights}
    with pytest.raises(RuntimeError, match=r"its rows span 0\.\.99"):
        layer.load_state_dict(wide | {"rows": layer.rows.clone().fill_(99).index_fill(0, torch.tensor([0]), 0)})
    with pytest.raises(RuntimeError, match="size mismatch for held_rows"):
        layer.load_state_dict(wide | {"rows": layer.rows[:5]})
    many = BucketEmbedding(graphhash.double_map(300, 7, seed=0), DIM)
    wide = {"table": many.table.detach(), "rows": many.rows, "row_weights": torch.rand(301, 2)}
    with pytest.raises(RuntimeError, match="301 distinct rows of weights, of at most 256"):
        many.load_state_dict(wide)


def test_rows_and_weights_are_computed_and_cannot_be_set():
    layer = pair(MAPS["two rows per id"]).layer
    before = layer(IDS)
    layer.row_weights.zero_()
    layer.rows.zero_()
    assert torch.equal(layer(IDS), before)
    for name in ("rows", "row_weights"):
        with pytest.raises(AttributeError):
            setattr(layer, name, torch.zeros(1))


def test_padding_holds_where_a_codebook_is_full():
    plain, padded = (BucketEmbedding(full_codebook_map(), DIM, padding_idx=p) for p in (None, 3))
    padded.load_state_dict(plain.state_dict())
    ids = torch.arange(301)
    assert padded.row_weights[3].eq(0).all()
    assert padded(ids)[3].eq(0).all()
    assert torch.equal(padded(ids[ids != 3]), plain(ids[ids != 3]))


def test_an_id_of_a_small_type_is_not_taken_for_a_padding_id_beyond_the_type():
    layer = BucketEmbedding(full_codebook_map(), DIM, padding_idx=260)
    assert layer(torch.tensor([4], dtype=torch.uint8)).ne(0).any()


def test_padding_holds_in_every_fold():
    plain = graphhash.double_map(N_IDS, 7, seed=0)
    layer = BucketEmbedding(plain, DIM, padding_idx=3)
    rows = np.concatenate([plain.rows[:-1], plain.rows])
    codes = np.concatenate([plain.codes[:-1], plain.codes])
    layer.use_folds(graphhash.BucketMap(rows, plain.n_buckets, "double", codebook=plain.codebook, codes=codes))
    for fold in (0, 1):
        assert layer(torch.tensor([3]), torch.tensor([fold])).eq(0).all()
        assert layer(torch.tensor([4]), torch.tensor([fold])).abs().sum() > 0
        assert torch.equal(layer(torch.tensor([N_IDS]), torch.tensor([fold])), layer(torch.tensor([N_IDS])))
