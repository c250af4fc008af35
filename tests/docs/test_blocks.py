"""Every Python and TOML block of the pages does what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.run_config import RunConfig
from pipeline.ctr.schema import read_schema
from tests.docs.pages import blocks

NEEDS = ("needs out/bundle", "needs ctr/bundle")


# The blocks of other libraries' guides run in tests/guides.
OWN = [block for block in blocks("python") if block.mark != "runs in tests/guides"]


@pytest.mark.parametrize("block", OWN, ids=str)
def test_python_block_runs(block, request, tmp_path, monkeypatch):
    assert block.mark in ("", *NEEDS), f"{block}: unknown mark {block.mark!r}"
    # A block without a mark must run anywhere.
    monkeypatch.chdir(request.getfixturevalue("folder") if block.mark in NEEDS else tmp_path)
    exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})


def test_the_first_block_of_the_readme_gives_the_shape_that_it_states():
    names: dict = {}
    exec(next(block.text for block in blocks("python") if block.page == "README.md"), names)
    assert names["vectors"].shape == (2, 64)


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_toml_block_is_read(block, tmp_path):
    file = tmp_path / "block.toml"
    file.write_text(block.text, encoding="utf-8")
    if block.mark == "ctr schema":
        read_schema(file)
    else:
        RunConfig.load(file, (), **{"run.out": "out"})


def test_blocks_are_found():
    assert {Path(block.page).name for block in blocks("python")} >= {
        "README.md",
        "ctr.md",
        "bundles.md",
        "quickstart.md",
    }
