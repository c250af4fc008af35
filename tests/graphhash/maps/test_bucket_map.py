"""Bucket maps against naive second implementations, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import graphhash
from graphhash.clustering.labels import Labels
from graphhash.maps.affinities import POWER
from graphhash.maps.bucket_map import BucketMap
from graphhash.maps.codebook import nearest_codes, weight_codebook
from graphhash.maps.soft_maps import ITEM_DAMPING
from tests.helpers import graphs


def labels_of(users, items) -> Labels:
    return Labels(np.array(users, np.int32), np.array(items, np.int32), 1.0, 0.0)


def every_map(n_ids=50):
    degrees = np.random.default_rng(0).integers(1, 100, n_ids)
    graph = graphs.random_graph(0)
    labels = graphhash.cluster(graph, resolution=3)
    return [
        graphhash.full_map(n_ids),
        graphhash.modulo_map(n_ids, 11),
        graphhash.frequency_map(degrees, 11, seed=0),
        graphhash.double_frequency_map(degrees, 11, seed=0),
        graphhash.double_map(n_ids, 11, seed=0),
        graphhash.quotient_remainder_map(n_ids, 20),
        graphhash.lsh_map(np.random.default_rng(0).normal(size=(n_ids, 7)), 11, seed=0),
        graphhash.lsh_structure_map(graph, np.asarray(graph.sum(axis=0)), 11, seed=0),
        *graphhash.graph_maps(labels),
        *graphhash.double_graph_maps(labels, seed=0),
        *graphhash.multilevel_maps([graphhash.cluster(graph, resolution=1), labels]),
        *graphhash.soft_maps(graph, labels, indices_per_id=4),
        *graphhash.soft_maps(graph, labels, indices_per_id=4, hops="2"),
        *graphhash.double_soft_maps(graph, labels, indices_per_id=4, seed=0),
    ]


@pytest.mark.parametrize("bucket_map", every_map(), ids=lambda m: m.method)
def test_every_map_survives_saving(bucket_map, tmp_path):
    bucket_map.save(tmp_path / "map.npz")
    again = BucketMap.load(tmp_path / "map.npz")
    assert again.content_hash == bucket_map.content_hash
    assert_array_equal(again.rows, bucket_map.rows)
    assert_array_equal(again.weights, bucket_map.weights)
    for name in ("n_buckets", "method", "identity", "shared"):
        assert getattr(again, name) == getattr(bucket_map, name)
    assert again.nbytes == bucket_map.nbytes


@pytest.mark.parametrize("bucket_map", every_map(), ids=lambda m: m.method)
def test_unknown_ids_read_a_row_that_no_known_id_reads(bucket_map):
    known = bucket_map.rows[:-1][bucket_map.weights[:-1] > 0]
    assert bucket_map.rows[-1, 0] == bucket_map.oov_row
    # Of a shared table the last two rows are the unknown user's and the unknown item's.
    n_others = bucket_map.n_buckets - (2 if bucket_map.shared else 1)
    assert n_others <= bucket_map.oov_row < bucket_map.n_buckets
    without = known >= n_others
    assert not without.any() or ("soft" in bucket_map.method and (known[without] == bucket_map.oov_row).all())
    assert bucket_map.weights[-1].sum() == 1


def test_full_is_one_row_an_id_and_stores_no_map():
    bucket_map = graphhash.full_map(5)
    assert_array_equal(bucket_map.rows[:, 0], np.arange(6))
    assert bucket_map.nbytes == 0


@given(n_ids=st.integers(1, 300), n_buckets=st.integers(2, 400))
@settings(max_examples=50, deadline=None)
def test_modulo_is_the_remainder(n_ids, n_buckets):
    bucket_map = graphhash.modulo_map(n_ids, n_buckets)
    assert bucket_map.rows[:-1, 0].tolist() == [i % (n_buckets - 1) for i in range(n_ids)]


@given(seed=st.integers(0, 2**32 - 1), n_ids=st.integers(1, 200), n_buckets=st.integers(3, 100))
@settings(max_examples=50, deadline=None)
def test_frequent_ids_keep_a_row_of_their_own(seed, n_ids, n_buckets):
    degrees = np.random.default_rng(seed).integers(0, 5, n_ids)
    n_own = min((n_buckets - 1) // 2, n_ids)
    ranked = sorted(range(n_ids), key=lambda i: (-degrees[i], i))
    for make, indices_per_id in ((graphhash.frequency_map, 1), (graphhash.double_frequency_map, 2)):
        bucket_map = make(degrees, n_buckets, seed=seed)
        assert bucket_map.indices_per_id == indices_per_id
        for place, id_ in enumerate(ranked):
            rows = bucket_map.rows[id_]
            if place < n_own:
                assert (rows == place).all()
                assert bucket_map.weights[id_].sum() == 1
            else:
                assert ((rows >= n_own) & (rows < n_buckets - 1)).all()
                assert (bucket_map.weights[id_] == 1).all()


def test_hashes_are_seeded_and_exact():
    degrees = np.ones(1000)
    a, b, c = (graphhash.double_frequency_map(degrees, 101, seed=s) for s in (0, 0, 1))
    assert a.content_hash == b.content_hash != c.content_hash
    rng = np.random.default_rng(0)
    prime = 2**31 - 1
    for lookup in range(2):
        x, y = (int(rng.integers(1, prime)), int(rng.integers(0, prime)))
        # Python's integers cannot overflow.
        expected = [50 + (x * i + y) % prime % 50 for i in range(50, 1000)]
        assert a.rows[50:1000, lookup].tolist() == expected


def test_ids_of_one_community_share_a_row():
    users, items = graphhash.graph_maps(labels_of([4, 9, 4, 7], [9, 9, 0]))
    assert users.rows[:, 0].tolist() == [0, 2, 0, 1, 3]
    assert items.rows[:, 0].tolist() == [1, 1, 0, 2]
    assert (users.n_buckets, items.n_buckets) == (4, 3)
    assert users.nbytes == 2 * 5


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("indices_per_id", [1, 3, 64])
def test_soft_is_one_step_of_normalised_propagation(weighted, indices_per_id):
    graph = graphs.random_graph(3, weighted=weighted)
    labels = graphhash.cluster(graph, resolution=3)
    dense = graph.toarray().astype(np.float64)
    k, d = np.maximum(dense.sum(1), 1e-300), np.maximum(dense.sum(0), 1e-300)
    normalised = dense / np.sqrt(k)[:, None] / np.sqrt(d)
    damped = dense / np.sqrt(k)[:, None] / np.sqrt(d + ITEM_DAMPING * dense.sum(0).mean())
    maps = graphhash.soft_maps(graph, labels, indices_per_id=indices_per_id, hops="1")
    for bucket_map, matrix, neighbour_labels in (
        (maps[0], damped, labels.items),
        (maps[1], normalised.T, labels.users),
    ):
        buckets = np.unique(neighbour_labels, return_inverse=True)[1]
        one_hot = np.eye(buckets.max() + 1)[buckets]
        affinities = matrix @ one_hot
        assert bucket_map.n_buckets == one_hot.shape[1] + 1
        for id_, row in enumerate(affinities):
            kept = sorted(range(len(row)), key=lambda b, row=row: (-row[b], b))[:indices_per_id]
            kept = [b for b in kept if row[b] > 0]
            expected = np.zeros(bucket_map.n_buckets)
            if kept:
                expected[kept] = row[kept] ** POWER / np.linalg.norm(row[kept] ** POWER)
            else:
                expected[-1] = 1
            got = np.zeros(bucket_map.n_buckets)
            np.add.at(got, bucket_map.rows[id_], bucket_map.weights[id_])
            # Fewer ids than codebook: nothing is lost in them.
            assert_allclose(got, expected, atol=1e-6)


def test_one_hop_has_a_row_per_community_of_the_other_side_and_both_hops_one_table():
    graph = graphs.random_graph(3)
    labels = graphhash.cluster(graph, resolution=3)
    users, items = graphhash.soft_maps(graph, labels, indices_per_id=2, hops="1")
    assert (users.n_buckets, items.n_buckets) == (labels.item_rows + 1, labels.user_rows + 1)
    assert users.nbytes == (graph.shape[0] + 1) * (2 * 2 + 1) + 4 * 2 * len(users.codebook)
    users, items = graphhash.soft_maps(graph, labels, indices_per_id=2)
    assert users.shared
    assert items.shared
    assert users.n_buckets == items.n_buckets == labels.user_rows + labels.item_rows + 2
    assert (users.oov_row, items.oov_row) == (users.n_buckets - 2, users.n_buckets - 1)


@pytest.mark.parametrize("hops", ["1", "2", "1+2"])
def test_an_id_without_interactions_reads_the_oov_row(hops):
    graph = graphs.isolated_user()
    users, items = graphhash.soft_maps(graph, graphhash.cluster(graph, resolution=1), indices_per_id=2, hops=hops)
    assert users.rows[2, 0] == users.oov_row
    assert users.weights[2].tolist() == [1, 0]
    assert items.rows[3, 0] == items.oov_row


def test_large_tables_store_rows_in_four_bytes():
    assert graphhash.modulo_map(10, 2**16).rows_dtype == np.uint16
    assert graphhash.modulo_map(10, 2**16 + 1).rows_dtype == np.int32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": np.array([[0], [5], [3]], np.int32)}, "buckets span 0..5, table has 4 rows"),
        ({"rows": np.array([[-1], [0], [3]], np.int32)}, "buckets span -1..3"),
        ({"rows": np.array([[0], [0], [2]], np.int32)}, "must read the last table row 3"),
        ({"rows": np.array([0, 0, 3], np.int32)}, "2-D int32"),
        ({"rows": np.array([[0], [0], [3]])}, "2-D int32, got 2-D int64"),
        ({"codebook": np.ones((1, 1), np.float32)}, "given together"),
        ({"codebook": np.ones((1, 2), np.float32), "codes": np.zeros(3, np.uint8)}, r"of shape \(n_codes, 1\)"),
        ({"codebook": np.ones((1, 1)), "codes": np.zeros(3, np.uint8)}, "must be float32"),
        ({"codebook": np.ones((1, 1), np.float32), "codes": np.zeros(2, np.uint8)}, r"uint8 of shape \(3,\)"),
        (
            {"codebook": np.ones((1, 1), np.float32), "codes": np.ones(3, np.uint8)},
            "codes go up to 1, the codebook has 1",
        ),
        ({"codebook": np.full((1, 1), np.nan, np.float32), "codes": np.zeros(3, np.uint8)}, "finite"),
        ({"codebook": np.full((1, 1), 2, np.float32), "codes": np.zeros(3, np.uint8)}, "with weight 1"),
        ({"rows": np.array([[0, 1], [1, 1], [3, 3]], np.int32)}, "2 indices per id needs a codebook"),
        (
            {"rows": np.array([[0], [1], [1]], np.int32), "shared": True},
            "or the one before it, as the table is shared; it reads 1",
        ),
        ({"identity": True}, "identity map must have rows"),
    ],
)
def test_a_map_that_cannot_be_is_refused_at_birth(change, message):
    good = {
        "rows": np.array([[0], [1], [3]], np.int32), "n_buckets": 4, "method": "x",
    }  # fmt: skip
    BucketMap(**good)
    with pytest.raises(ValueError, match=message):
        BucketMap(**good | change)


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "map.npz"
    graphhash.modulo_map(100, 7).save(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(graphhash.DataError, match=r"map\.npz: not a readable bucket map"):
        BucketMap.load(path)
    with pytest.raises(graphhash.DataError, match="not a readable bucket map"):
        BucketMap.load(tmp_path / "missing.npz")


def test_bad_arguments_are_refused():
    graph = graphs.two_blocks()
    labels = graphhash.cluster(graph, resolution=1)
    with pytest.raises(ValueError, match="indices_per_id must be at least 1, got 0"):
        graphhash.soft_maps(graph, labels, indices_per_id=0)
    with pytest.raises(ValueError, match="hops is '3'; use one of '1', '2', '1\\+2'"):
        graphhash.soft_maps(graph, labels, hops="3")
    with pytest.raises(ValueError, match="biadjacency is 6 x 6, labels hold 2 users"):
        graphhash.soft_maps(graph, labels_of([0, 0], [0]), indices_per_id=1)
    with pytest.raises(ValueError, match="a table of 1 rows is too small"):
        graphhash.modulo_map(5, 1)


def test_few_different_weights_are_their_own_codes():
    weights = np.array([[0.6, 0.8], [1, 0], [0.6, 0.8], [1, 0]], np.float32)
    codebook, codes = weight_codebook(weights)
    assert_array_equal(codebook[codes], weights)
    # The last row is the unknown ids', and has a profile to itself even where a known id has the same weights.
    assert len(codebook) == 3
    assert codes.tolist() == [0, 1, 0, 2]


@pytest.mark.parametrize("indices_per_id", [1, 2, 12])
def test_many_different_weights_are_near_their_codebook(indices_per_id):
    rng = np.random.default_rng(0)
    weights = np.sort(rng.random((3000, indices_per_id)).astype(np.float32) ** rng.integers(1, 5, (3000, 1)), axis=1)[
        :, ::-1
    ]
    weights = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    weights[-1] = np.eye(1, indices_per_id)
    codebook, codes = weight_codebook(weights)
    assert len(codebook) <= 256
    assert codebook.dtype == np.float32
    assert codes.dtype == np.uint8
    assert_allclose(np.linalg.norm(codebook, axis=1), 1, atol=1e-6)
    # As near as the nearest of them.
    distances = np.linalg.norm(weights[:-1, None] - codebook[None, :-1], axis=2)
    assert_allclose(distances[np.arange(2999), codes[:-1]], distances.min(axis=1), atol=1e-6)
    assert np.sqrt((distances.min(axis=1) ** 2).mean()) < 0.15
    assert_array_equal(weight_codebook(weights)[0], codebook)


def test_a_shared_table_is_one_parameter_and_maps_of_two_calls_are_not_mixed():
    graph = graphs.random_graph(0)
    users, items = graphhash.soft_maps(graph, graphhash.cluster(graph, resolution=3), indices_per_id=2)
    model = graphhash.MatrixFactorization(users, items, 4, item_bias=False, seed=0)
    assert model.user_embedding.table is model.item_embedding.table
    assert [name for name, _ in model.named_parameters()] == ["user_embedding.table"]
    assert model.user_embedding.table[-2:].eq(0).all()
    with pytest.raises(ValueError, match="were not made together"):
        graphhash.MatrixFactorization(users, users, 4, item_bias=False, seed=0)
    with pytest.raises(ValueError, match="were not made together"):
        graphhash.MatrixFactorization(users, graphhash.full_map(5), 4, item_bias=False, seed=0)
    with pytest.raises(ValueError, match=r"the table is \(\d+, 4\), the map and dim need \(\d+, 5\)"):
        graphhash.BucketEmbedding(items, 5, table=model.user_embedding.table)


@pytest.mark.parametrize("indices", [1, 2, 7])
def test_codes_are_those_of_the_nearest_rows(indices):
    rng = np.random.default_rng(indices)
    weights, codebook = (rng.random((n, indices)).astype(np.float32) for n in (3000, 200))
    codebook[150:] = codebook[:50]  # Of two equal rows, the first one.
    weights[:100] = codebook[:100]
    distances = ((weights[:, None].astype(np.float64) - codebook) ** 2).sum(2)
    codes = nearest_codes(weights, codebook)
    assert codes.dtype == np.uint8
    assert_array_equal(codes, distances.argmin(1))
