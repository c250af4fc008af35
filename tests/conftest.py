"""Fixtures of the whole suite: one Ray for all tests, two workers without it, and the folder of real data."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.distributed.session import ray_session
from tests.helpers.gang import Gang, gang


def pytest_configure() -> None:
    """Let Ctrl-C interrupt again where the tests are started in the background, which ignores it for all children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts Ray, and keep what shares one in one process; the other files go where there is room (``--dist=loadgroup``)."""
    for item in items:
        if "ray_local" in getattr(item, "fixturenames", ()):
            item.add_marker("ray")
        if item.get_closest_marker("xdist_group") is None:
            group = "ray" if item.get_closest_marker("ray") else item.nodeid.partition("::")[0]
            item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    with ray_session(num_cpus=2):
        yield


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> Iterator[Gang]:
    """Two workers of one training, without Ray."""
    with gang(2, str(tmp_path_factory.mktemp("gang") / "rendezvous")) as workers:
        yield workers


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of published data sets; a test that asks for it is skipped where there is none."""
    folder = Path(os.environ.get("GRAPHHASH_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set GRAPHHASH_DATA")
    return folder
