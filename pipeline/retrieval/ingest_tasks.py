"""Partitions: the bodies of ingest's tasks. Plain functions over files; `pipeline.retrieval.ingest` runs them on Ray in
this order.

    read     a chunk of the log            -> its rows, cut by user id into hash partitions
    part-<chunk>.arrow merge    one partition                 -> distinct edges in local codes, and the ids
    edges, users, items encode   one partition, vocabularies   -> rows of its ids, lowest edge hash of its
    items       user_rows, item_rows, lowest split    one partition, lowest hashes  -> sorted edges of each
    part of the split               train, train_by_item, ... build    a range of rows, all partitions -> one
    shard of a ShardedCsr

All edges of a user are in one partition, so merging, leaks into test and the lowest hash of a user are local
matters.
Files: Arrow IPC for ids, .npy for numbers. Results are small dicts. Nothing here depends on the number of
partitions but
the work itself: parts are read in chunk order, so equal pairs are added in log order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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

EDGE_ARRAYS = ("users", "items", "weights")
# Odd, so that its powers never vanish modulo 2^64.
_STRING_BASE = np.uint64(0x9E3779B97F4A7C15)


def read_part(
    work: Path, number: int, chunk: Chunk, columns: Columns, bad_rows: str, n_partitions: int
) -> dict[str, int]:
    """Write `part-<number>.arrow`, record batch i for partition i % n_partitions, and rejected rows."""
    is_test = chunk.source.is_test
    fields = [
        ("user", _id_type(columns.user_kind)),
        ("item", _id_type(columns.item_kind)),
        ("weight", pa.float64()),
    ]
    fields += [("row", pa.int64())] if is_test else []
    schema = pa.schema([field for field in fields if columns.weight or field[0] != "weight"])
    n_rows, rejected = 0, []
    with (
        pa.OSFile(str(work / f"part-{number:06d}.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        for batch in read_chunk(chunk, columns, bad_rows=bad_rows, number_rows=is_test):
            n_rows += len(batch.rows)
            rejected.append(batch.rejected)
            data = {"user": batch.users, "item": batch.items}
            data |= {} if batch.weights is None else {"weight": pa.array(batch.weights)}
            data |= {"row": pa.array(batch.rows)} if is_test else {}
            partition = user_partition(batch.users, n_partitions)
            order = np.argsort(partition, kind="stable")
            rows = pa.record_batch(data, schema=schema).take(pa.array(order))
            bounds = np.searchsorted(partition[order], np.arange(n_partitions + 1)).tolist()
            for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
                # A copy through take: a slice of a string column would be written with the whole column's
                # bytes.
                writer.write_batch(rows.slice(start, stop - start))
    return {"n_rows": n_rows, "n_rejected": _write_rejected(work / f"rejected-{number:06d}.arrow", rejected)}


def merge_partition(
    work: Path, partition: int, n_partitions: int, parts: list[int], max_weight: float
) -> dict[str, int]:
    """Write the distinct edges of a partition, in codes of its own ids, and these ids.

    Raises DataError when the merged weight of a pair passes `max_weight`.
    """
    table = _read_partition(work, parts, partition, n_partitions)
    if table is None:
        table = pa.table({"user": pa.array([], pa.int64()), "item": pa.array([], pa.int64())})
    codes = {}
    for side in ("user", "item"):
        encoded = as_ids(table[side]).dictionary_encode()
        codes[side] = encoded.indices.to_numpy()
        _write_ids(work / f"{side}s-{partition:06d}.arrow", encoded.dictionary)
    weights = table["weight"].to_numpy() if "weight" in table.column_names else np.ones(len(table))
    users, items, weights = merge_duplicates(codes["user"], codes["item"], weights)
    if len(weights) and weights.max() > max_weight:
        raise DataError(
            f"the weights of one user-item pair add up to {weights.max():g}, "
            f"float32 ends at {max_weight:g}; scale the weights down"
        )
    _save_edges(work, "edges", partition, users, items, weights)
    return {"n_edges": len(users)}


def encode_partition(
    work: Path,
    partition: int,
    n_partitions: int,
    seed: int,
    tests: list[tuple[int, Chunk]],
    columns: Columns,
    bad_rows: str,
) -> dict[str, Any]:
    """Write the rows of a partition's ids and the lowest edge hash of each of its items; then the given test
    edges.

    Args:
        tests: part number and chunk of the given test file; empty with split="random".

    Returns: n_rejected; and, with bad_rows="error", `problem`: (file number, row, message) of the first test
        row whose user or item is unknown to train or whose pair is in train too, or None.
    """
    rows, vocabularies = {}, {}
    for side in ("user", "item"):
        vocabularies[side] = Vocabulary.load(work / f"{side}s.parquet")
        rows[side] = vocabularies[side].rows(_read_ids(work / f"{side}s-{partition:06d}.arrow"))
        np.save(work / f"{side}_rows-{partition:06d}.npy", rows[side])
    users, items, _ = _load_edges(work, "edges", partition)
    hashes = edge_hash(rows["user"][users], rows["item"][items], seed=seed)
    np.save(work / f"lowest-{partition:06d}.npy", lowest_hash(items, hashes, len(rows["item"])))
    if not tests:
        return {"n_rejected": 0, "problem": None}

    n_items = len(vocabularies["item"])
    train_keys = rows["user"][users].astype(np.int64) * n_items + rows["item"][items]
    return _encode_test(work, partition, n_partitions, tests, vocabularies, train_keys, columns, bad_rows)


def split_partition(
    work: Path, partition: int, seed: int, validation: float, test: float, given_test: bool
) -> dict[str, int]:
    """Write the edges of each part of the split in row numbers, sorted by user (`train_by_item`: by item)."""
    users, items, weights = _load_edges(work, "edges", partition)
    user_rows, item_rows = (np.load(work / f"{side}_rows-{partition:06d}.npy") for side in ("user", "item"))
    item_lowest = np.load(work / "item_lowest.npy", mmap_mode="r")[item_rows]
    hashes = edge_hash(user_rows[users], item_rows[items], seed=seed)
    user_lowest = lowest_hash(users, hashes, len(user_rows))
    parts = split_parts(hashes, user_lowest[users], item_lowest[items], validation=validation, test=test)
    users, items = user_rows[users], item_rows[items]
    counts = {}
    for name, part in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        if name == "test" and given_test:
            counts[name] = _save_counts(work, name, partition, _load_edges(work, name, partition)[0])
            continue
        chosen = np.flatnonzero(parts == part)
        chosen = chosen[np.lexsort((items[chosen], users[chosen]))]
        _save_edges(work, name, partition, users[chosen], items[chosen], weights[chosen])
        counts[name] = _save_counts(work, name, partition, users[chosen])
        if name == "train":
            chosen = chosen[np.argsort(items[chosen], kind="stable")]
            _save_edges(work, "train_by_item", partition, items[chosen], users[chosen], weights[chosen])
            _save_counts(work, "train_by_item", partition, items[chosen])
    return counts


def build_shard(
    work: Path, out: Path, name: str, shard: int, start: int, stop: int, n_cols: int, n_partitions: int
) -> ShardFacts:
    """Gather rows [start, stop) of graph `name` from all partitions and write them as one shard."""
    columns: list[list[NDArray]] = [[], [], []]
    for partition in range(n_partitions):
        arrays = _load_edges(work, name, partition)
        low, high = np.searchsorted(arrays[0], [start, stop])
        for column, array in zip(columns, arrays, strict=True):
            column.append(array[low:high])
    rows, indices, weights = (np.concatenate(column) for column in columns)
    order = np.lexsort((indices, rows))
    indptr = np.zeros(stop - start + 1, np.int64)
    np.cumsum(np.bincount(rows - start, minlength=stop - start), out=indptr[1:])
    return write_shard(out / name, shard, indptr, indices[order], weights[order], n_cols=n_cols)


def count_rows(work: Path, name: str, n_rows: int, n_partitions: int) -> NDArray[np.int64]:
    """Edges of each row of graph `name`, shape (n_rows,)."""
    counts = np.zeros(n_rows, np.int64)
    for partition in range(n_partitions):
        rows, n_edges = np.load(work / f"{name}-{partition:06d}.counts.npy")
        counts[rows] += n_edges
    return counts


def unique_ids(work: Path, side: str, n_partitions: int) -> pa.Array:
    """The ids of all partitions; those of users are distinct, those of items are not."""
    return as_ids(pa.chunked_array([_read_ids(work / f"{side}s-{p:06d}.arrow") for p in range(n_partitions)]))


def lowest_of_items(work: Path, n_items: int, n_partitions: int) -> NDArray[np.uint64]:
    """The lowest edge hash of each item over all partitions, shape (n_items,)."""
    lowest = np.full(n_items, np.iinfo(np.uint64).max, np.uint64)
    for partition in range(n_partitions):
        rows = np.load(work / f"item_rows-{partition:06d}.npy")
        # Rows are distinct within a partition, so a plain assignment is enough.
        lowest[rows] = np.minimum(lowest[rows], np.load(work / f"lowest-{partition:06d}.npy"))
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
    work: Path,
    partition: int,
    n_partitions: int,
    tests: list[tuple[int, Chunk]],
    vocabularies: dict[str, Vocabulary],
    train_keys: NDArray[np.int64],
    columns: Columns,
    bad_rows: str,
) -> dict[str, Any]:
    kept: list[list[NDArray]] = [[np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0)]]
    rejected, problems = [], []
    for number, chunk in tests:
        table = _read_partition(work, [number], partition, n_partitions)
        if table is None:
            continue
        users, items = (
            vocabularies[side].rows(table[side], missing="fallback").astype(np.int64) for side in ("user", "item")
        )
        n_users, n_items = len(vocabularies["user"]), len(vocabularies["item"])
        # The first reason that holds is given.
        reason = np.zeros(len(users), np.int8)
        reason[np.isin(users * n_items + items, train_keys)] = 3
        reason[items == n_items] = 2
        reason[users == n_users] = 1
        bad = reason > 0
        if bad.any():
            reasons = pa.array(
                [
                    "",
                    "the user is not in train",
                    "the item is not in train",
                    "the pair is in train too, it would leak",
                ]
            )
            wrong = table.filter(pa.array(bad))
            raw = pc.binary_join_element_wise(
                *(
                    pc.binary_join_element_wise(f"{name}=", as_ids(wrong[side]).cast(pa.string()), "")
                    for name, side in ((columns.user, "user"), (columns.item, "item"))
                ),
                ", ",
            )
            bad_reasons = reasons.take(pa.array(reason[bad]))
            source = pa.array(np.full(len(raw), chunk.number, np.int32))
            arrays = [source, as_ids(wrong["row"]), bad_reasons, raw]
            rejected.append(pa.table(arrays, schema=REJECTED_SCHEMA))
            first = rejected[-1].sort_by("row").slice(0, 1).to_pylist()[0]
            message = f"{chunk.source.file}: row {first['row']}: {first['reason']} ({first['raw']}); {SKIP_REMEDY}"
            problems.append((chunk.number, first["row"], message))
        weights = table["weight"].to_numpy() if "weight" in table.column_names else np.ones(len(users))
        for column, values in zip(kept, (users, items, weights), strict=True):
            column.append(values[~bad])
    if problems and bad_rows == "error":
        return {"n_rejected": 0, "problem": min(problems)}
    _save_edges(work, "test", partition, *merge_duplicates(*(np.concatenate(column) for column in kept)))
    n_rejected = _write_rejected(work / f"rejected_test-{partition:06d}.arrow", rejected)
    return {"n_rejected": n_rejected, "problem": None}


def _read_partition(work: Path, parts: list[int], partition: int, n_partitions: int) -> pa.Table | None:
    batches = []
    for number in parts:
        reader = pa.ipc.open_file(pa.memory_map(str(work / f"part-{number:06d}.arrow")))
        batches += [reader.get_batch(i) for i in range(partition, reader.num_record_batches, n_partitions)]
    return pa.Table.from_batches(batches) if batches else None


def _write_rejected(file: Path, tables: list[pa.Table]) -> int:
    n_rejected = sum(table.num_rows for table in tables)
    if n_rejected:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, REJECTED_SCHEMA) as writer:
            for table in tables:
                writer.write_table(table)
    return n_rejected


def _write_ids(file: Path, ids: pa.Array) -> None:
    table = pa.table({"id": ids})
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _read_ids(file: Path) -> pa.Array:
    column = pa.ipc.open_file(pa.memory_map(str(file))).read_all()["id"]
    return as_ids(column)


def _save_edges(work: Path, name: str, partition: int, *arrays: NDArray) -> None:
    for key, array in zip(EDGE_ARRAYS, arrays, strict=True):
        np.save(work / f"{name}-{partition:06d}.{key}.npy", array)


def _save_counts(work: Path, name: str, partition: int, rows: NDArray[np.integer]) -> int:
    np.save(work / f"{name}-{partition:06d}.counts.npy", np.array(np.unique(rows, return_counts=True), np.int64))
    return len(rows)


def _load_edges(work: Path, name: str, partition: int) -> list[NDArray]:
    files = [work / f"{name}-{partition:06d}.{key}.npy" for key in EDGE_ARRAYS]
    # An empty array cannot be memory-mapped, and a tiny one need not be.
    return [np.load(file, mmap_mode="r" if file.stat().st_size > 4096 else None) for file in files]


def _id_type(kind: str) -> pa.DataType:
    return pa.int64() if kind == "int64" else pa.large_string()
