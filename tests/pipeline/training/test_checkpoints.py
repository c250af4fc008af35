"""States on disk: whole or not at all, refused when damaged, kept when the disk is full; and trainings that go on from them."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import resource
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import graphhash
from graphhash.nn.workers import Workers
from pipeline.errors import ConfigError
from pipeline.retrieval.objective import TrainingPairs, fit_retrieval
from pipeline.retrieval.train import _validation
from pipeline.training import checkpoints as resume
from pipeline.training import workers as ray_fit
from pipeline.training.checkpointing import fit_and_save
from pipeline.training.checkpoints import CheckpointManager
from pipeline.training.interrupts import run_interruptibly
from pipeline.training.workers import share_out_workers
from tests.graphhash.nn.test_workers import SETTINGS, graph_of, made


def state_of(epoch: int, step: int = 0, n: int = 1000) -> dict:
    return {
        "epoch": epoch,
        "step": step,
        "model": {"table": torch.full((n,), float(epoch))},
        "history": [{"epoch": epoch}],
    }


def job_of(folder, epochs=6, seconds=0.0, **settings) -> dict:
    """What fit_and_save needs, for a small training."""
    settings = dataclasses.replace(SETTINGS, epochs=epochs, **settings)
    return {
        "folder": str(folder),
        "checkpoints": CheckpointManager(folder / "checkpoints"),
        "checkpoint_seconds": seconds,
        "settings": settings,
    }


def task(job, device, how):
    graph = graph_of()
    model, users, items = made("mf", "soft")
    validate = _validation(graph, graph, 50, 0, how["workers"])
    return fit_retrieval(model, TrainingPairs(users, items), job["settings"], validate, **how)


def train(job, **how):
    """The last state, and what was said."""
    notes = []
    state = fit_and_save(
        job.get("task", task), job, torch.device("cpu"), how.pop("report", lambda entry: None), notes.append, **how
    )
    return state, notes


@contextmanager
def files_up_to(n_bytes: int):
    """The kernel refuses to write beyond this size, as a full disk does: half-way through a file, with an error."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_the_two_newest_states_are_kept_and_read_back(tmp_path):
    states = CheckpointManager(tmp_path / "s", "key", {"mlflow_run_id": "r"})
    assert states.newest() is None
    assert states.manifest() is None
    (tmp_path / "s" / ".epoch-000008-step-00000000.partial").mkdir(parents=True)
    for epoch, step in ((9, 0), (10, 0), (10, 7)):
        states.save(state_of(epoch, step))
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [
        "epoch-000010-step-00000000",
        "epoch-000010-step-00000007",
    ]
    assert states.newest() == "epoch-000010-step-00000007"
    loaded = states.load(states.newest())
    assert (loaded["epoch"], loaded["step"], loaded["history"]) == (10, 7, [{"epoch": 10}])
    assert torch.equal(loaded["model"]["table"], torch.full((1000,), 10.0))
    assert states.manifest()["mlflow_run_id"] == "r"
    assert CheckpointManager(tmp_path / "s", "another key").newest() is None


def truncated(file):
    file.write_bytes(file.read_bytes()[:-100])


def tampered(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "name", "reason"),
    [
        (truncated, resume.STATE, r"state.pt has [\d,]+ bytes of [\d,]+"),
        (tampered, resume.STATE, r"the checksum of state.pt is \w+..., it was \w+"),
        (truncated, resume.MANIFEST, "Expecting"),
        (os.remove, resume.STATE, "No such file"),
    ],
)
def test_a_damaged_state_is_refused_with_the_reason_and_the_one_before_it_is_taken(tmp_path, damage, name, reason):
    states, notes = CheckpointManager(tmp_path / "s"), []
    states.save(state_of(1))
    damage(states.save(state_of(2)) / name)
    assert states.newest(notes.append) == "epoch-000001-step-00000000"
    assert len(notes) == 1
    assert re.search(rf"epoch-000002-step-00000000: this checkpoint is damaged and not used \(.*{reason}", notes[0])


def test_a_training_goes_on_from_the_state_before_a_truncated_one(tmp_path):
    whole, _ = train(job_of(tmp_path / "a"))
    job = job_of(tmp_path / "b")
    train(job)
    names = sorted(path.name for path in job["checkpoints"].folder.iterdir())
    assert names == ["epoch-000004-step-00000000", "epoch-000006-step-00000000"]
    truncated(job["checkpoints"].folder / names[1] / resume.STATE)
    again, notes = train(job)
    assert again["resumed"] == [4]
    assert again["epoch"] == 6
    assert "damaged" in notes[0]
    assert all(torch.equal(again["model"][name], weight) for name, weight in whole["model"].items())


