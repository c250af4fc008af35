"""The tasks of the ingest stage, as plain functions over files. `pipeline.retrieval.ingest` calls them in Ray tasks or in its process:

`read_part` -> `merge_partition` -> `encode_partition` -> `split_partition` -> `build_shard`

What each reads and writes is listed in `docs/formats.md` (Ingest folder). All edges of a user are in one hash partition, so merging
duplicates, leaks into the test and a user's lowest hash need no other partition. The result does not depend on the number of
partitions: parts are read in chunk order, so equal pairs are added in log order.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from graphhash.errors import DataError
from graphhash.graph.interactions import (
    TEST,
    TRAIN,
    VALIDATION,
    edge_hash,
    lowest_hash,
    merge_duplicates,
    split_parts,
)
from graphhash.graph.vocabulary import Vocabulary, as_ids, string_bytes
from pipeline.distributed.shards import ShardFacts, write_shard
from pipeline.logs.columns import REJECTED_SCHEMA, Columns
from pipeline.logs.readers import SKIP_REMEDY, read_chunk
from pipeline.logs.sources import Chunk
from pipeline.retrieval.ingest_files import Workspace, write_rejected
from pipeline.retrieval.ingest_times import ALL_ROWS, TrainRows

# Odd, so that its powers never vanish modulo 2^64.
_STRING_BASE = np.uint64(0x9E3779B97F4A7C15)
# Why a test row is rejected, by code; 0 is a good row.
_TEST_REASONS = ("", "the user is not in train", "the item is not in train", "the pair is in train too, it would leak")
# Those of ids that train lacks.
UNSEEN = (1, 2)


@dataclass(frozen=True)
class Reading:
    """How the log is read.

    Args:
        columns: with the kinds of ids.
        bad_rows: "error" or "skip".
        filtered: train lacks ids because of a filter. A test row with such an id is left out, and is no bad row.
    """

    columns: Columns
    bad_rows: str
    filtered: bool = False


@dataclass(frozen=True)
class Split:
    """How edges are split.

    Args:
        validation, test: shares of the edges.
        given: the parts that are there already: those of a split by time, and a test file.
    """

    seed: int
    validation: float
    test: float
    given: tuple[str, ...] = ()


class ReadFacts(TypedDict):
    """Rows of a chunk, without the rejected ones."""

    n_rows: int
    n_rejected: int
    n_below: int


class EncodeFacts(TypedDict):
    """Test rows of a partition that are rejected, and that are left out because of a filter; `problem` is (file number, row, message) of
    the first rejected one with bad_rows="error"."""

    n_rejected: int
    n_left_out: int
    problem: tuple[int, int, str] | None


def read_part(work: Workspace, number: int, chunk: Chunk, reading: Reading) -> ReadFacts:
    """Write the rows of a chunk, cut by hash of the user id into partitions, and its rejected rows.

    Args:
        number: of the chunk, in reading order.
    """
    is_test, columns = chunk.source.is_test, reading.columns
    schema = _part_schema(columns, with_rows=is_test)
    n_rows, n_below, rejected, times = 0, 0, [], [np.empty(0, np.int64)]
    with (
        pa.OSFile(str(work.part(number)), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        for batch in read_chunk(chunk, columns, bad_rows=reading.bad_rows, number_rows=is_test):
            n_rows += len(batch.rows)
            n_below += batch.n_below
            rejected.append(batch.rejected)
            data = {"user": batch.users, "item": batch.items}
            data |= {} if batch.weights is None else {"weight": pa.array(batch.weights)}
            data |= {"row": pa.array(batch.rows)} if is_test else {}
            if batch.times is not None:
                data["time"] = pa.array(batch.times)
                times.append(batch.times)
            partition = user_partition(batch.users, work.n_partitions)
            order = np.argsort(partition, kind="stable")
            rows = pa.record_batch(data, schema=schema).take(pa.array(order))
            bounds = np.searchsorted(partition[order], np.arange(work.n_partitions + 1)).tolist()
            for start, stop in itertools.pairwise(bounds):
                # `take` copies: a slice of a string column alone would be written with the whole column's bytes.
                writer.write_batch(rows.slice(start, stop - start))
    if columns.time:
        np.save(work.times(number), np.sort(np.concatenate(times)))
    return {
        "n_rows": n_rows,
        "n_rejected": write_rejected(work.rejected(number), rejected),
        "n_below": n_below,
    }


def merge_partition(
    work: Workspace, partition: int, parts: Sequence[int], max_weight: float, train: TrainRows = ALL_ROWS
) -> int:
    """Write the distinct edges of a partition, in codes of its own ids, and these ids. Returns the number of edges.

    Args:
        parts: numbers of the chunks of train.
        train: which of their rows to take.

    Raises:
        DataError: the merged weight of a pair exceeds `max_weight`, or ageing left it too small.
    """
    table = work.read_partition(parts, partition)
    nothing = {"user": pa.array([], pa.int64()), "item": pa.array([], pa.int64())}
    table = pa.table(nothing) if table is None else train.of(table)
    codes = {}
    for side in ("user", "item"):
        encoded = as_ids(table[side]).dictionary_encode()
        codes[side] = encoded.indices.to_numpy()
        work.write_ids(side, partition, encoded.dictionary)
    users, items, weights = merge_duplicates(codes["user"], codes["item"], _weights(table))
    if len(weights) and weights.max() > max_weight:
        raise DataError(
            f"the weights of one user-item pair add up to {weights.max():g}, "
            f"float32 ends at {max_weight:g}; scale the weights down"
        )
    train.check(weights)
    work.save_edges("edges", partition, users, items, weights)
    return len(users)


def encode_partition(
    work: Workspace, partition: int, seed: int, tests: Sequence[tuple[int, Chunk]], reading: Reading
) -> EncodeFacts:
    """Write the vocabulary rows of a partition's ids and the lowest edge hash of each of its items; then the given test edges.

    Args:
        seed: of the edge hashes.
        tests: number and chunk of the given test file; empty with split="random".

    Returns: for test rows whose user or item train does not have, or whose pair is in train too.
    """
    rows, vocabularies = {}, {}
    for side in ("user", "item"):
        vocabularies[side] = Vocabulary.load(work.vocabulary(side))
        rows[side] = vocabularies[side].rows(work.read_ids(side, partition))
        work.save_rows(side, partition, rows[side])
    users, items, _ = work.load_edges("edges", partition)
    hashes = edge_hash(rows["user"][users], rows["item"][items], seed=seed)
    work.save_lowest(partition, lowest_hash(items, hashes, len(rows["item"])))
    if not tests:
        return {"n_rejected": 0, "n_left_out": 0, "problem": None}
    train_keys = rows["user"][users].astype(np.int64) * len(vocabularies["item"]) + rows["item"][items]
    return _encode_test(work, partition, tests, vocabularies, train_keys, reading)


def split_partition(work: Workspace, partition: int, split: Split) -> dict[str, int]:
    """Write the edges of each part of the split in vocabulary rows, sorted by user (`train_by_item`: by item).

    Returns: edges of train, validation and test.
    """
    users, items, weights = work.load_edges("edges", partition)
    user_rows, item_rows = (work.load_rows(side, partition) for side in ("user", "item"))
    item_lowest = np.load(work.item_lowest, mmap_mode="r")[item_rows]
    hashes = edge_hash(user_rows[users], item_rows[items], seed=split.seed)
    user_lowest = lowest_hash(users, hashes, len(user_rows))
    shares = {"validation": split.validation, "test": split.test}
    parts = split_parts(hashes, user_lowest[users], item_lowest[items], **shares)
    users, items = user_rows[users], item_rows[items]
    counts = {}
    for name, part in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        if name in split.given:
            counts[name] = work.save_counts(name, partition, work.load_edges(name, partition)[0])
            continue
        chosen = np.flatnonzero(parts == part)
        chosen = chosen[np.lexsort((items[chosen], users[chosen]))]
        work.save_edges(name, partition, users[chosen], items[chosen], weights[chosen])
        counts[name] = work.save_counts(name, partition, users[chosen])
        if name == "train":
            chosen = chosen[np.argsort(items[chosen], kind="stable")]
            work.save_edges("train_by_item", partition, items[chosen], users[chosen], weights[chosen])
            work.save_counts("train_by_item", partition, items[chosen])
    return counts


def build_shard(work: Workspace, out: Path, name: str, shard: int, start: int, stop: int, n_cols: int) -> ShardFacts:
    """Gather rows [start, stop) of graph `name` from all partitions and write them as one shard of `out / name`."""
    columns: list[list[NDArray]] = [[], [], []]
    for partition in range(work.n_partitions):
        arrays = work.load_edges(name, partition)
        low, high = np.searchsorted(arrays[0], [start, stop])
        for column, array in zip(columns, arrays, strict=True):
            column.append(array[low:high])
    rows, indices, weights = (np.concatenate(column) for column in columns)
    order = np.lexsort((indices, rows))
    indptr = np.zeros(stop - start + 1, np.int64)
    np.cumsum(np.bincount(rows - start, minlength=stop - start), out=indptr[1:])
    return write_shard(out / name, shard, indptr, indices[order], weights[order], n_cols=n_cols)


def unique_ids(work: Workspace, side: str) -> pa.Array:
    """The ids of all partitions; those of users are distinct, those of items are not."""
    return as_ids(pa.chunked_array([work.read_ids(side, partition) for partition in range(work.n_partitions)]))


def lowest_of_items(work: Workspace, n_items: int) -> NDArray[np.uint64]:
    """The lowest edge hash of each item over all partitions, shape (n_items,)."""
    lowest = np.full(n_items, np.iinfo(np.uint64).max, np.uint64)
    for partition in range(work.n_partitions):
        rows = work.load_rows("item", partition)
        # Rows are distinct within a partition, so a plain assignment is enough.
        lowest[rows] = np.minimum(lowest[rows], work.load_lowest(partition))
    return lowest


def user_partition(users: pa.Array, n_partitions: int) -> NDArray[np.int32]:
    """The hash partition of raw user ids, shape (n,), in 0..n_partitions-1."""
    if pa.types.is_int64(users.type):
        numbers = users.to_numpy().astype(np.uint64)
    else:
        offsets, text = string_bytes(users)
        first, last = int(offsets[0]), int(offsets[-1])
        # sum of byte * base^place over the string, from running sums: all modulo 2^64.
        powers = np.cumprod(np.full(last - first, _STRING_BASE))
        sums = np.concatenate([[np.uint64(0)], np.cumsum((text[first:last].astype(np.uint64) + np.uint64(1)) * powers)])
        starts, stops = offsets[:-1] - first, offsets[1:] - first
        inverse = np.uint64(pow(int(_STRING_BASE), -1, 2**64))
        back = np.concatenate([[np.uint64(1)], np.cumprod(np.full(last - first, inverse))])
        numbers = (sums[stops] - sums[starts]) * back[starts]
    none = np.zeros(len(numbers), np.int64)
    return (edge_hash(numbers, none, seed=0) % np.uint64(n_partitions)).astype(np.int32)


def _encode_test(
    work: Workspace,
    partition: int,
    tests: Sequence[tuple[int, Chunk]],
    vocabularies: Mapping[str, Vocabulary],
    train_keys: NDArray[np.int64],
    reading: Reading,
) -> EncodeFacts:
    """Write the test edges of a partition.

    Args:
        train_keys: user row * n_items + item row of each training edge.
    """
    kept: list[list[NDArray]] = [[np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0)]]
    n_left_out, rejected, problems = 0, [], []
    for number, chunk in tests:
        table = work.read_partition([number], partition)
        if table is None:
            continue
        users, items = (
            vocabularies[side].rows(table[side], missing="fallback").astype(np.int64) for side in ("user", "item")
        )
        reason = _test_reasons(users, items, vocabularies, train_keys)
        left_out = np.isin(reason, UNSEEN) if reading.filtered else np.zeros(len(reason), bool)
        n_left_out += int(left_out.sum())
        bad = (reason > 0) & ~left_out
        if bad.any():
            rejected.append(_rejected_test_rows(table.filter(pa.array(bad)), reason[bad], chunk, reading.columns))
            worst = rejected[-1].sort_by("row").slice(0, 1).to_pylist()[0]
            message = f"{chunk.source.file}: row {worst['row']}: {worst['reason']} ({worst['raw']}); {SKIP_REMEDY}"
            problems.append((chunk.number, worst["row"], message))
        for column, values in zip(kept, (users, items, _weights(table)), strict=True):
            column.append(values[reason == 0])
    if problems and reading.bad_rows == "error":
        return {"n_rejected": 0, "n_left_out": 0, "problem": min(problems)}
    work.save_edges("test", partition, *merge_duplicates(*(np.concatenate(column) for column in kept)))
    return {
        "n_rejected": write_rejected(work.rejected_test(partition), rejected),
        "n_left_out": n_left_out,
        "problem": None,
    }


def _test_reasons(
    users: NDArray[np.int64],
    items: NDArray[np.int64],
    vocabularies: Mapping[str, Vocabulary],
    train_keys: NDArray[np.int64],
) -> NDArray[np.int8]:
    """Codes of _TEST_REASONS, shape (n,)."""
    n_users, n_items = len(vocabularies["user"]), len(vocabularies["item"])
    reason = np.zeros(len(users), np.int8)
    # The first reason that holds is given.
    reason[np.isin(users * n_items + items, train_keys)] = 3
    reason[items == n_items] = 2
    reason[users == n_users] = 1
    return reason


def _rejected_test_rows(rows: pa.Table, reason: NDArray[np.int8], chunk: Chunk, columns: Columns) -> pa.Table:
    raw = pc.binary_join_element_wise(
        *(
            pc.binary_join_element_wise(f"{name}=", as_ids(rows[side]).cast(pa.string()), "")
            for name, side in ((columns.user, "user"), (columns.item, "item"))
        ),
        ", ",
    )
    source = pa.array(np.full(len(raw), chunk.number, np.int32))
    reasons = pa.array(_TEST_REASONS).take(pa.array(reason))
    return pa.table([source, as_ids(rows["row"]), reasons, raw], schema=REJECTED_SCHEMA)


def _part_schema(columns: Columns, *, with_rows: bool) -> pa.Schema:
    kinds = {"int64": pa.int64(), "string": pa.large_string()}
    fields = [("user", kinds[columns.user_kind]), ("item", kinds[columns.item_kind])]
    fields += [("weight", pa.float64())] if columns.weight else []
    fields += [("row", pa.int64())] if with_rows else []
    return pa.schema(fields + ([("time", pa.int64())] if columns.time else []))


def _weights(table: pa.Table) -> NDArray[np.float64]:
    return table["weight"].to_numpy() if "weight" in table.column_names else np.ones(len(table))
