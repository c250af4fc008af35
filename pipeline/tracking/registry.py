"""The model registry: a bundle as a version of a registered model, with an alias that only better ones get.

    register(Path("out/bundle"), "gowalla", alias="champion", experiment="graphhash")   # then models:/gowalla@champion loads

A version carries what the next one is measured by: the metrics of its bundle, and what they were measured on.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import RegistryError
from pipeline.tracking.client import (
    client_of,
    current_store,
    error_code,
    no_empty_folder,
    one_at_a_time,
    one_line_errors,
    quiet,
)
from pipeline.tracking.tracker import Store, connect, training_run

if TYPE_CHECKING:
    import numpy as np

# What decides, by the manifest's task, and which metrics are better when they are lower.
METRICS = {"retrieval": "recall@20", "ctr": "log_loss"}
LOWER_IS_BETTER = ("log_loss",)
# What the logged model of a retrieval bundle gives: its signature has no optional inputs, so it takes no candidates.
RECOMMENDATION = ("item_id", "score", "known")
BUNDLE_TAG, DATA_TAG, METRICS_TAG = "graphhash.bundle", "graphhash.data", "graphhash.metrics"


@one_line_errors
def register(
    bundle: Path, name: str, *, alias: str, experiment: str, metric: str | None = None, force: bool = False
) -> dict[str, Any]:
    """Check a bundle, register it as a new version of the model `name`, and give it the alias.

    A bundle that the store has already, in any run, is not stored again, and one that has the alias already stays as it is.

    Args:
        alias: one version has it at a time; `champion` by custom.
        experiment: where the model is stored if no run has stored it (trained with --no-mlflow).
        metric: one of the manifest's; None: the task's (METRICS).
        force: do not compare with the version that has the alias. A damaged bundle is refused all the same.

    Returns: ``name``, ``version``, ``alias``, ``uri``, ``metric``, ``value``, and ``before``: ``version`` and ``value`` of the
        version that had the alias, or None.

    Raises:
        BundleError: the bundle is damaged, or does not answer.
        RegistryError: it has no such metric, or is not better than the version that has the alias, or cannot be compared with it.
        TrackingError: the store cannot be reached.
    """
    from mlflow.exceptions import MlflowException

    manifest = _check(bundle)
    metrics = {key: value for key, value in manifest["metrics"].items() if isinstance(value, (int, float))}
    metric = metric or METRICS.get(manifest["task"], next(iter(METRICS.values())))
    if metric not in metrics:
        raise RegistryError(
            f"{bundle}: the manifest has no number for {metric!r}, but for {', '.join(metrics) or 'none'}; choose --metric"
        )
    tags = {
        BUNDLE_TAG: manifest["manifest_sha256"],
        DATA_TAG: measured_on(manifest),
        METRICS_TAG: json.dumps({key: value for key, value in metrics.items() if not isinstance(value, bool)})[:5000],
    }
    store = connect(experiment)
    with quiet(), no_empty_folder(Path("mlruns")), one_at_a_time(store.uri):
        client = client_of(store.uri)
        before = _holder(client, name, alias)
        result = {
            "name": name,
            "alias": alias,
            "uri": f"models:/{name}@{alias}",
            "metric": metric,
            "value": metrics[metric],
        }
        if before is not None:
            result["before"] = {"version": str(before.version), "value": _metrics_of(before).get(metric)}
            if before.tags.get(BUNDLE_TAG) == tags[BUNDLE_TAG]:
                return result | {"version": str(before.version)}
            if not force:
                _compare(result, before, tags[DATA_TAG])
        model = _stored(client, store, tags[BUNDLE_TAG]) or _store(
            client, store, bundle, manifest, name, tags[BUNDLE_TAG]
        )
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error_code(error) != "RESOURCE_ALREADY_EXISTS":
                raise
        with current_store(store.uri):
            version = client.create_model_version(
                name, f"models:/{model.model_id}", run_id=model.source_run_id, tags=tags, model_id=model.model_id
            )
        client.set_registered_model_alias(name, alias, version.version)
    return {"before": None, **result, "version": str(version.version)}


def measured_on(manifest: Mapping[str, Any]) -> str:
    """What the metrics of a bundle were measured on, as a text that is equal for the same log, split in the same way."""
    data = manifest["provenance"].get("data") or manifest.get("vocabulary_hashes")
    return json.dumps(data, sort_keys=True)


def model_example(manifest: Mapping[str, Any], user_ids: Any) -> dict[str, np.ndarray]:
    """A call that a retrieval bundle answers, one array per input.

    Args:
        user_ids: raw ids, shape (n,), of the bundle's type.
    """
    import numpy as np

    return {
        "user_id": np.array(list(user_ids)),  # Texts as numpy's, which MLflow wants.
        "k": np.array(min(20, manifest["n_items"]), np.int64),
        "exclude_item_id": np.array([[manifest["padding_item_id"]]] * len(user_ids)),
    }


def click_example(manifest: Mapping[str, Any], ids: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
    """A call of one row that a bundle of task "ctr" answers, one array per input.

    Args:
        ids: a raw value of some columns, by name; the others are missing, and numbers are their means.
    """
    import numpy as np

    example = {}
    for column in manifest["columns"]:
        values = np.array(
            [column["mean"] if column["role"] == "dense" else (ids or {}).get(column["name"], column["missing"])]
        )
        example[column["input"]] = values[:, None] if column["role"] == "bag" else values
    return example


def known_example(manifest: Mapping[str, Any], ingest_dir: Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """A call of known ids of a run's log, and the outputs that the logged model is to give; none: all."""
    import numpy as np

    from graphhash.graph.vocabulary import Vocabulary

    if manifest["task"] == "retrieval":
        users = Vocabulary.load(ingest_dir / "users.parquet")
        return model_example(manifest, users.take(np.arange(min(2, len(users))))), RECOMMENDATION
    from pipeline.ctr.data import Features

    features = Features.open(ingest_dir)
    vocabularies = {column.name: features.vocabulary(column) for column in features.all_columns}
    return click_example(manifest, {name: ids.take([0])[0] for name, ids in vocabularies.items() if len(ids)}), ()