def test_a_disk_that_fills_up_while_a_state_is_written_leaves_the_one_before(tmp_path):
    states = CheckpointManager(tmp_path / "s")
    states.save(state_of(1))
    with files_up_to(20_000), pytest.raises(OSError, match="File too large") as raised:
        states.save(state_of(2, n=50_000))
    assert raised.value.errno == errno.EFBIG
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["epoch-000001-step-00000000"]
    assert states.load(states.newest())["epoch"] == 1


def write_until_full(file):
    while True:
        file.write(bytes(2**12))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, which takes root")
def test_a_training_goes_on_while_the_disk_is_full_and_says_so(tmp_path):
    (tmp_path / "small").mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path / "small"], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        job, filler = job_of(tmp_path), tmp_path / "small" / "filler"
        job["checkpoints"] = CheckpointManager(tmp_path / "small" / "states")

        def fill_after_the_first(entry):
            if entry["epoch"] == 2:
                with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space left on device"):
                    write_until_full(file)

        with pytest.raises(
            graphhash.DataError, match="the disk is full, and the last checkpoint cannot be written; epoch-000002-"
        ):
            train(job, report=fill_after_the_first)
        assert job["checkpoints"].newest() == "epoch-000002-step-00000000"
        filler.unlink()
        state, notes = train(job)
        assert state["resumed"] == [2]
        assert state["epoch"] == 6
        assert notes == []
        # Space that comes back before the end is enough.
        job["checkpoints"].clear()

        def fill_and_free(entry):
            fill_after_the_first(entry)
            if entry["epoch"] == 4:
                filler.unlink()

        state, notes = train(job, report=fill_and_free)
        assert state["epoch"] == 6
        assert job["checkpoints"].newest() == "epoch-000006-step-00000000"
        assert len(notes) == 1
        assert notes[0].startswith("no checkpoint in epoch 4: No space left on device in ")
        assert notes[0].endswith("epoch-000002-step-00000000 is kept, and training goes on")
    finally:
        subprocess.run(["umount", tmp_path / "small"], check=True)


def test_a_clock_that_jumps_back_changes_no_checkpoint_and_no_duration(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.training.loop.POLL_S", 0.0)
    ticks, day = iter(range(10**9)), 86_400
    monkeypatch.setattr(time, "time", lambda: 1.8e9 - day * next(ticks))
    # The steady clock is the one that counts: a second goes by whenever it is looked at.
    steady = iter(range(10**9))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(steady)))
    job, saved = job_of(tmp_path, seconds=20.0), []
    save = CheckpointManager.save
    monkeypatch.setattr(
        CheckpointManager,
        "save",
        lambda self, state: (saved.append((state["epoch"], state["step"])), save(self, state)),
    )
    state, _ = train(job)
    between = [step for _, step in saved if step]
    assert len(between) > 2
    assert saved == sorted(saved)
    assert {(2, 0), (4, 0), (6, 0)} <= set(saved)
    seconds = [entry["seconds"] for entry in state["history"]]
    assert seconds == sorted(seconds)
    assert seconds[0] >= 0


def trained_until_stopped(folder: str, stop_at: int, epochs: int):
    job = job_of(Path(folder), epochs, seconds=600.0)

    def stopping(job, device, how):
        on_epoch = how["callbacks"].on_epoch

        def then_stop(epoch, loss):
            on_epoch(epoch, loss)
            if epoch == stop_at and how["workers"].rank == 0:
                job["checkpoints"].stop_file.parent.mkdir(exist_ok=True)
                job["checkpoints"].stop_file.touch()

        return task(job, device, how | {"callbacks": dataclasses.replace(how["callbacks"], on_epoch=then_stop)})

    # Looked for after every step, and so before the training ends by itself.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.training.loop.POLL_S", 0.0)
        state, _ = train(job | {"task": stopping})
    return state["stopped"], state["epoch"], state["step"], dict(state["model"]), state["resumed"]


def run_to_the_end(folder: str, epochs: int):
    job = job_of(Path(folder), epochs)
    if Workers.from_process_group().rank == 0:
        job["checkpoints"].stop_file.unlink(missing_ok=True)
    Workers.from_process_group().broadcast([0])
    state, _ = train(job)
    return state["stopped"], state["epoch"], state["step"], dict(state["model"]), state["resumed"]


