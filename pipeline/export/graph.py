"""ONNX graphs built node by node (opset 20, ai.onnx.ml 4), so that every dtype is chosen and no constant is folded in the file.

graph = Graph()
graph.node("Add", ["x", graph.constant("one", np.float32(1))], "y")
graph.model("name", inputs, outputs)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from serving.manifest import TensorSpec

OPSET, ML_OPSET, IR_VERSION = 20, 4, 10
ONNX_TYPES: dict[str, int] = {
    "int64": TensorProto.INT64,
    "string": TensorProto.STRING,
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "bool": TensorProto.BOOL,
}


class Graph:
    """Nodes and initializers in the order they are added; every method returns the name of what it added.

    The body of an `If`, `Loop` or `Scan` is a `Graph` with the graph around it as its parent: it sees everything
    there, and its initializers become the outermost graph's, so that no name stands for two things.
    """

    def __init__(self, parent: Graph | None = None) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = [] if parent is None else parent.initializers

    @property
    def names(self) -> set[str]:
        return {tensor.name for tensor in self.initializers}

    def constant(self, name: str, values: NDArray | np.generic) -> str:
        """An initializer; one that is there already is used again."""
        if name not in self.names:
            self.initializers.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def node(self, op: str, inputs: list[str], outputs: str | list[str], **attributes: Any) -> str:
        """A node, named like its first output, whose name is returned."""
        names = [outputs] if isinstance(outputs, str) else outputs
        self.nodes.append(helper.make_node(op, inputs, names, name=names[0], **attributes))
        return names[0]

    def cast(self, source: str, name: str, dtype: int) -> str:
        """The tensor `source` in a type of TensorProto's."""
        return self.node("Cast", [source], name, to=dtype)

    def axis(self, number: int) -> str:
        """The number as int64, shape (1,), for what takes axes, shapes and slices."""
        return self.constant(f"axis_{number}".replace("-", "minus_"), np.array([number], np.int64))

    def body(self, name: str, inputs: list[Any], outputs: list[Any]) -> onnx.GraphProto:
        """This graph as the body of a node of its parent."""
        return helper.make_graph(self.nodes, name, inputs, outputs)

    def model(self, name: str, inputs: list[Any], outputs: list[Any]) -> onnx.ModelProto:
        return helper.make_model(
            helper.make_graph(self.nodes, name, inputs, outputs, self.initializers),
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.ml", ML_OPSET)],
            ir_version=IR_VERSION,
            producer_name="graphhash",
        )


def describe(values: Iterable[onnx.ValueInfoProto]) -> dict[str, TensorSpec]:
    """Names, types and meanings of graph inputs or outputs, for the manifest."""
    names: dict[int, str] = {number: name for name, number in ONNX_TYPES.items()}
    return {
        value.name: {
            "dtype": names[value.type.tensor_type.elem_type],
            "shape": [axis.dim_param for axis in value.type.tensor_type.shape.dim],
            "meaning": value.doc_string,
        }
        for value in values
    }
