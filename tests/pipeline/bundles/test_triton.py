"""The Triton model repository: its configuration against the ONNX inputs and outputs, and answers as Triton asks."""

from __future__ import annotations

import itertools
import re

import numpy as np
import onnx
import onnxruntime
import pytest

from pipeline.bundles.triton import write_triton
from pipeline.cli import main as cli
from serving import BundleError, Retriever, Scorer
from tests.helpers.small_ctr import export_small, raw_log, small_ctr
from tests.helpers.small_models import INT_IDS, STRING_IDS, naive_answer, small_model

NUMPY = {
    "TYPE_INT64": np.int64,
    "TYPE_STRING": object,
    "TYPE_FP32": np.float32,
    "TYPE_FP64": np.float64,
    "TYPE_BOOL": np.bool_,
}
ONNX = {
    "TYPE_INT64": "tensor(int64)",
    "TYPE_STRING": "tensor(string)",
    "TYPE_FP32": "tensor(float)",
    "TYPE_FP64": "tensor(double)",
    "TYPE_BOOL": "tensor(bool)",
}


def parse_pbtxt(text: str) -> dict:
    """Protobuf text format as {field: [values]}: messages are dicts, lists of a field are joined."""
    tokens = re.findall(r'"(?:[^"\\]|\\.)*"|[A-Za-z_]\w*|-?\d+|[{}\[\]:,]', text)
    assert "".join(tokens) == re.sub(r'("(?:[^"\\]|\\.)*")|\s', r"\1", text)
    position = 0

    def value():
        nonlocal position
        token = tokens[position]
        if token == "{":
            position += 1
            return message("}")
        position += 1
        if token[0] == '"':
            return token[1:-1]
        return int(token) if re.fullmatch(r"-?\d+", token) else token

    def message(end: str | None) -> dict:
        nonlocal position
        fields: dict[str, list] = {}
        while position < len(tokens) and tokens[position] != end:
            name = tokens[position]
            assert re.fullmatch(r"[A-Za-z_]\w*", name)
            position += 1
            colon = tokens[position] == ":"
            position += colon
            found = fields.setdefault(name, [])
            if tokens[position] != "[":
                assert colon or tokens[position] == "{"
                found.append(value())
                continue
            position += 1
            while tokens[position] != "]":
                found.append(value())
                assert tokens[position] in (",", "]")
                position += tokens[position] == ","
            position += 1
        position += 1
        return fields

    return message(None)


def model_shape(tensor: dict) -> list[int]:
    """What the model gets of a tensor, by Triton's rules: the batch, then the dims or what they are reshaped to."""
    (reshape,) = tensor.get("reshape", [{"shape": tensor["dims"]}])
    assert np.prod([d for d in tensor["dims"] if d > 0]) == np.prod([d for d in reshape["shape"] if d > 0])
    return [-1, *reshape["shape"]]


