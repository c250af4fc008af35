"""Scorer: strict about what it takes, the same answer however it is asked, and no answer from a bundle that is not whole."""

from __future__ import annotations

import datetime
import hashlib
import shutil

import numpy as np
import pandas as pd
import pytest

from graphhash.graph.vocabulary import Vocabulary
from pipeline.bundles.check import check
from pipeline.ctr.export import ExportOptions, export_ctr
from serving import BundleError, Retriever, Scorer, bundle_model, check_bundle, session
from tests.helpers.small_ctr import N_ITEMS, as_part, entries_of, export_small, precisions_for, raw_log, small_ctr
from tests.helpers.small_models import small_model
from tests.helpers.tampering import rewrite


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scorer") / "bundle"
    export_small(small_ctr(), folder)
    return folder


@pytest.fixture(scope="module")
def loaded(bundle):
    return Scorer(bundle, provider="cpu", threads=1)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """A bundle without a text column, whose inputs can be bound."""
    folder = tmp_path_factory.mktemp("numbers") / "bundle"
    trained = small_ctr(multi_valued=False)
    users = trained.vocabularies[0]
    trained.vocabularies[0] = Vocabulary(np.arange(len(users)))
    first, *others = trained.features.columns
    columns = (type(first)(**{**vars(first), "kind": "int64"}), *others)
    features = type(trained.features)(**{**vars(trained.features), "columns": columns})
    log = raw_log(5) | {"user": [0, 1, None, 7, 10**6]}
    trained = type(trained)(trained.model, trained.maps, trained.vocabularies, features)
    part = as_part(entries_of(trained, log))
    export_ctr(
        trained,
        precisions_for(trained, "int8"),
        folder,
        ExportOptions("m", "int8"),
        part=part,
        metrics={},
        provenance={},
    )
    return folder, log


def test_it_says_what_it_needs_and_ignores_the_rest(loaded):
    assert loaded.columns == ("user", "device", "item", "hour", "only missing", "genres", "tags", "price", "seen at")
    log = raw_log(7)
    expected = loaded.predict(log)
    assert expected.dtype == np.float32
    assert expected.shape == (7,)
    assert ((expected > 0) & (expected < 1)).all()
    assert np.array_equal(loaded.predict(log | {"click": [1] * 7, "id": ["x"] * 7}), expected)
    for name in log:
        without = {key: values for key, values in log.items() if key != name}
        with pytest.raises(ValueError, match=f"no column '{name}'.*this model reads 'user', 'device'") as error:
            loaded.predict(without)
        assert "\n" not in str(error.value)


def test_lists_arrays_and_frames_get_the_same_answer(loaded):
    log = raw_log(40, seed=1)
    expected = loaded.predict(log)
    arrays = dict(log)
    for name in ("price", "seen at"):
        arrays[name] = np.array([np.nan if v is None else v for v in log[name]])
    for name in ("item", "hour_hour"):
        log[name] = [None if v is None else v % 1000 for v in log[name]]
        arrays[name] = np.array([np.nan if v is None else v for v in log[name]])
    arrays["user"] = np.array([v or "" for v in log["user"]])
    arrays["tags"] = tuple(None if v is None else np.array(v, np.int64) for v in log["tags"])
    arrays["genres"] = ["" if v is None else "|".join(t or "" for t in v) for v in log["genres"]]
    expected = loaded.predict(log)
    assert np.array_equal(loaded.predict(arrays), expected)
    frame = pd.DataFrame(
        {name: pd.Series(values, dtype="Int64") if name == "device" else values for name, values in log.items()}
    )
    assert np.array_equal(loaded.predict(frame), expected)
    frame["genres"] = arrays["genres"]
    frame["tags"] = [None if v is None else ",".join(map(str, v)) for v in log["tags"]]
    assert np.array_equal(loaded.predict(frame), expected)


