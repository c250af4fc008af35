"""Who may import what: rows of rooms, no circles, and heavy packages only where they belong.

Every import statement counts, also inside a function; imports under ``if TYPE_CHECKING:`` do not.

graphhash   nothing of ours above it; the order of GRAPHHASH_ROWS; torch in ``nn`` and ``models`` only
pipeline    graphhash and serving; the rows of PIPELINE_ROWS; mlflow in ``tracking``, click in ``cli``, onnxruntime through serving only
serving     nothing of ours, and none of the packages that only training needs
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("graphhash", "pipeline", "serving")

# From top to bottom. A room imports from itself and from the rows below it, never from a room above or beside it.
PIPELINE_ROWS = (
    ("__main__",),
    ("cli",),
    ("bench", "sweeps", "updates"),
    ("bundles",),
    ("runs",),
    ("retrieval", "ctr"),
    ("reports", "maps"),
    ("training",),
    ("tracking",),
    ("export", "distributed"),
    ("logs",),
    ("task",),
    ("storage", "config"),
    ("progress",),
    ("errors",),
    ("extras",),
    ("__init__",),
)
GRAPHHASH_ROWS = (
    ("__init__",),
    ("precompile",),
    ("models",),
    ("nn",),
    ("maps",),
    ("clustering",),
    ("metrics",),
    ("graph",),
    ("errors",),
)
ROWS = {"pipeline": PIPELINE_ROWS, "graphhash": GRAPHHASH_ROWS}

# Outside packages, and the rooms of ours that may import them. A key of a whole package bans them everywhere in it.
ONLY_IN = {
    "graphhash": {
        "torch": ("nn", "models"),
        **dict.fromkeys(("click", "mlflow", "onnx", "onnxruntime", "pipeline", "ray", "serving"), ()),
    },
    "pipeline": {"click": ("cli",), "mlflow": ("tracking",), "onnxruntime": ()},
    "serving": dict.fromkeys(
        (
            *("click", "graphhash", "matplotlib", "mlflow", "numba", "onnx", "onnxscript", "pandas", "pipeline"),
            *("pyarrow", "ray", "scipy", "torch"),
        ),
        (),
    ),
}


def module_name(path: Path) -> str:
    """``pipeline/cli/main.py`` is ``pipeline.cli.main``, and a package's ``__init__.py`` has the package's name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The room of a module of ours: the second part of its name."""
    return module.split(".")[1] if "." in module else "__init__"


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below ``node`` except those under ``if TYPE_CHECKING:``."""
    for child in ast.iter_child_nodes(node):
        yield child
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield from statements(child)


def is_module(name: str) -> bool:
    """Whether a dotted name is a file or a folder of ours."""
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def imported(path: Path) -> set[str]:
    """Modules that a file imports, wherever in it: ``from a import b`` is a.b where that is a module of ours, else a."""
    modules: set[str] = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = list(path.relative_to(ROOT).parent.parts)
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            inner = {f"{source}.{alias.name}" for alias in node.names}
            modules |= {name if is_module(name) else source for name in inner}
    return modules


@functools.cache
def all_imports() -> dict[str, set[str]]:
    """What every module of ours imports, by its name."""
    files = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {module_name(path): imported(path) for path in files}


def against_rows(module: str, names: set[str]) -> set[str]:
    """Modules of its own package that ``module`` imports from a room above or beside its own."""
    package = module.split(".")[0]
    if package not in ROWS:
        return set()
    row = {room: number for number, rooms in enumerate(ROWS[package]) for room in rooms}
    inner = {name for name in names & all_imports().keys() if name.split(".")[0] == package and name != package}
    own = room_of(module)
    # A room of no row is told by a test of its own.
    return {name for name in inner if room_of(name) != own and row.get(room_of(name), len(row)) <= row.get(own, 0)}


