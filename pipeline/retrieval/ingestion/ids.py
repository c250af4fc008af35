"""Numbering of the ids of a log: all ids of a side in ascending order, those of held-out rows among them.

Integers within a narrow range are marked in a bitmap, whose ranks are their rows. Other ids have codes of their chunk; the distinct ids of
all chunks are put together, and a table per chunk turns its codes into rows. The vocabularies hold those ids that are in train.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from graphhash.graph.id_columns import IdCodes, IntegerRanks, order_ids
from graphhash.graph.vocabulary import Vocabulary
from pipeline.distributed.session import run_tasks
from pipeline.retrieval.ingestion.files import Workspace, read_column

SIDES = ("user", "item")
STEP_ROWS = 1_000_000


@dataclass(frozen=True)
class Numbering:
    """How ids of a side become rows.

    Args:
        n_ids: of the whole log.
        low: the least integer, where a bitmap ranks them; None: the chunks have codes and tables.
    """

    side: str
    n_ids: int
    low: int | None

    @property
    def dtype(self) -> type[np.signedinteger]:
        """int32 while every row fits."""
        return np.int32 if self.n_ids < 2**31 else np.int64

    def rows(self, work: Workspace, chunk: int, start: int, stop: int) -> NDArray[np.signedinteger]:
        """Rows of the ids in places [start, stop) of a chunk."""
        file = work.column(self.side, chunk)
        if self.low is None:
            return work.load(f"{self.side}_table-{chunk:06d}")[read_column(file, np.int32, start, stop)]
        ranks = IntegerRanks(self.low, work.load(f"{self.side}_ranks"))
        return ranks.ranks(read_column(file, np.int64, start, stop), self.dtype)


def number_ids(
    work: Workspace, kinds: dict[str, str], ranges: dict[str, tuple[int, int]], n_rows: Sequence[int], n_tasks: int
) -> dict[str, Numbering]:
    """Number the ids of both sides, and write `users_all.arrow` and `items_all.arrow`.

    Args:
        kinds: "int64" or "string" of each side.
        ranges: least and greatest integer.
        n_rows: of each chunk.
        n_tasks: that mark integers.
    """
    chunks = range(len(n_rows))
    marked = [side for side in SIDES if kinds[side] == "int64" and IntegerRanks.fits(*ranges[side], sum(n_rows))]
    coded = [side for side in SIDES if kinds[side] == "int64" and side not in marked]
    run_tasks(encode_integers, [(work, side, n) for side in coded for n in chunks], label="ids", threads=n_tasks)
    shares = [range(task, len(n_rows), n_tasks) for task in range(min(n_tasks, len(n_rows)))]
    marks = [(work, side, share, *ranges[side]) for side in marked for share in shares]
    run_tasks(mark_integers, marks, label="ids", threads=n_tasks)
    ranked = [(work, side, len(shares), *ranges[side]) for side in marked]
    joined = [(work, side, chunks, kinds[side]) for side in SIDES if side not in marked]
    n_ids = dict(zip(marked, run_tasks(rank_integers, ranked, label="ids", threads=n_tasks), strict=True))
    n_ids |= zip([each[1] for each in joined], run_tasks(join_codes, joined, label="ids", threads=n_tasks), strict=True)
    return {side: Numbering(side, n_ids[side], ranges[side][0] if side in marked else None) for side in SIDES}


def mark_integers(work: Workspace, side: str, chunks: Sequence[int], low: int, high: int) -> None:
    """Write a bitmap of the integers of some chunks; the first of them names it."""
    ranks = IntegerRanks.empty(low, high)
    for chunk in chunks:
        for values in _steps(work, side, chunk):
            ranks.mark(values)
    work.save(f"{side}_bits-{chunks[0]:06d}", ranks.words[:, 0])


def rank_integers(work: Workspace, side: str, n_bitmaps: int, low: int, high: int) -> int:
    """Put the bitmaps of a side together. Returns the number of its ids."""
    ranks = IntegerRanks.empty(low, high)
    for number in range(n_bitmaps):
        ranks.add(work.load(f"{side}_bits-{number:06d}"))
        work.array(f"{side}_bits-{number:06d}").unlink()
    ids = ranks.finish()
    work.save(f"{side}_ranks", ranks.words)
    work.write_ids(f"{side}s_all", pa.array(ids))
    return len(ids)


def encode_integers(work: Workspace, side: str, chunk: int) -> None:
    """Replace the integers of a chunk by codes, and write its distinct ones."""
    found = IdCodes("int64")
    codes = [found.encode(pa.array(values)) for values in _steps(work, side, chunk)]
    np.concatenate([np.empty(0, np.int32), *codes]).tofile(work.column(side, chunk))
    work.write_ids(f"{side}s-{chunk:06d}", found.ids)


def join_codes(work: Workspace, side: str, chunks: Sequence[int], kind: str) -> int:
    """Put the distinct ids of all chunks together, and write a table from the codes of each to rows. Returns the number of ids."""
    found = IdCodes(kind)
    codes = [found.encode(work.read_ids(f"{side}s-{chunk:06d}")) for chunk in chunks]
    ids = found.ids
    order = order_ids(ids)
    rows = np.empty(len(ids), np.int32 if len(ids) < 2**31 else np.int64)
    rows[order] = np.arange(len(ids))
    for chunk, codes_of_chunk in zip(chunks, codes, strict=True):
        work.save(f"{side}_table-{chunk:06d}", rows[codes_of_chunk])
    work.write_ids(f"{side}s_all", ids.take(pa.array(order)))
    return len(ids)


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


def _steps(work: Workspace, side: str, chunk: int) -> Iterator[NDArray[np.int64]]:
    """The integers of a chunk in parts of bounded size."""
    file = work.column(side, chunk)
    n_rows = file.stat().st_size // 8
    for start in range(0, n_rows, STEP_ROWS):
        yield read_column(file, np.int64, start, min(start + STEP_ROWS, n_rows))