class AsTriton:
    """Runs a model folder as the server does: configured tensors in, batch first, requests joined, answers split."""

    def __init__(self, folder):
        self.config = parse_pbtxt((folder / "config.pbtxt").read_text())
        (file,) = self.config["default_model_filename"]
        self.session = onnxruntime.InferenceSession(str(folder / "1" / file), providers=["CPUExecutionProvider"])

    def infer(self, *requests: dict[str, list]) -> list[dict[str, np.ndarray]]:
        arrays = []
        for request in requests:
            arrays.append({})
            for tensor in self.config["input"]:
                array = np.array(request[tensor["name"][0]], NUMPY[tensor["data_type"][0]])
                assert array.ndim == 1 + len(tensor["dims"])
                assert all(d in (-1, n) for d, n in zip(tensor["dims"], array.shape[1:], strict=True))
                arrays[-1][tensor["name"][0]] = array
        sizes = [len(next(iter(request.values()))) for request in arrays]
        assert sum(sizes) <= self.config["max_batch_size"][0]
        feed = {
            tensor["name"][0]: np.concatenate([request[tensor["name"][0]] for request in arrays]).reshape(
                [sum(sizes), *model_shape(tensor)[1:]]
                if -1 not in model_shape(tensor)[1:]
                else [sum(sizes), len(arrays[0][tensor["name"][0]][0])]
            )
            for tensor in self.config["input"]
        }
        names = [tensor["name"][0] for tensor in self.config["output"]]
        outputs = dict(zip(names, self.session.run(names, feed), strict=True))
        for tensor in self.config["output"]:
            array = outputs[tensor["name"][0]]
            assert array.dtype == NUMPY[tensor["data_type"][0]]
            assert all(d in (-1, n) for d, n in zip(model_shape(tensor), array.shape, strict=True))
        bounds = np.cumsum([0, *sizes])
        return [{name: array[a:b] for name, array in outputs.items()} for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("gpu", [False, True], ids=["CPU", "GPU"])
@pytest.mark.parametrize(
    "options", [{}, {"users": "string", "items": "string"}, {"maps": "full", "items": "string"}], ids=str
)
def test_configuration_agrees_with_the_model(options, gpu, tmp_path):
    small_model(**options).export(tmp_path / "bundle")
    folders = write_triton(tmp_path / "bundle", tmp_path / "models", k=7, gpu=gpu, max_batch_size=64)
    assert [folder.name for folder in folders] == ["graphhash", "graphhash_score"]
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"graphhash", "graphhash_score"}
    for folder in folders:
        config = parse_pbtxt((folder / "config.pbtxt").read_text())
        assert (config["name"], config["backend"], config["max_batch_size"]) == ([folder.name], ["onnxruntime"], [64])
        assert config["instance_group"] == [{"count": [1], "kind": ["KIND_GPU" if gpu else "KIND_CPU"]}]
        assert len(config["dynamic_batching"]) == 1
        session = AsTriton(folder).session
        for side, nodes in (("input", session.get_inputs()), ("output", session.get_outputs())):
            stated = {t["name"][0]: (ONNX[t["data_type"][0]], model_shape(t)) for t in config[side]}
            actual = {n.name: (n.type, [d if isinstance(d, int) else -1 for d in n.shape]) for n in nodes}
            assert stated == actual
        assert not session.get_overridable_initializers()


@pytest.mark.parametrize("runtime", ["materialized", "compressed"])
@pytest.mark.parametrize(("kind", "ids", "unknown"), [("int64", INT_IDS, -99), ("string", STRING_IDS, "nobody")])
def test_answers_are_the_bundles_own_whoever_shares_the_batch(kind, ids, unknown, runtime, tmp_path):
    small = small_model(users=kind, items=kind)
    padding = small.export(tmp_path / "bundle", runtime=runtime)["padding_item_id"]
    recommend, score = map(AsTriton, write_triton(tmp_path / "bundle", tmp_path / "models", k=50))
    users = [*ids, unknown]
    requests = [{"user_id": [[user]], "exclude_item_id": [[ids[n % 9], padding]]} for n, user in enumerate(users)] + [
        {"user_id": [[ids[0]], [ids[1]]], "exclude_item_id": [[padding, padding], [ids[2], ids[3]]]}
    ]
    for request, answer in zip(requests, recommend.infer(*requests), strict=True):
        for (user,), exclude, item_ids, scores, known in zip(
            request["user_id"],
            request["exclude_item_id"],
            answer["item_id"],
            answer["score"],
            answer["known"],
            strict=True,
        ):
            expected = naive_answer(small, user, 23, exclude)
            n_left = len(expected[0])
            assert (item_ids.tolist()[:n_left], scores.tolist()[:n_left], known) == expected
            assert len(item_ids) == 23
            assert np.isneginf(scores[n_left:]).all()
    asked = [{"user_id": [[user]], "candidate_item_id": [[ids[3], unknown, ids[0]]]} for user in users]
    retriever = Retriever(tmp_path / "bundle", provider="cpu")
    for request, answer in zip(asked, score.infer(*asked), strict=True):
        expected = retriever.score(request["user_id"][0], request["candidate_item_id"])
        assert answer["candidate_score"].tolist() == expected.scores.tolist()
        assert answer["known"].tolist() == expected.known.tolist()
        assert answer["candidate_known"].tolist() == [[True, False, True]]


