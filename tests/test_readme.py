"""What the README shows works, and what it lists is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from pipeline.cli import main as cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^    (?:\S*/)?graphhash (.+)$", README, re.MULTILINE)


@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=range(len(PYTHON_BLOCKS)))
def test_python_example_runs(block):
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["vectors"].shape == (2, 64)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_takes_the_options_shown(command):
    name, *arguments = shlex.split(command, comments=True)
    parsed = cli.app.commands[name]
    parsed.parse_args(click.Context(parsed), arguments)


def test_tree_lists_the_files_that_are_there():
    listed = re.findall(r"^\| `(\w+/\w+\.py)` \|", README, re.MULTILINE)
    packages = ("graphhash", "pipeline", "serving")
    there = {
        f"{package}/{path.name}"
        for package in packages
        for path in (ROOT / package).glob("*.py")
        if not path.name.startswith("__")
    }
    assert set(listed) == there
    assert len(listed) == len(set(listed))
