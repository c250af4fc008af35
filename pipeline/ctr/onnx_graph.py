"""The ONNX graph of a CTR model: raw values of every column in, the click probability out.

    categorical (batch,)          -> entries, missing and out-of-vocabulary (OOV) ones by the convention of `pipeline.ctr.ingest`
    multi-valued (batch, n)       -> entries; padding and values behind the longest row of train weigh nothing
    dense (batch,), float64       -> (number - mean) / std as float32, NaN -> 0
    entries -> bucket maps and tables in their small types -> vectors of the fields -> the model's head -> logit -> probability

ONNX Runtime materializes all vectors of columns with few ids when it loads the graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from graphhash.models.ctr import DlrmHead
from pipeline.ctr.onnx_fields import FieldVectors
from pipeline.ctr.onnx_heads import head_logit
from pipeline.ctr.onnx_inputs import Inputs, add_inputs
from pipeline.ctr.weights import TrainedCtr
from pipeline.export.graph import Graph
from pipeline.export.layers import axes_1_2, linear, squeezed


def ctr_graph(trained: TrainedCtr, precisions: Sequence[str]) -> onnx.ModelProto:
    """The graph as described above.

    Args:
        trained: of one run.
        precisions: of every column's stored table, in the order of the maps: "float32", "float16", "int8" or "int4".

    Raises:
        BundleError: a value is not finite in its precision.
        ArgumentError: full columns of one table have different precisions.
    """
    graph, model = Graph(), trained.model
    inputs = add_inputs(graph, trained)
    # Pairs of fields are constants, so that DLRM takes the fields in any order.
    fields = FieldVectors(graph, trained, precisions, inputs, arranged=not isinstance(model.head, DlrmHead))
    vectors = fields.vectors("", model.fields)
    places = [fields.order.index(column) for column in model.fields.order]
    terms = [head_logit(graph, model.head, vectors, inputs.numbers, places)]
    if model.wide is not None:
        wide = fields.vectors("wide_", model.wide)
        terms.append(graph.node("ReduceSum", [wide, axes_1_2(graph)], "/wide", keepdims=0))
    if model.wide_dense is not None:
        assert inputs.numbers is not None
        terms.append(squeezed(graph, linear(graph, "/wide_dense", model.wide_dense, inputs.numbers), "/wide_of_dense"))
    terms += fields.biases()
    slope, offset = map(float, model.calibration)
    if (slope, offset) == (1.0, 0.0):
        graph.node("Sum", terms, "logit")
    else:
        scaled = graph.node(
            "Mul", [graph.node("Sum", terms, "/logit"), graph.constant("/slope", np.float32(slope))], "/scaled"
        )
        graph.node("Add", [scaled, graph.constant("/offset", np.float32(offset))], "logit")
    graph.node("Sigmoid", ["logit"], "probability")
    return graph.model("ctr", inputs.values, _outputs(graph, trained, inputs))


def _outputs(graph: Graph, trained: TrainedCtr, inputs: Inputs) -> list[onnx.ValueInfoProto]:
    """The outputs, and the node of `known`."""
    value, columns = helper.make_tensor_value_info, trained.features.columns
    outputs = [
        value("probability", TensorProto.FLOAT, ["batch"], "click probability"),
        value("logit", TensorProto.FLOAT, ["batch"], "its logit"),
    ]
    if inputs.table is not None:
        n_ids = graph.constant("/n_ids", np.array([column.n_ids for column in columns], np.int64))
        graph.node("Less", [inputs.table, n_ids], "known")
        meaning = "whether each categorical value is in the vocabulary"
        outputs.append(value("known", TensorProto.BOOL, ["batch", "n_categorical"], meaning))
    return outputs
