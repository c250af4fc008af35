"""What MLflow cannot be told now is told later: entries on disk, real servers that go away, real processes that are killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from pipeline.errors import TrackingError
from pipeline.tracking import tracker as tracker_module
from pipeline.tracking.client import client_of, one_line_errors, short_timeouts
from pipeline.tracking.mlflow_runs import parent_run, training_run
from pipeline.tracking.outbox import FOLDER, Outbox
from pipeline.tracking.store import connect, has_undelivered, outbox_of
from pipeline.tracking.tracker import Tracker
from tests.helpers.mlflow_store import sqlite_store as new_store

ROOT = Path(__file__).resolve().parents[3]


class Away(Exception):
    pass


def deliver(outbox: Outbox, send) -> int:
    return outbox.deliver(send, lambda error: isinstance(error, Away))


@pytest.fixture
def outbox(tmp_path):
    return Outbox(tmp_path / "out")


def test_entries_arrive_once_in_order(outbox):
    for number in range(20):
        outbox.put("run", "metrics", {"n": number})
    got = []
    assert deliver(outbox, lambda run, kind, content: got.append((run, kind, content["n"]))) == 20
    assert got == [("run", "metrics", number) for number in range(20)]
    assert not outbox
    assert deliver(outbox, lambda *_: pytest.fail("nothing is left")) == 0


def test_a_clock_that_is_set_back_changes_no_order(outbox, monkeypatch):
    """The metrics of a run follow its opening, though they are put at an earlier time of the wall clock."""
    later, earlier = time.time_ns(), time.time_ns() - 3600 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: later)
    outbox.put("later-1", "create", {})
    monkeypatch.setattr(time, "time_ns", lambda: earlier)
    outbox.put("later-1", "metrics", {})
    got = []

    def send(run, kind, content):
        if run.startswith("later-") and kind != "create":
            raise ValueError(f"the run {run} was never opened")
        got.append((run, kind))
        return "abc" if kind == "create" else None

    assert deliver(outbox, send) == 2
    assert got == [("later-1", "create"), ("abc", "metrics")]
    assert not (outbox.folder / "refused").exists()


def test_entries_of_an_earlier_version_are_delivered_first(outbox):
    """They are numbered by their time in nanoseconds, and by a counter."""
    entries = outbox.folder / "entries"
    entries.mkdir(parents=True)
    now = time.time_ns()
    for n, number in enumerate((now, now, now + 3600 * 10**9)):
        entry = {"run": "run", "kind": "metrics", "content": {"n": n}}
        (entries / f"{number:020d}-h-7-{n:06d}.json").write_text(json.dumps(entry))
    outbox.put("run", "metrics", {"n": 3})
    got = []
    assert deliver(outbox, lambda run, kind, content: got.append(content["n"])) == 4
    assert got == [0, 1, 2, 3]


def test_entries_of_several_processes_follow_what_was_there_before(outbox):
    """A second process continues after the entries of the first, and both after those that the store refused."""
    put = f"from pipeline.tracking.outbox import Outbox; from pathlib import Path; Outbox(Path({str(outbox.folder)!r})).put"
    for n in range(3):
        if n == 1:
            subprocess.run([sys.executable, "-c", f"{put}('run', 'metrics', {{'n': 1}})"], cwd=ROOT, check=True)
        else:
            outbox.put("run", "metrics", {"n": n})
    got = []
    deliver(outbox, lambda run, kind, content: got.append(content["n"]))
    assert got == [0, 1, 2]


def test_a_refused_entry_is_never_overwritten(outbox, monkeypatch):
    def refuse(*_):
        raise ValueError("no")

    for _ in range(2):
        # As in two containers, whose processes have the same number.
        monkeypatch.setattr("pipeline.tracking.outbox._last_numbers", {})
        outbox.put("run", "metrics", {})
        deliver(outbox, refuse)
    assert len(list((outbox.folder / "refused").iterdir())) == 2


def test_what_did_not_arrive_is_kept_from_the_first_on(outbox):
    for number in range(3):
        outbox.put("run", "metrics", {"n": number})
    got = []

    def send(run, kind, content):
        if content["n"] == 1 and len(got) < 2:
            raise Away
        got.append(content["n"])

    with pytest.raises(Away):
        deliver(outbox, send)
    assert len(outbox) == 2
    got.append("back")
    assert deliver(outbox, send) == 2
    assert got == [0, "back", 1, 2]


def test_a_refused_entry_is_set_aside_with_the_reason_and_holds_up_nothing(outbox):
    for number in range(3):
        outbox.put("run", "params", {"n": number})

    def send(run, kind, content):
        if content["n"] == 1:
            raise ValueError("changed parameter")

    assert deliver(outbox, send) == 2
    (refused,) = (outbox.folder / "refused").iterdir()
    assert json.loads(refused.read_text())["reason"] == "changed parameter"
    assert not outbox


def test_a_run_opened_while_the_store_is_away_gets_its_id_later(outbox):
    outbox.put("later-1", "create", {})
    outbox.put("later-1", "metrics", {})
    got = []

    def send(run, kind, content):
        got.append((run, kind))
        return "abc" if kind == "create" else None

    assert deliver(outbox, send) == 2
    assert got == [("later-1", "create"), ("abc", "metrics")]
    assert outbox.real_id("later-1") == "abc"
    assert outbox.real_id("xyz") == "xyz"


def test_two_processes_never_deliver_at_once(outbox):
    outbox.put("run", "metrics", {})
    inner = []
    assert deliver(outbox, lambda *_: inner.append(deliver(outbox, lambda *_: pytest.fail("twice")))) == 1
    assert inner == [0]


@pytest.fixture(scope="module")
def made_store(tmp_path_factory):
    """One SQLite store for the module: to make one takes seconds."""
    uri = new_store(tmp_path_factory.mktemp("store"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        patch.delenv("MLFLOW_RUN_ID", raising=False)
        connect("graphhash")
    return uri


@pytest.fixture
def sqlite_store(made_store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made_store)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    return made_store


# --- A real tracking server -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server(folder: Path, port: int):
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", new_store(folder)]
    command += [
        "--artifacts-destination",
        str(folder / "artifacts"),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    # Without the processes that would run jobs of MLflow's own.
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(folder / "server.log", "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while True:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer,
            ):
                if answer.status == 200:
                    break
            assert process.poll() is None, (folder / "server.log").read_text()[-3000:]
            assert time.monotonic() < deadline, (folder / "server.log").read_text()[-3000:]
            time.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def relay(port: int, target: int):
    """What comes to a port goes to another one for as long as the block lasts: the server there goes away and comes back at once."""
    ends: list[socket.socket] = []

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                sink.sendall(data)
        close(source, sink)

    def close(*sockets: socket.socket) -> None:
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                pair = listener.accept()[0], socket.create_connection(("127.0.0.1", target))
                ends.extend(pair)
                for source, sink in (pair, pair[::-1]):
                    threading.Thread(target=pump, args=(source, sink), daemon=True).start()

    with socket.create_server(("127.0.0.1", port)) as listener:
        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        try:
            yield
        finally:
            close(listener)
            accepting.join()
            close(*ends)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.mark.timeout(900)
def test_a_server_that_goes_away_in_mid_run_loses_nothing(tmp_path, monkeypatch, capfd):
    port, behind = free_port(), free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.setattr(tracker_module, "_retry_at", {})
    monkeypatch.setattr(tracker_module, "_noted", set())
    out, bundle = tmp_path / "out", tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "model.txt").write_text("weights")
    with server(tmp_path, behind):
        with relay(port, behind):
            store = connect("graphhash", out)
            context = parent_run(store, "compare", {"p": 1})
            parent, nested = context.__enter__()
            first = training_run(nested, "soft", {"lr": 0.1})
            tracker = first.__enter__()
            tracker.log_metrics({"recall@20": 0.1}, step=1)
        started = time.monotonic()
        for epoch in range(2, 40):
            tracker.log_metrics({"recall@20": epoch / 10}, step=epoch)
        tracker.log_artifact(bundle, "bundle")
        first.__exit__(None, None, None)
        with training_run(nested, "graph", {"lr": 0.2}) as unheard:
            unheard.log_metrics({"recall@20": 0.5}, step=1)
        context.__exit__(None, None, None)
        assert time.monotonic() - started < 20, "a server that is away holds nobody up"
        assert unheard.run_id.startswith("later-")
        assert capfd.readouterr().err.count("MLflow does not answer; what it should get is kept in") == 1
        with pytest.raises(TrackingError, match=r"does not answer.* set MLFLOW_TRACKING_URI"):
            connect("graphhash", out)
        with relay(port, behind):
            # The next command in the folder.
            assert connect("graphhash", out).killed == ()
            client = client_of(store.uri)
            assert not has_undelivered(out)
            history = client.get_metric_history(tracker.run_id, "recall_at_20")
            assert [m.step for m in history] == list(range(1, 40))
            assert len({m.timestamp for m in history}) > 1, "times are those of the measurement"
            assert [f.path for f in client.list_artifacts(tracker.run_id, "bundle")] == ["bundle/model.txt"]
            (graph,) = client.search_runs([store.experiment_id], "params.lr = '0.2'")
            assert graph.data.tags["mlflow.parentRunId"] == parent.run_id
            assert graph.data.metrics == {"recall_at_20": 0.5}
            statuses = {run.info.status for run in client.search_runs([store.experiment_id])}
            assert statuses == {"FINISHED"}


# --- SQLite, and processes that are killed ----------------------------------------------------------------------------

WRITER = """
import os, sys, time
from pathlib import Path
from pipeline.tracking.mlflow_runs import training_run
from pipeline.tracking.store import connect
name, out, ready = sys.argv[1:]
import mlflow, sqlalchemy
print("imported", flush=True)
while not Path(ready).exists():
    time.sleep(0.01)
