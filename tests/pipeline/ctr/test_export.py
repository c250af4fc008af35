"""Bundles of CTR models answer like PyTorch: every model x map x precision, and every kind of raw value."""

from __future__ import annotations

import copy
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from graphhash.errors import DataError
from graphhash.graph.vocabulary import Vocabulary
from graphhash.models.ctr_bytes import store_rounded
from pipeline.ctr import export as ctr_export
from pipeline.ctr import onnx_fields
from pipeline.ctr.export import ExportOptions, export_ctr, precision_loss, raw_columns
from pipeline.ctr.onnx_graph import ctr_graph
from pipeline.ctr.onnx_inputs import input_names, missing_id
from serving import BundleError, Scorer, check_bundle
from tests.helpers.small_ctr import MODELS, as_part, entries_of, export_small, precisions_for, raw_log, small_ctr

KINDS = ("full", "graph", "double_graph", "soft", "double_soft")


def expected_logits(trained, precision, log):
    model = copy.deepcopy(trained.model)
    store_rounded(model, precisions_for(trained, precision))
    with torch.no_grad():
        return model(entries_of(trained, log)).numpy()


# A head reads vectors, however they are stored: every model with every map, and every map in every precision.
CASES = [(model, kind, "int8") for model in MODELS for kind in KINDS]
CASES += [("dlrm", kind, precision) for kind in KINDS for precision in ("float32", "float16", "int4")]


@pytest.mark.parametrize(("model", "kind", "precision"), CASES)
def test_raw_rows_get_the_logits_of_torch(model, kind, precision, tmp_path):
    trained = small_ctr(model, kind)
    manifest = export_small(trained, tmp_path / "bundle", precision)
    assert (manifest["model"], manifest["precision"], manifest["format_version"]) == (model.split()[0], precision, 5)
    scorer, log = Scorer(tmp_path / "bundle", provider="cpu", threads=1), raw_log(300, seed=3)
    logits = expected_logits(trained, precision, log)
    for rows in (slice(0, 1), slice(None)):
        got = scorer.details({name: values[rows] for name, values in log.items()})
        np.testing.assert_allclose(got.logits, logits[rows], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got.probabilities, 1 / (1 + np.exp(-logits[rows])), rtol=1e-5, atol=1e-6)
    columns, entries = trained.features.columns, entries_of(trained, log).categorical.numpy()
    assert all(np.array_equal(got.known[c.name], entries[:, i] < c.n_ids) for i, c in enumerate(columns))
    assert np.ptp(logits) > 0.5, "rows differ"


@pytest.mark.parametrize("model", MODELS)
def test_calibrated_models_answer_with_calibrated_logits(model, tmp_path):
    trained, log = small_ctr(model, "soft"), raw_log(60, seed=3)
    before = expected_logits(trained, "int8", log)
    trained.model.calibrate(0.5, -0.25)
    export_small(trained, tmp_path / "bundle")
    got = Scorer(tmp_path / "bundle", provider="cpu", threads=1).details(log)
    np.testing.assert_allclose(got.logits, 0.5 * before - 0.25, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("parts", [{"dense": False}, {"multi_valued": False}, {"hidden": (), "n_cross": 0}], ids=str)
def test_models_that_lack_a_part(model, parts, tmp_path):
    trained = small_ctr(model, "soft", **parts)
    export_small(trained, tmp_path / "bundle")
    log = raw_log(60, seed=4)
    got = Scorer(tmp_path / "bundle", provider="cpu", threads=1).details(log)
    np.testing.assert_allclose(got.logits, expected_logits(trained, "int8", log), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_values", [0, 40])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["full", "double_graph", "soft"])
def test_columns_with_many_ids_are_read_from_what_is_stored(kind, model, n_values, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_fields, "_MATERIALIZED_VALUES", n_values)
    trained, log = small_ctr(model, kind), raw_log(60, seed=6)
    export_small(trained, tmp_path / "bundle", "int8")
    got = Scorer(tmp_path / "bundle", provider="cpu", threads=1).details(log)
    np.testing.assert_allclose(got.logits, expected_logits(trained, "int8", log), rtol=1e-5, atol=1e-5)


def n_nodes_run(trained, precision, folder):
    """Nodes that ONNX Runtime is left with once it has computed what is constant."""
    export_small(trained, folder / "bundle", precision)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "run.onnx"), 3
    model = str(folder / "bundle" / "model.onnx")
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return len(onnx.load(folder / "run.onnx", load_external_data=False).graph.node)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "full"])
@pytest.mark.parametrize("precision", ["float32", "int8", "int4"])
def test_a_compressed_column_takes_one_node_more_than_a_full_one_for_its_bias(kind, precision, tmp_path):
    full = n_nodes_run(small_ctr("dlrm", "full"), "float32", tmp_path)
    assert n_nodes_run(small_ctr("dlrm", kind), precision, tmp_path) == full + 2


