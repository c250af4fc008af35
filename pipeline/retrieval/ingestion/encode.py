"""The steps that turn merged edges into rows of the vocabularies, and check what is held out against train.

A held-out row whose user or item train does not have, or whose pair is in train too, is left out; in a given test file it is a bad row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.logs.columns import REJECTED_SCHEMA, Columns
from pipeline.logs.readers import SKIP_REMEDY
from pipeline.logs.sources import Chunk
from pipeline.retrieval.ingestion.files import Edges, Workspace
from pipeline.retrieval.ingestion.merge import merged, save_lowest
from pipeline.retrieval.ingestion.ranges import Layout, Rows
from pipeline.retrieval.ingestion.read import Reading
from pipeline.retrieval.ingestion.rejected import write_rejected
from pipeline.retrieval.ingestion.times import HELD_OUT, Cut, PartFacts, unseen_items

# Why a test row is rejected, by code; 0 is a good row.
_TEST_REASONS = ("", "the user is not in train", "the item is not in train", "the pair is in train too, it would leak")
# Those of ids that train lacks.
UNSEEN = (1, 2)


class EncodeFacts(TypedDict):
    """Test rows of a partition that are rejected, and that are left out because of a filter; `problem` is (file number, row, message) of
    the first rejected one with bad_rows="error"."""

    n_rejected: int
    n_left_out: int
    problem: tuple[int, int, str] | None


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
    save_lowest(work, partition, edges, low, (seed, n_items))
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
