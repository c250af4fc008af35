"""What the page says of a user: their buckets and who shares them, against the maps that the model was made with."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from graphhash.graph.vocabulary import Vocabulary
from graphhash.maps.bucket_map import BucketMap
from graphhash.models.mf import MatrixFactorization
from serving import Retriever
from serving.http.app import RetrievalOptions, create_app
from serving.http.buckets_shown import N_SHOWN_ITEMS, BucketsShown
from serving.http.live_bundle import LiveBundle
from serving.http.onnx_tensors import Strings, read_tensors
from tests.helpers.asgi_client import AsgiClient
from tests.helpers.small_models import SmallModel, naive_answer, small_model, soft_map


def shared_model(kind: str) -> SmallModel:
    """Users and items that read one table."""
    rng = np.random.default_rng(3)
    drawn = [soft_map(14, 6, 3, rng), soft_map(23, 6, 3, rng)]
    drawn[1].rows[-1, 0] = 4  # Unknown ids of the sides read rows of their own.
    maps = [BucketMap(m.rows, 6, "soft", codebook=m.codebook, codes=m.codes, shared=True) for m in drawn]
    model = MatrixFactorization(*maps, 4, item_bias=True, seed=0)
    small = small_model(users=kind, items=kind)
    return SmallModel(model, *maps, small.users, small.items)


def naive_buckets(bucket_map: BucketMap, entry: int) -> dict[int, float]:
    sums: dict[int, float] = {}
    for bucket, weight in zip(bucket_map.rows[entry].tolist(), bucket_map.weights[entry].tolist(), strict=True):
        if weight:
            sums[bucket] = sums.get(bucket, 0) + weight
    return sums


def readers(bucket_map: BucketMap, bucket: int) -> list[int]:
    return [entry for entry in range(bucket_map.n_ids) if bucket in naive_buckets(bucket_map, entry)]


@pytest.mark.parametrize("kind", ["int64", "string"])
@pytest.mark.parametrize("runtime", ["materialized", "compressed"])
@pytest.mark.parametrize("external", [False, True], ids=["one file", "external data"])
def test_buckets_and_who_shares_them_are_the_maps_own(kind, external, runtime, tmp_path):
    small = shared_model(kind)
    small.export(tmp_path / "bundle", external_data_mib=0.0001 if external else 1024, runtime=runtime)
    shown = BucketsShown(tmp_path / "bundle")
    assert shown.shared
    users, items = small.users.ids.to_pylist(), small.items.ids.to_pylist()
    for entry, user in enumerate([*users, {"int64": 99, "string": "?"}[kind]]):
        expected = naive_buckets(small.user_map, entry)
        got = shown.of_user(user)
        assert {row["bucket"]: row["weight"] for row in got} == expected
        assert [row["weight"] for row in got] == sorted(expected.values(), reverse=True)
        for row in got:
            assert row["n_users"] == len(readers(small.user_map, row["bucket"]))
            sharing = readers(small.item_map, row["bucket"])
            assert row["n_items"] == len(sharing)
            assert len(row["items"]) == min(N_SHOWN_ITEMS, len(sharing))
            weights = [naive_buckets(small.item_map, items.index(item))[row["bucket"]] for item in row["items"]]
            every = sorted((naive_buckets(small.item_map, i)[row["bucket"]] for i in sharing), reverse=True)
            assert weights == every[: len(weights)]
    for entry, item in enumerate(items):
        assert shown.of_item(item) == naive_buckets(small.item_map, entry)
    assert {shown.random_user(np.random.default_rng(seed)) for seed in range(200)} == set(users)


@pytest.mark.parametrize("maps", ["modulo", "full"])
def test_items_with_a_table_of_their_own_share_nothing_with_users(maps, tmp_path):
    small = small_model(maps=maps)
    small.export(tmp_path / "bundle")
    shown = BucketsShown(tmp_path / "bundle")
    assert not shown.shared
    (*rows,) = shown.of_user(3)
    if maps == "full":
        assert rows == []
        assert shown.of_item(3) == {}
        return
    bucket = int(small.user_map.rows[small.users.rows([3])[0], 0])
    assert rows == [
        {"bucket": bucket, "weight": 1.0, "n_users": len(readers(small.user_map, bucket)), "n_items": None, "items": []}
    ]


@pytest.mark.parametrize("ids", [range(5, 19), [*range(20, 40, 2), 1, 3, 2, 7]], ids=["a range", "dense"])
def test_ids_are_found_however_the_graph_looks_them_up(ids, tmp_path):
    small = small_model()
    users, items = Vocabulary(np.array([*ids])), Vocabulary(np.array([*ids, *range(40, 49)]))
    SmallModel(small.model, small.user_map, small.item_map, users, items).export(tmp_path / "bundle")
    tensors = read_tensors(tmp_path / "bundle" / "model.onnx")
    assert "user_first_id" in tensors.initializers
    shown = BucketsShown(tmp_path / "bundle")
    assert shown.user_ids.tolist() == list(ids)
    assert shown.item_ids.tolist() == items.ids.to_pylist()


def test_tensors_are_those_that_the_onnx_package_reads(tmp_path):
    small_model(users="string").export(tmp_path / "bundle", precision="float16")
    path = tmp_path / "bundle" / "model.onnx"
    tensors, model = read_tensors(path), onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.raw_data:
            assert np.array_equal(tensors.initializers[tensor.name], numpy_helper.to_array(tensor))
    keys = tensors.encoder_keys["user_id"]
    assert isinstance(keys, Strings)
    assert [keys[i] for i in range(len(keys))] == small_model(users="string").users.ids.to_pylist()


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_file_that_is_cut_is_refused(kept, tmp_path):
    small_model().export(tmp_path / "bundle")
    data = (tmp_path / "bundle" / "model.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError, match=r"cut short|leaves its message|has no graph|number|bytes"):
        read_tensors(tmp_path / "cut.onnx")


def test_explaining_gives_ids_as_text_and_marks_what_is_shared(tmp_path):
    small = shared_model("int64")
    small.export(tmp_path / "bundle")
    live = LiveBundle(Retriever, tmp_path / "bundle", "cpu", 1)
    client = AsgiClient(create_app(live, options=RetrievalOptions(explain=True)))
    user = 2**53 + 1  # JavaScript's numbers end before.
    answer = client.get(f"/v1/explain?user_id={user}&k=5").json()
    assert (answer["user_id"], answer["known"], answer["shared_table"]) == (str(user), True, True)
    assert [item["item_id"] for item in answer["items"]] == [str(i) for i in naive_answer(small, user, 5, [])[0]]
    mine = naive_buckets(small.user_map, small.users.rows([user])[0])
    for item in answer["items"]:
        theirs = naive_buckets(small.item_map, small.items.rows([int(item["item_id"])])[0])
        assert {b["bucket"]: b["with_user"] for b in item["buckets"]} == {b: b in mine for b in theirs}
    assert client.get("/v1/explain?user_id=99").json()["known"] is False
    assert client.get("/v1/explain").json()["known"] is True
    for query in ("user_id=a", "user_id=1e3", f"user_id={2**63}", "k=0", "k=a", "k=1001x", "other=1"):
        refused = client.get(f"/v1/explain?{query}")
        assert refused.status == 400
        assert refused.error
    # The maps of a newer bundle do not explain the answers of the older one.
    small_model().export(tmp_path / "bundle")
    client = AsgiClient(create_app(live, options=RetrievalOptions(explain=True)))
    assert client.get("/v1/explain").error == "the bundle is being replaced; try again"
    live.refresh()
    assert client.get("/v1/explain").status == 200
