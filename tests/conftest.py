"""Fixtures of the whole suite: one Ray for all tests, two workers without it, and the folder of real data."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from pipeline.distributed.session import ray_session
from tests.helpers.gang import Gang, gang

# How long an example takes is the machine's affair.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")


# Of the tests, and of all that they start, where the variables are not set: processes of one thread each, as there is one for every core
# already, and threads that do not spin while they wait. Ray's workers are as important as the tests that wait for them. A preemption
# watcher is a process of its own, which takes seconds to start and has nothing to watch here.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_worker_niceness": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


def pytest_configure() -> None:
    """Set ENVIRONMENT, and let Ctrl-C interrupt where the tests are started in the background, which ignores it for all children."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Files that go to one worker of pytest-xdist: those that share a Ray; those that start clusters of their own, so that no more than two
# are up at once; and those whose processes are copies of one (`tests/helpers/copied.py`). Every other file goes to one worker as well,
# because its fixtures are costly.
GROUPS = {
    "ray": (
        "tests/graphhash/clustering/test_hierarchy.py",
        "tests/graphhash/clustering/test_refinement.py",
        "tests/graphhash/clustering/test_row_budget.py",
        "tests/pipeline/bundles/test_serve.py",
        "tests/pipeline/distributed/test_maps.py",
        "tests/pipeline/retrieval/test_cluster.py",
        "tests/pipeline/retrieval/test_ingest.py",
        "tests/pipeline/retrieval/test_train.py",
        "tests/pipeline/storage/test_uris.py",
        "tests/pipeline/sweeps/test_compare.py",
        "tests/pipeline/sweeps/test_scheduler.py",
    ),
    "clusters": ("tests/end_to_end/test_nodes.py", "tests/pipeline/runs/test_jobs.py"),
    "copies": (
        "tests/graphhash/nn/test_workers.py",
        "tests/pipeline/retrieval/test_refit.py",
        "tests/pipeline/training/test_checkpoints.py",
        "tests/pipeline/training/test_here.py",
    ),
}
GROUP_OF = {file: group for group, files in GROUPS.items() for file in files}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts Ray, which has to be in files that :data:`GROUPS` names."""
    for item in items:
        if "ray_local" in getattr(item, "fixturenames", ()):
            item.add_marker("ray")
        file = item.nodeid.partition("::")[0]
        if item.get_closest_marker("ray") and GROUP_OF.get(file) not in ("ray", "clusters"):
            raise pytest.UsageError(f"{file} starts Ray; name it in GROUPS of tests/conftest.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Workers get whole groups, and whole files (``xdist_group`` of pytest-xdist 3.8 has no effect with pytest 9.2)."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return GROUP_OF.get(file, file)

    return Scheduler(config, log)


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
