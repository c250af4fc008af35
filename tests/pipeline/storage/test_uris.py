"""Logs and run folders at URIs: on disk (file://), in memory, and by pyarrow's own S3 client against moto's server on loopback."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pyarrow._fs import _MockFileSystem
from pyarrow.fs import FileSelector, LocalFileSystem, SubTreeFileSystem

from graphhash.errors import DataError
from pipeline.cli.settings import place
from pipeline.config.run_config import RunConfig
from pipeline.errors import ConfigError, RunFolderError
from pipeline.runs import remote as mirrors
from pipeline.runs.remote import Mirror, held_folder, run_folder
from pipeline.runs.run import run
from pipeline.storage.uris import bundle_folder, fetch, is_uri, localised, open_uri, uri_of_copy, with_uris, work_folder
from tests.helpers.s3 import s3_bucket

ROOT = Path(__file__).resolve().parents[3]


def on_disk(tmp_path):
    (tmp_path / "there").mkdir()
    return SubTreeFileSystem(str(tmp_path / "there"), LocalFileSystem()), "bucket/run"


def in_memory(tmp_path):
    return _MockFileSystem(datetime.now(UTC)), "bucket/run"


@pytest.fixture(scope="module")
def bucket():
    with s3_bucket() as bucket:
        yield bucket


@pytest.fixture(params=[on_disk, in_memory, "s3"], ids=["on disk", "in memory", "s3"])
def opened(request, tmp_path):
    if request.param == "s3":
        filesystem, path = open_uri(request.getfixturevalue("bucket").uri(tmp_path.name))
    else:
        filesystem, path = request.param(tmp_path)
    filesystem.create_dir(path, recursive=True)
    return filesystem, path


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(mirrors, "LOCK_SETTLE_S", 0.01)


def put(opened, name: str, text: str) -> None:
    filesystem, path = opened
    filesystem.create_dir(f"{path}/{name}".rpartition("/")[0], recursive=True)
    with filesystem.open_output_stream(f"{path}/{name}") as stream:
        stream.write(text.encode())


def listing(opened) -> dict[str, str]:
    filesystem, path = opened
    entries = filesystem.get_file_info(FileSelector(path, recursive=True))
    found = {}
    for entry in entries:
        if entry.is_file:
            with filesystem.open_input_stream(entry.path) as stream:
                found[entry.path.removeprefix(f"{path}/")] = stream.read().decode()
    return found


def mirror(opened, folder: Path) -> Mirror:
    return Mirror("mock://bucket/run", folder, opened=opened)


def test_what_is_a_uri():
    assert all(map(is_uri, ("s3://bucket/x", "gs://b/y.csv", "file:///tmp/x", "abfs+x://a")))
    assert not any(map(is_uri, ("/data/x", "out", "a:b", "C:\\x", "logs/*.csv", "")))
    assert work_folder("s3://b/run") == work_folder("s3://b/run/") != work_folder("s3://c/run")
    assert work_folder("s3://b/run", "/shared").parent == Path("/shared")


@pytest.mark.parametrize("uri", ["nonsense://x/y", "s3://", "file://host/x"])
def test_a_uri_that_cannot_be_opened_is_one_line(uri):
    with pytest.raises(DataError, match=r"cannot be opened \(.*write s3://, gs://"):
        open_uri(uri)


def test_a_password_in_a_uri_is_refused_and_not_repeated():
    with pytest.raises(DataError, match="AWS_ACCESS_KEY_ID") as caught:
        open_uri("s3://key:hush@bucket/run")
    assert "hush" not in str(caught.value)
    assert "bucket/run" in str(caught.value)


def test_a_bucket_that_denies_access_is_one_line(bucket, tmp_path):
    log = bucket.uri("denied/log.csv")
    with open_uri(log)[0].open_output_stream("bucket/denied/log.csv") as stream:
        stream.write(b"user_id,item_id\n1,2\n")
    assert fetch(log, tmp_path).read_text() == "user_id,item_id\n1,2\n"
    run = Mirror(bucket.uri("denied/run"), tmp_path / "run")
    with bucket.access_denied():
        with pytest.raises(DataError, match=r"cannot be read \(.*check the path, the region, and the credentials on"):
            fetch(log, tmp_path)
        with (
            pytest.raises(RunFolderError, match=r"cannot be written \(.*check the path and the credentials"),
            run.held(),
        ):
            pass


def test_a_log_is_copied_once_and_again_when_it_changes(opened, tmp_path):
    filesystem, path = opened
    put(opened, "log/a.csv", "user_id,item_id\n1,2\n")
    put(opened, "log/b.csv", "user_id,item_id\n3,4\n")
    put(opened, "log/deep/c.csv", "not read")

    def get(name: str, uri: str) -> Path:
        return fetch(uri, tmp_path / "source", opened=(filesystem, f"{path}/{name}"))

    file, folder, pattern = get("log/a.csv", "m://file"), get("log", "m://folder"), get("log/*.csv", "m://glob")
    assert file.read_text() == "user_id,item_id\n1,2\n"
    assert sorted(p.name for p in folder.iterdir()) == ["a.csv", "b.csv"]
    assert pattern.name == "*.csv"
    assert sorted(p.name for p in pattern.parent.iterdir()) == ["a.csv", "b.csv"]
    assert [uri_of_copy(str(copy)) for copy in (file, folder, pattern)] == ["m://file", "m://folder", "m://glob"]
    assert [uri_of_copy(path) for path in ("some/log.csv", "log", "/log")] == ["some/log.csv", "log", "/log"]
    before = file.stat()
    assert get("log/a.csv", "m://file").stat().st_ino == before.st_ino, "it is not copied again"
    put(opened, "log/a.csv", "user_id,item_id\n1,2\n5,6\n")
    filesystem.delete_file(f"{path}/log/b.csv")
    assert get("log/a.csv", "m://file").read_text().endswith("5,6\n")
    assert [p.name for p in get("log", "m://folder").iterdir()] == ["a.csv"]
    with pytest.raises(DataError, match="m://x: no such file or folder; check the path"):
        get("log/none.csv", "m://x")
    with pytest.raises(DataError, match="m://x: no file is there"):
        get("log/*.parquet", "m://x")


def test_settings_of_copies_name_their_uris_again(tmp_path):
    for name in ("log.csv", "features.csv"):
        (tmp_path / name).write_text("user_id,item_id\n1,2\n")
    log, features = (f"file://{tmp_path}/{name}" for name in ("*.csv", "features.csv"))
    here = RunConfig.from_flat(
        {"data.path": log, "data.item_features": features, "data.user_features": "/f.csv", "run.out": str(tmp_path)}
    )
    copied = localised(here)
    assert not is_uri(copied.data.path)
    assert not is_uri(copied.data.item_features)
    assert with_uris(copied) == here == with_uris(here)


def test_a_path_that_the_clusters_machine_lacks_is_named_with_the_remedy(tmp_path, monkeypatch):
    config = RunConfig.from_flat({"data.path": "/home/somebody/log.csv", "run.out": str(tmp_path)})
    assert localised(config) == config
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(
        DataError, match=r"/home/somebody/log.csv: no such file or folder on .*, where the job runs; .* s3://"
    ):
        localised(config)
    with pytest.raises(ConfigError, match="--out out: a Ray job runs in a temporary copy"):
        place("out", None)
    assert place("s3://b/run", "/shared")[1] == "s3://b/run"


def test_what_is_made_here_is_there_and_comes_back_on_another_machine(opened, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    with (one := mirror(opened, first)).held():
        (first / "stages").mkdir()
        (first / "bundle").mkdir()
        (first / "bundle" / "model.onnx").write_text("weights")
        (first / "stages" / "export.json").write_text("{}")
        (first / ".source").mkdir()
        (first / ".source" / "log.csv").write_text("not kept")
        (first / ".x.partial").write_text("not kept")
        (first / ".mlflow" / "entries").mkdir(parents=True)
        (first / ".mlflow" / "entries" / "1.json").write_text("undelivered")
        one.send()
        assert listing(opened).keys() == {
            "bundle/model.onnx",
            "stages/export.json",
            ".mlflow/entries/1.json",
            ".lock.json",
        }
    assert ".lock.json" not in listing(opened)
    with mirror(opened, second).held():
        assert (second / "bundle" / "model.onnx").read_text() == "weights"
        (second / "bundle" / "model.onnx").write_text("better")
        (second / ".mlflow" / "entries" / "1.json").unlink()
    assert listing(opened) == {"bundle/model.onnx": "better", "stages/export.json": "{}"}
    with mirror(opened, first).held():
        assert (first / "bundle" / "model.onnx").read_text() == "better"
        assert not (first / ".mlflow" / "entries" / "1.json").exists()


def test_unchanged_files_are_neither_fetched_nor_sent_again(opened, tmp_path, monkeypatch):
    with mirror(opened, tmp_path / "a").held():
        (tmp_path / "a" / "x").write_text("1")
    moved = []
    monkeypatch.setattr(mirrors, "upload", lambda *a: moved.append(a))
    monkeypatch.setattr(mirrors, "download", lambda filesystem, wanted: moved.extend(wanted))
    with mirror(opened, tmp_path / "a").held():
        pass
    assert moved == []


def test_a_stage_sent_half_is_not_recorded(opened, tmp_path, monkeypatch):
    """The connection breaks between the files of a stage and its record: neither the old nor the new record is there."""
    folder = tmp_path / "a"
    with mirror(opened, folder).held():
        (folder / "stages").mkdir()
        (folder / "stages" / "train.json").write_text("old")
        (folder / "model").write_text("old")
    original = mirrors.upload

    def upload(filesystem, target, path):
        if target.endswith("train.json"):
            raise OSError("connection reset")
        original(filesystem, target, path)

    (folder / "model").write_text("new, and longer")
    (folder / "stages" / "train.json").write_text("new, and longer")
    monkeypatch.setattr(mirrors, "upload", upload)
    kept = r"cannot be written .connection reset.; the results are kept in"
    with pytest.raises(RunFolderError, match=kept), mirror(opened, folder).held():
        pass
    assert listing(opened) == {"model": "new, and longer"}
    monkeypatch.setattr(mirrors, "upload", original)
    with mirror(opened, folder).held():
        pass
    assert listing(opened) == {"model": "new, and longer", "stages/train.json": "new, and longer"}


def test_a_failure_sends_what_there_is_and_stays_the_failure(opened, tmp_path):
    with pytest.raises(KeyboardInterrupt), mirror(opened, tmp_path / "a").held():  # noqa: PT012  (the block is what fails)
        (tmp_path / "a" / "x").write_text("1")
        raise KeyboardInterrupt
    assert listing(opened) == {"x": "1"}


def test_a_place_that_is_held_names_the_holder_and_a_dead_ones_is_taken_over(opened, tmp_path, monkeypatch, caplog):
    with (
        mirror(opened, tmp_path / "a").held(),
        pytest.raises(
            RunFolderError, match=f"is in use by process {os.getpid()} on {os.uname().nodename} since .*; wait for it"
        ),
        mirror(opened, tmp_path / "b").held(),
    ):
        pass
    # A process on another machine that was killed leaves its lock; the storage's clock says how long ago it wrote.
    put(
        opened,
        ".lock.json",
        json.dumps({"pid": 7, "host": "elsewhere", "started": "then", "command": "x", "token": "y"}),
    )
    late = mirror(opened, tmp_path / "c")
    monkeypatch.setattr(late, "_now", lambda: time.time() + 400)
    with late.held():
        pass
    assert "taken over from process 7 on elsewhere since then (x)" in caplog.messages[0]
    assert ".lock.json" not in listing(opened)


def test_a_holder_that_was_taken_over_sends_nothing_more(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(mirrors, "LOCK_BEAT_S", 0.01)
    with (  # noqa: PT012  (the holder loses its place during the block)
        pytest.raises(RunFolderError, match="in use by process 7 on elsewhere"),
        (held := mirror(opened, tmp_path / "a")).held(),
    ):
        put(
            opened,
            ".lock.json",
            json.dumps({"pid": 7, "host": "elsewhere", "started": "then", "command": "x", "token": "y"}),
        )
        deadline = time.monotonic() + 20
        while held._lost_to is None and time.monotonic() < deadline:
            # A beat may have been under way and have written over it.
            put(
                opened,
                ".lock.json",
                json.dumps({"pid": 7, "host": "elsewhere", "started": "then", "command": "x", "token": "y"}),
            )
            time.sleep(0.05)
        (tmp_path / "a" / "x").write_text("1")
    assert listing(opened).keys() == {".lock.json"}


def write_log(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = "\n".join(f"{u},{i}" for u in range(40) for i in range(30) if (u + i) % 4 == 0)
    path.write_text(f"user_id,item_id\n{rows}\n")


def test_ingest_and_clusters_at_a_uri_are_up_to_date_on_a_second_machine(tmp_path, ray_local, caplog):
    caplog.set_level(logging.INFO, "pipeline")
    write_log(tmp_path / "bucket" / "log.csv")
    data, remote = f"file://{tmp_path}/bucket/log.csv", f"file://{tmp_path}/bucket/run"

    def on_machine(name: str) -> list[str]:
        out = work_folder(remote, str(tmp_path / name))
        config = RunConfig.from_flat(
            {"data.path": data, "run.out": str(out), "run.remote": remote, "cluster.resolution": 1.0}
        )
        caplog.clear()
        run(config, until="cluster")
        return list(caplog.messages)

    assert any(line.startswith("cluster: done") for line in on_machine("one"))
    assert {"ingest.json", "users.parquet"} <= {p.name for p in (tmp_path / "bucket" / "run" / "ingest").iterdir()}
    assert on_machine("two") == ["ingest: unchanged, skipped", "cluster: unchanged, skipped"]
    settings = (tmp_path / "bucket" / "run" / "config.toml").read_text()
    assert data in settings, "the next command reads the log where it is"
    assert not list((tmp_path / "bucket" / "run").rglob("*.partial"))
    assert not (tmp_path / "bucket" / "run" / ".source").exists()


HOLDER = """
import sys, time
from pathlib import Path
from pipeline.config.run_config import RunConfig
from pipeline.runs.remote import run_folder
out, remote = sys.argv[1:]
config = RunConfig.from_flat({"run.out": out, "run.remote": remote or None})
with run_folder(config) as folder:
    print("held", flush=True)
    time.sleep(float(60))
