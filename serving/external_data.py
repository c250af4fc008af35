"""External data of an ONNX file: which other files the model would read its tensors from.

Reads the protobuf by hand, because serving needs no onnx package, and skips whatever leads to no tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

# message -> field number -> message, of all fields that lead to tensors; from onnx.proto, IR versions 3 to
# 13.
_ONNX_FIELDS = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "ExternalEntry"},
}
_MAX_DEPTH = 64
_KEY = b"location"
_CHUNK_BYTES = 8 * 2**20


def external_locations(model: Path) -> set[str]:
    """File names that an ONNX file reads its tensors from, wherever in the graph they are.

    Raises:
        ValueError: the file is empty, cut short or not protobuf.
    """
    if model.stat().st_size == 0:
        raise ValueError("it is empty")
    # The key stands there in clear; without it there is no external data, and nothing to walk.
    if not _holds_key(model):
        return set()
    # Read and not mapped: a mapped file that somebody cuts would end the process. With external data it is small.
    data = model.read_bytes()
    locations: set[str] = set()
    try:
        _walk(data, 0, len(data), "Model", locations, 0)
    except IndexError:
        raise ValueError("it is cut short") from None
    return locations


def _holds_key(model: Path) -> bool:
    """Whether a file holds the key of external locations, in a few MiB of memory."""
    end = b""
    with open(model, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            window = end + chunk
            if _KEY in window:
                return True
            end = window[1 - len(_KEY) :]
    return False


def _walk(data: bytes, start: int, stop: int, message: str, locations: set[str], depth: int) -> None:
    """Collect the external locations of one protobuf message that lies in data[start:stop]."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"nested deeper than {_MAX_DEPTH}")
    entry = {1: b"", 2: b""}
    for field, begin, end in _fields(data, start, stop):
        if message == "ExternalEntry" and field in entry:
            entry[field] = data[begin:end]
        elif field in _ONNX_FIELDS.get(message, {}):
            _walk(data, begin, end, _ONNX_FIELDS[message][field], locations, depth + 1)
    if entry[1] == b"location":
        locations.add(entry[2].decode("utf-8"))


def _fields(data: bytes, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, stop) of each length-delimited field; the others hold no tensors and are skipped."""
    position = start
    while position < stop:
        tag, position = read_varint(data, position)
        wire = tag & 7
        if wire == 0:
            _, position = read_varint(data, position)
        elif wire in (1, 5):
            position += 8 if wire == 1 else 4
        elif wire == 2:
            size, position = read_varint(data, position)
            if position + size > stop:
                raise ValueError("a field leaves its message")
            yield tag >> 3, position, position + size
            position += size
        else:
            raise ValueError(f"wire type {wire}")
    if position != stop:
        raise ValueError("a field leaves its message")


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """A number of protobuf's at a place, and the place behind it; ValueError where it does not end."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number of more than 10 bytes")
