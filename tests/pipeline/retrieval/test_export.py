from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch

from graphhash.maps.bucket_map import full_map
from graphhash.models.mf import MatrixFactorization
from pipeline.retrieval import export
from pipeline.retrieval.stored import as_shipped, store_rounded
from serving import BundleError, Retriever
from tests.helpers.small_models import SmallModel, naive_answer, small_model

MODELS = {
    "full": {"maps": "full"},
    "full without bias": {"maps": "full", "item_bias": False},
    "modulo, uint16 rows": {"maps": "modulo"},
    "modulo, int32 rows": {"maps": "modulo", "n_buckets": 65_537},
    "modulo, uint16 rows to the last": {"maps": "modulo", "n_buckets": 65_536},
    "soft, uint16 rows": {"maps": "soft"},
    "soft, int32 rows, without bias": {"maps": "soft", "n_buckets": 65_537, "item_bias": False},
    "string users": {"users": "string"},
    "string items": {"items": "string", "maps": "full"},
    "strings": {"users": "string", "items": "string"},
    "one user, one item": {"n_users": 1, "n_items": 1},
}


def folder_bytes(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def oov_ids(kind: str) -> list:
    return [-5, 99] if kind == "int64" else ["nobody", "a\0", "日"]


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_bundle_answers_like_the_obvious_loop(options, precision, tmp_path):
    small = small_model(**options)
    small.export(tmp_path / "bundle", precision=precision)
    retriever = Retriever(tmp_path / "bundle", provider="cpu", threads=1)
    item_ids = small.items.ids.to_pylist()
    users = small.users.ids.to_pylist() + oov_ids(small.users.kind)
    rng = np.random.default_rng(1)
    some = [[item_ids[i] for i in rng.integers(0, len(item_ids), n % 9)] for n in range(len(users))]
    with_unknown = [ids + ids[:2] + oov_ids(small.items.kind) for ids in some]
    for k in (1, 4, len(item_ids), len(item_ids) + 5):
        for exclude in (None, some, with_unknown, [item_ids] * len(users)):
            got = retriever.recommend(users, k, exclude)
            for i, user in enumerate(users):
                ids, scores, known = naive_answer(small, user, k, exclude[i] if exclude else [])
                assert got.item_ids[i].tolist() == ids
                assert got.scores[i].tolist() == scores
                assert got.known[i] == known


def test_graph_alone_takes_empty_exclusions_and_candidates_and_marks_left_over_slots(tmp_path):
    import onnxruntime

    small = small_model(items="string")
    small.export(tmp_path / "bundle")
    session = onnxruntime.InferenceSession(str(tmp_path / "bundle/model.onnx"), providers=["CPUExecutionProvider"])
    user = np.array([3], np.int64)
    none = np.empty((1, 0), object)
    request = {"user_id": user, "k": np.array(2, np.int64), "exclude_item_id": none, "candidate_item_id": none}
    ids, scores, known, *candidates = session.run(None, request)
    assert ids[0].tolist() == naive_answer(small, 3, 2, [])[0]
    assert known.tolist() == [True]
    everything = np.array([small.items.ids.to_pylist()[1:]], object)
    assert [part.shape for part in candidates] == [(1, 0), (1, 0)]
    ids, scores, *_ = session.run(None, request | {"exclude_item_id": everything})
    assert ids[0, 0] == small.items.ids[0].as_py()
    assert np.isfinite(scores[0, 0])
    assert scores[0, 1] == -np.inf


def test_tables_rows_and_weights_are_stored_in_their_small_types_and_nothing_is_expanded(tmp_path):
    small = small_model(n_items=23)
    small.export(tmp_path / "bundle", precision="float16")
    model = onnx.load(tmp_path / "bundle/model.onnx")
    stored = {
        t.name: (onnx.helper.tensor_dtype_to_np_dtype(t.data_type), tuple(t.dims)) for t in model.graph.initializer
    }
    assert stored["item_table"] == (np.float16, (6, 4))
    assert stored["item_rows"] == (np.uint16, (24, 3))
    assert stored["item_codes"] == (np.uint8, (24,))
    assert stored["item_codebook"] == (np.float32, (201, 3))
    assert stored["item_bias"] == (np.float16, (24,))
    assert all(dims != (24, 4) for _, dims in stored.values())
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 20, "ai.onnx.ml": 4}


