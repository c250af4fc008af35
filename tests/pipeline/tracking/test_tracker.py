"""MLflow: one run per training, ended truthfully, in a store that needs no server."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pipeline.errors import TrackingError
from pipeline.tracking import client as tracking_client
from pipeline.tracking.client import client_of, current_store
from pipeline.tracking.mlflow_runs import parent_run, training_run
from pipeline.tracking.onnx_model import ModelCall
from pipeline.tracking.store import connect
from pipeline.tracking.tracker import Tracker
from tests.helpers.asgi_client import AsgiClient
from tests.helpers.small_models import naive_answer, small_model


@pytest.fixture(scope="module")
def store_folder(tmp_path_factory):
    """One SQLite store for the module: to make one takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture
def store(store_folder, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return connect("graphhash")


def run_of(store, tracker):
    return client_of(store.uri).get_run(tracker.run_id)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """scores, item_id = top k of table[user_id]."""
    nodes = [
        helper.make_node("Reshape", ["k", "one"], ["k_1d"]),
        helper.make_node("Gather", ["table", "user_id"], ["row"]),
        helper.make_node("TopK", ["row", "k_1d"], ["score", "item_id"]),
    ]
    inputs = [
        helper.make_tensor_value_info("user_id", TensorProto.INT64, ["batch"]),
        helper.make_tensor_value_info("k", TensorProto.INT64, []),
    ]
    outputs = [
        helper.make_tensor_value_info("score", TensorProto.FLOAT, ["batch", "n"]),
        helper.make_tensor_value_info("item_id", TensorProto.INT64, ["batch", "n"]),
    ]
    tables = [
        helper.make_tensor("table", TensorProto.FLOAT, [2, 3], [0.0, 1, 2, 5, 4, 3]),
        helper.make_tensor("one", TensorProto.INT64, [1], [1]),
    ]
    graph = helper.make_graph(nodes, "top", inputs, outputs, tables)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_default_store_is_a_sqlite_file_named_absolutely(store, store_folder, capfd):
    assert store.uri == f"sqlite:///{store_folder}/mlflow.db"
    assert {p.name for p in store_folder.iterdir()} <= {"mlflow.db", "mlartifacts"}
    assert connect("graphhash") == store
    assert capfd.readouterr() == ("", "")


def test_run_holds_parameters_metrics_tags_and_artifacts(store, tmp_path):
    (tmp_path / "a.txt").write_text("x")
    tags = {"graphhash.method": "soft"}
    with training_run(store, "soft mf bpr log.csv", {"train.dim": 64, "train.amp": None}, tags=tags) as tracker:
        tracker.log_metrics({"recall@20": 0.1, "note": "no number", "flag": True}, step=10)
        tracker.log_metrics({"recall@20": 0.2}, step=20)
        tracker.set_tags({"graphhash.hash": "ab"})
        tracker.log_artifact(tmp_path, "bundle")
        tracker.log_artifact(tmp_path / "a.txt")
    run = run_of(store, tracker)
    client = client_of(store.uri)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "soft mf bpr log.csv"
    assert (run.data.tags["mlflow.source.name"], run.data.tags["mlflow.source.type"]) == ("graphhash", "LOCAL")
    assert run.data.params == {"train.dim": "64"}
    assert run.data.metrics == {"recall_at_20": 0.2}
    assert [(m.step, m.value) for m in client.get_metric_history(tracker.run_id, "recall_at_20")] == [
        (10, 0.1),
        (20, 0.2),
    ]
    assert (run.data.tags["graphhash.hash"], run.data.tags["graphhash.method"]) == ("ab", "soft")
    assert {f.path for f in client.list_artifacts(tracker.run_id)} == {"a.txt", "bundle"}


def test_the_source_of_a_run_is_the_command_line(store, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/graphhash", "run", "--data", "a log.csv"])
    with training_run(store, "soft", {}) as tracker:
        pass
    assert run_of(store, tracker).data.tags["mlflow.source.name"] == "graphhash run --data 'a log.csv'"


@pytest.mark.parametrize(("source", "kind"), [("/data/log.csv", "local"), ("s3://bucket/log.csv", "s3")])
def test_a_run_names_its_dataset_once(store, source, kind):
    import mlflow

    with training_run(store, "soft", {}) as tracker:
        for _ in range(2):
            tracker.log_dataset("log.csv", "0123456789abcdef", source, {"n_users": 3})
    (entry,) = run_of(store, tracker).inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("log.csv", "0123456789abcdef")
    assert mlflow.data.get_source(entry.dataset).__class__.__name__
    assert [(tag.key, tag.value) for tag in entry.tags] == [("mlflow.data.context", "training")]
    if kind == "local":
        assert (entry.dataset.source_type, entry.dataset.profile) == (kind, '{"n_users": 3}')


def test_more_entries_than_one_call_takes(store):
    with training_run(store, "soft", {f"p{i}": i for i in range(250)}) as tracker:
        tracker.log_metrics({f"m{i}": i for i in range(1100)})
        tracker.set_tags({f"t{i}": i for i in range(150)})
    data = run_of(store, tracker).data
    assert (len(data.params), len(data.metrics)) == (250, 1100)


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("x"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(143), "KILLED")],
)
def test_run_ends_truthfully(store, error, status):
    with pytest.raises(type(error)), training_run(store, "soft", {}) as tracker:
        raise error
    assert run_of(store, tracker).info.status == status


