"""The tasks of the ingest stage, as plain functions over files. `pipeline.retrieval.ingest` calls them in Ray tasks or in its process:

`read_part` -> (ids: `pipeline.retrieval.ingest_ids`) -> `cut_block` -> `merge_partition` -> `encode_partition` -> `split_partition` ->
`gather_items` -> `build_shard`

What each reads and writes is listed in `docs/formats.md` (Ingest folder). All edges of a user are in one partition, a range of users, so
merging duplicates, leaks into the test and a user's lowest hash need no other partition. The result does not depend on the number of
partitions: blocks are read in order, so equal pairs are added in log order.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from graphhash.errors import DataError
from graphhash.graph import _edge_kernels as kernels
from graphhash.graph.id_columns import IdCodes
from graphhash.graph.interactions import TEST, TRAIN, VALIDATION, seed_state
from graphhash.graph.vocabulary import Vocabulary
from pipeline.distributed.shards import ShardFacts, write_shard
from pipeline.logs.columns import REJECTED_SCHEMA, Batch, Columns
from pipeline.logs.readers import SKIP_REMEDY, read_chunk
from pipeline.logs.sources import Chunk
from pipeline.retrieval.ingest_files import Edges, Workspace, write_rejected
from pipeline.retrieval.ingest_ranges import Block, Layout, Ranges, Rows
from pipeline.retrieval.ingest_times import ALL_ROWS, HELD_OUT, Cut, PartFacts, TrainRows, unseen_items

MAX_WEIGHT = float(np.finfo(np.float32).max)
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
        chunks: of the whole log.
    """

    columns: Columns
    bad_rows: str
    filtered: bool = False
    chunks: tuple[Chunk, ...] = ()


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
    """Rows of a chunk, without the rejected ones; least and greatest integer of each side, (0, -1) where there is none."""

    n_rows: int
    n_rejected: int
    n_below: int
    ranges: dict[str, tuple[int, int]]


class EncodeFacts(TypedDict):
    """Test rows of a partition that are rejected, and that are left out because of a filter; `problem` is (file number, row, message) of
    the first rejected one with bad_rows="error"."""

    n_rejected: int
    n_left_out: int
    problem: tuple[int, int, str] | None


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


def cut_block(work: Workspace, layout: Layout, block: Block) -> None:
    """Number the ids of a block, and write its rows in order of partitions."""
    layout.cut(work, block)


def merge_partition(
    work: Workspace, layout: Layout, partition: int, train: TrainRows = ALL_ROWS, seed: int | None = None
) -> int:
    """Write the distinct edges of a partition in rows of the numbering, sorted. Returns their number.

    Args:
        train: which rows of the log to take.
        seed: where these rows are those of the vocabularies: of the edge hashes, whose lowest of each item are written.

    Raises:
        DataError: the merged weight of a pair exceeds float32, or ageing left it too small.
    """
    rows = train.of(layout.read(work, layout.blocks, partition))
    low, high = layout.ranges.bounds[partition : partition + 2].tolist()
    edges = merged(rows, low, high - low)
    if len(edges.weights) and edges.weights.max() > MAX_WEIGHT:
        raise DataError(
            f"the weights of one user-item pair add up to {edges.weights.max():g}, "
            f"float32 ends at {MAX_WEIGHT:g}; scale the weights down"
        )
    train.check(edges.weights)
    work.save_edges("edges", partition, edges)
    if seed is not None:
        _save_lowest(work, partition, edges, low, (seed, layout.items.n_ids))
    return len(edges.columns)


def merged(rows: Rows, low: int, n_rows: int) -> Edges:
    """Edges of rows of the log by user, ascending, each pair once; weights of equal pairs add up in float64, in log order.

    Args:
        low, n_rows: first user, and number of users.
    """
    indptr, columns, weights = kernels.group_rows(rows.users, rows.items, rows.weights, low, n_rows)
    weights = kernels.merge_rows(indptr, columns, weights)
    return Edges(indptr, columns[: indptr[-1]], weights)


def write_vocabulary(work: Workspace, side: str, kept: NDArray[np.bool_] | None) -> Vocabulary:
    """Write the vocabulary of a side, with its hash.

    Args:
        kept: ids of the numbering that are in train; None: all.
    """
    ids = work.read_ids(f"{side}s_all")
    vocabulary = Vocabulary(ids if kept is None else ids.filter(pa.array(kept)))
    vocabulary.save(work.vocabulary(side))
    vocabulary.content_hash  # noqa: B018  Computed here, where tasks run side by side.
    return vocabulary


