"""BucketEmbeddingBag beside ``nn.EmbeddingBag`` of the table that it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphhash
from graphhash.errors import ArgumentError
from graphhash.nn.embedding_bag import BucketEmbeddingBag

N_IDS, DIM = 12, 8
MAPS = [graphhash.modulo_map(N_IDS, 7), graphhash.double_map(N_IDS, 7, seed=0)]


def pair(bucket_map, **options) -> tuple[BucketEmbeddingBag, nn.EmbeddingBag]:
    bag = BucketEmbeddingBag(bucket_map, DIM, **options)
    full = nn.EmbeddingBag(N_IDS, DIM, **options)
    full.weight.data.copy_(bag.weight.detach())
    return bag, full


@pytest.mark.parametrize("bucket_map", MAPS, ids=lambda m: m.method)
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("form", ["rows", "offsets", "last offset"])
def test_bags_and_their_gradients_are_those_of_the_full_table(form, mode, padding_idx, bucket_map):
    bag, full = pair(bucket_map, mode=mode, padding_idx=padding_idx, include_last_offset=form == "last offset")
    ids = torch.tensor([[3, 5, 3], [1, 3, 11]])
    # The third bag is empty.
    offsets = {"offsets": [0, 2, 6, 6], "last offset": [0, 2, 6, 6]}.get(form)
    call = (ids,) if offsets is None else (ids.reshape(-1), torch.tensor(offsets))
    got, expected = bag(*call), full(*call)
    torch.testing.assert_close(got, expected)
    target = torch.randn(*got.shape)
    (got * target).sum().backward()
    (expected * target).sum().backward()
    chained = torch.autograd.grad(bag.weight, bag.embedding.table, full.weight.grad)[0]
    torch.testing.assert_close(bag.embedding.table.grad, chained)


@pytest.mark.parametrize("offsets", [None, [0, 2]])
def test_weights_of_ids_have_gradients_too(offsets):
    bag, full = pair(MAPS[1], mode="sum")
    ids = torch.tensor([[1, 2], [3, 4]]) if offsets is None else torch.tensor([1, 2, 3, 4])
    starts = None if offsets is None else torch.tensor(offsets)
    weights = [torch.linspace(0.5, 2, 4).reshape(ids.shape).requires_grad_() for _ in (bag, full)]
    results = [m(ids, starts, w) for m, w in zip((bag, full), weights, strict=True)]
    torch.testing.assert_close(*results)
    for result in results:
        result.square().sum().backward()
    torch.testing.assert_close(weights[0].grad, weights[1].grad)


def test_it_is_exported_and_compiled_as_one_graph():
    bag, _ = pair(MAPS[1], mode="mean")
    ids, offsets = torch.tensor([1, 2, 3, 4]), torch.tensor([0, 3])
    torch.testing.assert_close(torch.export.export(bag, (ids, offsets)).module()(ids, offsets), bag(ids, offsets))
    compiled = torch.compile(bag, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, offsets), bag(ids, offsets))


def test_what_does_not_fit_together_is_refused():
    bag, _ = pair(MAPS[0], mode="mean")
    ids = torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match=r"offsets are for ids of shape \(n,\)"):
        bag(ids, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"ids of shape \(n,\) need offsets"):
        bag(ids[0])
    with pytest.raises(ValueError, match="per_sample_weights need mode 'sum', this is 'mean'"):
        bag(ids, per_sample_weights=torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"have shape \(2,\), ids \(1, 2\)"):
        pair(MAPS[0], mode="sum")[0](ids, per_sample_weights=torch.ones(2))
    with pytest.raises(TypeError, match="ids must be integers"):
        bag(ids.float())
    with pytest.raises(ArgumentError, match="mode is 'max'; use 'mean' or 'sum'"):
        BucketEmbeddingBag(MAPS[0], DIM, mode="max")