@pytest.mark.parametrize("gpu", [False, True], ids=["CPU", "GPU"])
def test_a_click_models_columns_are_tensors_whose_rows_are_joined(gpu, tmp_path):
    manifest = export_small(small_ctr(), tmp_path / "bundle")
    (folder,) = write_triton(tmp_path / "bundle", tmp_path / "models", name="clicks", gpu=gpu, max_batch_size=64)
    served, scorer = AsTriton(folder), Scorer(tmp_path / "bundle", provider="cpu")
    for side, nodes in (("input", served.session.get_inputs()), ("output", served.session.get_outputs())):
        stated = {t["name"][0]: (ONNX[t["data_type"][0]], model_shape(t)) for t in served.config[side]}
        assert stated == {n.name: (n.type, [d if isinstance(d, int) else -1 for d in n.shape]) for n in nodes}
    n_categorical = sum(column["role"] == "categorical" for column in manifest["columns"])
    assert [t["dims"] for t in served.config["output"]] == [[1], [1], [n_categorical]]
    log = raw_log(20)
    tensors = scorer.tensors(log)
    rows = [
        {name: values[[i]] if values.ndim == 2 else values[[i], None] for name, values in tensors.items()}
        for i in range(20)
    ]
    expected = scorer.details(log)
    for row, answer in enumerate(served.infer(*rows)):
        assert answer["probability"][0] == pytest.approx(expected.probabilities[row], rel=1e-5)
        assert answer["logit"][0] == pytest.approx(expected.logits[row], rel=1e-5, abs=1e-6)
        assert answer["known"][0].tolist() == [of_column[row] for of_column in expected.known.values()]


def test_what_a_model_does_not_need_is_left_out_and_external_data_comes_along(tmp_path):
    small = small_model(items="string", n_items=300, n_buckets=100)
    small.export(tmp_path / "bundle", external_data_mib=0.001)
    recommend, score = write_triton(tmp_path / "bundle", tmp_path / "models", k=5)
    assert sorted(path.name for path in (recommend / "1").iterdir()) == ["model.onnx", "model.onnx.data"]
    item = AsTriton(recommend).infer({"user_id": [[3]], "exclude_item_id": [["?"]]})[0]["item_id"][0].tolist()
    assert item == naive_answer(small, 3, 5, [])[0]
    graph = onnx.load(score / "1" / "model.onnx", load_external_data=False).graph
    assert not {node.op_type for node in graph.node} & {"TopK", "Gemm", "ScatterElements"}
    assert "item_ids" not in {tensor.name for tensor in graph.initializer}


def test_a_second_writing_replaces_the_first_and_nothing_else(tmp_path):
    small_model().export(tmp_path / "bundle")
    (tmp_path / "models" / "other").mkdir(parents=True)
    for k in (5, 6):
        write_triton(tmp_path / "bundle", tmp_path / "models", k=k)
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["graphhash", "graphhash_score", "other"]
    assert "dims: [ 6 ]" in (tmp_path / "models" / "graphhash" / "config.pbtxt").read_text()
    with pytest.raises(BundleError, match="is no Triton model"):
        write_triton(tmp_path / "bundle", tmp_path / "models", name="other")
    with pytest.raises(ValueError, match=r"the model's name is '../up'"):
        write_triton(tmp_path / "bundle", tmp_path / "models", name="../up")
    with pytest.raises(BundleError, match="no bundle there"):
        write_triton(tmp_path, tmp_path / "models")


def test_the_command_says_where_the_models_are(tmp_path, capsys):
    small_model().export(tmp_path / "bundle")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["triton", str(tmp_path / "bundle"), str(tmp_path / "models"), "--name", "shop", "-k", "3", "--gpu"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.splitlines() == [
        f"Triton model: {tmp_path / 'models' / name}" for name in ("shop", "shop_score")
    ]
