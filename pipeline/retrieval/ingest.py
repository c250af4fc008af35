"""The ingest stage of retrieval: an interaction log -> vocabularies, and train, validation and test graphs in shards on disk.

Every heavy step is a function over files (`pipeline.retrieval.ingestion`). Ray tasks call it where Ray is running, as on a cluster, else
threads of this process: the steps are compiled loops and Arrow, which run side by side in one process, and memory is bounded by the sizes
of blocks and partitions whatever the log's. All edges of a user are in one partition, a range of users, so merging duplicates, leaks into
the test and a user's lowest hash need no other partition. The driver of the tasks holds the ids and numbers per id, never the edges. The
result depends on the data, the seed and the shares of the split alone: files, chunks, tasks and CPUs do not change a byte, and the number
of shards changes only where the graphs are cut.

The folder appears complete or not at all; `docs/formats.md` (Ingest folder) lists its files.

Split "random": all files of the log together; each user and each item keeps one edge in train, and of the other edges the shares
`test` and `validation` are drawn (`graphhash.graph.interactions`). Split "given": test is the test file, validation is drawn from the
train file in the same way, vocabularies are train's. A test row whose user or item train does not have, or whose pair is in train
too, is a bad row. Splits "temporal" and "leave-last-out": `pipeline.retrieval.ingestion.times`. On a cluster of several machines, log and
folder have to be on shared storage.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np

from graphhash.errors import DataError
from graphhash.graph.vocabulary import Vocabulary
from pipeline.distributed.session import run_tasks
from pipeline.distributed.shards import ShardedCsr, balanced_starts, finish
from pipeline.logs.kinds import open_sources
from pipeline.logs.sources import Chunk, Source, cut_chunks
from pipeline.retrieval.ingestion.core import items_of_train, keep_core
from pipeline.retrieval.ingestion.encode import encode_partition, hold_out
from pipeline.retrieval.ingestion.files import Workspace
from pipeline.retrieval.ingestion.filters import FilterFacts, describe_removed, has_core, is_filtered
from pipeline.retrieval.ingestion.graphs import Split, build_shard, gather_items, split_partition
from pipeline.retrieval.ingestion.ids import SIDES, number_ids, write_vocabulary
from pipeline.retrieval.ingestion.merge import cut_block, lowest_of_items, merge_partition
from pipeline.retrieval.ingestion.ranges import Layout, Ranges, cut_blocks, ranges_of_users
from pipeline.retrieval.ingestion.read import ReadFacts, Reading, join_ranges, other_columns, read_part
from pipeline.retrieval.ingestion.rejected import gather_rejected
from pipeline.retrieval.ingestion.times import (
    MICROSECONDS_PER_DAY,
    TimeFacts,
    TrainRows,
    describe_times,
    find_cut,
    newest_of_partition,
    part_facts,
    time_facts,
    with_newest,
)
from pipeline.storage.atomic import new_folder, write_json_atomic

if TYPE_CHECKING:
    from pipeline.config.run_config import DataConfig

logger = logging.getLogger(__name__)

# A task holds one block or partition in memory, about 50 bytes a row at its peak.
BLOCK_ROWS = 2_000_000
PARTITION_EDGES = 2_000_000
# More of them wait for memory and disk.
MAX_THREADS = 16


class IngestFacts(TypedDict):
    """What `ingest.json` holds: counts of distinct pairs per part, rejected rows, hashes of the vocabularies, and seconds; `removed` where
    a filter is set, `times` where they are read."""

    n_users: int
    n_items: int
    n_train: int
    n_validation: int
    n_test: int
    n_rejected: int
    users_hash: str
    items_hash: str
    seconds: float
    removed: NotRequired[FilterFacts]
    times: NotRequired[TimeFacts]


@dataclass(frozen=True)
class Log:
    """The log as it is read: its files, their chunks, and how."""

    sources: list[Source]
    chunks: list[Chunk]
    reading: Reading

    @property
    def train(self) -> list[int]:
        """Numbers of the chunks of train."""
        return [number for number, chunk in enumerate(self.chunks) if not chunk.source.is_test]


def ingest(config: DataConfig, out: Path | str, *, on_phase: Callable[[str], None] = lambda name: None) -> IngestFacts:
    """Read, check, split and store a log in the folder `out`, replacing what is there: by Ray tasks if Ray is running.

    Args:
        on_phase: called with the name of each phase that has ended: read, cut, merge, encode, build.

    Raises:
        DataError: one line naming file, row or column, value and remedy; `out` is then as it was before.
    """
    started = time.perf_counter()
    with new_folder(Path(out).absolute()) as partial:
        (partial / "work").mkdir()
        facts = _Ingestion(config, partial, Workspace(partial / "work"), on_phase).run()
        shutil.rmtree(partial / "work")
        facts["seconds"] = time.perf_counter() - started
        write_json_atomic(partial / "ingest.json", facts)
    return facts


class _Ingestion:
    """One ingestion: its settings, its folders, and what its steps hand on to each other.

    Args:
        out: folder of the result.
        work: intermediate files.
        on_phase: called as phases end.
    """

    def __init__(self, config: DataConfig, out: Path, work: Workspace, on_phase: Callable[[str], None]) -> None:
        self.config, self.out, self.work, self.on_phase = config, out, work, on_phase
        self.log = _open_log(config)
        self.threads = min(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, MAX_THREADS
        )
        self.removed: FilterFacts = {"rows_below": 0, "users": 0, "items": 0, "interactions": 0, "test_rows": 0}

    def run(self) -> IngestFacts:
        """All steps in their order."""
        config, work = self.config, self.work
        read = self._read()
        n_rejected = sum(facts["n_rejected"] for facts in read)
        self.on_phase("read")
        layout = self._lay_out(read)
        self.on_phase("cut")
        half_life = None if config.half_life is None else config.half_life * MICROSECONDS_PER_DAY
        train = TrainRows(find_cut(config, work, self.log.train), half_life)
        if half_life is not None:
            train = with_newest(train, self._each(newest_of_partition, layout, (work, layout), (train,), "times"))
        # Of all rows that are read, none is held out or left out: their numbering is the vocabularies'.
        is_whole = train.cut is None and not layout.tests and not has_core(config)
        self._each(merge_partition, layout, (work, layout), (train, config.seed if is_whole else None), "merge")
        self.on_phase("merge")
        self._keep_core(layout)
        vocabularies = self._number(layout, is_whole)
        if not is_whole:
            n_rejected += self._encode(layout)
        held_out = {}
        if train.cut is not None:
            held_out = part_facts(work, self._each(hold_out, layout, (work, layout), (train.cut,), "hold out"))
        self.on_phase("encode")
        graphs = self._build(layout, vocabularies)
        self.on_phase("build")
        for side in SIDES:
            work.vocabulary(side).rename(self.out / f"{side}s.parquet")
        if n_rejected:
            files, n_chunks = [source.file for source in self.log.sources], len(self.log.chunks)
            gather_rejected(self.out / "rejected.parquet", work, files, n_chunks, len(layout.ranges))
        facts: IngestFacts = {
            "n_users": len(vocabularies["user"]),
            "n_items": len(vocabularies["item"]),
            "n_train": graphs["train"].n_edges,
            "n_validation": graphs["validation"].n_edges,
            "n_test": graphs["test"].n_edges,
            "n_rejected": n_rejected,
            "users_hash": vocabularies["user"].content_hash,
            "items_hash": vocabularies["item"].content_hash,
            "seconds": 0.0,
        }
        if is_filtered(config):
            facts["removed"] = self.removed
            logger.info("filters: %s", describe_removed(self.removed))
        if self.log.reading.columns.time:
            facts["times"] = time_facts(self.log.reading.columns.time, train, held_out)
            for line in describe_times(facts["times"], config.split, config.half_life):
                logger.info(line)
        return facts

    def _tasks(self, function: Callable[..., Any], arguments: Sequence[tuple], label: str) -> list[Any]:
        return run_tasks(function, arguments, label=label, threads=self.threads)

    def _each(self, function: Callable[..., Any], layout: Layout, first: tuple, last: tuple, label: str) -> list[Any]:
        """Call a task for each partition, whose number is between the `first` and the `last` arguments."""
        return self._tasks(function, [(*first, p, *last) for p in range(len(layout.ranges))], label)

    def _read(self) -> list[ReadFacts]:
        """Read all chunks."""
        log, config = self.log, self.config
        reads = [(self.work, number, chunk, log.reading) for number, chunk in enumerate(log.chunks)]
        read = self._tasks(read_part, reads, "read")
        n_rejected = sum(facts["n_rejected"] for facts in read)
        self.removed["rows_below"] = sum(facts["n_below"] for facts in read)
        if not sum(read[number]["n_rows"] for number in log.train):
            if self.removed["rows_below"]:
                raise DataError(
                    f"{config.path}: no row of train has a rating from {config.positive_from:g} in column "
                    f"{log.reading.columns.rating!r}; lower positive_from (--positive-from)"
                )
            raise DataError(
                f"{config.path}: all {n_rejected} rows were rejected, nothing is left to train on; check columns"
            )
        return read

    def _lay_out(self, read: Sequence[ReadFacts]) -> Layout:
        """Number all ids, and cut all rows by ranges of users."""
        work, columns = self.work, self.log.reading.columns
        kinds = {"user": columns.user_kind, "item": columns.item_kind}
        n_rows = [facts["n_rows"] for facts in read]
        numberings = number_ids(work, kinds, join_ranges(read), n_rows, self.threads)
        blocks = cut_blocks(n_rows, BLOCK_ROWS)
        train = set(self.log.train)
        blocks, tests = [b for b in blocks if b.chunk in train], [b for b in blocks if b.chunk not in train]
        n_partitions = sum(n_rows) // PARTITION_EDGES + 1
        layout = Layout(
            numberings["user"],
            numberings["item"],
            ranges_of_users(work, numberings["user"], blocks, n_partitions),
            other_columns(columns),
            tuple(blocks),
            tuple(tests),
        )
        self._tasks(cut_block, [(work, layout, block) for block in (*blocks, *tests)], "cut")
        for chunk in range(len(n_rows)):
            for name in ("user", "item", *layout.columns):
                work.column(name, chunk).unlink()
        return layout

    def _keep_core(self, layout: Layout) -> None:
        """Remove users and items of train with too few interactions, and note how many."""
        config, removed = self.config, self.removed
        if not has_core(config):
            return
        least = (config.min_item_interactions, config.min_user_interactions)
        core = keep_core(self.work, len(layout.ranges), layout.items.n_ids, least, self.threads)
        if not core["n_kept"]:
            raise DataError(
                f"{config.path}: no users with {config.min_user_interactions} items and items with {config.min_item_interactions} "
                "users are left; lower min_user_interactions or min_item_interactions (--min-user-interactions, --min-item-interactions)"
            )
        removed["users"], removed["items"], removed["interactions"] = core["users"], core["items"], core["interactions"]

    def _number(self, layout: Layout, is_whole: bool) -> dict[str, Vocabulary]:
        """Make the vocabularies of train, and where they are not the numbering, maps from its rows to theirs, -1 for others."""
        work, n_partitions = self.work, len(layout.ranges)
        kept = {}
        if is_whole:
            work.save("user_starts", layout.ranges.bounds)
        else:
            counts = work.count_rows("edges", n_partitions)
            kept = {"user": counts > 0, "item": items_of_train(work, n_partitions, layout.items.n_ids)}
            before = np.concatenate([[0], np.cumsum(kept["user"])])
            work.save("user_starts", before[layout.ranges.bounds])
            for side, numbering in (("user", layout.users), ("item", layout.items)):
                rows = np.where(kept[side], np.cumsum(kept[side]) - 1, -1)
                work.save(f"{side}_map", rows.astype(numbering.dtype))
        found = self._tasks(write_vocabulary, [(work, side, kept.get(side)) for side in SIDES], "vocabularies")
        return dict(zip(SIDES, found, strict=True))

    def _encode(self, layout: Layout) -> int:
        """Turn rows of the numbering into vocabulary rows. Returns the number of rejected test rows."""
        last = (self.config.seed, self.log.reading)
        encoded = self._each(encode_partition, layout, (self.work, layout), last, "encode")
        problems = [facts["problem"] for facts in encoded if facts["problem"]]
        if problems:
            raise DataError(min(problems)[2])
        self.removed["test_rows"] = sum(facts["n_left_out"] for facts in encoded)
        return sum(facts["n_rejected"] for facts in encoded)

    def _build(self, layout: Layout, vocabularies: dict[str, Vocabulary]) -> dict[str, ShardedCsr]:
        """Split the edges; and the graphs, in shards of about as many edges each."""
        work, out, n_shards = self.work, self.out, self.config.shards
        n_users, n_items, n_partitions = len(vocabularies["user"]), len(vocabularies["item"]), len(layout.ranges)
        lowest, n_edges = lowest_of_items(work, n_partitions, n_items)
        work.save("item_lowest", lowest)
        items = Ranges.balanced(np.arange(n_items), n_edges, n_items, n_partitions)
        work.save("item_starts", items.bounds)
        self._each(split_partition, layout, (work,), (_split(self.config), items), "split")
        self._tasks(gather_items, [(work, n, items, n_partitions) for n in range(len(items))], "gather")
        builds, sizes = [], {}
        for name in ("train", "train_by_item", "validation", "test"):
            n_cols = n_users if name == "train_by_item" else n_items
            starts = balanced_starts(work.count_rows(name, n_partitions), n_shards).tolist()
            rows = list(itertools.pairwise(starts))
            builds += [(work, out, name, shard, rows[shard], n_cols) for shard in range(n_shards)]
            sizes[name] = n_cols
        facts = self._tasks(build_shard, builds, "build")
        return {
            name: finish(
                out / name, [f for build, f in zip(builds, facts, strict=True) if build[2] == name], n_cols=n_cols
            )
            for name, n_cols in sizes.items()
        }


def _split(config: DataConfig) -> Split:
    """How the merged edges are split: those of a split by time are of train."""
    if config.by_time:
        return Split(config.seed, 0.0, 0.0, ("validation", "test"))
    if config.split == "given":
        return Split(config.seed, config.validation, 0.0, ("test",))
    return Split(config.seed, config.validation, config.test)


def _open_log(config: DataConfig) -> Log:
    sources, columns = open_sources(config)
    # Tasks may run in another working directory.
    sources = [replace(source, file=str(Path(source.file).absolute())) for source in sources]
    chunks = cut_chunks(sources)
    return Log(sources, chunks, Reading(columns, config.bad_rows, is_filtered(config), tuple(chunks)))