def test_full_columns_in_small_types_take_no_node_more(tmp_path):
    trained = small_ctr("dlrm", "full")
    assert n_nodes_run(trained, "int4", tmp_path) == n_nodes_run(trained, "float32", tmp_path)


def test_large_full_columns_have_tables_of_their_own(tmp_path, monkeypatch):
    from graphhash.models import ctr_fields

    monkeypatch.setattr(ctr_fields, "JOINT_ROWS", 4)
    for model in MODELS:
        trained = small_ctr(model, "full")
        export_small(trained, tmp_path / "bundle", "int8")
        log = raw_log(60, seed=5)
        got = Scorer(tmp_path / "bundle", provider="cpu", threads=1).details(log)
        np.testing.assert_allclose(got.logits, expected_logits(trained, "int8", log), rtol=1e-5, atol=1e-5)


def test_the_graph_alone_takes_padding_anywhere_and_any_width(tmp_path):
    trained = small_ctr()
    export_small(trained, tmp_path / "bundle")
    session = onnxruntime.InferenceSession(str(tmp_path / "bundle" / "model.onnx"), providers=["CPUExecutionProvider"])
    missing = {
        c.name: missing_id(c, v) for c, v in zip(trained.features.all_columns, trained.vocabularies, strict=True)
    }
    assert missing["device"] == -(2**63) + 1
    assert missing["item"] == -(2**63)
    assert missing["user"] == ""
    log = raw_log(3)
    log |= {"genres": [["war", "drama"], [], ["comedy"]], "tags": [[5, 6, 9], [], [2**40]]}
    feed = {}
    for name, values in log.items():
        if name in ("price", "seen at"):
            feed[name] = np.array([np.nan if v is None else v for v in values])
        elif name not in ("genres", "tags"):
            feed[name] = np.array(
                [missing[name] if v is None else v for v in values], object if name == "user" else np.int64
            )
    pad = missing["tags"]
    feed["tags"] = np.array([[pad, 5, pad, 6, 9, 2**40], [pad] * 6, [pad, pad, pad, pad, pad, 2**40]])
    feed["genres"] = np.array([["", "war", "", "drama", "comedy"], [""] * 5, ["comedy", "", "", "", ""]], object)
    (logits,) = session.run(["logit"], feed)
    np.testing.assert_allclose(logits, expected_logits(trained, "int8", log), atol=1e-5)
    # No value in any row, and no row at all.
    feed |= {"tags": np.empty((3, 0), np.int64), "genres": np.empty((3, 0), object)}
    (logits,) = session.run(["logit"], feed)
    np.testing.assert_allclose(
        logits, expected_logits(trained, "int8", log | {"genres": [[]] * 3, "tags": [[]] * 3}), atol=1e-5
    )
    assert session.run(["logit", "known"], {name: values[:0] for name, values in feed.items()})[1].shape == (0, 5)


def test_columns_with_the_names_of_outputs_get_other_inputs(tmp_path):
    trained = small_ctr(multi_valued=False)
    renamed = {
        "user": "probability",
        "device": "column_probability",
        "item": "/0",
        "hour_hour": "known",
        "only missing": "axis_1",
    }
    columns = tuple(type(c)(**{**vars(c), "name": renamed[c.name]}) for c in trained.features.columns)
    features = type(trained.features)(**{**vars(trained.features), "columns": columns})
    trained = type(trained)(trained.model, trained.maps, trained.vocabularies, features)
    names = input_names(trained)
    assert names["probability"] == "column_column_probability"
    assert names["column_probability"] == "column_probability"
    part = as_part(entries_of(small_ctr(multi_valued=False), raw_log(50)))
    export_ctr(
        trained,
        precisions_for(trained, "int8"),
        tmp_path / "b",
        ExportOptions("m", "int8"),
        part=part,
        metrics={},
        provenance={},
    )
    log = raw_log(20)
    got = Scorer(tmp_path / "b", provider="cpu").details(
        {renamed.get(name, name): values for name, values in log.items()}
    )
    np.testing.assert_allclose(got.logits, expected_logits(small_ctr(multi_valued=False), "int8", log), atol=1e-5)


