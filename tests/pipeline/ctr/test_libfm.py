"""libfm files: columns by place or one multi-valued column, and bad lines are named."""

from __future__ import annotations

import pytest

from graphhash.errors import DataError
from pipeline.config.run_config import DataConfig
from pipeline.ctr import libfm
from pipeline.ctr.libfm import LibfmFile, find_libfm, read_libfm
from pipeline.ctr.log import open_log


def rows_of(path):
    return [rows for file in find_libfm(str(path), "random") for rows in read_libfm(file)]


def as_lists(path, names):
    parts = rows_of(path)
    return {name: [str(v) for part in parts for v in part.columns[name].to_pylist()] for name in names}


def test_libfm_of_fixed_width_has_a_column_per_place(tmp_path, monkeypatch):
    monkeypatch.setattr(libfm, "BLOCK_BYTES", 30)
    (tmp_path / "log.libfm").write_text("1 10:1 21:1 30:0.5\n-1 11:1 20:1 30:2\n-1 10:1 20:1 30:1\n1 12:1 20:1 30:3")
    assert as_lists(tmp_path / "log.libfm", ["label", "f0", "f1", "f2"]) == {
        "label": ["1.0", "0.0", "0.0", "1.0"], "f0": ["10", "11", "10", "12"], "f1": ["21", "20", "20", "20"],
        "f2": ["0.5", "2.0", "1.0", "3.0"],
    }  # fmt: skip
    log = open_log(DataConfig(str(tmp_path / "log.libfm")))
    assert [c.name for c in log.schema.categories] == ["f0", "f1"]
    assert log.schema.dense == ("f2",)


def test_libfm_of_changing_width_is_one_multi_valued_column(tmp_path):
    (tmp_path / "log.svm").write_text("1 3:1 5:1\n0\n0 4:1\n")
    (rows,) = rows_of(tmp_path / "log.svm")
    assert rows.columns["features"].to_pylist() == [[3, 5], [], [4]]
    assert open_log(DataConfig(str(tmp_path / "log.svm"))).schema.multi_valued[0].name == "features"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "file is empty"),
        ("1 3:1\n\n0 4:1\n", "row 2 is empty"),
        ("1 3:1 x\n", "'x' is no index:value"),
        ("1 3:1 4:1\n0 3:1 a:1\n", "write lines as"),
        ("yes 3:1\n", "write lines as"),
    ],
)
def test_a_bad_libfm_file_is_named_with_its_line(tmp_path, text, words):
    (tmp_path / "log.libfm").write_text(text)
    with pytest.raises(DataError, match=words) as error:
        rows_of(tmp_path / "log.libfm")
    assert "\n" not in str(error.value)


def test_a_later_libfm_line_of_another_shape_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(libfm, "BLOCK_BYTES", 8)
    file = LibfmFile(str(tmp_path / "log.libfm"), "libfm", layout=("index", "index"))
    (tmp_path / "log.libfm").write_text("1 3:1 4:1\n0 3:1\n")
    with pytest.raises(DataError, match=r"row 2 has 1 features, the first rows have 2"):
        list(read_libfm(file))
    (tmp_path / "log.libfm").write_text("1 3:1 4:1\n0 3:1 4:7\n")
    with pytest.raises(DataError, match=r"row 2 has a value that is not 1"):
        list(read_libfm(file))
