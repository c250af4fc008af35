"""The snippets of docs/bundle-format.md answer a manifest's example as the manifest states, in Node and in a browser.

They need npm packages: ``npm install --prefix DIR onnxruntime-node onnxruntime-web``, and the
variable ``GRAPHHASH_NODE_MODULES=DIR/node_modules``. The Python snippet runs in ``test_blocks.py``. The Java snippet is compiled where a
JDK is, against declarations of what it uses of ONNX Runtime and, where Gson is not installed, of Gson (``tests/docs/java``); it is not run.
"""

from __future__ import annotations

import functools
import html
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.docs.pages import blocks
from tests.helpers.small_ctr import export_small, small_ctr
from tests.helpers.small_models import small_model

MODULES = Path(os.environ.get("GRAPHHASH_NODE_MODULES", "node_modules"))
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
# Debian's package libgoogle-gson-java puts it there.
GSON = Path(os.environ.get("GRAPHHASH_GSON", "/usr/share/java/gson.jar"))
BUNDLES = ["int64", "string", "ctr"]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    for kind in ("int64", "string"):
        small_model(users=kind, items=kind).export(folder / kind)
    export_small(small_ctr(), folder / "ctr")
    return folder


def snippet(language: str) -> str:
    (block,) = (b for b in blocks(language) if b.page == "docs/bundle-format.md")
    return block.text


def assert_answers(answer: dict, manifest: dict) -> None:
    expected = manifest["example"]["outputs"]
    assert answer.keys() == expected.keys()
    for name, spec in expected.items():
        assert answer[name]["dims"] == spec["shape"]
        if spec["dtype"] == "float32":
            np.testing.assert_allclose(answer[name]["data"], spec["data"], rtol=1e-4, atol=1e-5)
        else:
            assert answer[name]["data"] == spec["data"]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_session_with_default_options_loads_without_a_warning(bundle, bundles):
    """Run in a process of its own: ONNX Runtime writes its warnings to the file descriptor of stderr."""
    code = f"import onnxruntime; onnxruntime.InferenceSession({str(bundles / bundle / 'model.onnx')!r}, providers=['CPUExecutionProvider'])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.skipif(not shutil.which("node"), reason="no node")
@pytest.mark.skipif(not (MODULES / "onnxruntime-node").exists(), reason="no onnxruntime-node, see above")
@pytest.mark.parametrize("bundle", BUNDLES)
def test_node_answers_the_example_and_an_empty_exclusion(bundle, bundles, tmp_path):
    (tmp_path / "ask.cjs").write_text(snippet("js"), encoding="utf-8")
    command = ["node", tmp_path / "ask.cjs", bundles / bundle]
    run = subprocess.run(
        command, env=os.environ | {"NODE_PATH": str(MODULES.absolute())}, capture_output=True, text=True
    )
    assert run.stderr == ""
    first, *others = map(json.loads, run.stdout.splitlines())
    manifest = json.loads((bundles / bundle / "manifest.json").read_text())
    assert_answers(first, manifest)
    if bundle != "ctr":
        assert others[0]["item_id"]["dims"] == manifest["example"]["outputs"]["item_id"]["shape"]
        assert others[0]["candidate_score"]["dims"] == [2, 0]


@pytest.mark.skipif(BROWSER is None, reason="no chromium")
@pytest.mark.skipif(not (MODULES / "onnxruntime-web").exists(), reason="no onnxruntime-web, see above")
@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_browser_answers_the_example(bundle, bundles, tmp_path):
    (tmp_path / "index.html").write_text(snippet("html"), encoding="utf-8")
    (tmp_path / "ort").symlink_to((MODULES / "onnxruntime-web" / "dist").absolute())
    (tmp_path / "bundle").symlink_to(bundles / bundle)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript"}

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        command = [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=60000", "--dump-dom", f"http://127.0.0.1:{server.server_port}/index.html",
        ]  # fmt: skip
        page = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    finally:
        server.shutdown()
        server.server_close()
    answer = json.loads(html.unescape(re.search(r'<pre id="answer">(.*?)</pre>', page, re.DOTALL)[1]))
    assert_answers(answer, json.loads((bundles / bundle / "manifest.json").read_text()))


@pytest.mark.skipif(not shutil.which("javac"), reason="no JDK")
def test_the_java_snippet_compiles(tmp_path):
    (tmp_path / "AskBundle.java").write_text(snippet("java"), encoding="utf-8")
    declarations = Path(__file__).parent / "java"
    folders = [declarations / "onnxruntime", *([] if GSON.exists() else [declarations / "gson"])]
    declared = sorted(file for folder in folders for file in folder.rglob("*.java"))
    library = ["-cp", GSON] if GSON.exists() else []
    command = ["javac", "-Xlint:all,-serial", "-Werror", "-proc:none", *library, "-d", tmp_path / "classes"]
    got = subprocess.run([*command, *declared, tmp_path / "AskBundle.java"], capture_output=True, text=True)
    assert got.returncode == 0, got.stderr
    assert (tmp_path / "classes" / "AskBundle.class").exists()
