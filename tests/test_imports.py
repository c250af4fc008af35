"""Who may import what: imports go one way, and heavy packages stay where they belong.

graphhash   nothing of ours; no ray, mlflow, onnxruntime; torch in the torch half only
pipeline    graphhash and serving; mlflow in `mlflow_store` and `registry` only; onnxruntime only through serving
serving     nothing of ours; fastapi in the HTTP app's modules, which `import serving` leaves alone; never torch, ray, mlflow
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("graphhash", "pipeline", "serving")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
# The modules of graphhash that people use without PyTorch.
CLUSTERING_HALF = {
    "__init__",
    "_kernels",
    "_level_kernels",
    "_map_kernels",
    "_refine_kernels",
    "balanced",
    "buckets",
    "clustering",
    "connected",
    "errors",
    "graph",
    "graph_maps",
    "hashes",
    "hierarchy",
    "interactions",
    "local_graph",
    "merging",
    "quantization",
    "modularity",
    "placement",
    "refinement",
    "row_budget",
    "row_search",
    "vocabulary",
    "weight_codebook",
}


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it, `from a import b` as both a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = list(path.relative_to(ROOT).parent.parts)
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def forbidden(path: Path) -> set[str]:
    package, module = path.relative_to(ROOT).parts[0], path.stem
    if package == "graphhash":
        banned = {"pipeline", "serving", "ray", "mlflow", "onnxruntime"}
        if module in CLUSTERING_HALF:
            banned.add("torch")
            banned |= {
                f"graphhash.{p.stem}" for p in (ROOT / "graphhash").glob("*.py") if p.stem not in CLUSTERING_HALF
            }
        return banned
    if package == "pipeline":
        return {"onnxruntime"} | ({"mlflow"} if module not in ("mlflow_store", "registry") else set())
    return {"graphhash", "pipeline", "mlflow", "ray", "torch", "onnx"}


def test_the_packages_are_there():
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(PACKAGES)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_module_imports_only_what_it_may(path):
    broken = {name for name in imported(path) for ban in forbidden(path) if name == ban or name.startswith(f"{ban}.")}
    assert not broken


@pytest.mark.parametrize("line", ["import torch", "from torch.nn import Module", "def f():\n    import torch.nn"])
def test_the_rule_sees_an_import_wherever_it_stands(tmp_path, monkeypatch, line):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "graphhash").mkdir()
    path = tmp_path / "graphhash" / "graph.py"
    path.write_text(line)
    assert any(name.split(".")[0] == "torch" for name in imported(path)) and "torch" in forbidden(path)


@pytest.mark.parametrize(
    ("program", "absent"),
    [
        (
            "import graphhash; graphhash.cluster, graphhash.soft_maps",
            "torch ray mlflow onnxruntime pipeline serving",
        ),
        (
            "import serving.bundle, serving.retriever",
            "torch ray mlflow onnx scipy numba pyarrow pandas fastapi prometheus_client graphhash pipeline",
        ),
        ("import serving.http.app", "torch ray mlflow onnx scipy numba pyarrow pandas graphhash pipeline"),
        (
            "import pipeline.cli.main, pipeline.config.run_config",
            "torch ray mlflow numba numpy onnxruntime pyarrow graphhash serving",
        ),
        (
            "import pipeline.runs.run, pipeline.retrieval.report, pipeline.tracking.tracker",
            "torch ray mlflow numba onnxruntime matplotlib",
        ),
    ],
    ids=["clustering half", "serving", "HTTP app", "command line", "run"],
)
def test_import_stays_light(program, absent):
    code = f"{program}\nimport sys\nprint(*[name for name in {absent.split()!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