def test_tables_lie_in_their_small_types_and_outside_of_the_file_where_they_are_large(tmp_path):
    from onnx import numpy_helper

    trained = small_ctr("deepfm", "soft", dim=64)
    graph = ctr_graph(trained, precisions_for(trained, "int8")).graph
    assert {tensor.name for tensor in graph.initializer} <= {name for node in graph.node for name in node.input}, (
        "none is left over"
    )
    dtypes = {
        tensor.name: numpy_helper.to_array(tensor).dtype.name for tensor in graph.initializer if tensor.data_type != 8
    }
    assert dtypes["/0_table"] == "int8"
    assert dtypes["/0_rows"] == "uint16"
    assert dtypes["/0_codes"] == "uint8"
    assert dtypes["/wide_0_table"] == dtypes["/bias_0_table"] == "float16"
    assert dtypes["/joint_table"] == "float32"
    one, two = (
        export_small(trained, tmp_path / "one"),
        export_small(trained, tmp_path / "two", external_data_mib=0.0001),
    )
    assert sorted(one["files"]) == ["model.onnx"]
    assert sorted(two["files"]) == ["model.onnx", "model.onnx.data"]
    log = raw_log(50)
    assert np.array_equal(*(Scorer(tmp_path / name, provider="cpu", threads=1).predict(log) for name in ("one", "two")))


def test_a_graph_that_disagrees_is_not_published(tmp_path, monkeypatch):
    trained = small_ctr()
    export_small(trained, tmp_path / "bundle")
    before = (tmp_path / "bundle" / "manifest.json").read_bytes()
    for change in (
        lambda t: t.model.head.out.bias.data.add_(0.01),
        lambda t: t.vocabularies.__setitem__(0, Vocabulary(t.vocabularies[0].ids[::-1])),
    ):
        other = small_ctr()
        change(other)
        with monkeypatch.context() as patch:
            patch.setattr(ctr_export, "ctr_graph", lambda _, precisions, other=other: ctr_graph(other, precisions))
            with pytest.raises(BundleError, match="differ by") as error:
                export_small(trained, tmp_path / "bundle")
        assert "\n" not in str(error.value)
    assert (tmp_path / "bundle" / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    with torch.no_grad():
        trained.model.fields.columns[0].table[0, 0] = float("nan")
    with pytest.raises(BundleError, match="not finite"):
        export_small(trained, tmp_path / "bundle")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").touch()
    with pytest.raises(BundleError, match="is no bundle"):
        export_small(small_ctr(), tmp_path / "other")


def test_rows_of_the_log_become_the_raw_values_they_were_made_of():
    trained, log = small_ctr(), raw_log(80)
    part = as_part(entries_of(trained, log))
    again = entries_of(trained, raw_columns(trained, part))
    assert np.array_equal(again.categorical.numpy(), part.categorical)
    np.testing.assert_allclose(again.dense.numpy(), part.dense, atol=1e-6)
    assert all(np.array_equal(a.numpy(), b) for a, b in zip(again.multi_valued, part.multi_valued, strict=True))
    part.categorical[0, 0] = 1000
    with pytest.raises(DataError, match="has entries"):
        raw_columns(trained, part)


def test_the_manifest_says_what_the_precision_costs_and_how_close_the_graph_is(tmp_path):
    metrics = {
        "log_loss": 0.31,
        "log_loss_float32": 0.3,
        "auc": 0.9,
        "calibration": 1.01,
        "ece": 0.02,
        "curve": {"counts": [1, 2]},
    }
    trained = small_ctr()
    manifest = export_small(trained, tmp_path / "bundle", metrics=metrics)
    assert manifest["precision_loss"]["relative"] == pytest.approx(1 / 30)
    assert precision_loss({})["relative"] is None
    assert manifest["calibration"] == {"calibration": 1.01, "ece": 0.02}
    tolerance = manifest["tolerance"]
    assert 0 <= tolerance["largest"] <= tolerance["absolute"] + tolerance["relative"] * 100
    assert tolerance["n_rows"] == 60
    assert manifest["bucket_map_hashes"]["user"] == trained.maps[0].content_hash
    column = {c["name"]: c for c in manifest["columns"]}
    assert column["genres"]["width"] == 2
    assert column["price"]["std"] == 2.5
    assert column["user"]["precision"] == "int8"
    assert column["hour_hour"]["time"] == {"column": "hour", "format": "%y%m%d%H", "part": "hour"}
    assert check_bundle(tmp_path / "bundle") == json.loads((tmp_path / "bundle" / "manifest.json").read_text())
