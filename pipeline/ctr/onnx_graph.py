"""The ONNX graph of a CTR model: raw values of every column in, the probability of a positive label out.

    categorical (batch,)          -> entries, missing and unknown ones by the convention of `pipeline.ctr.ingest`
    multi-valued (batch, n)       -> entries; padding and values behind the longest row of train weigh nothing
    dense (batch,), float64       -> (number - mean) / std as float32, NaN -> 0
    entries -> bucket maps and tables in their small types -> vectors of the fields -> the model's head -> logit -> probability

A missing id is the empty text, or of int64 the least number that no id is (``missing_id``); the same one pads multi-valued columns. Of a
compressed column with few ids ONNX Runtime makes all vectors when it loads the graph. Numbers come in as float64, because the difference of a
large one from its mean, such as a Unix time's, is lost in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import nn

from graphhash.errors import ArgumentError
from graphhash.graph.vocabulary import Vocabulary
from graphhash.maps.quantization import bias_dtype
from graphhash.models.ctr import DcnV2Head, DeepFmHead, DlrmHead
from graphhash.models.ctr_layers import FieldEmbeddings, shared_tables
from pipeline.ctr.data import Column
from pipeline.ctr.schema import TIME_PARTS
from pipeline.ctr.weights import TrainedCtr
from pipeline.export.graph import ONNX_TYPES, Graph
from pipeline.export.ids import encode_ids
from pipeline.export.tables import StoredMap, Table, read_vectors

OUTPUTS = ("probability", "logit", "known")
# Names inside the graph begin with these; a column that is called so gets another input.
_INSIDE = ("/", "axis_", "n_/")
# Numbers of a column's vectors that are kept as float32, 4 MiB.
_FOLDED_VALUES = 2**20
_PLAIN = StoredMap(None, None, None, 1)


def ctr_graph(trained: TrainedCtr, precisions: Sequence[str]) -> onnx.ModelProto:
    """The graph as described above.

    Args:
        trained: of one run.
        precisions: of every column's stored table, in the order of the maps: "float32", "float16", "int8" or "int4".

    Raises:
        BundleError: a value is not finite in its precision.
        ValueError: full columns of one table have different precisions.
    """
    graph, features, model = Graph(), trained.features, trained.model
    names = input_names(trained)
    inputs, entries, multi_valued = [], {}, {}
    for number, (column, vocabulary) in enumerate(zip(features.all_columns, trained.vocabularies, strict=True)):
        raw = names[column.name]
        axes, about = (
            ["batch"],
            f"raw ids; {missing_id(column, vocabulary)!r} is a missing one, unknown ones read the unknown ids' row",
        )
        entries[number] = _entries(graph, number, column, vocabulary, raw)
        if column.width is not None:
            axes, about = (
                ["batch", f"n_{number}"],
                f"raw ids of every row; {missing_id(column, vocabulary)!r} is none, and fills rows up",
            )
            multi_valued[number] = _value_weights(graph, number, column, vocabulary, raw)
        inputs.append(helper.make_tensor_value_info(raw, ONNX_TYPES[column.kind], axes, about))
    for dense in features.dense:
        inputs.append(
            helper.make_tensor_value_info(
                names[dense.name], TensorProto.DOUBLE, ["batch"], "a number; NaN is a missing one"
            )
        )
    numbers = _dense(graph, trained, names)

    parts = _Parts(graph, trained, precisions, entries, multi_valued)
    terms = [_head(graph, model.head, parts.vectors("", model.fields), numbers)]
    if model.wide is not None:
        axes = graph.constant("/axes_1_2", np.array([1, 2], np.int64))
        terms.append(graph.node("ReduceSum", [parts.vectors("wide_", model.wide), axes], "/wide", keepdims=0))
    if model.wide_dense is not None:
        terms.append(_scalar(graph, _linear(graph, "/wide_dense", model.wide_dense, numbers), "/wide_of_dense"))
    terms += parts.biases()
    graph.node("Sum", terms, "logit")
    graph.node("Sigmoid", ["logit"], "probability")
    value = helper.make_tensor_value_info
    outputs = [
        value("probability", TensorProto.FLOAT, ["batch"], "probability of a positive label"),
        value("logit", TensorProto.FLOAT, ["batch"], "its logit"),
    ]
    if features.columns:
        last = graph.constant("/n_ids", np.array([column.n_ids for column in features.columns], np.int64))
        graph.node(
            "Less",
            [_side_by_side(graph, [entries[n] for n in range(len(features.columns))], "/entries"), last],
            "known",
        )
        outputs.append(
            value(
                "known",
                TensorProto.BOOL,
                ["batch", "n_categorical"],
                "whether training has shown each categorical value",
            )
        )
    return graph.model("ctr", inputs, outputs)


def input_names(trained: TrainedCtr) -> dict[str, str]:
    """The graph's input for every column, by the column's name: the name itself, where nothing else in the graph is called so."""
    names = [column.name for column in (*trained.features.all_columns, *trained.features.dense)]
    found: dict[str, str] = {}
    for name in names:
        given = name
        while (
            given in OUTPUTS
            or given.startswith(_INSIDE)
            or not given
            or (given != name and given in (*names, *found.values()))
        ):
            given = f"column_{given}"
        found[name] = given
    return found


def missing_id(column: Column, vocabulary: Vocabulary) -> int | str:
    """The raw id that stands for a missing value: no id of the column is this."""
    if column.kind == "string":
        return ""
    first = -(2**63)
    near = (
        set(vocabulary.ids.to_numpy()[vocabulary.ids.to_numpy() < first + len(vocabulary) + 1].tolist())
        if len(vocabulary)
        else set()
    )
    return next(number for number in range(first, first + len(near) + 1) if number not in near)


def describe_columns(trained: TrainedCtr, precisions: Sequence[str]) -> list[dict[str, Any]]:
    """Every column for the manifest, in the order of the graph's inputs; see ``serving.bundle``."""
    features, names = trained.features, input_names(trained)
    made = {
        f"{name}_{part}": {"column": name, "format": form, "part": part}
        for name, form in features.schema.times
        for part in TIME_PARTS
    }
    separators = {feature.name: feature.separator for feature in features.schema.multi_valued}
    columns = []
    for column, vocabulary, bucket_map, precision in zip(
        features.all_columns, trained.vocabularies, trained.maps, precisions, strict=True
    ):
        described = {
            "name": column.name,
            "input": names[column.name],
            "role": "categorical" if column.width is None else "multi_valued",
            "dtype": column.kind,
            "n_ids": column.n_ids,
            "missing": missing_id(column, vocabulary),
            "map": bucket_map.method,
            "n_buckets": bucket_map.n_buckets,
            "indices_per_id": bucket_map.indices_per_id,
            "precision": precision,
        }
        if column.width is not None:
            described |= {"width": column.width, "separator": separators[column.name]}
        if column.name in made:
            described["time"] = made[column.name]
        columns.append(described)
    for dense in features.dense:
        described = {"name": dense.name, "input": names[dense.name], "role": "dense", "dtype": "float64"}
        columns.append(described | {"mean": dense.mean, "std": dense.std})
    return columns