@pytest.mark.parametrize("maps", ["soft", "modulo", "full"])
def test_8_bit_tables_answer_like_their_rounded_twins(maps, tmp_path):
    small = small_model(maps=maps, n_users=20, n_items=30)
    with torch.no_grad():
        for embedding in (small.model.user_embedding, small.model.item_embedding):
            embedding.table.normal_(generator=torch.Generator().manual_seed(1))
    small.export(tmp_path / "bundle", precision="int8")
    got = Retriever(tmp_path / "bundle").recommend(small.users.ids.to_pylist(), 30)
    store_rounded(small.model, "int8")
    with torch.no_grad():
        expected = small.model.score_all_items()(torch.arange(20)).numpy()
    for ids, scores, row in zip(got.item_ids, got.scores, expected, strict=True):
        np.testing.assert_allclose(scores, row[small.items.rows(ids)], rtol=0, atol=1e-4)
    stored = {t.name: t.data_type for t in onnx.load(tmp_path / "bundle" / "model.onnx").graph.initializer}
    assert (stored["item_table"], stored["item_scales"]) == (onnx.TensorProto.INT8, onnx.TensorProto.FLOAT16)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_real_values_agree_with_torch_within_the_stated_tolerance(precision, tmp_path):
    small = small_model(n_users=60, n_items=500, n_buckets=40)
    model = MatrixFactorization(small.user_map, small.item_map, 32, item_bias=True, seed=3)
    with torch.no_grad():
        model.item_bias.normal_(generator=torch.Generator().manual_seed(0))
    small = SmallModel(model, small.user_map, small.item_map, small.users, small.items)
    manifest = small.export(tmp_path / "bundle", precision=precision)
    got = Retriever(tmp_path / "bundle").recommend(small.users.ids.to_pylist(), 500)
    with torch.no_grad():
        expected = as_shipped(model, precision).score_all_items()(torch.arange(60)).numpy()
    allowed = manifest["tolerance"]["absolute"] + manifest["tolerance"]["relative"] * np.abs(expected).max()
    for ids, scores, row in zip(got.item_ids, got.scores, expected, strict=True):
        np.testing.assert_allclose(scores, row[small.items.rows(ids)], rtol=0, atol=allowed)


