"""The ingest stage of retrieval: an interaction log -> vocabularies, and train, validation and test graphs in shards on disk.

Every heavy step is a function over files (`pipeline.retrieval.ingest_tasks`). Ray tasks call it where Ray is running, else this process
does. The driver of the tasks holds the ids and numbers per id, never the edges. The result depends on the data, the seed and the shares of
the split alone: files, chunks, tasks and CPUs do not change a byte, and the number of shards changes only where the graphs are cut.

The folder appears complete or not at all; `docs/formats.md` (Ingest folder) lists its files.

Split "random": all files of the log together; each user and each item keeps one edge in train, and of the other edges the shares
`test` and `validation` are drawn (`graphhash.graph.interactions`). Split "given": test is the test file, validation is drawn from the
train file in the same way, vocabularies are train's. A test row whose user or item train does not have, or whose pair is in train
too, is a bad row. Splits "temporal" and "leave-last-out": `pipeline.retrieval.ingest_times`. On a cluster of several machines, log and
folder have to be on shared storage.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from graphhash.errors import DataError
from graphhash.graph.vocabulary import Vocabulary
from pipeline.distributed.session import run_tasks
from pipeline.distributed.shards import ShardedCsr, balanced_starts, finish
from pipeline.logs.columns import REJECTED_SCHEMA
from pipeline.logs.kinds import open_sources
from pipeline.logs.sources import Chunk, Source, cut_chunks, estimated_rows, find_sources
from pipeline.retrieval import ingest_tasks as tasks
from pipeline.retrieval.ingest_core import keep_core
from pipeline.retrieval.ingest_files import Workspace, read_table
from pipeline.retrieval.ingest_tasks import Reading, Split
from pipeline.retrieval.ingest_times import (
    MICROSECONDS_PER_DAY,
    TimeFacts,
    TrainRows,
    describe_times,
    find_cut,
    hold_out,
    time_facts,
    with_newest,
)
from pipeline.storage.atomic import new_folder, write_json_atomic

if TYPE_CHECKING:
    from pipeline.config.run_config import DataConfig

logger = logging.getLogger(__name__)

# A task holds one partition in memory, about 100 bytes an edge at its peak.
PARTITION_EDGES = 4_000_000
# Of a log's files. Below, Ray takes longer to start than its tasks save.
MAX_BYTES_HERE = 64 * 2**20
MAX_WEIGHT = float(np.finfo(np.float32).max)
SIDES = ("user", "item")


class FilterFacts(TypedDict):
    """What the filters removed: rows of a low rating, users, items and pairs of train outside of the core, and rows of a given test file
    whose user or item train then lacks."""

    rows_below: int
    users: int
    items: int
    interactions: int
    test_rows: int


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

    @property
    def tests(self) -> list[tuple[int, Chunk]]:
        """Chunks of the given test file, with their numbers."""
        return [(number, chunk) for number, chunk in enumerate(self.chunks) if chunk.source.is_test]


def wants_ray(config: DataConfig) -> bool:
    """Whether a log is large enough to be read by Ray tasks."""
    sources = find_sources(str(config.path), config.format, config.split)
    return sum(Path(source.file).stat().st_size for source in sources) > MAX_BYTES_HERE


def ingest(config: DataConfig, out: Path | str) -> IngestFacts:
    """Read, check, split and store a log in the folder `out`, replacing what is there: by Ray tasks if Ray is running.

    Raises:
        DataError: one line naming file, row or column, value and remedy; `out` is then as it was before.
    """
    started = time.perf_counter()
    with new_folder(Path(out).absolute()) as partial:
        (partial / "work").mkdir()
        facts = _ingest(config, partial, partial / "work")
        shutil.rmtree(partial / "work")
        facts["seconds"] = time.perf_counter() - started
        write_json_atomic(partial / "ingest.json", facts)
    return facts


def _ingest(config: DataConfig, out: Path, folder: Path) -> IngestFacts:
    log = _open_log(config)
    work = Workspace(folder, max(config.shards, estimated_rows(log.chunks) // PARTITION_EDGES + 1))
    removed: FilterFacts = {"rows_below": 0, "users": 0, "items": 0, "interactions": 0, "test_rows": 0}
    n_rejected = _read(config, log, work, removed)
    half_life = None if config.half_life is None else config.half_life * MICROSECONDS_PER_DAY
    train = with_newest(TrainRows(find_cut(config, work, log.train), half_life), work, log.train)
    _merge(log, work, train)
    _keep_core(config, work, removed)
    vocabularies = _number(work)
    n_users, n_items = len(vocabularies["user"]), len(vocabularies["item"])
    n_rejected += _encode(config, log, work, n_items, removed)
    held_out = {} if train.cut is None else hold_out(work, log.train, train.cut)
    split = _split(config)
    run_tasks(tasks.split_partition, [(work, p, split) for p in range(work.n_partitions)], label="split")
    graphs = _build(out, work, n_users, n_items, config.shards)
    for side in SIDES:
        work.vocabulary(side).rename(out / f"{side}s.parquet")
    if n_rejected:
        _write_rejected(out / "rejected.parquet", work, log)
    facts: IngestFacts = {
        "n_users": n_users,
        "n_items": n_items,
        "n_train": graphs["train"].n_edges,
        "n_validation": graphs["validation"].n_edges,
        "n_test": graphs["test"].n_edges,
        "n_rejected": n_rejected,
        "users_hash": vocabularies["user"].content_hash,
        "items_hash": vocabularies["item"].content_hash,
        "seconds": 0.0,
    }
    if is_filtered(config):
        facts["removed"] = removed
        logger.info("filters: %s", describe_removed(removed))
    if log.reading.columns.time:
        facts["times"] = time_facts(log.reading.columns.time, train, held_out)
        for line in describe_times(facts["times"], config.split, config.half_life):
            logger.info(line)
    return facts


def _split(config: DataConfig) -> Split:
    """How the merged edges are split: those of a split by time are of train."""
    if config.by_time:
        return Split(config.seed, 0.0, 0.0, ("validation", "test"))
    if config.split == "given":
        return Split(config.seed, config.validation, 0.0, ("test",))
    return Split(config.seed, config.validation, config.test)


def is_filtered(config: DataConfig) -> bool:
    """Whether the settings leave good rows out."""
    return config.positive_from is not None or _has_core(config)


def describe_removed(removed: FilterFacts) -> str:
    """What the filters removed, as one line."""
    words = {
        "rows_below": "rows of a lower rating",
        "users": "users",
        "items": "items",
        "interactions": "interactions of too few others",
        "test_rows": "test rows of ids that train lacks",
    }
    counts = [f"{removed[key]:,} {text}" for key, text in words.items()]  # type: ignore[literal-required]
    return f"removed {', '.join(counts)}"


def _has_core(config: DataConfig) -> bool:
    return max(config.min_user_interactions, config.min_item_interactions) > 1


def _open_log(config: DataConfig) -> Log:
    sources, columns = open_sources(config)
    # Tasks may run in another working directory.
    sources = [replace(source, file=str(Path(source.file).absolute())) for source in sources]
    chunks = cut_chunks(sources)
    return Log(sources, chunks, Reading(columns, config.bad_rows, is_filtered(config)))


def _read(config: DataConfig, log: Log, work: Workspace, removed: FilterFacts) -> int:
    """Read all chunks. Returns the number of rejected rows."""
    reads = [(work, number, chunk, log.reading) for number, chunk in enumerate(log.chunks)]
    read = run_tasks(tasks.read_part, reads, label="read")
    n_rejected = sum(facts["n_rejected"] for facts in read)
    removed["rows_below"] = sum(facts["n_below"] for facts in read)
    if not sum(read[number]["n_rows"] for number in log.train):
        if removed["rows_below"]:
            raise DataError(
                f"{config.path}: no row of train has a rating from {config.positive_from:g} in column "
                f"{log.reading.columns.rating!r}; lower positive_from (--positive-from)"
            )
        raise DataError(
            f"{config.path}: all {n_rejected} rows were rejected, nothing is left to train on; check columns"
        )
    return n_rejected


def _merge(log: Log, work: Workspace, train: TrainRows) -> None:
    """Merge the duplicates of train."""
    merge = [(work, p, log.train, MAX_WEIGHT, train) for p in range(work.n_partitions)]
    run_tasks(tasks.merge_partition, merge, label="merge")
    # A split by time takes validation and test from the same rows.
    for number in log.train if train.cut is None else ():
        work.part(number).unlink()


def _keep_core(config: DataConfig, work: Workspace, removed: FilterFacts) -> None:
    """Remove users and items of train with too few interactions, and note how many."""
    if not _has_core(config):
        return
    core = keep_core(work, config.min_item_interactions, config.min_user_interactions)
    if not core["n_kept"]:
        raise DataError(
            f"{config.path}: no users with {config.min_user_interactions} items and items with {config.min_item_interactions} users are "
            "left; lower min_user_interactions or min_item_interactions (--min-user-interactions, --min-item-interactions)"
        )
    removed["users"], removed["items"], removed["interactions"] = core["users"], core["items"], core["interactions"]


def _number(work: Workspace) -> dict[str, Vocabulary]:
    """Make the vocabularies of train."""
    vocabularies = {}
    for side in SIDES:
        vocabularies[side] = Vocabulary.from_ids(tasks.unique_ids(work, side))
        vocabularies[side].save(work.vocabulary(side))
    return vocabularies


def _encode(config: DataConfig, log: Log, work: Workspace, n_items: int, removed: FilterFacts) -> int:
    """Turn ids into vocabulary rows. Returns the number of rejected test rows."""
    encode = [(work, p, config.seed, log.tests, log.reading) for p in range(work.n_partitions)]
    encoded = run_tasks(tasks.encode_partition, encode, label="encode")
    problems = [facts["problem"] for facts in encoded if facts["problem"]]
    if problems:
        raise DataError(min(problems)[2])
    removed["test_rows"] = sum(facts["n_left_out"] for facts in encoded)
    np.save(work.item_lowest, tasks.lowest_of_items(work, n_items))
    return sum(facts["n_rejected"] for facts in encoded)


def _build(out: Path, work: Workspace, n_users: int, n_items: int, n_shards: int) -> dict[str, ShardedCsr]:
    """The graphs, in shards of about as many edges each."""
    builds, sizes = [], {}
    for name in ("train", "train_by_item", "validation", "test"):
        n_rows, n_cols = (n_items, n_users) if name == "train_by_item" else (n_users, n_items)
        starts = balanced_starts(work.count_rows(name, n_rows), n_shards).tolist()
        builds += [(work, out, name, shard, starts[shard], starts[shard + 1], n_cols) for shard in range(n_shards)]
        sizes[name] = n_cols
    facts = run_tasks(tasks.build_shard, builds, label="build")
    return {
        name: finish(out / name, [f for build, f in zip(builds, facts, strict=True) if build[2] == name], n_cols=n_cols)
        for name, n_cols in sizes.items()
    }


def _write_rejected(file: Path, work: Workspace, log: Log) -> None:
    """Rejected rows in reading order; test rows that do not fit train come last, in the same order."""
    schema = REJECTED_SCHEMA.remove(0).insert(0, pa.field("file", pa.string()))
    names = pa.array([source.file for source in log.sources])

    def named(table: pa.Table) -> pa.Table:
        return table.set_column(0, "file", pc.take(names, table["source"])).cast(schema)

    while_reading = _tables([work.rejected(number) for number in range(len(log.chunks))])
    test_rows = _tables([work.rejected_test(partition) for partition in range(work.n_partitions)])
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for table in while_reading:
            writer.write_table(named(table))
        if test_rows:
            order = [("source", "ascending"), ("row", "ascending"), ("raw", "ascending")]
            writer.write_table(named(pa.concat_tables(test_rows).sort_by(order)))


def _tables(files: Sequence[Path]) -> list[pa.Table]:
    return [read_table(file) for file in files if file.exists()]
