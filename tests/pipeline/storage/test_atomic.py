"""Files that are written whole or not at all."""

from __future__ import annotations

import json

import pytest

from pipeline.storage import atomic


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_whole_and_waits_for_the_disk_where_it_is_asked_to(tmp_path, monkeypatch, durable):
    synced = []
    monkeypatch.setattr(atomic.os, "fsync", synced.append)
    file = tmp_path / "new" / "facts.json"
    for value in ({"a": 1}, {"a": 2, "name": "é"}):
        atomic.write_json_atomic(file, value, durable=durable)
        assert json.loads(file.read_text(encoding="utf-8")) == value
    assert len(synced) == 2 * durable
    assert list(file.parent.iterdir()) == [file]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "facts.json"
    atomic.write_bytes_atomic(file, b"before")

    def disk_is_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", disk_is_full)
    with pytest.raises(OSError, match="No space"):
        atomic.write_text_atomic(file, "after")
    assert file.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [file]