def misplaced(module: str, names: set[str]) -> set[str]:
    """Packages that ``module`` imports although its room must not."""
    package, room = module.split(".")[0], room_of(module)
    tops = {name.split(".")[0] for name in names}
    return {top for top, rooms in ONLY_IN[package].items() if top in tops and room not in rooms}


def circles(imports: dict[str, set[str]]) -> set[frozenset[str]]:
    """The sets of modules that reach each other through imports (strongly connected components of more than one module)."""
    reached = {module: names & imports.keys() - {module} for module, names in imports.items()}
    changed = True
    while changed:
        changed = False
        for module, found in reached.items():
            more = found.union(*(reached[name] for name in found))
            changed |= more != found
            reached[module] = more
    return {
        frozenset(other for other in found if module in reached[other])
        for module, found in reached.items()
        if module in found
    }


def test_all_packages_and_rooms_are_known():
    assert {module.split(".")[0] for module in all_imports()} == set(PACKAGES)
    for package, rows in ROWS.items():
        rooms = {room_of(module) for module in all_imports() if module.split(".")[0] == package}
        assert rooms <= {room for row in rows for room in row}


def test_every_module_imports_only_what_its_room_may():
    broken = {
        (module, name)
        for module, names in all_imports().items()
        for name in against_rows(module, names) | misplaced(module, names)
    }
    assert not broken


def test_no_modules_import_each_other_in_a_circle():
    assert not circles(all_imports())


@pytest.mark.parametrize(
    "line",
    [
        "import torch",
        "from torch.nn import Module",
        "def f():\n    import torch.nn",
        "from graphhash.models import mf",
        "class C:\n    def f(self):\n        from graphhash.models.mf import MatrixFactorization",
        "from ..models import mf",
    ],
)
def test_the_rules_see_an_import_wherever_it_stands(tmp_path, monkeypatch, line):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for file in ("graph/local.py", "models/mf.py"):
        path = tmp_path / "graphhash" / file
        path.parent.mkdir(parents=True)
        path.touch()
    path = tmp_path / "graphhash" / "graph" / "local.py"
    path.write_text(line)
    names = imported(path)
    assert misplaced("graphhash.graph.local", names) | against_rows("graphhash.graph.local", names)


def test_imports_for_type_checking_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "graphhash").mkdir()
    path = tmp_path / "graphhash" / "graph.py"
    path.write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\nimport numpy")
    assert imported(path) == {"typing", "numpy"}


@pytest.mark.parametrize(
    ("imports", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"a"}, "c": {"a"}}, ["ab"]),
        ({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}, ["abc"]),
        ({"a": {"b"}, "b": {"a"}, "c": {"d"}, "d": {"c", "a"}}, ["ab", "cd"]),
    ],
    ids=["none", "of two", "of three", "two circles"],
)
def test_circles_are_found(imports, expected):
    assert circles(imports) == {frozenset(modules) for modules in expected}


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
            "torch ray mlflow numba numpy onnxruntime pyarrow scipy serving",
        ),
        (
            "from pipeline.cli.main import app\n"
            "with contextlib.redirect_stdout(io.StringIO()): app.main(['--help'], standalone_mode=False)",
            "torch ray mlflow numba numpy onnxruntime pyarrow scipy serving graphhash.graph pydantic pandas tqdm",
        ),
        (
            "from pipeline.tracking.tracker import Tracker\nTracker().log_metrics({'loss': 1.0}, step=1)",
            "mlflow sqlalchemy requests",
        ),
        (
            "import pipeline.runs.run, pipeline.retrieval.report, pipeline.tracking.tracker",
            "torch ray mlflow numba onnxruntime matplotlib",
        ),
    ],
    ids=[
        "graphhash without torch",
        "serving",
        "HTTP app",
        "command line",
        "help",
        "no MLflow",
        "run",
    ],
)
def test_import_stays_light(program, absent):
    code = (
        f"import contextlib, io, sys\n{program}\nprint(*[name for name in {absent.split()!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
