"""The GPU check runs on a CPU, where all comparisons agree, and says in one line where there is no GPU."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch

from pipeline.bench.gpu import parity, speed
from pipeline.bench.gpu.__main__ import main, publish
from pipeline.bench.gpu.data import SMALL, CtrData, Data
from pipeline.bench.gpu.parity import TOLERANCE, Comparison, relative_difference
from pipeline.bench.gpu.speed import CTR_BATCH, MAPS, RETRIEVAL, Result, Training, ctr_bytes, measure, trainings
from pipeline.bench.gpu.tables import NO_MEMORY, write_page
from pipeline.ctr.models import CTR_MODELS, CTR_PRESETS
from pipeline.maps.methods import METHODS
from pipeline.retrieval.presets import PRESETS

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "experiments" / "gpu.md"
# What a machine with a GPU has, beside what these require.
THERE = ("torch", "numpy", "scipy", "numba", "pyarrow")
OURS = {"graphhash", "pipeline", "serving"}


def test_the_whole_check_on_a_cpu(tmp_path, capsys):
    shutil.copy(PAGE, tmp_path / "gpu.md")
    options = ["--json", str(tmp_path / "gpu.json"), "--page", str(tmp_path / "gpu.md")]
    assert main(["--device", "cpu", "--small", *options]) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    compared = {(line["part"], line["name"]) for line in report["parity"]}
    assert compared >= {("model and loss", f"{model}, {loss}") for model, loss in PRESETS}
    assert compared >= {("map", name) for name in METHODS}
    assert compared >= {("CTR model", f"{name}, {table}") for name in CTR_MODELS for table in MAPS}
    assert compared >= {("optimizer", name) for name in ("full", "soft")}
    assert all(line["passed"] for line in report["parity"])
    assert {line["model"] for line in report["speed"]} == {
        *(f"{model}, {loss}" for model, loss, _ in RETRIEVAL),
        "dlrm",
    }
    assert all(line["per_second"] > 0 and line["bound_share"] > 0 for line in report["speed"])
    assert report["onnx_runtime"]["same_items"] == 1
    page = (tmp_path / "gpu.md").read_text()
    assert "| mf, softmax | soft | float32 |" in page
    assert "No figures yet." not in page
    assert capsys.readouterr().out in page + "\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_that_it_is_skipped(capsys):
    assert main([]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "skipped" in line


def absent() -> list[str]:
    """Modules of all installed distributions but those of a machine with a GPU."""
    kept: set[str] = set()
    waiting = list(THERE)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name not in kept:
            kept.add(name)
            with suppress(metadata.PackageNotFoundError):
                wanted = [r for r in metadata.requires(name) or () if "extra ==" not in r]
                waiting += [re.match(r"[\w.-]+", requirement).group() for requirement in wanted]
    found = metadata.packages_distributions().items()
    return sorted(
        module
        for module, names in found
        if module not in OURS and not any(re.sub(r"[-_.]+", "-", name).lower() in kept for name in names)
    )


def test_it_imports_nothing_but_the_numerical_packages():
    assert {"click", "mlflow", "onnx", "onnxruntime", "pandas", "pydantic", "ray", "tqdm"} <= set(absent())
    code = (
        "import sys\n"
        f"sys.modules |= dict.fromkeys({absent()!r})\n"
        "import pipeline.bench.gpu.parity, pipeline.bench.gpu.speed, pipeline.bench.gpu.tables\n"
        "from pipeline.bench.gpu import bundles, data\n"
        "print(bundles.compare_runtimes(data.Data.draw(data.SMALL), 8, 'cpu'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "skipped" in done.stdout


def test_a_difference_a_nan_and_an_error_fail(capsys, tmp_path):
    one = torch.ones(4)
    assert relative_difference(one, one) == 0
    assert relative_difference(one, one * (1 + 2 * TOLERANCE)) == pytest.approx(2 * TOLERANCE, rel=1e-2)
    assert relative_difference(one, one * torch.nan) == float("inf")
    assert relative_difference(one, 2 * one, least=4.0) == pytest.approx(0.5)
    assert relative_difference(one, 2 * one, least=1.0) == pytest.approx(1.0)
    assert not Comparison("map", "soft", 2 * TOLERANCE, "loss").passed
    assert not Comparison("map", "soft", None, "RuntimeError: x").passed
    failed = Result("mf, bpr", "full", "float32", 8, 0, error=NO_MEMORY)
    report = {
        "machine": {"device": "d", "torch": "2", "bandwidth_gb_s": 1.0}, "commit": "c", "date": "d", "seconds": 1.0,
        "parity": [Comparison("map", "soft", None, "RuntimeError: x").to_json()], "speed": [failed.to_json()],
        "onnx_runtime": {"skipped": "x"}, "errors": [],
    }  # fmt: skip
    assert publish(report, None) == 1
    assert "| map | soft | - | RuntimeError: x |" in capsys.readouterr().out
    assert publish(report | {"parity": []}, None) == 0
    failed = replace(failed, error="RuntimeError: no kernel").to_json()
    assert publish(report | {"parity": [], "speed": [failed]}, None) == 1
    (tmp_path / "page.md").write_text("no marker")
    with pytest.raises(ValueError, match="has no lines"):
        write_page(tmp_path / "page.md", "x")


def test_what_breaks_off_loses_nothing_of_the_rest(monkeypatch, tmp_path, capsys):
    def compare(device):
        yield Comparison("map", "soft", 0.0, "loss")
        raise OSError("the device is gone")

    def trainings(*_):
        raise AssertionError("no table")

    monkeypatch.setattr(parity, "compare_all", compare)
    monkeypatch.setattr(speed, "trainings", trainings)
    file = tmp_path / "gpu.json"
    assert main(["--device", "cpu", "--small", "--json", str(file)]) == 1
    report = json.loads(file.read_text())
    assert [line["passed"] for line in report["parity"]] == [True]
    assert [error["error"] for error in report["errors"]] == ["OSError: the device is gone", "AssertionError: no table"]
    assert "in compare" in report["errors"][0]["trace"]
    assert report["onnx_runtime"]["same_items"] == 1
    text = capsys.readouterr().out
    assert "Parity with the CPU: 1 of 1 comparisons agree" in text
    assert "Broken off: speed, by AssertionError: no table." in text


def test_a_training_that_fails_is_told_with_its_traceback():
    def make():
        raise TypeError("no such map")

    training = Training("mf, bpr", "soft", make, [torch.arange(8)], 4, lambda *_: None, lambda *_: 0)
    result = measure(training, torch.device("cpu"), None, 0.1, 1.0)
    assert (result.error, result.per_second) == ("TypeError: no such map", None)
    assert "in make" in result.trace


def test_the_bound_counts_adam_and_the_rows_that_are_read():
    data = Data.draw(SMALL)
    found = {
        training.name: training for training in trainings(data, SMALL, torch.device("cpu")) if training.map == "full"
    }
    model = found["mf, bpr"].make()
    n_parameters = (SMALL.n_users + SMALL.n_items + 2) * SMALL.dim
    # Batches of 10: 30 vectors of SMALL.dim numbers, read and added to.
    assert found["mf, bpr"].moved_bytes(model, 10) == 32 * n_parameters + 2 * 4 * SMALL.dim * 30
    samples = CtrData.draw(data, 10)
    ctr = CTR_PRESETS["dlrm"].spec("dlrm", "full", 0, dim=4).build(samples.maps(*data.maps("full")), 3, 1)
    n_trained = sum(parameter.numel() for parameter in ctr.parameters())
    # Three columns of one value and one of four.
    assert ctr_bytes(ctr, 10) == 32 * n_trained + 2 * 4 * 4 * 10 * 7
    assert found["dlrm"].n_per_step == min(CTR_BATCH, SMALL.n_samples)