def test_earlier_run_is_gone_on_with_or_replaced_when_lost(store):
    with pytest.raises(ValueError, match="diverged"), training_run(store, "soft", {}) as first:
        raise ValueError("diverged")
    with training_run(store, "soft", {"p": 1}, run_id=first.run_id) as second:
        assert run_of(store, second).info.status == "RUNNING"
    assert second == first
    assert run_of(store, first).info.status == "FINISHED"
    with training_run(store, "soft", {"p": 1}, run_id="0" * 32) as third:
        pass
    assert third.run_id not in (first.run_id, "0" * 32)


def test_the_callers_run_is_adopted_or_made_the_parent(store, monkeypatch):
    client = client_of(store.uri)
    outer = client.create_run(store.experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", outer)
    adopting = connect("another name, which the run overrules")
    with training_run(adopting, "soft", {"p": 1}) as tracker:
        assert tracker.run_id == outer
    with training_run(adopting, "graph", {"p": 1}, alone=False) as tracker:
        assert tracker.run_id != outer
    assert run_of(store, tracker).data.tags["mlflow.parentRunId"] == outer


def test_a_commands_run_is_the_parent_of_its_trainings(store, monkeypatch):
    with parent_run(store, "compare", {"p": 1}) as (parent, nested), training_run(nested, "soft", {}) as child:
        child.rename("soft mf seed 0")
    assert run_of(store, child).data.tags["mlflow.parentRunId"] == parent.run_id
    assert run_of(store, child).info.run_name == "soft mf seed 0"
    assert (run_of(store, parent).info.run_name, run_of(store, parent).info.status) == ("compare", "FINISHED")
    # The command again goes on with its run, whatever its parameters are now; below mlflow run, that one is the parent.
    with parent_run(store, "compare", {"p": 2}, run_id=parent.run_id) as (again, _):
        assert again == parent
    outer = client_of(store.uri).create_run(store.experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", outer)
    with parent_run(connect("graphhash"), "compare", {"p": 1}, run_id=parent.run_id) as (adopted, nested):
        assert adopted.run_id == outer
        with training_run(nested, "soft", {}) as child:
            assert child.run_id != outer
    assert run_of(store, child).data.tags["mlflow.parentRunId"] == outer
    with parent_run(None, "compare", {}) as (tracker, nested):
        assert (tracker, nested) == (Tracker(), None)


def test_onnx_model_has_signature_example_and_one_runtime(store, store_folder, model_path, capfd):
    import mlflow

    with training_run(store, "soft", {}) as tracker:
        example = {"user_id": np.array([1, 0]), "k": np.array(2)}
        tracker.log_dataset("log.csv", "ab", "/data/log.csv", {})
        tracker.log_metrics({"test.ndcg@20": 0.3, "test.rows": 4})
        tracker.log_metrics({"test.recall@20": 0.1}, step=1)
        tracker.log_metrics({"test.recall@20": 0.2, "loss": 3.0}, step=2)
        tracker.log_onnx_model(model_path, ModelCall(example, ("score", "item_id")), {"note": "abc"})
    assert mlflow.active_run() is None
    (logged,) = client_of(store.uri).search_logged_models([store.experiment_id], "tags.note = 'abc'")
    assert (logged.experiment_id, logged.source_run_id) == (store.experiment_id, tracker.run_id)
    assert str(logged.status) == "READY"
    linked = client_of(store.uri).get_logged_model(logged.model_id).metrics
    assert {m.key: m.value for m in linked} == {"test.ndcg_at_20": 0.3, "test.rows": 4, "test.recall_at_20": 0.2}
    assert {m.dataset_name for m in linked if m.key == "test.recall_at_20"} == {"log.csv"}
    files = Path(logged.artifact_location.removeprefix("file://"))
    requirements = (files / "requirements.txt").read_text().split()
    assert {line.partition("==")[0] for line in requirements} in (
        {"mlflow", "numpy", "onnx", "onnxruntime-gpu"},
        {"mlflow", "numpy", "onnx", "onnxruntime"},
    )
    assert capfd.readouterr() == ("", "")
    loaded = mlflow.pyfunc.load_model(str(files))
    assert [spec.name for spec in loaded.metadata.signature.inputs] == ["user_id", "k"]
    assert loaded.predict(example)["item_id"].tolist() == [[0, 1], [2, 1]]


@pytest.mark.parametrize(("kind", "users"), [("int64", [3, -99]), ("string", ["a", "nobody"])])
def test_logged_bundle_answers_loaded_served_and_by_its_alias(kind, users, store, tmp_path, capfd):
    import mlflow
    from mlflow.pyfunc import scoring_server

    small = small_model(users=kind, items=kind)
    padding = small.export(tmp_path / "bundle")["padding_item_id"]
    exclude = [[small.items.ids[4].as_py()], [padding]]
    example = {"user_id": np.array(users), "k": np.array(4), "exclude_item_id": np.array(exclude)}
    with training_run(store, "soft", {}) as tracker:
        call = ModelCall(example, ("item_id", "score", "known"))
        tracker.log_onnx_model(tmp_path / "bundle" / "model.onnx", call, {"note": kind})
    assert capfd.readouterr() == ("", "")
    client = client_of(store.uri)
    (logged,) = client.search_logged_models([store.experiment_id], f"tags.note = '{kind}'")
    client.create_registered_model(f"shop-{kind}")
    with current_store(store.uri):
        version = client.create_model_version(f"shop-{kind}", logged.model_uri, tracker.run_id).version
        client.set_registered_model_alias(f"shop-{kind}", "champion", version)
        loaded = mlflow.pyfunc.load_model(f"models:/shop-{kind}@champion")
    assert [spec.name for spec in loaded.metadata.signature.inputs] == ["user_id", "k", "exclude_item_id"]
    expected = [naive_answer(small, user, 4, out) for user, out in zip(users, exclude, strict=True)]
    answer = loaded.predict(example)
    assert list(answer) == ["item_id", "score", "known"]
    assert list(zip(*(answer[name].tolist() for name in answer), strict=True)) == expected
    # What `mlflow models serve` runs.
    request = {"inputs": {"user_id": users, "k": 4, "exclude_item_id": exclude}}
    served = AsgiClient(scoring_server.init(loaded)).post("/invocations", request)
    assert served.status == 200
    assert list(zip(*served.json()["predictions"].values(), strict=True)) == expected


def test_without_a_store_nothing_happens(tmp_path, model_path):
    with training_run(None, "soft", {"p": 1}) as tracker:
        tracker.log_params({"a": 1})
        tracker.log_metrics({"a": 1.0})
        tracker.set_tags({"a": 1})
        tracker.log_artifact(tmp_path)
        tracker.log_onnx_model(model_path, ModelCall({}))
    assert tracker == Tracker()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://127.0.0.1:9", "the server at http://127.0.0.1:9 does not answer"),
        ("sqlite:////dev/null/x.db", "MLflow"),
        ("nonsense://x", "MLflow"),
    ],
)
def test_unusable_store_is_one_line_at_once(monkeypatch, uri, message):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    with pytest.raises(TrackingError, match="set MLFLOW_TRACKING_URI") as caught:
        connect("graphhash")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_deleted_experiment_is_named(store):
    doomed = connect("doomed")
    client_of(store.uri).delete_experiment(doomed.experiment_id)
    with pytest.raises(TrackingError, match=r"'doomed' was deleted .*name another experiment"):
        connect("doomed")


