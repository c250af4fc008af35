"""What a manifest tells programs without this package: versions of the file, and a request with its answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.export.graph import IR_VERSION, ML_OPSET, OPSET

# The first ONNX Runtime that reads files of IR version 10.
LEAST_ONNXRUNTIME = "1.18"


def onnx_facts() -> dict[str, Any]:
    """Operator sets and IR version of the file, and the least ONNX Runtime that reads it."""
    return {
        "opset": {"ai.onnx": OPSET, "ai.onnx.ml": ML_OPSET},
        "ir_version": IR_VERSION,
        "least_onnxruntime": LEAST_ONNXRUNTIME,
    }


def tensors_as_json(tensors: Mapping[str, NDArray]) -> dict[str, dict[str, Any]]:
    """Tensors as ``dtype``, ``shape`` and ``data``, row by row; ids of int64 as texts, because JSON numbers are rounded by browsers."""
    described = {}
    for name, tensor in tensors.items():
        kind = {"i": "int64", "b": "bool", "O": "string", "U": "string"}.get(tensor.dtype.kind, tensor.dtype.name)
        values = tensor.reshape(-1).tolist()
        data = [str(value) for value in values] if kind in ("int64", "string") else values
        described[name] = {"dtype": kind, "shape": list(tensor.shape), "data": data}
    return described


def answered(outputs: list[str], results: list[NDArray], inputs: Mapping[str, NDArray]) -> dict[str, Any]:
    """The manifest's ``example``: a request, and what the graph answers."""
    arrays = {name: np.asarray(result) for name, result in zip(outputs, results, strict=True)}
    return {"inputs": tensors_as_json(inputs), "outputs": tensors_as_json(arrays)}
