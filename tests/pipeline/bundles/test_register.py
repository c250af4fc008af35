"""The model registry: whole bundles only, an alias for the better one, and a version that loads and answers."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner

from pipeline.bundles.register import register_bundle
from pipeline.cli.main import app
from pipeline.ctr.example import example_call as ctr_call
from pipeline.errors import RegistryError
from pipeline.retrieval.example import example_call
from pipeline.tracking.client import client_of, current_store
from pipeline.tracking.registry import measured_on
from serving import Scorer
from serving.bundle import check_bundle
from serving.errors import BundleError
from tests.helpers.asgi_client import AsgiClient
from tests.helpers.mlflow_store import sqlite_store
from tests.helpers.small_ctr import export_small, raw_log, small_ctr
from tests.helpers.small_models import small_model

DATA = {"n_test": 7, "users_hash": "a"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("registry")
    with pytest.MonkeyPatch.context() as patch:
        uri = sqlite_store(folder)
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        patch.delenv("MLFLOW_RUN_ID", raising=False)
        yield uri


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Makes bundles of a small model with the metrics given."""
    folder = tmp_path_factory.mktemp("bundles")

    def make(metrics: dict, data: dict | None = DATA, task: str = "retrieval", ids: str = "int64"):
        out = folder / f"{len(list(folder.iterdir()))}"
        given = {"metrics": metrics, "provenance": {"data": data} if data else {}}
        if task == "ctr":
            export_small(small_ctr(), out, **given)
        else:
            small_model(ids, ids).export(out, **given)
        return out

    return make


def add(bundle, name, **options):
    return register_bundle(bundle, name, **{"alias": "champion", "experiment": "graphhash", **options})


@pytest.mark.parametrize("ids", ["int64", "string"])
def test_a_registered_bundle_loads_by_its_alias_and_answers(store, bundle, ids):
    import mlflow
    from mlflow.pyfunc import scoring_server

    path, name = bundle({"recall@20": 0.25, "note": "no number"}, ids=ids), f"loads-{ids}"
    result = add(path, name)
    assert (result["version"], result["before"], result["uri"]) == ("1", None, f"models:/{name}@champion")
    with current_store(store):
        loaded = mlflow.pyfunc.load_model(result["uri"])
    call = example_call(check_bundle(path), [0, 3, 999] if ids == "int64" else ["a", "日本", "nobody"])
    asked, outputs = call.inputs, list(call.outputs)
    assert {"candidate_score", "candidate_known"} < set(outputs)
    session = onnxruntime.InferenceSession(str(path / "model.onnx"), providers=["CPUExecutionProvider"])
    expected = dict(zip(outputs, session.run(outputs, asked), strict=True))
    got = loaded.predict(asked)
    assert got.keys() == expected.keys()
    for output, values in expected.items():
        np.testing.assert_array_equal(got[output], values)
    # What `mlflow models serve` runs.
    request = {"inputs": {name: values.tolist() for name, values in asked.items()}}
    served = AsgiClient(scoring_server.init(loaded)).post("/invocations", request)
    assert served.json()["predictions"]["candidate_score"] == expected["candidate_score"].tolist()
    version = client_of(store).get_model_version_by_alias(name, "champion")
    assert json.loads(version.tags["graphhash.metrics"]) == {"recall@20": 0.25}
    run = client_of(store).get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert "bundle/manifest.json" in {f.path for f in client_of(store).list_artifacts(version.run_id, "bundle")}


def test_a_registered_bundle_of_clicks_loads_by_its_alias_and_predicts(store, bundle):
    import mlflow

    path = bundle({"log_loss": 0.3, "curve": {"counts": [1]}}, task="ctr")
    result = add(path, "clicks-load")
    assert (result["version"], result["metric"]) == ("1", "log_loss")
    with current_store(store):
        loaded = mlflow.pyfunc.load_model(result["uri"])
    scorer = Scorer(path, provider="cpu")
    log = raw_log(6)
    asked = {
        name: values.astype(str) if values.dtype == object else values for name, values in scorer.tensors(log).items()
    }
    got = loaded.predict(asked)
    assert got.keys() == {"probability", "logit", "known"}
    np.testing.assert_allclose(got["probability"], scorer.predict(log), rtol=1e-6)
    example = ctr_call(check_bundle(path), {"user": "u0"}).inputs
    assert loaded.predict(example)["known"][0].tolist() == [True, True, False, False, True]


