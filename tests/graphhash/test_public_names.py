"""The names of ``graphhash``: all there, each imported when first used."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import graphhash

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", graphhash.__all__)
def test_every_public_name_is_documented(name):
    assert getattr(graphhash, name).__doc__
    assert name in dir(graphhash)


def test_every_public_name_has_a_module():
    assert sorted(graphhash._MODULE_OF) == sorted(graphhash.__all__)


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'clusters'"):
        _ = graphhash.clusters


def test_the_version_is_the_packages():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert pyproject["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "graphhash.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", graphhash.__version__)


@pytest.mark.parametrize("package", ["graphhash", "pipeline", "serving"])
def test_every_package_says_that_it_is_typed(package):
    assert (ROOT / package / "py.typed").exists()
