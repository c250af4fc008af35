"""Fingerprints follow the content and the names of files, and files are read again only where a known hash may be stale."""

from __future__ import annotations

import os
import shutil

import pytest

from pipeline.runs import fingerprints
from pipeline.runs.fingerprints import FILE, FileHashes


@pytest.fixture
def read(monkeypatch):
    """The names of the files that are read, and no memory of those that other tests read."""
    names: list[str] = []
    file_sha256 = fingerprints.file_sha256
    monkeypatch.setattr(fingerprints, "file_sha256", lambda path: names.append(path.name) or file_sha256(path))
    monkeypatch.setattr(fingerprints, "_KNOWN", {})
    return names


def old_file(path, text="x"):
    """A file that was written long before it is hashed, by its modification time and its change time."""
    path.write_text(text)
    os.utime(path, (1, 1))
    return path


@pytest.fixture
def late(monkeypatch):
    """A clock far ahead of every change."""
    time_ns = fingerprints.time.time_ns
    monkeypatch.setattr(fingerprints.time, "time_ns", lambda: time_ns() + 10 * fingerprints.GRANULARITY_NS)


def test_names_and_content_count_and_neither_place_nor_time_does(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        old_file(tmp_path / name / "a")
    one, two, hashes = tmp_path / "one" / "a", tmp_path / "two" / "a", FileHashes(tmp_path)
    before = hashes.fingerprint([one])
    assert before == hashes.fingerprint([two])
    os.utime(two)
    assert before == hashes.fingerprint([two])
    assert hashes.fingerprint([one, two]) == hashes.fingerprint([two, one])
    shutil.copyfile(one, tmp_path / "b")
    assert before != hashes.fingerprint([tmp_path / "b"])
    two.write_text("y")
    assert before != hashes.fingerprint([two])


def test_a_large_log_is_read_once(tmp_path, read, late, monkeypatch):
    file = old_file(tmp_path / "log")
    for _ in range(2):
        hashes = FileHashes(tmp_path)
        first = hashes.fingerprint([file])
        hashes.save()
    assert read == ["log"]
    # Another process knows it from the run folder.
    monkeypatch.setattr(fingerprints, "_KNOWN", {})
    assert FileHashes(tmp_path).fingerprint([file]) == first
    assert read == ["log"]
    os.utime(file)
    assert FileHashes(tmp_path).fingerprint([file]) == first
    assert read == ["log", "log"]


def test_an_edit_of_equal_size_in_the_same_instant_is_noticed(tmp_path, read):
    file = tmp_path / "log"
    file.write_text("x")
    before = FileHashes(tmp_path).fingerprint([file])
    state = os.stat(file)
    file.write_text("y")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert FileHashes(tmp_path).fingerprint([file]) != before
    assert read == ["log", "log"]


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"/log": 1}'])
def test_damaged_hashes_are_made_anew(tmp_path, damage, read):
    file = old_file(tmp_path / "log")
    (tmp_path / FILE).write_text(damage)
    assert FileHashes(tmp_path).fingerprint([file])
    assert read == ["log"]


def test_no_folder_is_made_for_hashes(tmp_path):
    hashes = FileHashes(tmp_path / "run")
    hashes.fingerprint([old_file(tmp_path / "log")])
    hashes.save()
    assert not (tmp_path / "run").exists()
