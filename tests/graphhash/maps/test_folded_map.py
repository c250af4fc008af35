"""Folded maps: an index of the ids that a fold reads, and maps that hold the entries of these alone."""

import functools

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

import graphhash
from graphhash.maps.bucket_map import BucketMap
from graphhash.maps.folded_map import FoldedMap, FoldIndex
from graphhash.nn.embedding import BucketEmbedding

N_USERS, N_ITEMS, N_FOLDS = 200, 150, 5


@pytest.fixture(scope="module")
def graphs():
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, N_USERS, 2000), rng.integers(0, N_ITEMS, 2000)
    fold = rng.integers(0, N_FOLDS, 2000)
    sizes = {"n_users": N_USERS, "n_items": N_ITEMS}
    return [graphhash.biadjacency(users[fold != f], items[fold != f], **sizes) for f in range(-1, N_FOLDS)]


def random_masks(n_ids, seed=0):
    rng = np.random.default_rng(seed)
    return np.packbits(rng.random((N_FOLDS, n_ids)) < 0.3, axis=0, bitorder="little")[0]


def test_entries_are_numbered_by_id_and_fold():
    masks = random_masks(200)
    index = FoldIndex(masks, N_FOLDS)
    there = [(i, f) for i in range(200) for f in range(N_FOLDS) if masks[i] >> f & 1]
    ids, folds = (np.array(column) for column in zip(*there, strict=True))
    assert index.n_entries == len(there)
    assert_array_equal(index.entries(ids, folds), np.arange(len(there)))
    assert_array_equal(index.ids(), ids)
    for fold in range(N_FOLDS):
        own, entries = index.of_fold(fold)
        assert_array_equal(own, ids[folds == fold])
        assert_array_equal(entries, np.flatnonzero(folds == fold))


@pytest.mark.parametrize(("masks", "n_folds"), [([1], 0), ([1], 9), ([4], 2)])
def test_an_index_of_no_such_folds_is_refused(masks, n_folds):
    with pytest.raises(ValueError, match="fold"):
        FoldIndex(np.array(masks, np.uint8), n_folds)


@pytest.mark.parametrize("share", [None, 0.0, 0.25])
def test_entries_are_those_of_the_map_of_all_ids_in_all_folds(graphs, monkeypatch, share):
    monkeypatch.setattr("graphhash.maps.codebook.SAMPLE", 300)
    graph, *folds = graphs
    labels = graphhash.cluster(graph, resolution=2.0)
    make = functools.partial(graphhash.soft_maps, indices_per_id=4)
    if share is not None:
        make = functools.partial(graphhash.double_soft_maps, indices_per_id=4, share=share, seed=3)
    indices = tuple(FoldIndex.of(random_masks(n, seed), N_FOLDS) for seed, n in enumerate((N_USERS, N_ITEMS)))
    whole = make(graph, labels, folds=folds)
    parts = make(graph, labels, folds=folds, fold_indices=indices)
    for dense, part, index in zip(whole, parts, indices, strict=True):
        assert 0 < part.n_ids < dense.n_ids
        assert_array_equal(part.codebook, dense.codebook)
        for fold in range(N_FOLDS):
            ids, entries = index.of_fold(fold)
            assert_array_equal(part.rows[entries], dense.rows[fold * index.n_ids + ids])
            assert_array_equal(part.codes[entries], dense.codes[fold * index.n_ids + ids])
        assert_array_equal(part.rows[-1], dense.rows[-1])


def test_a_layer_reads_the_entries(graphs):
    graph, *folds = graphs
    labels = graphhash.cluster(graph, resolution=2.0)
    index = tuple(FoldIndex.of(random_masks(n), N_FOLDS) for n in (N_USERS, N_ITEMS))
    dense = graphhash.soft_maps(graph, labels, indices_per_id=4, folds=folds)[0]
    part = graphhash.soft_maps(graph, labels, indices_per_id=4, folds=folds, fold_indices=index)[0]
    layers = [BucketEmbedding(graphhash.soft_maps(graph, labels, indices_per_id=4)[0], 8) for _ in range(2)]
    layers[1].table = layers[0].table
    layers[0].use_folds(dense)
    layers[1].use_folds(FoldedMap.of(part, index[0]))
    ids, fold = torch.arange(N_USERS + 1).unsqueeze(1), torch.arange(N_FOLDS).unsqueeze(0)
    there = torch.from_numpy(index[0].masks).long().unsqueeze(1) >> fold & 1 > 0
    places = torch.cat([there, torch.ones(1, N_FOLDS, dtype=torch.bool)])
    ids, fold = ids.expand_as(places)[places], fold.expand_as(places)[places]
    expected, found = (layer(ids, fold) for layer in layers)
    assert torch.equal(found, expected)
    (expected * found.detach()).sum().backward()
    gradient, layers[0].table.grad = layers[0].table.grad, None
    (found * found.detach()).sum().backward()
    assert torch.equal(layers[0].table.grad, gradient)
    for layer in layers:  # By PyTorch's operations.
        layer.double()
    torch.testing.assert_close(layers[1](ids, fold).float(), found)
    assert layers[1].n_folds == N_FOLDS


def test_an_id_without_an_entry_in_a_fold_is_refused():
    index = FoldIndex(np.array([3, 1], np.uint8), 2)
    folded = FoldedMap.of(graphhash.modulo_map(3, 2), index)
    layer = BucketEmbedding(graphhash.modulo_map(2, 2), 4)
    layer.use_folds(folded)
    with pytest.raises(IndexError, match="id 1 has no entry in fold 1"):
        layer(torch.tensor([0, 1]), torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="is none of folds of 3 ids"):
        BucketEmbedding(graphhash.modulo_map(3, 2), 4).use_folds(folded)
    with pytest.raises(ValueError, match="the map has 4 entries, the index 3"):
        FoldedMap.of(graphhash.modulo_map(4, 2), index)


@pytest.mark.parametrize("n_buckets", [2**16, 2**16 + 1])
def test_rows_beyond_those_of_a_signed_integer_are_read(n_buckets):
    rows = np.array([[40_000], [50_000], [n_buckets - 1]], np.int32)
    plain = BucketMap(rows, n_buckets, "plain")
    folded = FoldedMap.of(plain)
    assert folded.rows.dtype == (np.uint16 if n_buckets == 2**16 else np.int32)
    layer = BucketEmbedding(plain, 2)
    layer.use_folds(folded)
    ids = torch.arange(3)
    assert torch.equal(layer(ids, torch.zeros(3, dtype=torch.int64)), layer(ids))
