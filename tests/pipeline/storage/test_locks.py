"""Locks between processes: one holder at a time, who is named."""

from __future__ import annotations

import os
import threading

import pytest

from pipeline.storage.locks import LockedError, NoLocksError, describe_holder, file_lock, this_process


def test_one_holder_at_a_time_who_is_named(tmp_path):
    path = tmp_path / "lock"
    with file_lock(path) as lock:
        with pytest.raises(LockedError, match="another process"), file_lock(path):
            pass
        lock.sign()
        with pytest.raises(LockedError) as caught, file_lock(path):
            pass
        assert str(caught.value) == describe_holder(this_process())
        assert f"process {os.getpid()} on {os.uname().nodename} since " in str(caught.value)
    with file_lock(path):
        pass


def test_who_waits_gets_the_lock_when_it_is_free(tmp_path):
    """On a folder, of which nothing is changed."""
    order, is_waiting = [], threading.Event()

    def second():
        is_waiting.set()
        with file_lock(tmp_path, wait=True):
            order.append("second")

    with file_lock(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        assert is_waiting.wait(20)
        thread.join(0.1)
        order.append("first")
    thread.join(20)
    assert order == ["first", "second"]
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_told_from_a_lock_that_is_held(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(NoLocksError, match="No locks available"), file_lock(tmp_path / "lock"):
        pass


@pytest.mark.parametrize("holder", [None, {}, "text", {"pid": 1}])
def test_a_holder_that_cannot_be_made_out_is_another_process(holder):
    assert describe_holder(holder) == "another process"