def _missing(graph: Graph, number: int, column: Column, vocabulary: Vocabulary) -> str:
    value, name = missing_id(column, vocabulary), f"/{number}_missing"
    if isinstance(value, int):
        return graph.constant(name, np.int64(value))
    graph.initializers.append(helper.make_tensor(name, TensorProto.STRING, [], [value.encode()]))
    return name


def _entries(graph: Graph, number: int, column: Column, vocabulary: Vocabulary, raw: str) -> str:
    """Entries of raw ids, int64, of their shape: known ids, then missing where the column has it, and unknown ones last."""
    name, n_known = f"/{number}", len(vocabulary)
    if n_known and not column.has_missing:
        return encode_ids(graph, name, vocabulary, raw)
    is_missing = graph.node("Equal", [raw, _missing(graph, number, column, vocabulary)], f"{name}_is_missing")
    if not n_known:
        first, second = graph.constant("/zero", np.int64(0)), graph.constant("/one", np.int64(1))
        return graph.node("Where", [is_missing, first, second], name)
    # An id that is not known is missing, or else in the entry behind it.
    rows = encode_ids(graph, name, vocabulary, raw)
    is_new = graph.node(
        "GreaterOrEqual", [rows, graph.constant(f"{name}_n_known", np.int64(n_known))], f"{name}_is_new"
    )
    is_unknown = graph.node("And", [is_new, graph.node("Not", [is_missing], f"{name}_is_there")], f"{name}_is_unknown")
    return graph.node("Add", [rows, graph.cast(is_unknown, f"{name}_step", TensorProto.INT64)], f"{name}_entry")


