"""Addresses where nothing answers end in one line, and a path with a question mark is the SQLite store's own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pipeline.distributed.session import ray_session
from pipeline.errors import TrackingError
from pipeline.storage import reachable
from pipeline.storage.reachable import unreachable_uri, why_unreachable
from pipeline.tracking.client import absolute_uri, check_answers, sqlite_file


@contextmanager
def server(answer: bytes | None) -> Iterator[int]:
    """A port whose listener sends this back, or is silent."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            kept = []
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                kept.append(connection)
                if answer is not None:
                    connection.recv(1000)
                    connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_a_closed_port_is_named_with_the_remedy(closed_port, monkeypatch):
    # Other tests of this process may have a Ray of theirs, which a session would take.
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with (
        pytest.raises(ConnectionError, match=rf"--address 127.0.0.1:{closed_port}: no Ray answers \(.*refused\)"),
        ray_session(f"127.0.0.1:{closed_port}"),
    ):
        pass
    with pytest.raises(ConnectionError, match="no Ray answers"), ray_session(f"ray://127.0.0.1:{closed_port}"):
        pass
    for uri in (f"http://127.0.0.1:{closed_port}", f"postgresql+psycopg2://me:secret@127.0.0.1:{closed_port}/mlflow"):
        with pytest.raises(TrackingError, match=r"does not answer .*set MLFLOW_TRACKING_URI") as error:
            check_answers(uri)
        assert "secret" not in str(error.value)


def test_a_silent_port_and_one_of_another_kind_are_no_answer(monkeypatch):
    monkeypatch.setattr(reachable, "TIMEOUT_S", 0.2)
    with server(None) as port:
        assert "no answer within" in str(why_unreachable("127.0.0.1", port, protocol="grpc"))
        assert "no answer within" in str(unreachable_uri(f"http://127.0.0.1:{port}"))
    with server(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        assert "another kind" in str(why_unreachable("127.0.0.1", port, protocol="grpc"))
        assert unreachable_uri(f"http://127.0.0.1:{port}") is None
    settings = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
    for status, expected in ((0x88, None), (0x8D, "something listens there, and it is of another kind")):
        reply = bytes((0, 0, 2, 1, 4, 0, 0, 0, 1, 0x20, status))
        with server(settings + reply) as port:
            assert why_unreachable("127.0.0.1", port, protocol="grpc") == expected
    with server(bytes((0x15, 3, 1, 0, 2, 2, 70))) as port:
        assert why_unreachable("127.0.0.1", port, protocol="grpc") is None


def test_a_name_that_is_not_found_in_time_is_no_answer(monkeypatch):
    monkeypatch.setattr(reachable, "LIMIT_S", 0.1)
    waiting = threading.Event()

    def connect(*_):
        waiting.wait(5)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", connect)
    assert "no answer within" in str(why_unreachable("nowhere.invalid", 80))
    waiting.set()


@pytest.mark.parametrize("uri", ["sqlite:////tmp/mlflow.db", "databricks", "file:///tmp/mlruns"])
def test_stores_without_a_server_are_not_asked(uri):
    assert unreachable_uri(uri) is None


def test_a_question_mark_in_the_folder_stays_in_the_path(tmp_path, monkeypatch):
    sqlalchemy = pytest.importorskip("sqlalchemy")
    folder = tmp_path / "what? 100% #1"
    folder.mkdir()
    monkeypatch.chdir(folder)
    uri = absolute_uri("sqlite:///mlflow.db")
    assert sqlite_file(uri) == folder / "mlflow.db"
    engine = sqlalchemy.create_engine(uri)
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text("create table t (a int)"))
    engine.dispose()
    assert [file.name for file in folder.iterdir()] == ["mlflow.db"]
    assert [file.name for file in tmp_path.iterdir()] == [folder.name]
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///a.db?timeout=3") == f"sqlite:///{tmp_path}/a.db?timeout=3"
