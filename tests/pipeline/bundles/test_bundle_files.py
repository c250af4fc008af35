"""Bundles in other people's hands: damaged files are refused or answer as before, and fixed requests have fixed answers."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from graphhash.graph.vocabulary import Vocabulary
from pipeline.bench.serving import BenchOptions, as_markdown, bench, draw
from pipeline.bundles.check import check
from pipeline.export.graph import Graph
from pipeline.export.ids import decode_ids, encode_ids, stored_ids
from serving import BundleError, Retriever
from tests.helpers.small_models import INT_IDS, STRING_IDS, small_model
from tests.helpers.tampering import rewrite

# GRAPHHASH_FUZZ=2000 damages so many bundles; the default suits a suite that runs often.
ROOT = Path(__file__).resolve().parents[3]
N_DAMAGED = int(os.environ.get("GRAPHHASH_FUZZ", 400))
USERS = ["", "a", "日本", "nobody"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    small_model(users="string", n_users=9, n_items=12, n_buckets=4).export(folder, external_data_mib=0.0001)
    return folder


def answer(folder: Path) -> tuple:
    loaded = Retriever(folder, provider="cpu", threads=1)
    got, scored = loaded.recommend(USERS, 5), loaded.score(USERS, [[3, 55]] * 4)
    return (
        [ids.tolist() for ids in got.item_ids],
        [s.tolist() for s in got.scores],
        got.known.tolist(),
        scored.scores.tolist(),
    )


def mutate(folder: Path, rng: np.random.Generator) -> None:
    """One random thing that happens to files: bytes change, or are cut, added, moved; files go, come, and change places."""
    names = sorted(path.name for path in folder.iterdir())
    path = folder / names[rng.integers(len(names))]
    data = bytearray(path.read_bytes())
    kind = rng.integers(9)
    if kind <= 2:
        for position in rng.integers(0, len(data), rng.integers(1, 9)):
            data[position] = rng.integers(256)
    elif kind == 3:
        data = data[: rng.integers(len(data))]
    elif kind == 4:
        data += bytes(rng.integers(0, 256, rng.integers(1, 40)).tolist())
    elif kind == 5:
        start, stop = np.sort(rng.integers(0, len(data), 2))
        data[start:stop] = bytes(rng.integers(0, 256, rng.integers(0, 9)).tolist())
    elif kind == 6:
        other = folder / names[rng.integers(len(names))]
        data, swapped = bytearray(other.read_bytes()), bytes(data)
        other.write_bytes(swapped)
    elif kind == 7:
        path.rename(folder / f"{path.name}{rng.integers(3)}")
        return
    else:
        text = (folder / "manifest.json").read_text()
        words = text.split('"')
        at = rng.integers(len(words))
        words[at] = words[rng.integers(len(words))]
        path, data = folder / "manifest.json", bytearray('"'.join(words).encode())
    path.write_bytes(data)


def test_damaged_bundles_are_refused_or_answer_as_before(exported, tmp_path):
    expected, rng, n_accepted = answer(exported), np.random.default_rng(0), 0
    originals = {path.name: path.read_bytes() for path in exported.iterdir()}
    folder = tmp_path / "bundle"
    folder.mkdir()
    for _ in range(N_DAMAGED):
        for path in folder.iterdir():
            path.unlink()
        for name, data in originals.items():
            (folder / name).write_bytes(data)
        mutate(folder, rng)
        got, reason = None, ""
        try:
            got = answer(folder)
        except BundleError as error:
            reason = str(error)
        assert "\n" not in reason
        assert reason or got == expected
        n_accepted += not reason
    # A byte may be written as it was, and words may change places with themselves.
    assert n_accepted < 0.2 * N_DAMAGED


def test_golden_requests_have_their_answers(exported):
    """Written down once from the obvious loop; a format or a graph that answers otherwise has changed its meaning."""
    ids, scores, known, candidates = answer(exported)
    assert known == [True, True, True, False]
    golden = json.loads((Path(__file__).parent / "golden_requests.json").read_text())
    assert [ids, scores, candidates] == [golden["item_ids"], golden["scores"], golden["candidate_scores"]]


VOCABULARIES = {
    "boundaries of int64": INT_IDS,
    "strings": STRING_IDS,
    "in a row": range(5, 25),
    "in a row to the last number": [2**63 - 3, 2**63 - 2, 2**63 - 1],
    "in a row from the first number": [-(2**63), -(2**63) + 1],
    "with gaps, in any order": [40, 3, 17, 4, 5, 30, 29],
    "around zero": [-3, -1, 0, 2],
    "far apart": [0, 10**12],
    "one": [7],
}


@pytest.mark.parametrize("ids", VOCABULARIES.values(), ids=VOCABULARIES.keys())
def test_the_graph_numbers_ids_as_the_vocabulary_does(ids):
    import onnxruntime

    vocabulary = Vocabulary(list(ids) if isinstance(ids[0], str) else np.array(list(ids)))
    kind = {"int64": onnx.TensorProto.INT64, "string": onnx.TensorProto.STRING}[vocabulary.kind]
    graph = Graph()
    row = encode_ids(graph, "user", vocabulary, "raw")
    graph.node("Min", [row, graph.constant("last_row", np.int64(len(vocabulary) - 1))], "known_row")
    decode_ids(graph, "decoded", vocabulary, "known_row")
    value = onnx.helper.make_tensor_value_info
    outputs = [value("user", onnx.TensorProto.INT64, ["n"]), value("decoded", kind, ["n"])]
    model = graph.model("ids", [value("raw", kind, ["n"])], outputs)
    onnx.checker.check_model(model, full_check=True)
    assert stored_ids(model, "user").tolist() == list(ids)
    if vocabulary.kind == "int64":
        others = [
            -(2**63),
            2**63 - 1,
            0,
            -1,
            1,
            *(np.array(list(ids)) - 1).tolist(),
            *(np.array(list(ids)) + 1).tolist(),
        ]
    else:
        others = ["", " a", "a\0", "日", "z" * 400, "é"]
    asked = [*ids, *others]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    raw = np.array(asked, np.int64 if vocabulary.kind == "int64" else object)
    rows, decoded = session.run(None, {"raw": raw})
    assert rows.tolist() == vocabulary.rows(asked, missing="fallback").tolist()
    assert decoded[: len(ids)].tolist() == list(ids)


def test_check_explains_a_good_bundle(exported):
    found = {finding.what: finding.text for finding in check(exported, "cpu")}
    assert "trial request" in found
    assert "12 items" in found["trial request"]
    assert found["ids"] == "9 users and 12 items, each once"
    assert "CPUExecutionProvider 100 %" in found["provider"]
    assert "users read 3 of 4 rows, uint16" in found["maps"]


def resign(folder: Path, name: str, data: bytes) -> None:
    """Put a file in and give the manifest valid hashes, as somebody with bad intent would."""
    (folder / name).write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(folder, lambda manifest: manifest["files"].update({name: entry}))


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("item_rows", 9, "item_rows spans 0..9, there are 4 rows"),
        ("user_codes", 255, "user_codes spans"),
        ("item_table", np.nan, "'item_table' holds nan"),
    ],
)
def test_check_names_what_is_wrong_inside(tensor, value, message, tmp_path):
    small_model(users="string", n_users=9, n_items=12, n_buckets=4).export(tmp_path / "bundle")
    model = onnx.load(tmp_path / "bundle" / "model.onnx")
    stored = next(t for t in model.graph.initializer if t.name == tensor)
    array = onnx.numpy_helper.to_array(stored).copy()
    array.flat[0] = value
    stored.CopyFrom(onnx.numpy_helper.from_array(array, tensor))
    resign(tmp_path / "bundle", "model.onnx", model.SerializeToString())
    with pytest.raises(BundleError, match=message):
        list(check(tmp_path / "bundle", "cpu"))


def test_the_benchmark_measures_time_memory_and_placement(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "b")
    results = bench(
        exported,
        tmp_path / "b",
        options=BenchOptions("cpu", threads=1, k=3, n_requests=5, batch_sizes=(1, 4)),
    )
    assert [size["batch"] for size in results[0]["sizes"]] == [1, 4]
    assert len(results) == 2
    for entry in results:
        assert entry["disk_bytes"] == sum(path.stat().st_size for path in exported.iterdir())
        assert set(entry["memory"]) == {"loaded", "after 1", "after 256"}
        assert entry["memory"]["loaded"] > 0
        assert entry["providers"]["CPUExecutionProvider"] > 20
        assert all(0 < size["p50_ms"] <= size["p95_ms"] <= size["p99_ms"] for size in entry["sizes"])
    assert as_markdown(results).count("\n| 4 |") == 2
    draw(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


SPOILED = """
import sys
from pathlib import Path
from pipeline.__main__ import main
from pipeline.bundles import check_retrieval

folder, trial = Path(sys.argv[2]), check_retrieval.trial_request

def spoiled(loaded, known):
    # In place, as rsync --inplace or a copy over the folder does it.
    for file in folder.iterdir():
        with open(file, "r+b") as opened:
            opened.truncate(10)
    return trial(loaded, known)

check_retrieval.trial_request = spoiled
main()
"""


def test_a_bundle_that_is_cut_while_it_is_checked_is_told_in_one_line(tmp_path):
    """Run in a process of its own: before, it died of SIGBUS, because ONNX Runtime had mapped what was cut."""
    small_model(n_items=3000).export(tmp_path / "bundle", external_data_mib=0.0001)
    command = [sys.executable, "-c", SPOILED, "check", str(tmp_path / "bundle"), "--provider", "cpu"]
    got = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert got.returncode == 1, got.stderr
    assert got.stderr == (
        f"graphhash: error: {tmp_path / 'bundle'}: changed while it was checked; check it again once nothing writes to it\n"
    )
    assert "ok  trial request" in got.stdout
