"""Tensors of an ONNX file as arrays: raw ids, rows of tables, weights.

For showing what a model is made of, not for running it. Reads the protobuf by hand, as serving/external_data.py does,
because serving needs no onnx package. The file is read and not mapped, because a mapped file that is cut ends the process.
Only a checked bundle is read here (serving/bundle.py); still, every length is checked before it is followed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serving.external_data import read_varint

# Field numbers of onnx.proto.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OP_TYPE, _NODE_ATTRIBUTE = 1, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_TENSOR = 1, 5
_DIMS, _DATA_TYPE, _STRINGS, _NAME, _RAW, _EXTERNAL = 1, 2, 6, 8, 9, 13
_STRING = 8
_DTYPES = {
    1: "<f4",
    2: "u1",
    3: "i1",
    4: "<u2",
    5: "<i2",
    6: "<i4",
    7: "<i8",
    10: "<f2",
    11: "<f8",
    12: "<u4",
    13: "<u8",
}

Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Strings:
    """Texts that lie in one array of bytes: `self[i]` and `len(self)`."""

    data: bytes
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> str:
        return self.data[self.starts[index] : self.stops[index]].decode("utf-8")


@dataclass(frozen=True, eq=False)
class OnnxTensors:
    """What `read_tensors` finds: arrays or `Strings`, read-only.

    Attributes:
        initializers: by name.
        encoder_keys: keys of each LabelEncoder, by the name of the node's input; key i stands for row i.
    """

    initializers: dict[str, NDArray | Strings]
    encoder_keys: dict[str, NDArray | Strings]

    @property
    def arrays(self) -> dict[str, NDArray]:
        """The initializers that hold numbers."""
        return {name: values for name, values in self.initializers.items() if not isinstance(values, Strings)}


def read_tensors(model: Path, wanted: Callable[[str], bool] = lambda name: True) -> OnnxTensors:
    """Read the tensors of an ONNX file, external data too.

    Args:
        wanted: initializers of other names are empty.

    Raises:
        ValueError: the file is cut short or no protobuf, or a tensor does not fit its shape.
    """
    data = model.read_bytes()
    try:
        graph = next((span for field, span in _fields(data, (0, len(data))) if field == _MODEL_GRAPH), None)
        if not isinstance(graph, tuple):
            raise ValueError("it has no graph")
        initializers: dict[str, NDArray | Strings] = {}
        keys: dict[str, NDArray | Strings] = {}
        for field, value in _fields(data, graph):
            if field == _GRAPH_INITIALIZER:
                name, values = _tensor(data, _span(value), model.parent, wanted)
                initializers[name] = values
            elif field == _GRAPH_NODE:
                node = dict(reversed(list(_fields(data, _span(value)))))  # The first of each field.
                if _bytes(data, node.get(_NODE_OP_TYPE)) == b"LabelEncoder":
                    keys[_bytes(data, node.get(_NODE_INPUT)).decode()] = _keys(data, _span(value), model.parent)
    except IndexError:
        raise ValueError("it is cut short") from None
    return OnnxTensors(initializers, keys)


def _keys(data: bytes, node: Span, folder: Path) -> NDArray | Strings:
    for field, span in _fields(data, node):
        if field == _NODE_ATTRIBUTE:
            attribute = dict(_fields(data, _span(span)))
            if _bytes(data, attribute.get(_ATTRIBUTE_NAME)) == b"keys_tensor":
                return _tensor(data, _span(attribute[_ATTRIBUTE_TENSOR]), folder, lambda _: True)[1]
    raise ValueError("a LabelEncoder has no keys_tensor")


def _tensor(data: bytes, span: Span, folder: Path, wanted: Callable[[str], bool]) -> tuple[str, NDArray | Strings]:
    """Name and values of a TensorProto; no values of types that are of no use here, such as bool, and of small constants."""
    fields: dict[int, list[Span | int]] = {}
    for field, value in _fields(data, span):
        fields.setdefault(field, []).append(value)
    name = _bytes(data, fields.get(_NAME, [0])[-1]).decode()
    dims = [size for size in fields.get(_DIMS, []) if isinstance(size, int)]
    kind = fields.get(_DATA_TYPE, [0])[-1]
    if not wanted(name):
        return name, np.empty(0)
    if kind == _STRING:
        spans = np.array([_span(text) for text in fields.get(_STRINGS, [])], np.int64).reshape(-1, 2)
        # A part of the file, so that the rest of it can go.
        start, stop = (int(spans[0, 0]), int(spans[-1, 1])) if len(spans) else (0, 0)
        return name, Strings(data[start:stop], spans[:, 0] - start, spans[:, 1] - start)
    if not isinstance(kind, int) or kind not in _DTYPES:
        return name, np.empty(0)
    dtype, count = np.dtype(_DTYPES[kind]), int(np.prod(dims, dtype=np.int64))
    if _EXTERNAL in fields:
        external = dict(_entry(data, _span(entry)) for entry in fields[_EXTERNAL])
        n_bytes = int(external.get("length", count * dtype.itemsize))
        values = np.fromfile(folder / external["location"], dtype, count, offset=int(external.get("offset", 0)))
    elif _RAW in fields:
        start, stop = _span(fields[_RAW][-1])
        n_bytes = stop - start
        values = np.frombuffer(data[start:stop], dtype) if n_bytes == count * dtype.itemsize else np.empty(0, dtype)
    else:  # Small constants may be written value by value.
        return name, np.empty(0)
    if n_bytes != count * dtype.itemsize or len(values) != count:
        raise ValueError(f"tensor {name!r} has {n_bytes} bytes for shape {dims}")
    return name, values.reshape(dims)


def _entry(data: bytes, span: Span) -> tuple[str, str]:
    """Key and value of a StringStringEntryProto."""
    entry = dict(_fields(data, span))
    return _bytes(data, entry.get(1)).decode(), _bytes(data, entry.get(2)).decode()


def _span(value: Span | int) -> Span:
    """A field's place; ValueError for a number, which a well-formed file has not where a message is expected."""
    if isinstance(value, int):
        raise ValueError(f"the number {value} stands for a message")
    return value


def _bytes(data: bytes, span: Span | int | None) -> bytes:
    return data[span[0] : span[1]] if isinstance(span, tuple) else b""


def _fields(data: bytes, span: Span) -> Iterator[tuple[int, Span | int]]:
    """(number, value) of each field of a message: an int, or where it lies. Fixed-width numbers are skipped."""
    position, stop = span
    while position < stop:
        tag, position = read_varint(data, position)
        wire = tag & 7
        if wire == 0:
            value, position = read_varint(data, position)
            yield tag >> 3, value
        elif wire in (1, 5):
            position += 8 if wire == 1 else 4
        elif wire == 2:
            size, position = read_varint(data, position)
            if position + size > stop:
                raise ValueError("a field leaves its message")
            yield tag >> 3, (position, position + size)
            position += size
        else:
            raise ValueError(f"wire type {wire}")