def _value_weights(graph: Graph, number: int, column: Column, vocabulary: Vocabulary, raw: str) -> str:
    """Weights of the values of a multi-valued feature, float32, shape (batch, 1, n): a mean over the first ones that are there."""
    name, missing = f"/{number}", _missing(graph, number, column, vocabulary)
    there = graph.node("Not", [graph.node("Equal", [raw, missing], f"{name}_is_padding")], f"{name}_there")
    place = graph.node(
        "CumSum", [graph.cast(there, f"{name}_counted", TensorProto.INT64), graph.axis(1)], f"{name}_place"
    )
    early = graph.node("LessOrEqual", [place, graph.constant(f"{name}_width", np.int64(column.width))], f"{name}_early")
    kept = graph.cast(graph.node("And", [there, early], f"{name}_kept"), f"{name}_share", TensorProto.FLOAT)
    total = graph.node("ReduceSum", [kept, graph.axis(1)], f"{name}_total", keepdims=1)
    least = graph.node("Max", [total, graph.constant("/one_number", np.float32(1))], f"{name}_divisor")
    return graph.node("Unsqueeze", [graph.node("Div", [kept, least], f"{name}_shares"), graph.axis(1)], f"{name}_mean")


def _dense(graph: Graph, trained: TrainedCtr, names: dict[str, str]) -> str | None:
    """Dense columns as the model takes them, float32, shape (batch, n_dense)."""
    columns = trained.features.dense
    if not columns:
        return None
    numbers = _side_by_side(graph, [names[column.name] for column in columns], "/numbers")
    means, stds = (np.array([getattr(column, key) for column in columns], np.float64) for key in ("mean", "std"))
    centred = graph.node("Sub", [numbers, graph.constant("/means", means)], "/centred")
    scaled = graph.cast(
        graph.node("Div", [centred, graph.constant("/stds", stds)], "/standardised"), "/dense_given", TensorProto.FLOAT
    )
    gone = graph.node("IsNaN", [scaled], "/dense_missing")
    return graph.node("Where", [gone, graph.constant("/zero_number", np.float32(0)), scaled], "/dense")


def _side_by_side(graph: Graph, columns: Sequence[str], name: str) -> str:
    """Tensors of shape (batch,) as columns of one, (batch, n)."""
    return graph.node(
        "Concat",
        [graph.node("Unsqueeze", [c, graph.axis(1)], f"{name}_of_{i}") for i, c in enumerate(columns)],
        name,
        axis=1,
    )