def test_logging_of_others_is_left_as_it_was(store):
    assert logging.root.manager.disable == logging.NOTSET
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_a_store_that_somebody_else_makes_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    file, write = tmp_path / "mlflow.db", tracking_client.write_bytes_atomic

    def write_late(path, content):
        if not file.exists():
            write(file, content)
            MlflowClient(f"sqlite:///{file}").create_experiment("theirs")
        write(path, content)

    monkeypatch.setattr(tracking_client, "write_bytes_atomic", write_late)
    client = client_of(f"sqlite:///{file}")
    assert client.get_experiment_by_name("theirs") is not None
    assert list(tmp_path.iterdir()) == [file]


def test_a_new_sqlite_store_is_whole_and_alone_in_its_folder(tmp_path, monkeypatch):
    from mlflow.store.db.utils import _get_latest_schema_revision

    def disk_is_full(path, content):
        raise OSError(28, "No space left on device")

    for name in ("new.db", "by MLflow itself.db"):
        file = tmp_path / name / name
        file.parent.mkdir()
        client_of(f"sqlite:///{file}")
        assert list(file.parent.iterdir()) == [file]
        with contextlib.closing(sqlite3.connect(file)) as connection:
            assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [
                (_get_latest_schema_revision(),)
            ]
        monkeypatch.setattr("pipeline.tracking.client.write_bytes_atomic", disk_is_full)
