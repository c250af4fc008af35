"""The run folder: locking, skipping, and whole results or none."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pipeline.errors import RunFolderError
from pipeline.runs.folder import RunFolder
from pipeline.storage.atomic import write_json_atomic

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def folder(tmp_path):
    with RunFolder(tmp_path / "run") as opened:
        yield opened


def writer(text: str, calls: list | None = None):
    def compute(out: Path) -> dict:
        if calls is not None:
            calls.append(text)
        (out / "deep").mkdir()
        (out / "deep" / "a.txt").write_text(text)
        return {"text": text}

    return compute


def listing(path: Path) -> set[str]:
    return {str(p.relative_to(path)) for p in path.rglob("*")}


def test_second_time_is_skipped(folder, caplog):
    caplog.set_level(logging.INFO, "pipeline")
    calls = []
    first = folder.stage("cluster", {"g": 1.0}, {"log": "in"}, "cluster", writer("x", calls))
    second = folder.stage("cluster", {"g": 1.0}, {"log": "in"}, "cluster", writer("x", calls))
    assert calls == ["x"]
    assert (first.skipped, second.skipped) == (False, True)
    assert (first.key, first.result, first.seconds) == (second.key, second.result, second.seconds)
    assert caplog.messages[-1] == "cluster: unchanged, skipped"


@pytest.mark.parametrize(
    ("settings", "inputs"), [({"g": 2.0}, {"log": "in"}), ({"g": 1.0}, {"log": "other"}), ({}, {"log": "in"})]
)
def test_other_settings_or_inputs_compute_again(folder, settings, inputs):
    folder.stage("cluster", {"g": 1.0}, {"log": "in"}, "cluster", writer("old"))
    again = folder.stage("cluster", settings, inputs, "cluster", writer("new"))
    assert not again.skipped
    assert (folder.path / "cluster" / "deep" / "a.txt").read_text() == "new"


def damage_content(file: Path):
    file.write_text("y")


def damage_size(file: Path):
    file.write_text("longer")


def damage_absence(file: Path):
    file.unlink()


def damage_type(file: Path):
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("damage", [damage_content, damage_size, damage_absence, damage_type])
def test_damaged_output_is_computed_again(folder, damage):
    folder.stage("cluster", {}, {}, "cluster", writer("x"))
    file = folder.path / "cluster" / "deep" / "a.txt"
    damage(file)
    assert not folder.stage("cluster", {}, {}, "cluster", writer("x")).skipped
    assert file.read_text() == "x"


@pytest.mark.parametrize("record", ["", "[]", "{", '{"key": 1}'])
def test_damaged_record_is_computed_again(folder, record):
    folder.stage("cluster", {}, {}, "cluster", writer("x"))
    (folder.path / "stages" / "cluster.json").write_text(record)
    assert not folder.stage("cluster", {}, {}, "cluster", writer("x")).skipped


def test_a_copied_run_folder_is_up_to_date(tmp_path, folder):
    folder.stage("cluster", {}, {}, "cluster", writer("x"))
    shutil.copytree(folder.path, tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(tmp_path / "copy" / "cluster" / "deep" / "a.txt", (1, 1))
    with RunFolder(tmp_path / "copy") as copy:
        assert copy.stage("cluster", {}, {}, "cluster", writer("x")).skipped


@pytest.mark.parametrize("error", [RuntimeError("bang"), KeyboardInterrupt(), SystemExit(143)])
def test_failure_keeps_the_previous_result_and_leaves_no_litter(folder, error):
    folder.stage("train soft", {"v": 1}, {}, "methods/soft", writer("old"))
    before = listing(folder.path)

    def fail(out: Path) -> dict:
        (out / "half").write_text("half")
        raise error

    with pytest.raises(type(error)):
        folder.stage("train soft", {"v": 2}, {}, "methods/soft", fail)
    assert listing(folder.path) == before
    assert folder.stage("train soft", {"v": 1}, {}, "methods/soft", writer("never")).skipped


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_one_line_and_loses_nothing(folder, code):
    folder.stage("cluster", {"v": 1}, {}, "cluster", writer("old"))

    def fail(out: Path) -> dict:
        raise OSError(code, os.strerror(code))

    with pytest.raises(RunFolderError, match=r"disk is full.*stage 'cluster'.*Free some space") as caught:
        folder.stage("cluster", {"v": 2}, {}, "cluster", fail)
    assert "\n" not in str(caught.value)
    assert folder.current("cluster").result == {"text": "old"}


def test_other_operating_system_errors_stay_themselves(folder):
    def fail(out: Path) -> dict:
        return {"x": (out / "missing").read_text()}

    with pytest.raises(FileNotFoundError):
        folder.stage("cluster", {}, {}, "cluster", fail)


def test_value_stage_writes_its_result_as_the_file(folder):
    calls = []

    def compute() -> dict:
        calls.append(1)
        return {"recall@20": 0.5}

    for _ in range(2):
        result = folder.value("evaluate soft", {}, {"train": "k"}, "methods/soft/metrics.json", compute)
    assert (len(calls), result.skipped, result.result) == (1, True, {"recall@20": 0.5})
    assert json.loads((folder.path / "methods" / "soft" / "metrics.json").read_text()) == {"recall@20": 0.5}


def test_new_training_takes_its_metrics_along(folder):
    folder.stage("train soft", {"v": 1}, {}, "methods/soft", writer("x"))
    folder.value("evaluate soft", {}, {"train": "k"}, "methods/soft/metrics.json", dict)
    folder.stage("train soft", {"v": 2}, {}, "methods/soft", writer("y"))
    assert folder.current("evaluate soft") is None


def test_litter_of_a_dead_process_is_removed(tmp_path):
    run = tmp_path / "run"
    for litter in (
        ".cluster.partial",
        "methods/.soft.partial",
        "methods/.graph.replaced",
        ".bundle.replaced",
    ):
        (run / litter).mkdir(parents=True)
        (run / litter / "x").write_text("x")
    (run / "bundle").mkdir()
    (run / ".metrics.json.12.partial").write_text("x")
    with RunFolder(run):
        # `graph` died between the two renames, so its previous result comes back; `bundle` after both.
        assert listing(run) == {".lock", "bundle", "methods", "methods/graph", "methods/graph/x"}


def test_second_process_is_told_who_holds_the_folder(tmp_path):
    run = tmp_path / "run"
    program = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from pipeline.runs.folder import RunFolder
        with RunFolder(Path({str(run)!r})):
            print("locked", flush=True)
            sys.stdin.read()
    """)
    holder = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(
        RunFolderError, match=rf"in use by process {holder.pid} on .* since .*choose another run folder"
    ):
        RunFolder(run).__enter__()
    holder.communicate("")
    with RunFolder(run):
        pass


