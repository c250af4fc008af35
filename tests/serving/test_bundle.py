from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from serving import external_data, manifest
from serving.bundle import check_bundle, write_manifest
from serving.errors import BundleError
from serving.external_data import external_locations
from tests.helpers.small_models import small_model
from tests.helpers.tampering import rewrite

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "bundle"
    small_model(items="string", n_items=60, n_buckets=200).export(folder, external_data_mib=0.001)
    return folder


@pytest.fixture
def copied(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def refusal(folder: Path) -> str:
    with pytest.raises(BundleError) as error:
        check_bundle(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    return str(error.value)


def test_an_exported_bundle_is_accepted_and_its_manifest_is_as_written(exported):
    manifest = check_bundle(exported)
    assert manifest["format_version"] == 5
    assert manifest["task"] == "retrieval"
    assert sorted(manifest["files"]) == ["model.onnx", "model.onnx.data"]
    assert check_bundle(str(exported)) == manifest


@pytest.mark.parametrize(("name", "n_positions"), [("manifest.json", 400), ("model.onnx", 60), ("model.onnx.data", 60)])
def test_one_changed_byte_is_refused_wherever_it_is(name, n_positions, copied):
    original = (copied / name).read_bytes()
    rng = np.random.default_rng(0)
    positions = {0, len(original) - 1, *rng.integers(0, len(original), n_positions).tolist()}
    for position in positions:
        changed = bytearray(original)
        changed[position] ^= int(rng.integers(1, 256))
        (copied / name).write_bytes(changed)
        refusal(copied)
    (copied / name).write_bytes(original)
    check_bundle(copied)


def test_white_space_in_the_manifest_is_a_change_too(copied):
    text = (copied / "manifest.json").read_text()
    for changed in (
        text + "\n",
        text.replace("\n", "\r\n"),
        text.replace("  ", "\t", 1),
        json.dumps(json.loads(text)),
    ):
        (copied / "manifest.json").write_bytes(changed.encode())
        assert "changed since it was written" in refusal(copied)


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "model.onnx.data"])
@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_a_cut_file_is_refused(name, share, copied):
    data = (copied / name).read_bytes()
    (copied / name).write_bytes(data[: int(share * len(data))])
    refusal(copied)


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "model.onnx.data"])
def test_a_missing_file_is_refused(name, copied):
    (copied / name).unlink()
    assert "missing" in refusal(copied)


def test_what_does_not_belong_there_is_refused(copied):
    (copied / "notes.txt").write_text("hello")
    assert "notes.txt: not part of the bundle; remove it" in refusal(copied)
    (copied / "notes.txt").unlink()
    (copied / "folder").mkdir()
    assert "folder: not part of the bundle" in refusal(copied)


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "model.onnx.data"])
def test_links_are_refused(name, copied, tmp_path):
    (copied / name).rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", copied / name)
    assert "not a plain file" in refusal(copied)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", "", "c:\\x", "manifest.json"])
def test_names_that_leave_the_folder_are_refused(name, copied):
    rewrite(copied, lambda m: m["files"].update({name: {"bytes": 1, "sha256": "0"}}))
    assert "not a plain file name" in refusal(copied)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "manifest.json", "model.onnx", "other.data"])
def test_external_data_outside_of_the_listed_files_is_refused(location, copied):
    model = onnx.load(copied / "model.onnx", load_external_data=False)
    next(t for t in model.graph.initializer if t.external_data).external_data[0].value = location
    data = model.SerializeToString()
    (copied / "model.onnx").write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(copied, lambda m: m["files"].update({"model.onnx": entry}))
    assert repr(location) in refusal(copied)


def test_external_locations_are_found_in_attributes_and_subgraphs(tmp_path):
    def tensor(location: str) -> onnx.TensorProto:
        value = onnx.TensorProto(data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
        value.external_data.add(key="location", value=location)
        return value

    inner = onnx.helper.make_graph([], "inner", [], [], [tensor("c")])
    nodes = [
        onnx.helper.make_node("Constant", [], ["x"], value=tensor("a")),
        onnx.helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner),
    ]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "outer", [], [], [tensor("b")]))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert external_locations(tmp_path / "m.onnx") == {"a", "b", "c"}


