"""Every model x map x precision x run-time form answers like PyTorch, for recommendations and for candidates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from graphhash.graph.vocabulary import Vocabulary
from graphhash.maps.bucket_map import BucketMap, full_map, plain_map
from graphhash.maps.embedding_spec import EmbeddingSpec
from graphhash.maps.hashes import double_map, modulo_map
from graphhash.models.lightgcn import LightGCN
from graphhash.models.mf import MatrixFactorization
from graphhash.models.neumf import NeuMF
from pipeline.retrieval import onnx_parts, onnx_scores
from pipeline.retrieval.export import ExportOptions, TrainedRetrieval, export_retrieval
from pipeline.retrieval.stored import as_shipped
from serving import Retriever
from tests.helpers.small_models import soft_map, vocabulary

N_USERS, N_ITEMS, DIM = 31, 67, 8


def shared_soft(rng: np.random.Generator) -> tuple[BucketMap, BucketMap]:
    """Two maps into one table, as the soft methods make them: the unknown user's row is the last but one."""
    maps = []
    for n, unknown in ((N_USERS, 13), (N_ITEMS, 14)):
        soft = soft_map(n, 13, 3, rng)
        rows = soft.rows.copy()
        rows[-1] = unknown
        maps.append(BucketMap(rows, 15, "soft", codebook=soft.codebook, codes=soft.codes, shared=True))
    return maps[0], maps[1]


MAPS = {
    "full": lambda rng: (full_map(N_USERS), full_map(N_ITEMS)),
    "modulo": lambda rng: (modulo_map(N_USERS, 7), modulo_map(N_ITEMS, 11)),
    "double": lambda rng: (double_map(N_USERS, 7, seed=0), double_map(N_ITEMS, 11, seed=1)),
    "balanced, items plain": lambda rng: (
        plain_map(rng.integers(0, 6, (N_USERS, 2)), 7, "balanced"), plain_map(rng.integers(0, 9, (N_ITEMS, 1)), 10, "balanced"),
    ),
    "soft": lambda rng: (soft_map(N_USERS, 9, 3, rng), soft_map(N_ITEMS, 12, 3, rng)),
    "soft, shared table": shared_soft,
}  # fmt: skip


def lightgcn(users: BucketMap, items: BucketMap, item_bias: bool, cosine: bool = False) -> LightGCN:
    rng = np.random.default_rng(3)
    edges = rng.random((N_USERS, N_ITEMS)) < 0.1
    graph = csr_array(edges.astype(np.float32))
    return LightGCN(users, items, DIM, graph=graph, n_layers=2, item_bias=item_bias, seed=0, cosine=cosine)


MODELS = {
    "mf": lambda u, i, bias: MatrixFactorization(u, i, DIM, item_bias=bias, seed=0),
    "lightgcn": lightgcn,
    "neumf": lambda u, i, bias: NeuMF(u, i, DIM, item_bias=bias, seed=0),
}
COSINE_MODELS = {
    "mf, cosine": lambda u, i, bias: MatrixFactorization(u, i, DIM, item_bias=bias, seed=0, cosine=True),
    "lightgcn, cosine": lambda u, i, bias: lightgcn(u, i, bias, cosine=True),
}
OWN = EmbeddingSpec("residual", {"own_dim": 5, "own_bits": 4})
RESIDUAL_MODELS = {
    "mf, residual": lambda u, i, bias: MatrixFactorization(u, i, DIM, item_bias=bias, seed=0, embedding=OWN),
    "mf, residual, cosine": lambda u, i, bias: MatrixFactorization(
        u, i, DIM, item_bias=bias, seed=0, embedding=OWN, cosine=True
    ),
}
# LightGCN stores its vectors, whatever the maps.
CASES = [(kind, maps) for kind in (*MODELS, "mf, cosine") for maps in MAPS] + [("lightgcn, cosine", "soft")]
CASES += [("mf, residual", "soft"), ("mf, residual", "modulo"), ("mf, residual, cosine", "soft, shared table")]