def test_killed_process_leaves_a_usable_folder(tmp_path):
    run = tmp_path / "run"
    program = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from pipeline.runs.folder import RunFolder
        def die(out):
            (out / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        with RunFolder(Path({str(run)!r})) as folder:
            folder.stage("cluster", {{}}, {{}}, "cluster", lambda out: {{}})
            folder.stage("cluster", {{"v": 2}}, {{}}, "cluster", die)
    """)
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=False).returncode == -9
    assert (run / ".cluster.partial" / "half").exists()
    with RunFolder(run) as folder:
        assert folder.stage("cluster", {}, {}, "cluster", writer("never")).skipped
        assert not list(run.glob(".*.partial"))


def test_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match="choose another run folder"):
        RunFolder(tmp_path / "file" / "run").__enter__()


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json_atomic(path, {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(path, {"x": float("nan")})
    assert json.loads(path.read_text()) == {"x": 1}
    assert listing(tmp_path) == {"a.json"}


def test_a_result_of_another_folder_is_taken_over_if_it_is_the_same(folder, tmp_path):
    with RunFolder(tmp_path / "other") as other:
        made = other.stage("cluster", {"g": 1.0}, {"log": "in"}, "cluster", writer("x"))
    for settings, inputs in (({"g": 2.0}, {"log": "in"}), ({"g": 1.0}, {"log": "out"})):
        assert not folder.reuse(tmp_path / "other", "cluster", settings, inputs, "cluster")
    assert not folder.reuse(tmp_path / "nowhere", "cluster", {"g": 1.0}, {"log": "in"}, "cluster")
    assert not (folder.path / "cluster").exists()
    assert folder.reuse(tmp_path / "other", "cluster", {"g": 1.0}, {"log": "in"}, "cluster")
    taken = folder.stage("cluster", {"g": 1.0}, {"log": "in"}, "cluster", writer("not computed"))
    assert (taken.skipped, taken.result, taken.seconds) == (True, made.result, made.seconds)
    # What is up to date stays, and to make it anew leaves the source as it was.
    assert not folder.reuse(tmp_path / "other", "cluster", {"g": 1.0}, {"log": "in"}, "cluster")
    folder.stage("cluster", {"g": 3.0}, {"log": "in"}, "cluster", writer("y"))
    assert (tmp_path / "other" / "cluster" / "deep" / "a.txt").read_text() == "x"
    assert RunFolder(tmp_path / "other").would_skip("cluster", {"g": 1.0}, {"log": "in"})


def test_without_hard_links_a_result_is_copied(folder, tmp_path, monkeypatch):
    with RunFolder(tmp_path / "other") as other:
        other.stage("cluster", {}, {}, "cluster", writer("x"))

    def refuse(*_arguments):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert folder.reuse(tmp_path / "other", "cluster", {}, {}, "cluster")
    assert (folder.path / "cluster" / "deep" / "a.txt").read_text() == "x"
