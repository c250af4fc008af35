"""Logs and blocks that the guides share."""

from __future__ import annotations

import ast

import numpy as np
import pytest

from tests.docs.pages import blocks


@pytest.fixture
def pairs() -> tuple[np.ndarray, np.ndarray]:
    """Users and items of interactions with planted communities: int64, shape (n,) each."""
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 300, 6000), rng.integers(0, 20, 6000)
    inside = rng.random(6000) < 0.9
    pairs = np.unique(np.stack([users, np.where(inside, users % 10 + 10 * items, rng.integers(0, 200, 6000))]), axis=1)
    return pairs[0], pairs[1]


@pytest.fixture
def run_block():
    """Run the Python block of a guide with the given names; returns the names after it."""

    def run(page: str, **names: object) -> dict:
        (block,) = (b for b in blocks("python") if b.page == f"docs/guides/{page}")
        statements = [s for s in ast.walk(ast.parse(block.text)) if isinstance(s, ast.stmt)]
        asked = [s for s in statements if not isinstance(s, (ast.Import, ast.ImportFrom))]
        assert len(asked) <= 10, f"{page} asks for {len(asked)} statements"
        exec(compile(block.text, page, "exec"), names)
        return names

    return run