"""


@pytest.mark.parametrize("remote", [False, True], ids=["folder", "uri"])
def test_two_real_processes_in_one_run_folder(tmp_path, remote):
    uri = f"file://{tmp_path}/bucket/run" if remote else ""
    command = [sys.executable, "-c", HOLDER]

    def start(out: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*command, str(tmp_path / out), uri], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    first = start("a")
    try:
        assert first.stdout.readline() == "held\n"
        # At a URI another machine works elsewhere; only the lock there can stop it.
        second = start("b" if remote else "a")
        _, error = second.communicate(timeout=60)
        assert second.returncode == 1
        assert f"in use by process {first.pid} on {os.uname().nodename} since" in error
        first.send_signal(signal.SIGKILL)
        first.wait()
        third = RunConfig.from_flat({"run.out": str(tmp_path / "a"), "run.remote": uri or None})
        if remote:
            # A dead holder's lock is a file: it is believed for five minutes.
            with pytest.raises(RunFolderError, match=f"process {first.pid}"), run_folder(third):
                pass
        else:
            with run_folder(third):
                pass
    finally:
        first.kill()
        first.communicate()


def test_a_bundle_at_a_uri_is_copied(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.json").write_text("{}")
    assert bundle_folder(str(tmp_path / "b")) == tmp_path / "b"
    copy = bundle_folder(f"file://{tmp_path}/b")
    assert copy != tmp_path / "b"
    assert [p.name for p in copy.iterdir()] == ["manifest.json"]


def test_a_run_at_a_uri_is_held_while_it_is_updated(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "work"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "metrics.json").write_text("[]")
    uri = f"file://{tmp_path}/there"
    with held_folder(uri) as folder:
        assert (folder / "metrics.json").read_text() == "[]"
        assert (tmp_path / "there" / ".lock.json").exists()
        (folder / "updates.json").write_text("{}")
    assert sorted(p.name for p in (tmp_path / "there").iterdir()) == ["metrics.json", "updates.json"]
    with held_folder(str(tmp_path / "there")) as folder:
        assert folder == tmp_path / "there"