def trained(kind: str, maps: str, item_bias: bool):
    users, items = MAPS[maps](np.random.default_rng(1))
    model = (MODELS | COSINE_MODELS | RESIDUAL_MODELS)[kind](users, items, item_bias)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model, users, items


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks, blocks and pieces even here, and more users than the short way takes in a part of the requests."""
    monkeypatch.setattr(onnx_scores, "_CHUNK_ROWS", 8)
    monkeypatch.setattr(onnx_scores, "_PER_SUM", 3)
    monkeypatch.setattr(onnx_scores, "_CHUNK_VALUES", 40)
    monkeypatch.setattr(onnx_scores, "FEW_USERS", 5)
    monkeypatch.setattr(onnx_scores, "_BLOCK_VALUES", 40 * DIM)
    monkeypatch.setattr(onnx_scores, "_PIECE_VALUES", 4 * DIM)
    monkeypatch.setattr(onnx_scores, "FOLDED_VALUES", 0)


@pytest.mark.parametrize("runtime", ["materialized", "materialized, large", "compressed"])
@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "int4"])
@pytest.mark.parametrize(("kind", "maps"), CASES)
def test_scores_and_items_are_those_of_torch(kind, maps, precision, runtime, small_chunks, tmp_path, monkeypatch):
    item_bias = maps != "modulo"
    runtime, *large = runtime.split(", ")
    if large:
        monkeypatch.setattr(onnx_parts, "_USER_VALUES", 0)
        monkeypatch.setattr(onnx_parts, "_TABLE_VALUES", 0)
    model, *both = trained(kind, maps, item_bias)
    users, items = Vocabulary(np.arange(5, 5 + N_USERS)), vocabulary("string", N_ITEMS)
    manifest = export_retrieval(
        TrainedRetrieval(model, *both, users, items),
        tmp_path / "bundle",
        ExportOptions(precision, runtime),
        metrics={},
        provenance={},
    )
    assert (manifest["runtime"]["mode"], manifest["precision"]) == (runtime, precision)
    assert (manifest["model"], manifest["cosine"]) == (kind.split(",")[0], kind.endswith("cosine"))
    loaded = Retriever(tmp_path / "bundle", provider="cpu", threads=1)
    rows = np.append(np.arange(N_USERS), N_USERS)
    asked = [*users.take(np.arange(N_USERS)).tolist(), 999]
    with torch.no_grad():
        expected = as_shipped(model, precision).score_all_items()(torch.from_numpy(rows)).numpy()
    excluded = np.random.default_rng(0).integers(0, N_ITEMS, (N_USERS + 1, 6))
    allowed = 1e-5 * (1 + np.abs(expected).max())
    for part in (slice(0, 1), slice(3, 8), slice(0, None)):  # One user, as many as are few, and all.
        got = loaded.recommend(asked[part], N_ITEMS, [items.take(ids) for ids in excluded[part]])
        assert got.known.tolist() == [user != 999 for user in asked[part]]
        for ids, scores, truth, left_out in zip(got.item_ids, got.scores, expected[part], excluded[part], strict=True):
            found = items.rows(ids)
            assert set(found) == set(range(N_ITEMS)) - set(left_out)
            np.testing.assert_allclose(scores, truth[found], rtol=0, atol=allowed)
            assert (scores[1:] < scores[:-1]).all() or (found[1:] > found[:-1])[scores[1:] == scores[:-1]].all()
    candidates = np.random.default_rng(1).integers(0, N_ITEMS, (len(asked), 9))
    got = loaded.score(asked, items.take(candidates))
    np.testing.assert_allclose(got.scores, np.take_along_axis(expected, candidates, 1), rtol=0, atol=allowed)
    assert got.known_items.all()
    assert not loaded.score(asked, [["nothing"]] * len(asked)).known_items.any()


@pytest.mark.parametrize("runtime", ["materialized", "compressed"])
@pytest.mark.parametrize("kind", MODELS)
def test_external_data_holds_the_tensors_of_every_model(kind, runtime, tmp_path):
    model, *both = trained(kind, "soft", True)
    parts = TrainedRetrieval(model, *both, Vocabulary(np.arange(N_USERS)), Vocabulary(np.arange(N_ITEMS)))
    facts = {"metrics": {}, "provenance": {}}
    one = export_retrieval(parts, tmp_path / "one", ExportOptions(runtime=runtime), **facts)
    two = export_retrieval(parts, tmp_path / "two", ExportOptions(runtime=runtime, external_data_mib=0.001), **facts)
    assert sorted(one["files"]) == ["model.onnx"]
    assert sorted(two["files"]) == ["model.onnx", "model.onnx.data"]
    a, b = (Retriever(tmp_path / name, threads=1).recommend(range(N_USERS), 20) for name in ("one", "two"))
    assert [ids.tolist() for ids in a.item_ids] == [ids.tolist() for ids in b.item_ids]
    assert [scores.tolist() for scores in a.scores] == [scores.tolist() for scores in b.scores]


def test_a_compressed_graph_keeps_no_vector_per_item(tmp_path):
    """Whatever ONNX Runtime folds at load, the optimised graph has no float32 array with a row per item."""
    import onnx
    import onnxruntime

    from pipeline.retrieval.onnx_graph import retrieval_graph

    rng = np.random.default_rng(0)
    maps = soft_map(40, 30, 3, rng), soft_map(5000, 300, 3, rng)
    model = MatrixFactorization(*maps, 16, item_bias=True, seed=0)
    ids = Vocabulary(np.arange(40)), Vocabulary(np.arange(5000))
    largest = {}
    for runtime in ("materialized", "compressed"):
        graph = retrieval_graph(model, *maps, *ids, "int8", runtime)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{runtime}.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
        largest[runtime] = max(
            int(np.prod(tensor.dims))
            for tensor in onnx.load(tmp_path / f"{runtime}.onnx").graph.initializer
            if tensor.data_type == onnx.TensorProto.FLOAT
        )
    assert largest["materialized"] >= 5000 * 16
    assert largest["compressed"] <= 5100


@pytest.mark.parametrize("kind", ["mf, cosine", "mf, residual, cosine"])
def test_a_large_catalogue_of_cosines_stores_its_lengths_and_answers_alike(kind, tmp_path, monkeypatch):
    """Folded lengths need the vectors of all items at once; stored ones need none, and are the same numbers."""
    import onnx

    model, *both = trained(kind, "soft, shared table", True)
    parts = TrainedRetrieval(model, *both, Vocabulary(np.arange(N_USERS)), Vocabulary(np.arange(N_ITEMS)))
    answers, lengths, folded = {}, {}, {}
    for name, most in (("small", onnx_scores.FOLDED_VALUES), ("large", 0)):
        monkeypatch.setattr(onnx_scores, "FOLDED_VALUES", most)
        options = ExportOptions("int8", "compressed")
        export_retrieval(parts, tmp_path / name, options, metrics={}, provenance={})
        graph = onnx.load(tmp_path / name / "model.onnx").graph
        lengths[name] = [tensor for tensor in graph.initializer if tensor.name == "item_lengths"]
        folded[name] = [
            node for node in graph.node if node.op_type == "ReduceL2" and node.output[0].startswith("length")
        ]
        answers[name] = Retriever(tmp_path / name, threads=1).recommend(range(3), N_ITEMS).scores
    assert (len(lengths["small"]), len(folded["small"])) == (0, 1)
    assert (len(lengths["large"]), len(folded["large"])) == (1, 0)
    np.testing.assert_allclose(np.stack(answers["large"]), np.stack(answers["small"]), rtol=0, atol=1e-5)
    with torch.no_grad():
        shipped = as_shipped(model, "int8").item_embedding(torch.arange(N_ITEMS + 1))
    stored = onnx.numpy_helper.to_array(lengths["large"][0])
    np.testing.assert_allclose(stored[: N_ITEMS + 1], shipped.norm(dim=1).numpy(), rtol=1e-5, atol=1e-9)
