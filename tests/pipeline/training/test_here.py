"""A training in the command's own process: signals, a full disk, an exception; and then the weights of an undisturbed one."""

from __future__ import annotations

import json
import select
import shutil
import signal
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graphhash.errors import DataError
from pipeline.cli.main import main
from pipeline.config.run_config import RunConfig
from pipeline.runs.run import run
from pipeline.tracking.tracker import Tracker
from pipeline.training import checkpointing, loop, machine
from pipeline.training.here import fit_here
from pipeline.training.machine import n_cpus
from tests.helpers import graphs
from tests.helpers.copied import program
from tests.pipeline.training.test_checkpoints import files_up_to, job_of, task


def train_until_told(out: str) -> None:
    """`graphhash train` that tells of epoch 50 and goes on when it is told to. A signal is thus sent in the middle of the training.

    Python runs signal handlers between instructions: a signal that arrives just before a read that blocks would wait for that read.
    """
    loop.POLL_S = 0.0  # After every step.
    on_epoch = checkpointing._Saver._on_epoch

    def waiting(self, epoch, loss):
        on_epoch(self, epoch, loss)
        if epoch == 50:
            print("epoch 50", *(name for name in ("ray", "mlflow") if name in sys.modules), flush=True)
            while not select.select([sys.stdin], [], [], 0.05)[0]:
                pass

    checkpointing._Saver._on_epoch = waiting
    main(["train", "--out", out])


@pytest.fixture(scope="module")
def clustered(tmp_path_factory) -> Path:
    """A run folder with a log of 180 users, read and clustered."""
    folder = tmp_path_factory.mktemp("here")
    graphs.write_log(folder / "log.csv", graphs.planted(0, 6, 30, 0.3, 0.02)[0])
    settings = {"data.path": str(folder / "log.csv"), "run.out": str(folder / "out"), "run.mlflow": False}
    settings |= {"run.methods": ("soft",), "cluster.rows": 60, "train.dim": 8}
    settings |= {"train.epochs": 100, "train.eval_every": 20, "train.patience": 1000, "train.batch_size": 1000}
    run(RunConfig.from_flat(settings), until="cluster")
    return folder / "out"


def trained(out: Path) -> tuple[bytes, dict]:
    """The weights and the history after `graphhash train`, which ends what was begun."""
    config = RunConfig.load(out / "config.toml", **{"run.out": str(out)})
    run(config, until="train")
    method = out / "methods" / "soft"
    return (method / "checkpoint" / "model.npz").read_bytes(), json.loads((method / "history.json").read_text())


@pytest.fixture(scope="module")
def whole(clustered, tmp_path_factory):
    """The weights of a training that nothing disturbs."""
    weights, history = trained(Path(shutil.copytree(clustered, tmp_path_factory.mktemp("whole") / "out")))
    assert history["resumed"] == []
    return weights


@pytest.fixture
def command(clustered, tmp_path):
    """`graphhash train` in a copy of the run folder, stopped in epoch 50; and the folder."""
    out = Path(shutil.copytree(clustered, tmp_path / "out"))
    with program(train_until_told, str(out)) as process:
        assert process.stdout.readline() == "epoch 50\n", "neither Ray nor MLflow is imported"
        yield process, out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_first_and_the_same_command_ends_with_the_same_weights(command, whole, number, code):
    process, out = command
    process.send_signal(number)
    process.stdin.write("go on\n")
    process.stdin.flush()
    errors = process.stderr.read()
    assert process.wait(timeout=300) == code, errors
    assert "stopping as soon as a checkpoint is written; again to stop at once" in errors
    assert "; the same command goes on from there" in errors
    assert "Traceback" not in errors
    weights, history = trained(out)
    assert history["resumed"] == [50]
    assert weights == whole


def test_a_second_signal_ends_the_command_at_once(command, whole):
    process, out = command
    process.send_signal(signal.SIGINT)
    assert any("again to stop at once" in line for line in iter(process.stderr.readline, ""))
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 130  # It was told nothing to go on.
    weights, history = trained(out)
    assert history["resumed"] == [40], "the last evaluation before epoch 50"
    assert weights == whole


def test_sigkill_keeps_the_last_checkpoint(command, whole):
    process, out = command
    process.kill()
    assert process.wait(timeout=300) == -signal.SIGKILL
    weights, history = trained(out)
    assert history["resumed"] == [40]
    assert weights == whole


def here(job: dict) -> dict:
    job["checkpoints"].folder.mkdir(parents=True, exist_ok=True)
    return fit_here({"task": task, **job}, Tracker())


def test_a_full_disk_is_said_in_one_line_and_the_checkpoint_before_is_kept(tmp_path, caplog):
    whole = here(job_of(tmp_path / "whole"))
    job = job_of(tmp_path / "full")
    with ExitStack() as until_the_end:

        def filling(job, device, options):
            def on_epoch(epoch, loss):
                if epoch == 3:
                    until_the_end.enter_context(files_up_to(1000))

            return task(job, device, options | {"callbacks": replace(options["callbacks"], on_epoch=on_epoch)})

        with pytest.raises(DataError, match="and the last checkpoint cannot be written; epoch-000002-"):
            here(job | {"task": filling})
    assert any("no checkpoint in epoch 4: File too large" in line for line in caplog.messages)
    state = here(job)
    assert all(torch.equal(state["model"][name], weight) for name, weight in whole["model"].items())


def test_an_exception_in_the_loop_is_one_line_and_the_checkpoint_is_kept(tmp_path):
    def failing(job, device, options):
        task(job, device, options)
        raise RuntimeError("CUDA error\nout of memory")

    job = job_of(tmp_path)
    with pytest.raises(DataError, match=r"^training failed: out of memory$"):
        here(job | {"task": failing})
    assert job["checkpoints"].newest() == "epoch-000006-step-00000000"


def test_a_stop_file_put_there_by_hand_counts_as_ctrl_c(tmp_path):
    def stopping(job, device, options):
        job["checkpoints"].stop_file.touch()
        return task(job, device, options)

    job = job_of(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        here(job | {"task": stopping})
    assert not job["checkpoints"].stop_file.exists()
    assert job["checkpoints"].newest() is not None


def test_evaluations_are_sent_to_mlflow_and_threads_and_signals_are_put_back(tmp_path, monkeypatch):
    sent, seen = [], []
    monkeypatch.setattr(Tracker, "log_metrics", lambda self, values, *, step: sent.append((step, sorted(values))))

    def noting(job, device, options):
        seen.append(torch.get_num_threads())
        return task(job, device, options)

    torch_before, handlers = (
        torch.get_num_threads(),
        (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)),
    )
    torch.set_num_threads(1)
    monkeypatch.delenv("OMP_NUM_THREADS")
    try:
        here(job_of(tmp_path) | {"task": noting})
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(torch_before)
    assert seen == [n_cpus()]
    assert sent == [(epoch, ["capped_recall@20", "loss", "ndcg@20", "seconds"]) for epoch in (2, 4, 6)]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


@pytest.mark.parametrize(("asked", "threads"), [(None, 3), ("2", 2), ("1,4", 1), ("8", 3), ("0", 3), ("all", 3)])
def test_a_training_has_the_threads_of_the_environment(asked, threads, monkeypatch):
    monkeypatch.setattr(machine, "n_cpus", lambda: 3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert machine.n_threads() == threads