def log_onnx_model(
    uri: str,
    run_id: str,
    model_path: Path,
    example: Mapping[str, tuple[str, Any]],
    tags: Mapping[str, str],
    outputs: Sequence[str] = (),
) -> str:
    """Log an ONNX file as an MLflow model of the onnx flavour.

    Args:
        model_path: `model.onnx`, with its data file beside it if it has one.
        example: (dtype, nested lists) per input that the logged model is to take; the graph's other inputs keep their defaults.
            The signature is read from the graph.
        tags: of the model. With the hash of a bundle among them, the file has to be that bundle's still.
        outputs: those that the logged model is to give; none: all, and all inputs.

    Returns: its id.

    Raises:
        FileNotFoundError: the file is not there, or is that of another bundle.
    """
    import mlflow
    import numpy as np
    import onnx
    from mlflow.models import Model

    from pipeline.export.subgraph import keep_part
    from serving.bundle import check_bundle

    if not model_path.exists():
        raise FileNotFoundError(f"{model_path} is no longer there")
    if BUNDLE_TAG in tags and check_bundle(model_path.parent)["manifest_sha256"] != tags[BUNDLE_TAG]:
        raise FileNotFoundError(f"{model_path} belongs to another bundle by now")
    with no_empty_folder(Path("mlruns")):
        model = onnx.load(model_path)
        if outputs:
            keep_part(model.graph, tuple(example), outputs)
        client = client_of(uri)
        run = client.get_run(run_id)
        # Without this MLflow files the model under the process's current experiment, whatever the run's is.
        logged = client.create_logged_model(
            run.info.experiment_id, name="model", source_run_id=run_id, params=run.data.params, tags=dict(tags)
        )
        with current_store(uri):
            Model.log(
                None,
                mlflow.onnx,
                model_id=logged.model_id,
                run_id=run_id,
                onnx_model=model,
                signature=_signature(model),
                input_example={name: np.array(values, dtype) for name, (dtype, values) in example.items()},
                pip_requirements=_requirements(),
                # MLflow's default asks for CUDA first and warns at length wherever there is none.
                onnx_execution_providers=["CPUExecutionProvider"],
            )
    return logged.model_id