def test_a_file_that_is_cut_while_it_is_walked_does_not_end_the_process(copied):
    """Run in a process of its own: before, the file was mapped, and the process died of SIGBUS."""
    code = f"""
from serving import external_data
walk = external_data._walk
def spoiled(*arguments):
    open({str(copied / "model.onnx")!r}, "r+b").truncate(0)
    external_data._walk = walk
    return walk(*arguments)
external_data._walk = spoiled
from pathlib import Path
assert external_data.external_locations(Path({str(copied / "model.onnx")!r})) == {{"model.onnx.data"}}
"""
    got = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert got.returncode == 0, (got.returncode, got.stderr)


def test_the_key_of_external_data_is_found_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(external_data, "_CHUNK_BYTES", 5)
    for n in range(12):
        (tmp_path / "file").write_bytes(b"x" * n + b"location" + b"y")
        assert external_data._holds_key(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"locatio" * 9)
    assert not external_data._holds_key(tmp_path / "file")


def test_random_damage_to_the_walked_file_raises_nothing_but_value_errors(exported, tmp_path):
    original = (exported / "model.onnx").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(original[: rng.integers(1, len(original) + 1)])
        for position in rng.integers(0, len(changed), 5):
            changed[position] = rng.integers(0, 256)
        (tmp_path / "m.onnx").write_bytes(changed)
        with contextlib.suppress(ValueError):
            external_locations(tmp_path / "m.onnx")


@pytest.mark.parametrize("version", [1, 2, 3])
def test_an_older_format_is_refused_with_the_remedy(version, copied):
    rewrite(copied, lambda m: m.update(format_version=version))
    assert (
        f"bundle format {version} is older than 4, the oldest read here; export it again with 'graphhash export'"
        in refusal(copied)
    )


def test_a_newer_format_is_refused_with_both_versions(copied):
    rewrite(copied, lambda m: m.update(format_version=7))
    assert "bundle format 7 is newer than 5" in refusal(copied)
    for version in ("1", 0, True, 1.0, None):
        rewrite(copied, lambda m, v=version: m.update(format_version=v))
        assert "format_version" in refusal(copied)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("n_items"),
        lambda m: m.update(n_items="41000"),
        lambda m: m.update(n_users=0),
        lambda m: m.update(dim=True),
        lambda m: m.update(id_types={"user_id": "int64", "item_id": "float"}),
        lambda m: m.update(id_types={"user_id": "int64", "item_id": ["string"]}),
        lambda m: m.update(padding_item_id=5),
        lambda m: m.update(n_buckets=3),
        lambda m: m.update(indices_per_id={}),
        lambda m: m.update(outputs={"score": 3}),
        lambda m: m.update(outputs={"score": {"dtype": ["x"]}}),
        lambda m: m.update(files=[]),
        lambda m: m.update(files={}),
        lambda m: m["files"].update({"model.onnx": 3}),
    ],
)
def test_a_manifest_of_another_shape_is_refused(change, copied):
    rewrite(copied, change)
    refusal(copied)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"3",
        b"{",
        b"\xff\xfe",
        b'{"a": NaN}',
        b"[" * 100_000,
        b"9" * 10_000,
        b"{}" + b" " * 2**20,
        b'{"a": 1, "a": 2}',
    ],
)
def test_what_is_no_manifest_is_refused(text, copied):
    (copied / "manifest.json").write_bytes(text)
    refusal(copied)


def test_a_place_without_a_bundle_is_named(tmp_path):
    assert "graphhash export" in refusal(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    refusal(tmp_path / "file")


def test_a_manifest_that_would_not_load_is_not_written(tmp_path, exported):
    (tmp_path / "model.onnx").write_bytes(b"x")
    content = {key: value for key, value in check_bundle(exported).items() if key in manifest._FIELDS}
    for wrong in (
        {"metrics": {"x": float("nan")}},
        {"provenance": {"x": {1, 2}}},
        {"provenance": {"x": "y" * 2**20}},
        {"dim": 0},
    ):
        with pytest.raises(BundleError):
            write_manifest(tmp_path, {**content, **wrong})
    assert not (tmp_path / "manifest.json").exists()


def test_serving_imports_without_the_training_half():
    program = (
        "import sys, serving\n"
        "heavy = {'torch', 'ray', 'mlflow', 'onnx', 'pyarrow', 'scipy', 'pandas', 'graphhash', 'pipeline'} "
        "& set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)
