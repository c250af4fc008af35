"""A bundle as a model repository for NVIDIA Triton, whose onnxruntime backend then answers for it.

    DIR/NAME/config.pbtxt          user_id, exclude_item_id -> item_id, score, known
    DIR/NAME/1/model.onnx          (and its external data beside it)
    DIR/NAME_score/...             user_id, candidate_item_id -> candidate_score, known, candidate_known

or, of a CTR model,

    DIR/NAME/...                   every column -> probability, logit, known

Triton puts requests together along the first axis of every tensor (dynamic batching), so each tensor needs one. The
bundle's graph has a scalar k; here k is a constant, and who wants fewer items takes the first ones, which are the
same. A tensor of shape (batch,) is (batch, 1) in a request, and reshaped by Triton. Requests are batched where their
lists of excluded items, or of candidates, have the same length: pad them with the padding id; lists of a
multi-valued column likewise, with its missing value. The parts of the graph that an answer does not need are left out.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from graphhash.errors import ArgumentError
from pipeline.export.subgraph import keep_part
from serving.bundle import check_bundle
from serving.errors import BundleError
from serving.manifest import MODEL

_TYPES: dict[int, str] = {
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.STRING: "TYPE_STRING",
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.DOUBLE: "TYPE_FP64",
    TensorProto.BOOL: "TYPE_BOOL",
}


@dataclass(frozen=True)
class ServedModel:
    """A model of the repository, as a part of the bundle's graph.

    Attributes:
        suffix: of its name.
        inputs, outputs: of the graph, that requests and answers have; None: all of them.
        constants: values of other inputs.
        axes: sizes of named axes.
    """

    suffix: str
    inputs: tuple[str, ...] | None
    outputs: tuple[str, ...] | None
    constants: dict[str, NDArray]
    axes: dict[str, int]


def _retrieval_models(manifest: Mapping[str, Any], k: int) -> list[ServedModel]:
    n_best = min(k, manifest["n_items"])
    constants, axes = {"k": np.array(n_best, np.int64)}, {"k_or_all": n_best}
    candidates = ("candidate_score", "known", "candidate_known")
    return [
        ServedModel("", ("user_id", "exclude_item_id"), ("item_id", "score", "known"), constants, axes),
        ServedModel("_score", ("user_id", "candidate_item_id"), candidates, constants, axes),
    ]


def _ctr_models(manifest: Mapping[str, Any], k: int) -> list[ServedModel]:
    n_categorical = sum(column["role"] == "categorical" for column in manifest["columns"])
    return [ServedModel("", None, None, {}, {"n_categorical": n_categorical})]


SERVED_MODELS: dict[str, Callable[[Mapping[str, Any], int], list[ServedModel]]] = {
    "retrieval": _retrieval_models,
    "ctr": _ctr_models,
}


def write_triton(
    bundle: Path, out: Path, *, name: str = "graphhash", k: int = 100, gpu: bool = False, max_batch_size: int = 256
) -> list[Path]:
    """Write the bundle's models into a Triton model repository, each whole or not at all; older ones are replaced.

    Args:
        bundle: checked here.
        out: the model repository; other models in it are left alone.
        name: of the model that recommends; the one that scores candidates is `{name}_score`.
        k: items per user, at most the number of items; not used by CTR models.
        gpu: run on the GPUs of the server, instead of its CPUs.
        max_batch_size: users, or rows, of one run.

    Returns: the model folders.

    Raises:
        BundleError: the bundle fails its check, or a model's folder would replace something else.
        ArgumentError: k, `max_batch_size` or `name` is out of range.
    """
    if k < 1 or max_batch_size < 1:
        raise ArgumentError(f"k is {k}, max_batch_size is {max_batch_size}; both start at 1")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ArgumentError(f"the model's name is {name!r}; use letters, digits, '_', '-' and '.'")
    manifest = check_bundle(bundle)
    folders = []
    for served in SERVED_MODELS[manifest["task"]](manifest, k):
        # Tensors outside of the file stay there.
        model = onnx.load(bundle / MODEL, load_external_data=False)
        if served.inputs is not None and served.outputs is not None:
            keep_part(model.graph, served.inputs, served.outputs, served.constants)
        _batch_first(model.graph, served.axes)
        folder = out / (name + served.suffix)
        config = triton_config(model, folder.name, gpu=gpu, max_batch_size=max_batch_size)
        folders.append(_publish(bundle, model, config, folder))
    return folders


def triton_config(model: onnx.ModelProto, name: str, *, gpu: bool, max_batch_size: int) -> str:
    """config.pbtxt for a model whose every tensor has the batch as its first axis."""
    kind = "KIND_GPU" if gpu else "KIND_CPU"
    parts = [
        f'name: "{name}"',
        'backend: "onnxruntime"',
        f'default_model_filename: "{MODEL}"',
        f"max_batch_size: {max_batch_size}",
        *(_tensor("input", value) for value in model.graph.input),
        *(_tensor("output", value) for value in model.graph.output),
        f"instance_group [\n  {{\n    count: 1\n    kind: {kind}\n  }}\n]",
        # What has come while a run goes on makes the next one; nobody waits for company.
        "dynamic_batching {\n  max_queue_delay_microseconds: 0\n}",
    ]
    return "\n".join(parts) + "\n"


def _tensor(side: str, value: onnx.ValueInfoProto) -> str:
    kind = value.type.tensor_type
    dims = [axis.dim_value or -1 for axis in kind.shape.dim][1:]
    # JSON escapes what a text of protobuf's has to.
    lines = [
        f"name: {json.dumps(value.name, ensure_ascii=False)}",
        f"data_type: {_TYPES[kind.elem_type]}",
        f"dims: [ {', '.join(map(str, dims or [1]))} ]",
    ]
    if not dims:
        lines.append("reshape: { shape: [ ] }")
    return f"{side} [\n  {{\n" + "".join(f"    {line}\n" for line in lines) + "  }\n]"


def _batch_first(graph: onnx.GraphProto, numbers: dict[str, int]) -> None:
    """State the shapes as Triton wants them: the batch first everywhere, and some axes as numbers."""
    for value in [*graph.input, *graph.output]:
        first, *others = value.type.tensor_type.shape.dim
        first.dim_param = "batch"
        for axis in others:
            if axis.dim_param in numbers:
                axis.dim_value = numbers[axis.dim_param]


def _publish(bundle: Path, model: onnx.ModelProto, config: str, folder: Path) -> Path:
    if folder.exists() and not (folder / "config.pbtxt").is_file():
        raise BundleError(f"{folder}: exists and is no Triton model; choose another place or name, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        version = work / "model" / "1"
        version.mkdir(parents=True)
        onnx.save(model, version / MODEL)
        for file in _external_files(model):
            shutil.copyfile(bundle / file, version / file)
        onnx.checker.check_model(str(version / MODEL), full_check=True)
        (work / "model" / "config.pbtxt").write_text(config)
        if folder.exists():
            folder.rename(work / "replaced")
        os.rename(work / "model", folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _external_files(model: onnx.ModelProto) -> set[str]:
    return {
        entry.value
        for tensor in model.graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
