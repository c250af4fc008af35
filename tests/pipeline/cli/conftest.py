"""Commands run in this process, and runs that are replaced."""

from __future__ import annotations

import logging
import signal
from pathlib import Path

import pytest

from pipeline.cli import main as cli
from pipeline.config.run_config import RunConfig
from pipeline.runs import run as run_module
from pipeline.runs.run import RunResult

METRICS = {
    "method": "soft",
    "rows": 11061,
    "bytes": 4000000,
    "bytes_full": 16000000,
    "bytes_ratio": 0.25,
    "recall@20": 0.1399,
    "capped_recall@20": 0.1421,
    "ndcg@20": 0.1131,
    "seconds": {"train": 12.4},
}


@pytest.fixture
def graphhash(capsys):
    """Run a command in this process: (exit code, stdout, stderr)."""
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(argument) for argument in arguments])
        return (exit_.value.code, *capsys.readouterr())

    yield call
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def runs(monkeypatch):
    """Replace the run by one that notes (configuration, last stage)."""
    seen: list[tuple[RunConfig, str]] = []

    def run(config, *, until, keep_trained=False):
        seen.append((config, until))
        Path(config.run.out).mkdir(parents=True, exist_ok=True)
        (Path(config.run.out) / "config.toml").write_text(config.to_toml())
        logging.getLogger("pipeline.runs.run").info("progress")
        cluster = {
            "modularity": 0.1155,
            "rows": 11061,
            "sizes": {"users": {"median": 2.0}},
            "history": [0.1, 0.2],
        }
        return RunResult({"n_users": 29858, "hashes": {"users": "ab"}}, cluster, [METRICS])

    monkeypatch.setattr(run_module, "run", run)
    return seen


@pytest.fixture
def failing(monkeypatch):
    def fail_with(error: BaseException):
        def run(config, *, until, keep_trained=False):
            raise error

        monkeypatch.setattr(run_module, "run", run)

    return fail_with