@dataclass
class _Parts:
    """What of the graph reads tables: entries by the number of their column, and weights of multi-valued features."""

    graph: Graph
    trained: TrainedCtr
    precisions: Sequence[str]
    entries: dict[int, str]
    multi_valued: dict[int, str]

    def __post_init__(self):
        fields, maps = self.trained.model.fields, self.trained.maps
        self.maps = {c: StoredMap.add(self.graph, f"/{c}", maps[c]) for c in fields.own_columns}
        self.first_of = shared_tables(maps)

    def vectors(self, prefix: str, fields: FieldEmbeddings) -> str:
        """Vectors of all fields, float32, shape (batch, n_fields, dim), in the order of ``fields.order``."""
        graph, parts = self.graph, []
        if fields.joint is not None:
            parts += self._joint(f"/{prefix}joint", fields)
        tables: dict[int, Table] = {}
        for c in fields.own_columns:
            name, first = f"/{prefix}{c}", self.first_of.get(c, c)
            if first not in tables:
                tables[first] = self._table(
                    f"/{prefix}{first}", fields.columns[first].table, self._stored_as(fields, first)
                )
            if c not in self.multi_valued:
                read = self._read(f"{name}_field", tables[first], c, self.entries[c])
                parts.append(graph.node("Unsqueeze", [read, graph.axis(1)], f"{name}_one_field"))
                continue
            flat = graph.node("Reshape", [self.entries[c], graph.axis(-1)], f"{name}_flat")
            read = self._read(f"{name}_field", tables[first], c, flat)
            size = [graph.node("Shape", [self.entries[c]], f"{name}_size"), graph.axis(fields.dim)]
            shape = graph.node("Concat", size, f"{name}_shape", axis=0)
            values = graph.node("Reshape", [read, shape], f"{name}_values", allowzero=1)
            parts.append(graph.node("MatMul", [self.multi_valued[c], values], f"{name}_mean"))
        return graph.node("Concat", parts, f"/{prefix}fields", axis=1)

    def _read(self, name: str, table: Table, column: int, entries: str) -> str:
        """Vectors of a column's entries. Those of few ids are an expression of constants, which ONNX Runtime computes once."""
        bucket_map = self.trained.maps[column]
        if bucket_map.identity or (bucket_map.n_ids + 1) * table.shape[1] > _FOLDED_VALUES:
            return read_vectors(self.graph, name, table, self.maps[column], entries)
        whole = read_vectors(self.graph, f"{name}_all", table, self.maps[column], None)
        return self.graph.node("Gather", [whole, entries], name, axis=0)

    def biases(self) -> list[str]:
        """The id bias of every compressed column, float32, shape (batch,) each."""
        bias, graph = self.trained.model.bias, self.graph
        if bias is None:
            return []
        terms = []
        for embedding, c in zip(bias.columns, self.trained.model.bias_columns.tolist(), strict=True):
            table = self._table(f"/bias_{c}", embedding.table, bias_dtype(self.precisions[c]))
            terms.append(
                _scalar(graph, read_vectors(graph, f"/bias_{c}", table, _PLAIN, self.entries[c]), f"/bias_of_{c}")
            )
        return terms

    def _joint(self, name: str, fields: FieldEmbeddings) -> list[str]:
        """Fields of the table that full columns have together: one lookup for all categorical ones."""
        graph = self.graph
        columns = fields.joint_columns.tolist()
        kinds = {self._stored_as(fields, c) for c in (*columns, *(c for c, _ in fields.joint_multi_valued))}
        if len(kinds) > 1:
            raise ArgumentError(
                f"full columns are stored in {' and '.join(sorted(kinds))}, and have one table; give them one precision"
            )
        table = self._table(name, fields.joint.table, kinds.pop())
        parts = []
        if columns:
            starts = graph.constant("/joint_starts", fields.joint_starts.numpy())
            entries = _side_by_side(graph, [self.entries[c] for c in columns], f"{name}_entries")
            rows = graph.node("Add", [entries, starts], f"{name}_rows_read")
            parts.append(read_vectors(graph, f"{name}_read", table, _PLAIN, rows))
        for c, start in fields.joint_multi_valued:
            rows = graph.node(
                "Add", [self.entries[c], graph.constant(f"/{c}_start", np.int64(start))], f"{name}_{c}_rows_read"
            )
            parts.append(
                graph.node(
                    "MatMul",
                    [self.multi_valued[c], read_vectors(graph, f"{name}_{c}", table, _PLAIN, rows)],
                    f"{name}_{c}_mean",
                )
            )
        return parts

    def _stored_as(self, fields: FieldEmbeddings, column: int) -> str:
        precision = self.precisions[column]
        return precision if fields is self.trained.model.fields else bias_dtype(precision)

    def _table(self, name: str, table: torch.Tensor, precision: str) -> Table:
        return Table.add(self.graph, name, table.detach().numpy(), precision)