def test_only_a_better_one_takes_the_alias(store, bundle):
    first, worse, better = (bundle({"recall@20": value}) for value in (0.5, 0.4, 0.6))
    assert add(first, "m")["before"] is None
    with pytest.raises(
        RegistryError, match=r"recall@20 is 0.4000, and version 1 of m, the champion, has 0.5000; --force"
    ):
        add(worse, "m")
    assert len(client_of(store).search_model_versions("name = 'm'")) == 1, "what is refused is not registered"
    assert add(better, "m")["before"] == {"version": "1", "value": 0.5}
    assert str(client_of(store).get_model_version_by_alias("m", "champion").version) == "2"
    forced = add(worse, "m", force=True)
    assert forced["version"] == "3"
    assert forced["before"]["value"] == 0.6
    # The same bundle again changes nothing, and another alias has its own holder.
    assert add(worse, "m")["version"] == "3"
    assert add(first, "m", alias="challenger")["version"] == "4"
    assert str(client_of(store).get_model_version_by_alias("m", "champion").version) == "3"


def test_an_equal_one_is_no_worse(store, bundle):
    add(bundle({"recall@20": 0.5}), "equal")
    assert add(bundle({"recall@20": 0.5, "ndcg@20": 0.1}), "equal")["version"] == "2"


def test_lower_log_loss_is_better(store, bundle):
    add(bundle({"log_loss": 0.3, "auc": 0.9}, task="ctr"), "clicks")
    with pytest.raises(RegistryError, match=r"log_loss is 0.4000, and version 1 of clicks, the champion, has 0.3000"):
        add(bundle({"log_loss": 0.4, "auc": 0.99}, task="ctr"), "clicks")
    with pytest.raises(RegistryError, match=r"auc is 0.8000"):
        add(bundle({"log_loss": 0.2, "auc": 0.8}, task="ctr"), "clicks", metric="auc")
    assert add(bundle({"log_loss": 0.2, "auc": 0.8}, task="ctr"), "clicks")["version"] == "2"


def test_figures_of_other_data_are_not_compared(store, bundle):
    add(bundle({"recall@20": 0.5}), "data")
    with pytest.raises(
        RegistryError, match=r"measured on another log or split .*recall@20 0.5000 there, 0.9000 here.*--force"
    ):
        add(bundle({"recall@20": 0.9}, {**DATA, "n_test": 8}), "data")
    assert add(bundle({"recall@20": 0.9}, {**DATA, "n_test": 8}), "data", force=True)["version"] == "2"
    manifest = {"provenance": {}, "vocabulary_hashes": {"users": "x", "items": "y"}}
    assert measured_on(manifest) == '{"items": "y", "users": "x"}'


def test_a_metric_that_is_not_there_is_named(store, bundle):
    path = bundle({"recall@20": 0.5})
    with pytest.raises(RegistryError, match="no number for 'hits', but for recall@20; choose --metric"):
        add(path, "metric", metric="hits")


def test_a_damaged_bundle_is_refused_forced_or_not(store, bundle):
    path = bundle({"recall@20": 0.9})
    with open(path / "model.onnx", "r+b") as file:
        file.seek(100)
        file.write(b"\0\0\0\0")
    for force in (False, True):
        with pytest.raises(BundleError):
            add(path, "damaged", force=force)
    assert not client_of(store).search_registered_models("name = 'damaged'")


def test_the_command_takes_a_run_folder_and_says_what_it_did(store, bundle, tmp_path):
    bundle({"recall@20": 0.5}).rename(tmp_path / "bundle")
    done = CliRunner().invoke(app, ["register", str(tmp_path), "--name", "said", "--json", str(tmp_path / "r.json")])
    assert done.exit_code == 0, done.output
    assert done.output == "models:/said@champion: version 1, recall@20 0.5000\n"
    assert json.loads((tmp_path / "r.json").read_text())["value"] == 0.5