def encode_partition(work: Workspace, layout: Layout, partition: int, seed: int, reading: Reading) -> EncodeFacts:
    """Turn the merged edges of a partition into vocabulary rows, and write the lowest edge hash of each item; then the given test edges.

    Args:
        seed: of the edge hashes.

    Returns: for test rows whose user or item train does not have, or whose pair is in train too.
    """
    edges, item_map = work.load_edges("edges", partition), work.load("item_map")
    kept = np.diff(edges.indptr) > 0
    indptr = np.concatenate([[0], edges.indptr[1:][kept]])
    edges = Edges(indptr, item_map[edges.columns], np.array(edges.weights))
    work.save_edges("edges", partition, edges)
    low, n_items = int(work.load("user_starts")[partition]), int(item_map.max(initial=-1)) + 1
    _save_lowest(work, partition, edges, low, (seed, n_items))
    if not layout.tests:
        return {"n_rejected": 0, "n_left_out": 0, "problem": None}
    return _encode_test(work, layout, partition, edges, reading)


def hold_out(work: Workspace, layout: Layout, partition: int, cut: Cut) -> dict[str, PartFacts]:
    """Write the edges of validation and test of a partition, and the items that train lacks. Returns the facts of both."""
    starts = work.load("user_starts")
    low, n_users = int(starts[partition]), int(starts[partition + 1] - starts[partition])
    user_map, item_map = work.load("user_map"), work.load("item_map")
    n_items = int(item_map.max(initial=-1)) + 1
    edges = work.load_edges("edges", partition)
    known = edges.rows * n_items + edges.columns
    log = layout.read(work, layout.blocks, partition)
    part_of = cut.parts(log)
    facts = {}
    for name, part in HELD_OUT.items():
        rows = log.only(part_of == part)
        users, items = user_map[rows.users], item_map[rows.items]
        is_unseen = (users < 0) | (items < 0)
        repeated = ~is_unseen & is_within((users.astype(np.int64) - low) * n_items + items, known)
        kept = ~is_unseen & ~repeated
        facts[name] = PartFacts(
            rows=len(users),
            rows_of_unseen=int(is_unseen.sum()),
            rows_repeated=int(repeated.sum()),
            unseen_users=len(np.unique(rows.users[users < 0])),
            unseen_items=0,
        )
        work.save(unseen_items(name, partition), np.unique(rows.items[items < 0]))
        of_part = merged(Rows(users[kept], items[kept], rows.only(kept).full_weights), low, n_users)
        work.save_edges(name, partition, of_part)
        known = np.sort(np.concatenate([known, of_part.rows * n_items + of_part.columns]))
    return facts


def split_partition(work: Workspace, partition: int, split: Split, items: Ranges) -> dict[str, int]:
    """Write the edges of each part of the split in vocabulary rows, by user; those of train also cut by ranges of items.

    Returns: edges of train, validation and test.
    """
    edges, low = work.load_edges("edges", partition), int(work.load("user_starts")[partition])
    parts = np.zeros(len(edges.columns), np.uint8)
    if split.validation or split.test:
        kernels.draw_parts(
            edges.indptr, edges.columns, low, seed_state(split.seed)[0], work.load("item_lowest"),
            float(split.validation), float(split.test), parts,
        )  # fmt: skip
    counts = {}
    for name, part in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        if name in split.given:
            counts[name] = len(work.load_edges(name, partition).columns)
            continue
        picked = Edges(*kernels.pick_edges(edges.indptr, edges.columns, edges.weights, parts, part))
        work.save_edges(name, partition, picked)
        counts[name] = len(picked.columns)
        if name == "train":
            _cut_by_item(work, partition, picked, low, items)
    return counts


def gather_items(work: Workspace, number: int, items: Ranges, n_partitions: int) -> None:
    """Write the edges of a range of items by item, users ascending."""
    parts: list[list[NDArray]] = [[], [], []]
    is_weighted = any(work.has(f"by_item-{partition:06d}.weights") for partition in range(n_partitions))
    for partition in range(n_partitions):
        name = f"by_item-{partition:06d}"
        start, stop = work.load(f"{name}.bounds")[number : number + 2].tolist()
        parts[0].append(work.load(f"{name}.items")[start:stop])
        parts[1].append(work.load(f"{name}.users")[start:stop])
        if is_weighted:
            has_weights = work.has(f"{name}.weights")
            parts[2].append(work.load(f"{name}.weights")[start:stop] if has_weights else np.ones(stop - start))
    weights = np.concatenate(parts[2]) if is_weighted else np.empty(0)
    low, high = items.bounds[number : number + 2].tolist()
    grouped = kernels.group_rows(np.concatenate(parts[0]), np.concatenate(parts[1]), weights, low, high - low)
    work.save_edges("train_by_item", number, Edges(*grouped))


