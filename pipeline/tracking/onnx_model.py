"""A bundle's graph as an MLflow model of the onnx flavour: its example call, signature and requirements."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.tracking.client import client_of, current_store, no_empty_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from numpy.typing import NDArray

# The tag of a logged model and of a registered version: the hash of the manifest of the bundle that it belongs to.
BUNDLE_TAG = "graphhash.bundle"
# MLflow's own limit on one log_batch call.
MAX_METRICS = 1000


@dataclass(frozen=True)
class ModelCall:
    """An example call of a model, which MLflow stores with it.

    Args:
        inputs: one array per input that the logged model is to take; the graph's other inputs keep their defaults, because a signature of
            MLflow's has no optional tensors.
        outputs: those that the logged model is to give; none: all, and all inputs.
    """

    inputs: Mapping[str, NDArray[Any]]
    outputs: Sequence[str] = ()


def log_onnx_model(
    uri: str,
    run_id: str,
    model_path: Path,
    inputs: Mapping[str, tuple[str, Any]],
    tags: Mapping[str, str],
    outputs: Sequence[str] = (),
) -> str:
    """Log an ONNX file as an MLflow model of the onnx flavour.

    Args:
        model_path: `model.onnx`, with its data file beside it if it has one.
        inputs, outputs: of a :class:`ModelCall`, the arrays as (dtype, nested lists). The signature is read from the graph.
        tags: of the model. With the hash of a bundle among them, the file has to belong to that bundle still.

    Returns: the id of the logged model.

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
            keep_part(model.graph, tuple(inputs), outputs)
        client = client_of(uri)
        run = client.get_run(run_id)
        # Otherwise MLflow files the model under the process's current experiment, whatever the run's is.
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
                input_example={name: np.array(values, dtype) for name, (dtype, values) in inputs.items()},
                pip_requirements=_requirements(),
                # MLflow's default asks for CUDA first and warns at length wherever there is none.
                onnx_execution_providers=["CPUExecutionProvider"],
            )
        _link_metrics(client, run_id, logged.model_id)
    return logged.model_id


def _link_metrics(client: MlflowClient, run_id: str, model_id: str) -> None:
    """Give a logged model the last values of its run's test metrics, with the run's dataset, so that MLflow compares models by them."""
    from mlflow.entities import Metric

    run = client.get_run(run_id)
    # MLflow itself links what was logged at step 0, and refuses it a second time.
    linked = {metric.key for metric in client.get_logged_model(model_id).metrics or ()}
    datasets = [entry.dataset for entry in run.inputs.dataset_inputs] if run.inputs is not None else []
    belongs_to = {"dataset_name": datasets[0].name, "dataset_digest": datasets[0].digest} if datasets else {}
    metrics = [
        Metric(metric.key, metric.value, metric.timestamp, metric.step, model_id=model_id, run_id=run_id, **belongs_to)
        for metric in run.data._metric_objs
        if metric.key.startswith("test.") and metric.key not in linked
    ]
    for start in range(0, len(metrics), MAX_METRICS):
        client.log_batch(run_id, metrics=metrics[start : start + MAX_METRICS])


def _signature(model: Any) -> Any:
    """The graph's inputs and outputs as an MLflow signature; a named axis counts as -1."""
    import numpy as np
    import onnx
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    def schema(values: Any) -> Schema:
        specs: list[ColSpec | TensorSpec] = []
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
    try:
        runtime = f"onnxruntime-gpu=={importlib.metadata.version('onnxruntime-gpu')}"
    except importlib.metadata.PackageNotFoundError:
        runtime = f"onnxruntime=={importlib.metadata.version('onnxruntime')}"
    return [*(f"{name}=={importlib.metadata.version(name)}" for name in ("mlflow", "numpy", "onnx")), runtime]
