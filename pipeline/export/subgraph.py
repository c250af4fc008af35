"""A part of an ONNX graph: some of its inputs and outputs, and what lies between them.

For servers that want every input in every request, or one shape of tensor alone (pipeline/triton.py), and for MLflow,
whose signatures know no optional tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper


def keep_part(
    graph: onnx.GraphProto,
    inputs: Sequence[str],
    outputs: Sequence[str],
    constants: Mapping[str, NDArray] | None = None,
) -> None:
    """Reduce `graph` to these outputs, as functions of these inputs, in place.

    Args:
        inputs: no longer optional, where they were.
        outputs: in the order wanted.
        constants: values of other inputs. One that is in neither keeps its default, or is without elements, with
            shape (1, 0, ...), if it has none.
    """
    constants = constants or {}
    stored = {tensor.name: tensor for tensor in graph.initializer}
    values = {value.name: value for value in graph.input}
    for name, value in values.items():
        if name in inputs or name in constants:
            if name in stored:
                graph.initializer.remove(stored[name])
            if name in constants:
                graph.initializer.append(numpy_helper.from_array(constants[name], name))
        elif name not in stored:
            shape = [1] + [0] * (len(value.type.tensor_type.shape.dim) - 1)
            graph.initializer.append(helper.make_tensor(name, value.type.tensor_type.elem_type, shape, []))
    given = {value.name: value for value in graph.output}
    needed, nodes = set(outputs), []
    for node in reversed(graph.node):
        if needed & set(node.output):
            nodes.append(node)
            needed |= set(_reads(node))
    initializers = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.input[:], graph.output[:], graph.node[:], graph.initializer[:]
    graph.input.extend(values[name] for name in inputs)
    graph.output.extend(given[name] for name in outputs)
    graph.node.extend(reversed(nodes))
    graph.initializer.extend(initializers)


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, those that its subgraphs read from around them too."""
    yield from node.input
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            yield from (value.name for value in graph.output)
            for inner in graph.node:
                yield from _reads(inner)