def build_shard(work: Workspace, out: Path, name: str, shard: int, rows: tuple[int, int], n_cols: int) -> ShardFacts:
    """Gather rows [start, stop) of graph `name` from its pieces, and write them as one shard of `out / name`."""
    starts = work.load("item_starts" if name == "train_by_item" else "user_starts")
    counts: list[NDArray] = [np.zeros(1, np.int64)]
    columns: list[NDArray] = []
    weights: list[NDArray | int] = []
    for piece in range(len(starts) - 1):
        start, stop = (int(min(max(row - starts[piece], 0), starts[piece + 1] - starts[piece])) for row in rows)
        if start == stop:
            continue
        edges = work.load_edges(name, piece)
        low, high = edges.indptr[start], edges.indptr[stop]
        counts.append(np.diff(edges.indptr[start : stop + 1]))
        columns.append(edges.columns[low:high])
        weights.append(edges.weights[low:high] if len(edges.weights) else int(high - low))
    indptr = np.cumsum(np.concatenate(counts))
    joined = np.concatenate(columns) if columns else np.empty(0, np.int32)
    if all(isinstance(part, int) for part in weights):
        return write_shard(out / name, shard, indptr, joined, None, n_cols=n_cols)
    full = np.concatenate([np.ones(part) if isinstance(part, int) else part for part in weights])
    return write_shard(out / name, shard, indptr, joined, full, n_cols=n_cols)