def test_external_data_past_the_limit_gives_the_same_answers(tmp_path):
    small = small_model(items="string", n_items=300, n_buckets=100)
    one = small.export(tmp_path / "one")
    two = small.export(tmp_path / "two", external_data_mib=0.001)
    assert sorted(one["files"]) == ["model.onnx"]
    assert sorted(two["files"]) == ["model.onnx", "model.onnx.data"]
    assert two["files"]["model.onnx.data"]["bytes"] > 1000
    users = small.users.ids.to_pylist()
    first, second = (Retriever(tmp_path / name).recommend(users, 300) for name in ("one", "two"))
    assert all(np.array_equal(a, b) for a, b in zip(first.item_ids, second.item_ids, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(first.scores, second.scores, strict=True))


def test_same_model_gives_the_same_graph_byte_for_byte(tmp_path):
    manifests = [small_model(users="string").export(tmp_path / name) for name in "ab"]
    assert manifests[0]["files"] == manifests[1]["files"]


def other_table(model, *arguments):
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.item_embedding.table[0] += 0.01
    return GRAPH(model, *arguments)


def other_ids(model, user_map, item_map, users, items, *how):
    return GRAPH(model, user_map, item_map, users, type(items)(items.ids[::-1]), *how)


def other_users(model, user_map, item_map, users, items, *how):
    return GRAPH(model, user_map, item_map, type(users)(np.arange(1000, 1000 + len(users))), items, *how)


GRAPH = export.retrieval_graph


@pytest.mark.parametrize("wrong_graph", [other_table, other_ids, other_users])
def test_a_graph_that_disagrees_with_the_model_is_not_published(wrong_graph, tmp_path, monkeypatch):
    small = small_model()
    small.export(tmp_path / "bundle")
    before = folder_bytes(tmp_path / "bundle")
    monkeypatch.setattr(export, "retrieval_graph", wrong_graph)
    with pytest.raises(BundleError) as error:
        small.export(tmp_path / "bundle")
    assert "\n" not in str(error.value)
    assert folder_bytes(tmp_path / "bundle") == before
    with pytest.raises(BundleError):
        small.export(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("step", ["_save", "write_manifest", "check_agreement"])
def test_a_failure_at_any_step_leaves_the_previous_bundle(step, tmp_path, monkeypatch):
    small = small_model()
    small.export(tmp_path / "bundle")
    before = folder_bytes(tmp_path / "bundle")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, step, fail)
    with pytest.raises(OSError, match="No space"):
        small.export(tmp_path / "bundle")
    assert folder_bytes(tmp_path / "bundle") == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_failed_rename_puts_the_previous_bundle_back(tmp_path, monkeypatch):
    small = small_model()
    small.export(tmp_path / "bundle")
    before = folder_bytes(tmp_path / "bundle")
    rename = export.Path.rename

    def fail_for_the_new_one(self, target):
        if self.name == "bundle" and self.parent != tmp_path:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(export.Path, "rename", fail_for_the_new_one)
    with pytest.raises(OSError, match="Input/output"):
        small.export(tmp_path / "bundle")
    assert folder_bytes(tmp_path / "bundle") == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_second_export_replaces_the_first_and_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "bundle").mkdir()
    small_model().export(tmp_path / "bundle")
    small_model(users="string").export(tmp_path / "bundle")
    assert Retriever(tmp_path / "bundle").manifest["id_types"]["user_id"] == "string"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_folder_that_is_no_bundle_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="is no bundle"):
        small_model().export(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("value", "precision"), [(float("nan"), "float32"), (float("inf"), "float32"), (7e4, "float16")]
)
def test_values_that_the_file_cannot_hold_are_refused(value, precision, tmp_path):
    small = small_model()
    with torch.no_grad():
        small.model.item_embedding.table[2, 1] = value
    with pytest.raises(BundleError, match=r"item table holds .* not finite in " + precision):
        small.export(tmp_path / "bundle", precision=precision)


def test_parts_of_different_runs_are_refused(tmp_path):
    small, other = small_model(), small_model(n_users=15)
    with pytest.raises(ValueError, match="15 user ids, but the user map has 14"):
        SmallModel(small.model, small.user_map, small.item_map, other.users, small.items).export(tmp_path / "b")
    with pytest.raises(ValueError, match="item map is not the one"):
        SmallModel(small.model, small.user_map, full_map(23), small.users, small.items).export(tmp_path / "b")
    with pytest.raises(ValueError, match="int3"):
        small.export(tmp_path / "b", precision="int3")
    with pytest.raises(BundleError, match="JSON"):
        small.export(tmp_path / "b", metrics={"recall@20": float("nan")})
    assert not list(tmp_path.iterdir())


def test_manifest_states_what_the_model_is(tmp_path):
    small = small_model(users="string")
    manifest = small.export(tmp_path / "bundle")
    assert manifest["n_users"] == 14
    assert manifest["n_items"] == 23
    assert manifest["dim"] == 4
    assert manifest["id_types"] == {"user_id": "string", "item_id": "int64"}
    assert manifest["method"] == {"users": "soft", "items": "soft"}
    assert manifest["n_buckets"] == {"users": 6, "items": 6}
    assert manifest["bucket_map_hashes"]["items"] == small.item_map.content_hash
    assert manifest["vocabulary_hashes"]["users"] == small.users.content_hash
    assert manifest["metrics"] == {"recall@20": 0.25}
    assert manifest["provenance"] == {"run": "test"}
    assert manifest["padding_item_id"] not in small.items.ids.to_pylist()
    assert manifest["outputs"]["score"]["dtype"] == "float32"
