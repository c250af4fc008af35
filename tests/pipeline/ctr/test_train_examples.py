"""What a CTR training takes batches of: rows in memory for a small log, rows on disk for a large one."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

import graphhash
import pipeline.ctr.train as module
from pipeline.config.run_config import DataConfig
from pipeline.ctr.data import Features
from pipeline.ctr.folds import cross_fitted_maps, draw_folds, fold_graphs
from pipeline.ctr.ingest import ingest_ctr
from pipeline.ctr.maps import MapOptions, find_pairs, pair_graph
from pipeline.ctr.synthetic import synth_ctr
from pipeline.ctr.synthetic_model import LogSettings
from pipeline.ctr.train import training_examples
from pipeline.ctr.weights import load_folds, save_folds
from pipeline.task import REFIT_PARTS
from pipeline.training.examples import StreamedExamples


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    synth_ctr(folder / "log", LogSettings(3000, 2000, 2, 10, 0.2, 0.1, 0.3, 0))
    (folder / "ingest").mkdir()
    ingest_ctr(DataConfig(path=str(folder / "log"), schema=str(folder / "log" / "schema.toml")), folder / "ingest")
    return Features.open(folder / "ingest")


def test_a_small_log_is_held_in_memory_in_the_order_of_its_parts(features):
    rows, train, validation = features.rows_of(REFIT_PARTS), features.part("train"), features.part("validation")
    fold = np.arange(len(rows)).astype(np.uint8)
    tensors = training_examples(rows, fold)
    for tensor, one, other in zip(tensors, train.arrays, validation.arrays, strict=False):
        assert np.array_equal(tensor.numpy(), np.concatenate([one, other]))
    assert np.array_equal(tensors[-1].numpy(), fold)


def test_a_large_log_is_read_from_disk_row_for_row(features, monkeypatch):
    rows = features.rows_of(REFIT_PARTS)
    fold = np.arange(len(rows)).astype(np.uint8)
    in_memory = training_examples(rows, fold)
    monkeypatch.setattr(module, "IN_MEMORY_BYTES", 0)
    streamed = training_examples(rows, fold)
    assert isinstance(streamed, StreamedExamples)
    batches = list(streamed.batches([1000] * (len(rows) // 1000) + [len(rows) % 1000], torch.Generator()))
    found = [torch.cat(tensors) for tensors in zip(*batches, strict=True)]

    def sorted_rows(tensors):
        flat = np.column_stack([tensor.numpy().astype(np.float64) for tensor in tensors])
        return flat[np.lexsort(flat.T)]

    assert np.array_equal(sorted_rows(found), sorted_rows(in_memory))
    # A step of all rows holds them all.
    assert isinstance(training_examples(rows, fold, is_whole=True), list)


def test_graphs_are_those_of_the_positive_rows(features, monkeypatch):
    monkeypatch.setattr("pipeline.ctr.data.BLOCK_ROWS", 64)
    rows, pair = features.rows_of(REFIT_PARTS), find_pairs(features)[1]
    labels, categorical, *_ = (tensor.numpy() for tensor in rows.tensors())
    fold = (np.arange(len(rows)) % 8).astype(np.uint8)

    def edges(kept):
        n_ids = [features.columns[c].n_ids for c in pair.columns]
        pairs = categorical[kept][:, pair.columns]
        return {tuple(p) for p in pairs.tolist() if p[0] < n_ids[0] and p[1] < n_ids[1]}

    graph = pair_graph(features, rows, pair).tocoo()
    assert set(zip(*(c.tolist() for c in graph.coords), strict=True)) == edges(labels > 0)
    for number, graph in enumerate(fold_graphs(features, rows, pair, fold)):
        found = graph.tocoo()
        assert set(zip(*(c.tolist() for c in found.coords), strict=True)) == edges((labels > 0) & (fold != number))


def test_maps_by_folds_are_those_of_the_ids_that_rows_of_a_fold_have(features, monkeypatch, tmp_path):
    monkeypatch.setattr("graphhash.maps.codebook.SAMPLE", 20)
    rows, pairs = features.rows_of(REFIT_PARTS), find_pairs(features)
    graphs, fold = [pair_graph(features, rows, pair) for pair in pairs], draw_folds(len(rows), 0)
    labels = [graphhash.cluster(graph, resolution=1.0) for graph in graphs]
    made = cross_fitted_maps(features, rows, graphs, labels, "double_soft", fold, MapOptions(4, "1+2", 0))
    save_folds(tmp_path, dict(made))
    np.save(tmp_path / "fold.npy", fold)
    folded, loaded = load_folds(tmp_path)
    assert_array_equal(loaded, fold)
    assert sorted(folded) == sorted(
        c for pair in pairs for c, on in zip(pair.columns, pair.compressed, strict=True) if on
    )
    _, categorical, *_ = (tensor.numpy() for tensor in rows.tensors())
    for column, each in folded.items():
        n_ids = features.columns[column].n_ids
        known = categorical[:, column] < n_ids
        occurs = np.zeros((n_ids, 8), bool)
        occurs[categorical[known, column], fold[known]] = True
        has = np.unpackbits(each.index.masks[:, None], axis=1, bitorder="little").astype(bool)
        assert has[occurs].all()
        assert occurs.sum() <= each.n_entries <= occurs.sum() + 20 < 8 * n_ids


def test_parts_are_written_as_numpy_saves_them(features, tmp_path):
    for part in ("train", "validation", "test"):
        for file in (features.folder / part).iterdir():
            np.save(tmp_path / file.name, np.load(file))
            assert (tmp_path / file.name).read_bytes() == file.read_bytes()