@pytest.mark.parametrize("n_workers", [1, 2])
def test_the_stop_file_ends_a_training_that_the_same_call_goes_on_with(pair, tmp_path, n_workers):
    together = pair if n_workers == 2 else lambda function, *arguments: [function(*arguments)]
    epochs = 12
    for stopped, epoch, _, _, _ in together(trained_until_stopped, str(tmp_path / "a"), 3, epochs):
        assert stopped
        assert 3 <= epoch < epochs
    resumed = together(run_to_the_end, str(tmp_path / "a"), epochs)
    whole = together(run_to_the_end, str(tmp_path / "b"), epochs)
    for (*_, weights, resumed_at), (*_, expected, none) in zip(resumed, whole, strict=True):
        assert len(resumed_at) == 1
        assert none == []
        assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


def test_a_signal_asks_for_an_end_once_and_twice_does_not_wait():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    ended, asked = threading.Event(), []

    def send(number, *after_s):
        for delay in after_s:
            threading.Timer(delay, os.kill, (os.getpid(), number)).start()

    send(signal.SIGTERM, 0.3)
    error, number = run_interruptibly(lambda: ended.wait(60), lambda: (asked.append(1), ended.set()), lambda: None)
    assert (error, number, asked) == (None, signal.SIGTERM, [1])
    never = threading.Event()
    send(signal.SIGINT, 0.3, 1.5)
    error, number = run_interruptibly(lambda: never.wait(300), lambda: None, lambda: None)
    assert (error, number) == (None, signal.SIGINT)
    never.set()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    error, number = run_interruptibly(lambda: 1 / 0, lambda: None, lambda: None)
    assert isinstance(error, ZeroDivisionError)
    assert number is None


@pytest.mark.parametrize(
    ("asked", "n_gpus", "cpus", "expected"),
    [
        (None, 0, [8], (1, {"CPU": 8})),
        (None, 4, [8], (4, {"GPU": 1})),
        (2, 4, [8], (2, {"GPU": 1})),
        (2, 0, [8], (2, {"CPU": 4})),
        (3, 0, [8, 8], (3, {"CPU": 4})),
        (2, 0, [16, 2], (2, {"CPU": 8})),
        (None, 0, [], (1, {"CPU": 1})),
        (None, 0, [2, 6], (1, {"CPU": 6})),
    ],
)
def test_workers_get_the_gpus_or_the_cpus_in_equal_parts(asked, n_gpus, cpus, expected):
    assert share_out_workers(asked, n_gpus, cpus) == expected


def test_more_workers_than_the_cluster_has_are_refused():
    with pytest.raises(ConfigError, match=r"train\.workers=5 is more than the 4 CPUs of the cluster; give at most 4"):
        share_out_workers(5, 0, [2, 2])
    with pytest.raises(ConfigError, match=r"train\.workers=5 is more than the 4 GPUs"):
        share_out_workers(5, 4, [64])


def test_metrics_of_an_epoch_are_sent_once(tmp_path):
    class Noting:
        def __init__(self):
            self.sent = []

        def log_metrics(self, values, step):
            self.sent.append((step, values))

    file, tracker = tmp_path / "entries.jsonl", Noting()
    sender = ray_fit._EntriesSender(file, tracker, sent=[2])
    sender.send()
    for epoch in (2, 4, 4, 6):
        ray_fit._append(file, json.dumps({"epoch": epoch, "loss": 0.5}))
        sender.send()
    with open(file, "a") as half:
        half.write('{"epoch": 8, "lo')
    sender.send()
    assert tracker.sent == [(4, {"loss": 0.5}), (6, {"loss": 0.5})]


def test_what_cannot_be_had_is_said_in_one_line(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, which has all of it")
    plain, notes = train(job_of(tmp_path / "plain"))
    assert notes == []
    same, notes = train(job_of(tmp_path / "same", amp="bf16", compile=True, sparse_gradients=True))
    assert len(notes) == 3
    assert all("\n" not in note for note in notes)
    assert [note.split("=")[0] for note in notes] == ["train.sparse_gradients", "train.amp", "train.compile"]
    assert "needs a GPU of compute capability 8.0 or newer, and this is a CPU: training is in float32" in notes[1]
    assert all(torch.equal(same["model"][name], weight) for name, weight in plain["model"].items())


def test_states_hold_nothing_but_tensors_and_plain_values(tmp_path):
    job = job_of(tmp_path)
    train(job)
    manifest = json.loads((job["checkpoints"].folder / job["checkpoints"].newest() / resume.MANIFEST).read_text())
    assert {"version", "key", "epoch", "step", "bytes", "sha256"} <= manifest.keys()
    # Reading with weights_only is what refuses code.
    state = job["checkpoints"].load(job["checkpoints"].newest())
    assert {"model", "optimizer", "best", "best_score", "workers", "history"} <= state.keys()
    assert isinstance(state["best_score"], float)
    assert not isinstance(state["best_score"], np.floating)