def _head(graph: Graph, head: nn.Module, vectors: str, numbers: str | None) -> str:
    """The head's logit, shape (batch,); as the ``forward`` of ``graphhash.models.ctr``'s heads."""
    if isinstance(head, DlrmHead):
        units = _dlrm(graph, head, vectors, numbers)
    else:
        flat = graph.node("Flatten", [vectors], "/vectors_flat", axis=1)
        first = flat if numbers is None else graph.node("Concat", [flat, numbers], "/joined", axis=1)
        if isinstance(head, DcnV2Head):
            crossed = first
            for n, layer in enumerate(head.cross.layers):
                product = graph.node(
                    "Mul", [first, _linear(graph, f"/cross_{n}", layer, crossed)], f"/cross_{n}_product"
                )
                crossed = graph.node("Add", [product, crossed], f"/cross_{n}_out")
            if head.stacked:
                units = _perceptron(graph, "/deep", head.network, crossed)
            else:
                units = graph.node(
                    "Concat", [crossed, _perceptron(graph, "/deep", head.network, first)], "/parallel", axis=1
                )
        else:
            units = _perceptron(graph, "/deep", head.network, first)
    logit = _scalar(graph, _linear(graph, "/out", head.out, units), "/head")
    if not isinstance(head, DeepFmHead):
        return logit
    total = graph.node("ReduceSum", [vectors, graph.axis(1)], "/fm_sum", keepdims=0)
    square = graph.node(
        "ReduceSum", [graph.node("Mul", [total, total], "/fm_squared_sum"), graph.axis(1)], "/fm_square", keepdims=0
    )
    axes = graph.constant("/axes_1_2", np.array([1, 2], np.int64))
    squares = graph.node(
        "ReduceSum", [graph.node("Mul", [vectors, vectors], "/fm_squared"), axes], "/fm_squares", keepdims=0
    )
    twice = graph.node("Sub", [square, squares], "/fm_twice")
    return graph.node(
        "Add", [logit, graph.node("Mul", [twice, graph.constant("/half", np.float32(0.5))], "/fm")], "/head_and_fm"
    )


def _dlrm(graph: Graph, head: DlrmHead, vectors: str, numbers: str | None) -> str:
    of_dense = None
    if head.dense is not None:
        of_dense = _perceptron(graph, "/dense_network", head.dense, numbers)
        vectors = graph.node(
            "Concat",
            [graph.node("Unsqueeze", [of_dense, graph.axis(1)], "/dense_field"), vectors],
            "/all_fields",
            axis=1,
        )
    turned = graph.node("Transpose", [vectors], "/fields_turned", perm=[0, 2, 1])
    products = graph.node("Flatten", [graph.node("MatMul", [vectors, turned], "/products")], "/products_flat", axis=1)
    units = graph.node("Gather", [products, graph.constant("/pairs", head.dots.pairs.numpy())], "/dots", axis=1)
    units = units if of_dense is None else graph.node("Concat", [of_dense, units], "/dense_and_dots", axis=1)
    return _perceptron(graph, "/deep", head.network, units)


def _perceptron(graph: Graph, name: str, network: nn.Sequential, units: str) -> str:
    """Its layers; dropout does nothing once trained."""
    for number, layer in enumerate(network):
        if isinstance(layer, nn.Linear):
            units = _linear(graph, f"{name}_{number}", layer, units)
        elif isinstance(layer, nn.ReLU):
            units = graph.node("Relu", [units], f"{name}_{number}")
    return units


def _linear(graph: Graph, name: str, layer: nn.Linear, units: str) -> str:
    inputs = [units, graph.constant(f"{name}_weight", layer.weight.detach().numpy())]
    if layer.bias is not None:
        inputs.append(graph.constant(f"{name}_offset", layer.bias.detach().numpy()))
    return graph.node("Gemm", inputs, f"{name}_units", transB=1)


def _scalar(graph: Graph, column: str, name: str) -> str:
    """A tensor of shape (batch, 1) as (batch,)."""
    return graph.node("Squeeze", [column, graph.axis(1)], name)