def _check(bundle: Path) -> dict[str, Any]:
    """The manifest of a bundle that is whole and whose graph loads."""
    from serving.bundle import check_bundle
    from serving.retriever import Retriever
    from serving.scorer import Scorer

    manifest = check_bundle(bundle)
    (Scorer if manifest["task"] == "ctr" else Retriever)(bundle, provider="cpu")
    return manifest


def _holder(client: Any, name: str, alias: str) -> Any | None:
    """The version that has the alias, if any."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        # The registry calls an alias that is not there an invalid value, and a model that is not there missing.
        if error_code(error) in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _metrics_of(version: Any) -> dict[str, float]:
    try:
        return dict(json.loads(version.tags[METRICS_TAG]))
    except (KeyError, ValueError, TypeError):
        return {}


def _compare(result: Mapping[str, Any], before: Any, data: str) -> None:
    metric, value, old = result["metric"], result["value"], result["before"]["value"]
    held = f"version {before.version} of {result['name']}, the {result['alias']}"
    if old is None:
        raise RegistryError(f"{held}, carries no {metric} to compare with; --force puts the bundle in its place")
    if before.tags.get(DATA_TAG) != data:
        raise RegistryError(
            f"{held}, was measured on another log or split ({metric} {old:.4f} there, {value:.4f} here), so neither is known to be "
            "better; train both on the same data, or --force"
        )
    if (value > old) if metric in LOWER_IS_BETTER else (value < old):
        raise RegistryError(f"{metric} is {value:.4f}, and {held}, has {old:.4f}; --force puts the bundle in its place")


def _stored(client: Any, store: Store, bundle_hash: str) -> Any | None:
    """The logged model of a bundle, if a run has stored it."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_logged_models(
        experiments, filter_string=f"tags.`{BUNDLE_TAG}` = '{bundle_hash}'", max_results=10
    )
    return next((model for model in found if str(model.status) == "READY"), None)


def _store(client: Any, store: Store, bundle: Path, manifest: Mapping[str, Any], name: str, bundle_hash: str) -> Any:
    """Store the bundle and its graph in a run that is made for it."""
    import numpy as np

    from serving.manifest import MODEL

    if manifest["task"] == "ctr":
        example, outputs = click_example(manifest), ()
    else:
        unknown = np.array([0]) if manifest["id_types"]["user_id"] == "int64" else np.array([""])
        example, outputs = model_example(manifest, unknown), RECOMMENDATION
    with training_run(store, f"register {name}", {}) as tracker:
        tracker.log_metrics({f"test.{key}": value for key, value in manifest["metrics"].items()})
        tracker.log_artifact(bundle, "bundle")
        tracker.log_onnx_model(bundle / MODEL, example, {BUNDLE_TAG: bundle_hash}, outputs)
    model = _stored(client, store, bundle_hash)
    assert model is not None, "a model that was logged is found"
    return model


def _signature(model: Any) -> Any:
    """The graph's inputs and outputs as an MLflow signature; a named axis counts as -1."""
    import numpy as np
    import onnx
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    def schema(values: Any) -> Schema:
        specs = []
        for value in values:
            kind = value.type.tensor_type
            dtype = (
                np.dtype(str)
                if kind.elem_type == onnx.TensorProto.STRING
                else np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
            )
            shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
            specs.append(TensorSpec(dtype, shape, value.name))
        return Schema(specs)

    stored = {tensor.name for tensor in model.graph.initializer}
    return ModelSignature(schema(v for v in model.graph.input if v.name not in stored), schema(model.graph.output))


def _requirements() -> list[str]:
    """What the logged model needs, with only that one of the two onnxruntime packages that is installed here.

    MLflow's own inference lists both, and installing both breaks the GPU one.
    """
    installed = {d.metadata["Name"].lower() for d in importlib.metadata.distributions() if d.metadata["Name"]}
    runtime = "onnxruntime-gpu" if "onnxruntime-gpu" in installed else "onnxruntime"
    names = ["mlflow", "numpy", "onnx", runtime]
    return [f"{name}=={importlib.metadata.version(name)}" for name in names]
