"""A bundle that several modules serve."""

from __future__ import annotations

import pytest

from tests.helpers.small_models import small_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The bundle of a small model."""
    made = tmp_path_factory.mktemp("served") / "bundle"
    small_model().export(made)
    return made