store = connect("shared", Path(out))
with training_run(store, name, {"p": name}) as tracker:
    print(tracker.run_id, flush=True)
    for step in range(15):
        tracker.log_metrics({f"m{i}": step for i in range(20)}, step=step)
    if name == "killed":
        os.kill(os.getpid(), 9)
"""


def writer(folder: Path, name: str) -> subprocess.Popen:
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "PYTHONPATH": str(ROOT)}
    environment.pop("MLFLOW_RUN_ID", None)
    command = [sys.executable, "-c", WRITER, name, str(folder / f"out-{name}"), str(folder / "ready")]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_commands_make_and_write_one_sqlite_store_at_once(tmp_path, monkeypatch):
    writers = {name: writer(tmp_path, name) for name in ("a", "b", "killed")}
    # All have imported what they need, and go for a store that is not there yet.
    assert {process.stdout.readline() for process in writers.values()} == {"imported\n"}
    (tmp_path / "ready").touch()
    ended = {name: process.communicate(timeout=120) for name, process in writers.items()}
    assert [writers[name].returncode for name in ("a", "b", "killed")] == [0, 0, -9], ended
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    for name in ("a", "b", "killed"):
        run_id = ended[name][0].strip()
        client = client_of(f"sqlite:///{tmp_path}/mlflow.db")
        assert client.get_run(run_id).info.status == ("RUNNING" if name == "killed" else "FINISHED")
        assert has_undelivered(tmp_path / f"out-{name}") == (name == "killed")
        store = connect("shared", tmp_path / f"out-{name}")
        assert [m.value for m in client.get_metric_history(run_id, "m19")] == list(range(15))
    assert store.killed == (run_id,)
    assert client.get_run(run_id).info.status == "KILLED"
    assert not has_undelivered(tmp_path / "out-killed")
    assert connect("shared", tmp_path / "out-killed").killed == ()
    assert len(client.search_experiments(filter_string="name = 'shared'")) == 1


def test_the_end_of_a_run_asks_again_and_delivers_what_was_kept(tmp_path, sqlite_store, monkeypatch):
    store = connect("graphhash", tmp_path / "out")
    with training_run(store, "soft", {}) as tracker:
        # As after a call that found the store locked.
        monkeypatch.setitem(tracker_module._retry_at, store.uri, time.monotonic() + 1000)
        tracker.log_metrics({"a": 1.0})
        assert len(store.outbox) == 1
    assert not store.outbox
    run = client_of(store.uri).get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"a": 1.0})


def test_trainings_elsewhere_that_end_with_a_stopped_command_are_killed_as_it_is(tmp_path, sqlite_store):
    store = connect("graphhash", tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), parent_run(store, "compare", {}) as (parent, nested):  # noqa: PT012  (the command)
        with training_run(nested, "soft", {}) as done:
            pass
        # In a process that is no more when the command ends.
        elsewhere = training_run(nested, "graph", {}).__enter__()
        raise KeyboardInterrupt
    client = client_of(store.uri)
    assert [client.get_run(run.run_id).info.status for run in (parent, done, elsewhere)] == [
        "KILLED",
        "FINISHED",
        "KILLED",
    ]
    assert not store.outbox


def test_what_is_kept_for_one_store_is_not_given_to_another(tmp_path, sqlite_store, monkeypatch):
    out, away = tmp_path / "out", "http://127.0.0.1:9"
    outbox_of(out, away).put("abc", "metrics", {"entries": [["a", 1.0, 0, 0]]})
    assert not has_undelivered(out)
    connect("graphhash", out)
    assert len(outbox_of(out, away)) == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", away)
    assert has_undelivered(out)


def test_a_model_delivered_later_is_the_one_that_was_logged(tmp_path):
    from pipeline.tracking.onnx_model import BUNDLE_TAG, log_onnx_model
    from tests.helpers.small_models import small_model

    small_model().export(tmp_path / "bundle")
    with pytest.raises(FileNotFoundError, match="belongs to another bundle by now"):
        log_onnx_model(
            "http://127.0.0.1:9", "abc", tmp_path / "bundle" / "model.onnx", {}, {BUNDLE_TAG: "of an earlier one"}
        )


def test_a_ray_job_names_its_store(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.chdir(tmp_path)
    for uri in ("", "sqlite:///mlflow.db"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(TrackingError, match=r"in a Ray job .* temporary folder; set MLFLOW_TRACKING_URI"):
            connect("graphhash")
    assert not list(tmp_path.iterdir())


def test_without_an_outbox_a_store_that_is_away_is_an_error():
    tracker = Tracker("http://127.0.0.1:9", "0" * 32)

    @one_line_errors
    def log():
        with short_timeouts():
            tracker.log_metrics({"a": 1.0})

    with pytest.raises(TrackingError, match="MLflow"):
        log()
    assert FOLDER.startswith(".")
