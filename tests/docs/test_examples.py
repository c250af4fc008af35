"""The examples run, and show what they say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.bundles.serve import ServeSettings
from serving.http.answers import Limits
from tests.docs.pages import ROOT
from tests.helpers.http_server import on_a_thread

EXAMPLES = ROOT / "examples"


def load(path: Path, name: str) -> dict:
    """The names of a script after it ran under a module name; `__main__` runs it as `python path` does."""
    names: dict = {"__name__": name}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), names)
    return names


def test_the_pytorch_layer_learns(capsys):
    load(EXAMPLES / "pytorch_layer.py", "__main__")
    out = capsys.readouterr().out
    assert "table rows: 302" in out
    assert float(out.split("steps: ")[1].split()[0]) < 1.1


def test_the_notebook_runs_and_is_kept_without_outputs():
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"quickstart.ipynb, code cell {number}", "exec"), names)
    recalls, n_rows = names["recalls"], names["n_rows"]
    assert n_rows["soft"] <= n_rows["graph"] < 0.11 * n_rows["full"]
    assert recalls["soft"] > 2 * recalls["modulo"]
    assert recalls["soft"] > 0.9 * recalls["full"]


@pytest.fixture
def server(folder) -> Iterator[str]:
    """A server of the bundle."""
    with on_a_thread(ServeSettings(folder / "out" / "bundle", Limits(), "cpu", threads=1)) as (host, port):
        yield f"http://{host}:{port}"


def test_the_client_prints_items_and_the_servers_errors(server, capsys):
    main = load(EXAMPLES / "http_client.py", "http_client")["main"]
    main([server, "anna", "nobody", "-k", "3"])
    known, unknown = capsys.readouterr().out.splitlines()
    assert known.startswith("anna: item ")
    assert known.count("item ") == 3
    assert unknown.startswith("nobody (unknown to the model")
    with pytest.raises(SystemExit, match=r"400: .*k"):
        main([server, "anna", "-k", "0"])
