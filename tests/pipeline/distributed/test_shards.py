from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from scipy.sparse import csr_array, random_array

from graphhash.errors import DataError
from pipeline.distributed.shards import ShardedCsr, balanced_starts, write_shard


def graph(weighted=True, shape=(50, 30)):
    rng = np.random.default_rng(0)
    matrix = random_array(shape, density=0.2, rng=rng, format="csr", dtype=np.float32)
    matrix.sort_indices()
    matrix.data = matrix.data + np.float32(0.1) if weighted else np.ones_like(matrix.data)
    return csr_array(matrix)


def same(a, b):
    return a.shape == b.shape and all(
        np.array_equal(getattr(a, n), getattr(b, n)) for n in ("indptr", "indices", "data")
    )


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unit"])
@pytest.mark.parametrize("n_shards", [1, 2, 7, 60])
def test_what_is_read_is_what_was_written(weighted, n_shards, tmp_path):
    matrix = graph(weighted)
    written = ShardedCsr.write(tmp_path / "g", matrix, n_shards=n_shards)
    opened = ShardedCsr.open(tmp_path / "g")
    assert opened == written
    assert opened.n_shards == n_shards
    assert opened.unit_weights != weighted
    assert same(opened.load(), matrix)
    assert opened.load().dtype == np.float32
    assert any(tmp_path.rglob("*.weights.npy")) == weighted
    for start, stop in [(0, 50), (3, 9), (10, 10), (49, 50), (0, 0)]:
        indptr, indices, weights = opened.read(start, stop)
        expected = matrix[start:stop]
        assert_array_equal(indptr, expected.indptr)
        assert_array_equal(indices, expected.indices)
        assert_array_equal(weights, expected.data if weighted else [])
        assert (indptr.dtype, indices.dtype, weights.dtype) == (np.int64, np.int32, np.float32)


def test_total_weight_is_the_same_to_the_last_bit_for_every_sharding(tmp_path):
    matrix = graph()
    matrix.data *= np.float32(10.0) ** np.random.default_rng(1).integers(-20, 20, matrix.nnz).astype(np.float32)
    totals = {ShardedCsr.write(tmp_path / str(n), matrix, n_shards=n).total_weight for n in (1, 2, 7)}
    assert totals == {math.fsum(matrix.data.tolist())}


def test_a_graph_without_edges_or_rows(tmp_path):
    for shape in [(0, 5), (5, 0), (4, 3)]:
        empty = csr_array(shape, dtype=np.float32)
        opened = ShardedCsr.write(tmp_path / f"{shape}", empty, n_shards=2)
        assert opened.n_edges == 0
        assert opened.total_weight == 0
        assert opened.load().shape == shape


def test_a_read_within_one_shard_is_a_memory_map(tmp_path):
    opened = ShardedCsr.write(tmp_path / "g", graph(shape=(500, 300)), n_shards=1)
    assert isinstance(opened.read(10, 20)[1], np.memmap)
    assert not opened.read(10, 20)[1].flags.writeable


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 9))
def test_no_shard_is_larger_than_its_share_and_one_row(edges_per_row, n_shards):
    starts = balanced_starts(np.array(edges_per_row, np.int64), n_shards)
    assert len(starts) == n_shards + 1
    assert starts[0] == 0
    assert starts[-1] == len(edges_per_row)
    assert np.all(np.diff(starts) >= 0)
    sizes = [sum(edges_per_row[a:b]) for a, b in itertools.pairwise(starts)]
    assert max(sizes) <= sum(edges_per_row) / n_shards + max([*edges_per_row, 1])


@pytest.mark.parametrize(
    ("indices", "weights"),
    [
        ([2, 1], [1, 1]),
        ([1, 1], [1, 1]),
        ([0, 3], [1, 1]),
        ([-1, 0], [1, 1]),
        ([0, 1], [1, 0]),
        ([0, 1], [1, np.inf]),
    ],
    ids=["descending", "duplicate", "too large", "negative", "zero weight", "infinite weight"],
)
def test_a_broken_row_is_not_written(indices, weights, tmp_path):
    with pytest.raises(ValueError, match="shard 0"):
        write_shard(tmp_path, 0, np.array([0, 2]), np.array(indices), np.array(weights), n_cols=3)


def test_a_missing_short_or_changed_file_is_named(tmp_path):
    folder = tmp_path / "g"
    ShardedCsr.write(folder, graph(), n_shards=2)
    name = "shard-00001.indices.npy"
    good = (folder / name).read_bytes()

    (folder / name).write_bytes(good[:-3])
    with pytest.raises(DataError, match=name):
        ShardedCsr.open(folder)
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{name}: missing or short"):
        ShardedCsr.open(folder)
    (folder / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(DataError, match=f"{name}: sha256"):
        ShardedCsr.open(folder).load()
    np.save(folder / name, np.zeros(3, np.int64))
    with pytest.raises(DataError, match="holds 1-D int64, not 1-D int32"):
        ShardedCsr.open(folder)
    np.save(folder / name, np.zeros(3, np.int32))
    with pytest.raises(DataError, match=r"shards hold .* edges, meta.json says"):
        ShardedCsr.open(folder)


def test_a_folder_without_sound_meta_is_no_graph(tmp_path):
    with pytest.raises(DataError, match="no readable graph"):
        ShardedCsr.open(tmp_path / "nothing")
    ShardedCsr.write(tmp_path / "g", graph(), n_shards=2)
    meta = json.loads((tmp_path / "g" / "meta.json").read_text())
    for change, words in [
        ({"format_version": 9}, "format version 9, this program reads 1"),
        ({"starts": [0, 3]}, "do not cut 50 rows"),
        ({"n_edges": 1}, "meta.json says 1"),
        ({"starts": 7}, "no readable graph"),
    ]:
        (tmp_path / "g" / "meta.json").write_text(json.dumps(meta | change))
        with pytest.raises(DataError, match=words):
            ShardedCsr.open(tmp_path / "g")


def test_rows_outside_the_graph_are_refused(tmp_path):
    opened = ShardedCsr.write(tmp_path / "g", graph(), n_shards=2)
    with pytest.raises(ValueError, match=r"rows 3..51 are not within 0..50"):
        opened.read(3, 51)
