"""The step that reads the log: a chunk of it becomes columns on disk, and its bad rows are set apart."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa

from graphhash.graph.id_columns import IdCodes
from pipeline.logs.columns import Batch, Columns
from pipeline.logs.readers import read_chunk
from pipeline.logs.sources import Chunk
from pipeline.retrieval.ingestion.files import Workspace
from pipeline.retrieval.ingestion.rejected import write_rejected


@dataclass(frozen=True)
class Reading:
    """How the log is read.

    Args:
        columns: with the kinds of ids.
        bad_rows: "error" or "skip".
        filtered: train lacks ids because of a filter. A test row with such an id is left out, and is no bad row.
        chunks: of the whole log.
    """

    columns: Columns
    bad_rows: str
    filtered: bool = False
    chunks: tuple[Chunk, ...] = ()


class ReadFacts(TypedDict):
    """Rows of a chunk, without the rejected ones; least and greatest integer of each side, (0, -1) where there is none."""

    n_rows: int
    n_rejected: int
    n_below: int
    ranges: dict[str, tuple[int, int]]


def read_part(work: Workspace, number: int, chunk: Chunk, reading: Reading) -> ReadFacts:
    """Write the columns of a chunk, and its rejected rows. Strings are written as codes of the chunk, with its distinct ones.

    Args:
        number: of the chunk, in reading order.
    """
    is_test, columns = chunk.source.is_test, reading.columns
    kinds = {"user": columns.user_kind, "item": columns.item_kind}
    codes = {side: IdCodes("string") for side, kind in kinds.items() if kind == "string"}
    n_rows, n_below, rejected, times = 0, 0, [], [np.empty(0, np.int64)]
    ranges = dict.fromkeys(kinds, (0, -1))
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(open(work.column(name, number), "wb"))
            for name in ("user", "item", *other_columns(columns), *(("row",) if is_test else ()))
        }
        for batch in read_chunk(chunk, columns, bad_rows=reading.bad_rows, number_rows=is_test):
            n_below += batch.n_below
            rejected.append(batch.rejected)
            if not len(batch.rows):
                continue
            n_rows += len(batch.rows)
            for name, values in _columns(batch).items():
                if name in codes:
                    values = codes[name].encode(values)
                elif name in kinds:
                    ranges[name] = _wider(ranges[name], (int(values.min()), int(values.max())))
                if name in files:
                    values.tofile(files[name])
            if batch.times is not None:
                times.append(batch.times)
    for side, found in codes.items():
        work.write_ids(f"{side}s-{number:06d}", found.ids)
    if columns.time:
        np.save(work.times(number), np.sort(np.concatenate(times)))
    return {
        "n_rows": n_rows,
        "n_rejected": write_rejected(work.rejected(number), rejected),
        "n_below": n_below,
        "ranges": ranges,
    }


def join_ranges(facts: Sequence[ReadFacts]) -> dict[str, tuple[int, int]]:
    """Least and greatest integer of each side in all chunks."""
    ranges = {"user": (0, -1), "item": (0, -1)}
    for each in facts:
        ranges = {side: _wider(found, each["ranges"][side]) for side, found in ranges.items()}
    return ranges


def other_columns(columns: Columns) -> tuple[str, ...]:
    """Columns besides users and items that are read and kept."""
    return (*(("weight",) if columns.weight else ()), *(("time",) if columns.time else ()))


def _columns(batch: Batch) -> dict[str, Any]:
    """What a batch holds, by name: arrays, and Arrow arrays of strings."""
    users, items = (ids.to_numpy() if pa.types.is_int64(ids.type) else ids for ids in (batch.users, batch.items))
    found = {"user": users, "item": items, "weight": batch.weights, "time": batch.times, "row": batch.rows}
    return {name: values for name, values in found.items() if values is not None}


def _wider(first: tuple[int, int], second: tuple[int, int]) -> tuple[int, int]:
    """The range of both, where (0, -1) is none."""
    if first[1] < first[0]:
        return second
    if second[1] < second[0]:
        return first
    return min(first[0], second[0]), max(first[1], second[1])
