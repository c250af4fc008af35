"""Bundles of format 4, which an earlier version has written, are still loaded and answer the same."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import serving
from pipeline.bundles.check import check
from tests.helpers.small_ctr import export_small, small_ctr
from tests.helpers.small_models import small_model

FORMER = Path(__file__).parent / "format_4"


@pytest.fixture
def former(tmp_path) -> Path:
    return Path(shutil.copytree(FORMER, tmp_path / "former"))


def test_a_retrieval_bundle_of_format_4_answers(former):
    retriever = serving.open_bundle(former / "retrieval", provider="cpu")
    assert retriever.manifest["format_version"] == 4
    got = retriever.recommend(["", "a", "nobody"], 4, [[3], [], []])
    assert [ids.tolist() for ids in got.item_ids] == [
        [-(2**63), 2**31, -7, -1],
        [2**53 + 1, 2**63 - 1, 0, 3],
        [2**53 + 1, 3, 0, 2**63 - 1],
    ]
    assert [row.tolist() for row in got.scores] == [
        [1.25, -0.5, -1.25, -3.5],
        [24.25, 14.25, 13.75, 13.5],
        [12.0, 8.0, 6.0, 6.0],
    ]
    scored = retriever.score(["a"], [[3, 12, 999]])
    assert scored.scores.tolist() == [[13.5, 0.25, -6.0]]
    assert scored.known_items.tolist() == [[True, True, False]]


def test_a_ctr_bundle_of_format_4_answers(former):
    scorer = serving.open_bundle(former / "ctr", provider="cpu")
    rows = {name: [None] for name in scorer.columns} | {"user": ["u1"], "item": [12]}
    np.testing.assert_allclose(scorer.predict(rows), [0.703385591506958], rtol=1e-6)


@pytest.mark.parametrize("task", ["retrieval", "ctr"])
def test_a_bundle_of_format_4_passes_the_check(former, task):
    assert [f.what for f in check(former / task, "cpu")][-1] == "provider"


@pytest.mark.parametrize("task", ["retrieval", "ctr"])
def test_onnxruntime_loads_and_runs_a_bundle_without_a_warning(task, tmp_path):
    small_model(maps="soft").export(tmp_path / "b") if task == "retrieval" else export_small(
        small_ctr(), tmp_path / "b"
    )
    # With ONNX Runtime's default of warnings on standard error.
    program = "import onnxruntime, sys; onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])"
    run = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "b" / "model.onnx"], capture_output=True, check=True
    )
    assert (run.stdout, run.stderr) == (b"", b"")
