"""How commands end: exit codes, one-line errors, and signals of real processes."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from graphhash.errors import DataError
from graphhash.graph.vocabulary import Vocabulary
from pipeline.cli import main as cli
from pipeline.errors import RunFolderError
from pipeline.runs import run as run_module

ROOT = Path(__file__).resolve().parents[3]


class RemoteError(DataError):
    """As Ray makes them: the text is the remote traceback, the cause is the error."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("Traceback ...\n  many lines\n")
        self.cause = cause


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DataError("log.csv: bad\nrow 3"), "log.csv: bad row 3"),
        (RemoteError(DataError("log.csv: bad")), "log.csv: bad"),
        (RunFolderError("out is in use"), "out is in use"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "[Errno 13] Permission denied: 'out'"),
        (ConnectionError("no Ray at 1.2.3.4"), "no Ray at 1.2.3.4"),
    ],
)
def test_expected_errors_are_one_line_and_code_1(graphhash, failing, tmp_path, error, line):
    failing(error)
    assert graphhash("run", "--data", "x", "--out", tmp_path) == (1, "", f"graphhash: error: {line}\n")


def test_our_own_value_error_is_one_line_and_a_foreign_one_is_a_defect(graphhash, monkeypatch, tmp_path):
    monkeypatch.setattr(run_module, "run", lambda *_a, **_k: Vocabulary([1]).take([5]))
    code, _, err = graphhash("run", "--data", "x", "--out", tmp_path)
    assert (code, err) == (1, "graphhash: error: rows span 5..5, the vocabulary has rows 0..0\n")
    monkeypatch.setattr(run_module, "run", lambda *_a, **_k: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["run", "--data", "x", "--out", str(tmp_path)])


def test_debugging_shows_the_traceback(failing, monkeypatch, tmp_path):
    monkeypatch.setenv("GRAPHHASH_DEBUG", "1")
    failing(DataError("bad"))
    with pytest.raises(DataError):
        cli.main(["run", "--data", "x", "--out", str(tmp_path)])


def test_an_interrupt_is_130_and_says_what_is_kept(graphhash, failing, tmp_path):
    failing(KeyboardInterrupt())
    code, _, err = graphhash("run", "--data", "x", "--out", tmp_path)
    assert code == 130
    assert err.strip().count("\n") == 0
    assert "finished stages are kept" in err


def test_a_command_that_ends_with_code_1_by_itself_was_not_interrupted(graphhash, failing, tmp_path):
    failing(SystemExit(1))
    assert graphhash("run", "--data", "x", "--out", tmp_path) == (1, "", "")


def test_ctrl_c_that_ray_turns_into_code_1_was_an_interrupt(graphhash, monkeypatch, tmp_path):
    def run(*_arguments, **_options):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise SystemExit(1) from None

    monkeypatch.setattr(run_module, "run", run)
    code, _, err = graphhash("run", "--data", "x", "--out", tmp_path)
    assert code == 130
    assert "finished stages are kept" in err


@pytest.mark.parametrize("code", [0, 3])
def test_another_code_after_ctrl_c_is_the_commands_own(graphhash, monkeypatch, tmp_path, code):
    """As `graphhash serve` ends, which Ctrl-C is meant to stop."""

    def run(*_arguments, **_options):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            sys.exit(code)

    monkeypatch.setattr(run_module, "run", run)
    assert graphhash("run", "--data", "x", "--out", tmp_path) == (code, "", "")


def test_signal_handlers_are_put_back(graphhash, failing, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    failing(DataError("bad"))
    graphhash("run", "--data", "x", "--out", tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


WAITING = """
import sys, time
from pipeline.cli import main as cli
from pipeline.runs import run

def wait(config, *, until):
    try:
        print("up", flush=True)
        time.sleep(60)
    finally:
        print("cleaned", flush=True)

run.run = wait
cli.main(["run", "--data", "x", "--out", sys.argv[1]])
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_runs_the_clean_up(tmp_path, number, code):
    """SIGTERM, as schedulers send it, unwinds like Ctrl-C: locks, temporary folders and MLflow runs are seen to."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
        # A shell's background jobs, and what they start, ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    out, error = process.communicate()
    assert (out, process.returncode) == ("cleaned\n", code)
    assert ("interrupted" in error) == (number == signal.SIGINT)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_within_a_callback_of_c_is_not_lost(graphhash, monkeypatch, tmp_path, number, code):
    """As while numba compiles: an exception that a handler raises there goes no further than the callback."""
    done = threading.Event()

    @ctypes.CFUNCTYPE(None)
    def callback():
        signal.raise_signal(number)

    def run(*_arguments, **_options):
        callback()
        assert not done.wait(60), "nobody sets it"

    monkeypatch.setattr(run_module, "run", run)
    hook = sys.unraisablehook
    assert graphhash("run", "--data", "x", "--out", tmp_path)[0] == code
    assert sys.unraisablehook is hook
