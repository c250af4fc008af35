"""Packages by extra: what each brings, and the one line that a missing one gives."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pipeline.extras import EXTRAS, remedy
from tests.helpers.small_models import small_model
from tests.test_imports import PACKAGES, all_imports

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Modules that packages of an extra bring along, and modules that work without: there is code for both cases.
BROUGHT_ALONG = {"requests", "sqlalchemy", "starlette"}
OPTIONAL = {"faiss", "igraph", "networkit", "sknetwork", "uvloop"}


def packages(requirements: list[str]) -> set[str]:
    """Names of the packages that requirements bring, those of the extras that they name among them."""
    names: set[str] = set()
    for requirement in requirements:
        name, extras = re.fullmatch(r"([\w-]+)(?:\[([^\]]*)\])?.*", requirement).groups()
        if name == PROJECT["name"]:
            for extra in extras.split(","):
                names |= packages(PROJECT["optional-dependencies"][extra])
        else:
            names.add(name.replace("-", "_"))
    return names


def of(extra: str) -> set[str]:
    return packages(PROJECT["optional-dependencies"][extra])


def test_the_library_needs_three_packages():
    assert packages(PROJECT["dependencies"]) == {"numba", "numpy", "scipy"}


def test_serving_has_neither_torch_nor_ray():
    assert not of("serve") & {"torch", "ray", "mlflow", "pyarrow", "onnx", "pandas"}
    assert {"fastapi", "uvicorn", "httptools", "onnxruntime", "click"} <= of("serve")


def test_no_extra_brings_both_runtimes_on_one_machine():
    for extra, requirements in PROJECT["optional-dependencies"].items():
        text = " ".join(requirements)
        both = {"onnxruntime", "onnxruntime_gpu"} <= of(extra)
        assert not both or extra in ("serve-gpu", "train-gpu", "all"), extra
        if "onnxruntime-gpu" in text:
            assert "onnxruntime-gpu>=1.22; sys_platform == 'linux' and platform_machine == 'x86_64'" in requirements
            assert "onnxruntime>=1.22; sys_platform != 'linux' or platform_machine != 'x86_64'" in requirements


def test_all_brings_every_extra_that_commands_need():
    wanted = set().union(*(of(extra) for extra in ("serve", "train", "ray", "mlflow", "storage")))
    assert wanted <= of("all")
    assert 'call install,".[all]"' in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_every_imported_package_is_a_dependency_or_has_an_extra():
    base = packages(PROJECT["dependencies"])
    used = {name.partition(".")[0] for names in all_imports().values() for name in names}
    others = used - set(PACKAGES) - set(sys.stdlib_module_names) - base - OPTIONAL - {"__future__"}
    assert others - EXTRAS.keys() - BROUGHT_ALONG == set()
    for module, extra in EXTRAS.items():
        assert module in of(extra) | BROUGHT_ALONG, f"{extra} does not bring {module}"


def test_python_versions_are_those_of_the_classifiers():
    versions = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    assert versions == ["3.11", "3.12", "3.13", "3.14"]
    assert PROJECT["requires-python"] == ">=3.11,<3.15"


def without(modules: list[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run Python where these packages are not installed."""
    block = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {modules!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""
    return subprocess.run(
        [sys.executable, "-c", block + code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("missing", "arguments", "line"),
    [
        ("click", ["--help"], "click is not installed; pip install 'graphhash[train]'"),
        ("onnxruntime", ["serve", "nothing"], "onnxruntime is not installed; pip install 'graphhash[serve]'"),
        ("onnx", ["check", "nothing"], "onnx is not installed; pip install 'graphhash[train]'"),
        ("pyarrow", ["recommend", "s3://a/b", "--user-id", "3"], "pyarrow is not installed; pip install 'graphhash[storage]'"),
        ("fastapi", ["serve", "nothing"], "fastapi is not installed; pip install 'graphhash[serve]'"),
        ("pydantic", ["status", "nothing"], "pydantic is not installed; pip install 'graphhash[train]'"),
    ],
)  # fmt: skip
def test_a_command_names_the_extra_that_it_needs(missing, arguments, line):
    got = without([missing], f"sys.argv = ['graphhash', *{arguments!r}]\nfrom pipeline.__main__ import main\nmain()")
    assert got.returncode == 1
    assert got.stderr.strip() == f"graphhash: error: {line}, or graphhash[all] for everything"


@pytest.mark.parametrize(
    ("missing", "name", "extra"),
    [("torch", "graphhash.BucketEmbedding", "train"), ("pyarrow", "graphhash.Vocabulary", "storage"),
     ("onnxruntime", "serving.Retriever", "serve")],
)  # fmt: skip
def test_a_name_of_the_library_says_what_it_needs(missing, name, extra):
    package = name.partition(".")[0]
    got = without([missing], f"import {package}\n{name}")
    last = got.stderr.strip().splitlines()[-1]
    assert last.startswith(
        f"ModuleNotFoundError: {name} needs {missing}, which is not installed; pip install 'graphhash[{extra}]'"
    )


def test_the_library_clusters_and_maps_with_its_three_packages_alone():
    heavy = sorted((set(EXTRAS) | {"networkx", "sklearn"}) - {"click"})
    code = """
import graphhash
graph = graphhash.biadjacency(users=[0, 0, 1, 1, 2], items=[0, 1, 0, 1, 2])
communities = graphhash.cluster(graph, resolution=1.0)
user_map, item_map = graphhash.soft_maps(graph, communities, indices_per_id=2)
print(user_map.rows.shape, graphhash.modularity(graph, communities.users, communities.items) > 0)
"""
    got = without(heavy, code)
    assert got.returncode == 0, got.stderr
    assert got.stdout.split() == ["(4,", "2)", "True"]


def test_a_bundle_is_asked_where_nothing_but_the_packages_of_the_recipe_is_installed(tmp_path):
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"pip install -c constraints.txt (click .*)\n.*--no-deps \.", text)
    assert set(line.split()) == of("serve"), "docs/install.md names the packages of the extra serve"
    small_model().export(tmp_path / "bundle")
    others = sorted((set(EXTRAS) - of("serve") - {"annotated_types", "starlette"}) | {"numba", "llvmlite", "scipy"})
    words = ["graphhash", "recommend", str(tmp_path / "bundle"), "--user-id", "3"]
    got = without(others, f"sys.argv = {words!r}\nfrom pipeline.__main__ import main\nmain()")
    assert got.returncode == 0, got.stderr
    assert got.stdout.startswith("user 3\n")
    code = f"""
from pipeline.bundles.serve import ServeSettings, build_app
from serving.http.answers import DEFAULT_LIMITS
print(build_app(ServeSettings({str(tmp_path / "bundle")!r}, DEFAULT_LIMITS, "cpu")).title)
"""
    got = without(others, code)
    assert got.stdout == "GraphHash\n", got.stderr


def test_the_extra_of_a_part_of_a_package_is_that_of_the_package():
    text = remedy(ModuleNotFoundError("No module named 'mlflow.client'", name="mlflow.client"))
    assert text == "mlflow is not installed; pip install 'graphhash[mlflow]', or graphhash[all] for everything"


def test_modules_of_ours_have_no_remedy():
    assert remedy(ModuleNotFoundError("No module named 'pipeline.nothing'", name="pipeline.nothing")) is None
    assert remedy(ModuleNotFoundError("no name")) is None


@pytest.mark.parametrize("file", ["Dockerfile.serve", "Dockerfile.train"])
def test_the_images_copy_what_is_there_install_an_extra_and_run_as_a_user(file):
    text = (ROOT / "pipeline" / "deploy" / file).read_text(encoding="utf-8")
    joined = text.replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in joined.splitlines() if line and not line.startswith("#")]
    kept = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for instruction, words in lines:
        if instruction == "COPY" and "--from" not in words:
            for source in words.split()[:-1]:
                assert (ROOT / source).exists()
                assert f"!{source}" in kept
    default = re.search(r"^ARG EXTRA=(\S+)$", text, re.MULTILINE).group(1)
    assert default in PROJECT["optional-dependencies"]
    assert '-c constraints.txt ".[${EXTRA}]"' in text
    names = [instruction for instruction, _ in lines]
    assert names.index("ENTRYPOINT") > names.index("USER")
    assert re.search(r"^USER [1-9]\d*$", text, re.MULTILINE)
    assert not re.search(r":latest|\bADD\b|\bsudo\b", text)


@pytest.mark.parametrize(
    "file", ["docs/install.md", "pipeline/deploy/Dockerfile.serve", "pipeline/deploy/Dockerfile.train"]
)
def test_images_write_into_mounted_folders_as_their_owner(file):
    """The user of the images has no rights in a folder of somebody else."""
    commands = re.findall(r"docker run .*", (ROOT / file).read_text(encoding="utf-8"))
    assert commands
    for command in commands:
        (mount,) = re.findall(r'-v "\$PWD[^"]*"', command)
        assert ('--user "$(id -u):$(id -g)"' in command) is (":ro" not in mount), command


def test_the_source_distribution_has_deploy_files_and_constraints():
    manifest = (ROOT / "MANIFEST.in").read_text(encoding="utf-8")
    assert "constraints.txt" in manifest
    assert "recursive-include pipeline/deploy *" in manifest


def test_the_shell_completes_commands():
    code = "from pipeline.__main__ import main\nmain()"
    words = {"_GRAPHHASH_COMPLETE": "bash_complete", "COMP_WORDS": "graphhash ser", "COMP_CWORD": "1"}
    got = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **words},
        capture_output=True,
        text=True,
    )
    assert got.stdout.strip() == "plain,serve"