def test_a_time_gives_its_parts_unless_they_are_given(loaded):
    log = raw_log(6) | {"hour_hour": [0, 13, 23, 9, None, None]}
    expected = loaded.predict(log)
    del log["hour_hour"]
    dates = [datetime.datetime(2014, 10, 21, hour) for hour in (0, 13, 23, 9)]
    for times in (
        [14102100, 14102113, 14102123, 14102109, None, float("nan")],
        ["14102100", "14102113", "14102123", "14102109", "", None],
        [14102100.0, 14102113.0, 14102123.0, 14102109.0, np.nan, np.nan],
        [*dates, None, None],
        np.array([*dates, None, None], "datetime64[s]"),
        pd.Series([*dates, None, None]),
    ):
        assert np.array_equal(loaded.predict(log | {"hour": times}), expected)
    for wrong in ("2014-10-21", 1, True, 1.5, float("inf"), b"x", [14102100]):
        with pytest.raises(ValueError, match=r"hour\[1\] is .*no time like '%y%m%d%H'"):
            loaded.predict(log | {"hour": [14102100, wrong, 14102100, None, None, None]})


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("user", ["u0"], r"user\[1\] is \['u0'\]; this column takes string ids"),
        ("user", b"\xff", "takes string ids"),
        ("user", datetime.date(2024, 1, 1), "takes string ids"),
        ("user", 2.0**60, "takes string ids"),
        ("user", "\ud800", "cannot be written as UTF-8"),
        ("item", "010", r"item\[1\] is '010'; this column takes int64 ids"),
        ("item", 10.5, r"item\[1\] is 10.5"),
        ("item", 2.0**60, r"item\[1\] is 1.15"),
        ("item", 2**63, "leaves int64"),
        ("item", -(2**63), "stands for a missing value here; pass None"),
        ("price", "3,5", r"price\[1\] is '3,5'; this column takes numbers"),
        ("price", [3], "takes numbers"),
        ("price", float("inf"), r"price\[1\] is infinite"),
        ("price", 10**400, r"price\[1\] is infinite"),
        ("price", 1e300, r"price\[1\] is 1e\+300, too far from training's for float32"),
        ("genres", {"war": 1}, r"genres\[1\] is \{'war': 1\}; pass a list of ids"),
        ("genres", ["war", ["a"]], r"genres\[1\]\[1\] is \['a'\]; this column takes string ids"),
        ("tags", ["5x"], r"tags\[1\]\[0\] is '5x'"),
        ("tags", "5,x", r"tags\[1\]\[1\] is 'x'; this column takes int64 ids"),
        ("tags", [[5]], "takes int64 ids"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_its_column_and_row(name, value, reason, loaded):
    log = raw_log(3)
    log[name][1] = value
    with pytest.raises(ValueError, match=reason) as error:
        loaded.predict(log)
    assert "\n" not in str(error.value)


def test_a_row_without_a_finite_answer_is_named(tmp_path):
    export_small(small_ctr("dcnv2 stacked"), tmp_path / "bundle")
    with pytest.raises(ValueError, match="row 1 gives no finite number"):
        Scorer(tmp_path / "bundle", provider="cpu").predict(raw_log(3) | {"price": [1, 1e30, None]})


@pytest.mark.parametrize(
    "values",
    [
        "abc",
        5,
        {"a": 1},
        None,
        np.zeros((3, 2)),
        np.array(3),
        [1],
        np.array(["a"] * 3),
        np.array([0.5] * 3),
        np.array([2.0**60] * 3),
    ],
)
def test_what_is_no_column_of_ids_is_refused(values, loaded):
    with pytest.raises(ValueError, match="item"):
        loaded.predict(raw_log(3) | {"item": values})


def test_rows_in_chunks_get_the_same_answer(loaded, monkeypatch):
    log = raw_log(100, seed=2)
    whole = loaded.details(log)
    for size in (1, 7, 100):
        monkeypatch.setattr(loaded, "_chunk", size)
        got = loaded.details(log)
        np.testing.assert_allclose(got.logits, whole.logits, atol=1e-6)
        assert all(np.array_equal(got.known[name], flags) for name, flags in whole.known.items())
    assert loaded.predict({name: [] for name in log}).shape == (0,)


def test_the_most_extreme_ids_are_told_apart(loaded):
    log = {name: values * 3 for name, values in raw_log(1).items()}
    log |= {"device": [-(2**63), 2**63 - 1, -(2**63) + 2], "item": [10, 8 + 2 * N_ITEMS, 2**63 - 1]}
    known = loaded.details(log).known
    assert known["device"].tolist() == [True, True, False]
    assert known["item"].tolist() == [True, True, False]


def test_bound_inputs_answer_like_plain_ones(numbers, monkeypatch):
    folder, log = numbers
    model = Scorer(folder, provider="cpu")
    assert not model._bound
    plain = model.predict(log)
    monkeypatch.setattr(model, "_bound", True)
    monkeypatch.setattr(bundle_model, "bound_run", lambda *parts: session.bound_run(*parts[:-1], "cpu"))
    assert np.array_equal(model.predict(log), plain)


def test_cuda_is_refused_where_it_is_not_in_use(bundle):
    if session.n_cuda_devices():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(BundleError, match="'cuda' is not in use"):
        Scorer(bundle, provider="cuda")


def test_cuda_answers_like_the_cpu(bundle, loaded, numbers):
    if not session.n_cuda_devices():
        pytest.skip("no CUDA device")
    folder, log = numbers
    for path, rows in ((bundle, raw_log(50)), (folder, log)):
        np.testing.assert_allclose(
            Scorer(path, provider="cuda").predict(rows), Scorer(path, provider="cpu").predict(rows), atol=1e-4
        )


def test_bundles_and_options_of_another_kind_are_refused(bundle, tmp_path):
    small_model().export(tmp_path / "retrieval")
    with pytest.raises(BundleError, match="made for the task 'retrieval', not 'ctr'"):
        Scorer(tmp_path / "retrieval")
    with pytest.raises(BundleError, match="made for the task 'ctr', not 'retrieval'"):
        Retriever(bundle)
    for options in ({"provider": "tpu"}, {"threads": 0}, {"threads": True}):
        with pytest.raises(ValueError, match=r"is .*; use"):
            Scorer(bundle, **options)


# ---- damage


def test_one_changed_byte_is_refused_wherever_it_is(bundle, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    rng = np.random.default_rng(0)
    for name in ("manifest.json", "model.onnx"):
        original = (folder / name).read_bytes()
        for position in rng.integers(0, len(original), 60).tolist():
            changed = bytearray(original)
            changed[position] ^= int(rng.integers(1, 256))
            (folder / name).write_bytes(changed)
            with pytest.raises(BundleError):
                check_bundle(folder)
        (folder / name).write_bytes(original)
    check_bundle(folder)


def column(number, **values):
    return lambda m: m["columns"][number].update(values)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(columns=[]), "columns is"),
        (lambda m: m.update(columns=["user"]), "columns is"),
        (lambda m: m.update(dim=0), "dim is 0"),
        (lambda m: m.pop("calibration"), "calibration is None"),
        (lambda m: m.update(task="recall"), "id_types is None"),
        (column(0, role="dense"), "that go together"),
        (column(0, dtype="float64"), "that go together"),
        (column(0, n_ids=0), "n_ids of column 'user' is 0"),
        (column(0, missing=3), "missing value of column 'user' is 3, which is no string"),
        (column(1, missing=True), "missing value of column 'device'"),
        (column(1, name="user"), "two columns have the same name"),
        (column(0, name="other"), "bucket_map_hashes is of columns"),
        (column(0, input="other"), "inputs are not those of the columns"),
        (column(3, time={"part": "year"}), "the time of column 'hour_hour'"),
        (column(5, separator=""), "the separator of column 'genres'"),
        (column(5, width=0), "width of column 'genres'"),
        (column(7, std=0), "mean and std of column 'price'"),
        (lambda m: m["outputs"].pop("known"), "outputs is"),
        (lambda m: m["vocabulary_hashes"].pop("user"), "vocabulary_hashes is of columns"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(change, reason, bundle, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    rewrite(folder, change)
    with pytest.raises(BundleError, match=reason) as error:
        check_bundle(folder)
    assert "\n" not in str(error.value)


def test_a_manifest_of_another_model_is_refused(bundle, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    for change in (column(7, mean=11.0), lambda m: m.update(dim=5)):
        rewrite(folder, change)
        with pytest.raises(BundleError, match="manifest and model are of different bundles"):
            Scorer(folder)


# ---- graphhash check


def test_check_explains_a_bundle(bundle):
    findings = {finding.what: finding.text for finding in check(bundle, "cpu")}
    assert "dlrm, dim 4, method m, compressed user, item, in int8" in findings["model"]
    assert "user reads 3 of" in findings["maps"]
    assert "4 of device" in findings["ids"]
    assert "alone they get the same" in findings["trial request"]
    assert findings["provider"].startswith("cpu in use: CPUExecutionProvider 100 %")


def test_check_finds_a_map_that_leaves_its_table(bundle, tmp_path):
    import onnx
    from onnx import numpy_helper

    folder = shutil.copytree(bundle, tmp_path / "bundle")
    model = onnx.load(folder / "model.onnx")
    tensor = next(t for t in model.graph.initializer if t.name == "/0_rows")
    rows = numpy_helper.to_array(tensor).copy()
    rows[0] = 60000
    tensor.CopyFrom(numpy_helper.from_array(rows, "/0_rows"))
    data = model.SerializeToString()
    (folder / "model.onnx").write_bytes(data)
    rewrite(
        folder,
        lambda m: m["files"].update({"model.onnx": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}),
    )
    with pytest.raises(BundleError, match=r"the map of 'user' has .* span 0..60000"):
        list(check(folder, "cpu"))