def lowest_of_items(work: Workspace, n_partitions: int, n_items: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The lowest edge hash of each item over all partitions, and its number of edges, shape (n_items,) each."""
    lowest, counts = np.full(n_items, np.iinfo(np.uint64).max, np.uint64), np.zeros(n_items, np.int64)
    for partition in range(n_partitions):
        rows = work.load(f"lowest-{partition:06d}.items")
        # Rows are distinct within a partition, so a plain assignment is enough.
        lowest[rows] = np.minimum(lowest[rows], work.load(f"lowest-{partition:06d}.hashes"))
        counts[rows] += work.load(f"lowest-{partition:06d}.counts")
    return lowest, counts


def _save_lowest(work: Workspace, partition: int, edges: Edges, low: int, of: tuple[int, int]) -> None:
    """Write the items of a partition, the lowest hash and the number of edges of each.

    Args:
        low: row of the first user.
        of: seed, and number of items.
    """
    seed, n_items = of
    lowest, counts = kernels.lowest_of_columns(edges.indptr, edges.columns, low, seed_state(seed)[0], n_items)
    items = np.flatnonzero(counts)
    for name, values in (("items", items), ("hashes", lowest[items]), ("counts", counts[items])):
        work.save(f"lowest-{partition:06d}.{name}", values)


def _cut_by_item(work: Workspace, partition: int, edges: Edges, low: int, items: Ranges) -> None:
    """Write the edges of train of a partition in order of ranges of items; within one, in order of users."""
    users = edges.rows + low
    users = users.astype(np.int32 if low + len(edges.indptr) < 2**31 else np.int64)
    cut_items, cut_users, order, bounds = kernels.cut_by_range(
        edges.columns, users, items.part_of_cell, items.shift, len(items), bool(len(edges.weights))
    )
    name = f"by_item-{partition:06d}"
    for key, values in (("bounds", bounds), ("items", cut_items), ("users", cut_users)):
        work.save(f"{name}.{key}", values)
    if len(edges.weights):
        work.save(f"{name}.weights", edges.weights[order])


def _encode_test(work: Workspace, layout: Layout, partition: int, edges: Edges, reading: Reading) -> EncodeFacts:
    """Write the test edges of a partition.

    Args:
        edges: of train, in vocabulary rows.
    """
    starts = work.load("user_starts")
    low, n_users = int(starts[partition]), int(starts[partition + 1] - starts[partition])
    maps = {side: work.load(f"{side}_map") for side in ("user", "item")}
    n_items = int(maps["item"].max(initial=-1)) + 1
    train_keys = edges.rows * n_items + edges.columns
    kept: list[Rows] = []
    n_left_out, rejected, problems = 0, [], []
    for block in layout.tests:
        chunk = reading.chunks[block.chunk]
        rows = layout.read(work, [block], partition)
        users, items = maps["user"][rows.users].astype(np.int64), maps["item"][rows.items].astype(np.int64)
        reason = _test_reasons(users, items, is_within((users - low) * n_items + items, train_keys))
        left_out = np.isin(reason, UNSEEN) if reading.filtered else np.zeros(len(reason), bool)
        n_left_out += int(left_out.sum())
        bad = (reason > 0) & ~left_out
        if bad.any():
            rejected.append(_rejected_test_rows(work, rows.only(bad), reason[bad], chunk, reading.columns))
            worst = rejected[-1].sort_by("row").slice(0, 1).to_pylist()[0]
            message = f"{chunk.source.file}: row {worst['row']}: {worst['reason']} ({worst['raw']}); {SKIP_REMEDY}"
            problems.append((chunk.number, worst["row"], message))
        good = reason == 0
        kept.append(Rows(users[good], items[good], rows.only(good).full_weights))
    if problems and reading.bad_rows == "error":
        return {"n_rejected": 0, "n_left_out": 0, "problem": min(problems)}
    work.save_edges("test", partition, merged(joined(kept, layout), low, n_users))
    return {
        "n_rejected": write_rejected(work.rejected_test(partition), rejected),
        "n_left_out": n_left_out,
        "problem": None,
    }


def joined(rows: Sequence[Rows], layout: Layout) -> Rows:
    """Rows one behind the other, in the types of the layout."""
    users, items, weights = (
        np.concatenate([np.empty(0, dtype), *(getattr(part, name) for part in rows)], dtype=dtype, casting="unsafe")
        for name, dtype in (("users", layout.users.dtype), ("items", layout.items.dtype), ("weights", np.float64))
    )
    return Rows(users, items, weights)


def is_within(keys: NDArray[np.int64], ascending: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which keys are among others that ascend, shape (n,)."""
    if not len(ascending):
        return np.zeros(len(keys), bool)
    return ascending[np.minimum(np.searchsorted(ascending, keys), len(ascending) - 1)] == keys


def _test_reasons(users: NDArray[np.int64], items: NDArray[np.int64], leaks: NDArray[np.bool_]) -> NDArray[np.int8]:
    """Codes of _TEST_REASONS, shape (n,)."""
    reason = np.zeros(len(users), np.int8)
    # The first reason that holds is given.
    reason[leaks] = 3
    reason[items < 0] = 2
    reason[users < 0] = 1
    return reason


def _rejected_test_rows(
    work: Workspace, rows: Rows, reason: NDArray[np.int8], chunk: Chunk, columns: Columns
) -> pa.Table:
    raw = pc.binary_join_element_wise(
        *(
            pc.binary_join_element_wise(
                f"{name}=", work.read_ids(f"{side}s_all").take(pa.array(ids)).cast(pa.string()), ""
            )
            for name, side, ids in ((columns.user, "user", rows.users), (columns.item, "item", rows.items))
        ),
        ", ",
    )
    source = pa.array(np.full(len(raw), chunk.number, np.int32))
    reasons = pa.array(_TEST_REASONS).take(pa.array(reason))
    return pa.table([source, pa.array(rows.numbers), reasons, raw], schema=REJECTED_SCHEMA)


def _columns(batch: Batch) -> dict[str, Any]:
    """What a batch holds, by name: arrays, and Arrow arrays of strings."""
    users, items = (ids.to_numpy() if pa.types.is_int64(ids.type) else ids for ids in (batch.users, batch.items))
    found = {"user": users, "item": items, "weight": batch.weights, "time": batch.times, "row": batch.rows}
    return {name: values for name, values in found.items() if values is not None}


def other_columns(columns: Columns) -> tuple[str, ...]:
    """Columns besides users and items that are read and kept."""
    return (*(("weight",) if columns.weight else ()), *(("time",) if columns.time else ()))


def join_ranges(facts: Sequence[ReadFacts]) -> dict[str, tuple[int, int]]:
    """Least and greatest integer of each side in all chunks."""
    ranges = {"user": (0, -1), "item": (0, -1)}
    for each in facts:
        ranges = {side: _wider(found, each["ranges"][side]) for side, found in ranges.items()}
    return ranges


def _wider(first: tuple[int, int], second: tuple[int, int]) -> tuple[int, int]:
    """The range of both, where (0, -1) is none."""
    if first[1] < first[0]:
        return second
    if second[1] < second[0]:
        return first
    return min(first[0], second[0]), max(first[1], second[1])
