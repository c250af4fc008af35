"""Ingest: an interaction log -> vocabularies, and train, validation and test graphs in shards on disk.

Every heavy step is a Ray task over files (`pipeline.retrieval.ingest_tasks`); the driver holds the ids and numbers per
id, never the edges. The result depends on the data, the seed and the shares of the split alone: the same
bytes come out for any number of files, chunks, tasks and CPUs, and, the cut of the shards apart, for any
number of shards.

The folder, which appears complete or not at all:

    users.parquet, items.parquet    Vocabulary, row order = ascending raw id
    train/  validation/  test/      ShardedCsr, users x items
    train_by_item/                  ShardedCsr, items x users: the transpose of train
    rejected.parquet                file, row, reason, raw: only where bad_rows="skip" met any
    ingest.json                     the returned dict

Split "random": all files of the log together; each user and each item keeps one edge in train, and of the
other edges the shares `test` and `validation` are drawn (`graphhash.graph.interactions`). Split "given": test is
the test file, validation is drawn from the train file in the same way, vocabularies are train's. A test row
whose user or item train does not know, or whose pair is in train too, is a bad row. On a cluster of several
machines, log and folder have to be on shared storage.
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from graphhash.errors import DataError
from graphhash.graph.vocabulary import Vocabulary
from pipeline.distributed.session import run_tasks
from pipeline.distributed.shards import ShardedCsr, balanced_starts, finish
from pipeline.logs.columns import REJECTED_SCHEMA, Columns
from pipeline.logs.kinds import find_kinds
from pipeline.logs.sources import Chunk, Source, cut_chunks, estimated_rows, find_sources
from pipeline.retrieval import ingest_tasks as partitions

if TYPE_CHECKING:
    from pipeline.config.run_config import DataConfig

# A task holds one partition in memory, about 100 bytes an edge at its peak.
PARTITION_EDGES = 4_000_000
MAX_WEIGHT = float(np.finfo(np.float32).max)


def ingest(config: DataConfig, out: Path | str) -> dict[str, Any]:
    """Read, check, split and store a log in the folder `out`, replacing what is there. Ray has to be
    initialised.

    Returns: n_users, n_items, n_train, n_validation, n_test (distinct pairs), n_rejected (rows), users_hash,
        items_hash (of the vocabularies), seconds.

    Raises DataError in one line naming file, row or column, value and remedy; then `out` is as it was before.
    """
    started = time.perf_counter()
    out = Path(out).absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}-{uuid.uuid4().hex[:8]}.partial")
    (partial / "work").mkdir(parents=True)
    try:
        result = _ingest(config, partial, partial / "work")
        shutil.rmtree(partial / "work")
        result["seconds"] = time.perf_counter() - started
        (partial / "ingest.json").write_text(json.dumps(result, indent=1) + "\n")
        _publish(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return result


def _ingest(config: DataConfig, out: Path, work: Path) -> dict[str, Any]:
    sources = find_sources(str(config.path), config.format, config.split)
    sources = [Source(str(Path(s.file).absolute()), s.format, s.is_test) for s in sources]
    chunks = cut_chunks(sources)
    columns = Columns(config.user_column, config.item_column, config.weight_column)
    user_kind, item_kind = find_kinds(sources, columns)
    columns = Columns(columns.user, columns.item, columns.weight, user_kind, item_kind)
    n = max(config.shards, estimated_rows(chunks) // PARTITION_EDGES + 1)

    reads = [(work, number, chunk, columns, config.bad_rows, n) for number, chunk in enumerate(chunks)]
    read = run_tasks(partitions.read_part, reads, label="read")
    n_rejected = sum(facts["n_rejected"] for facts in read)
    train = [number for number, chunk in enumerate(chunks) if not chunk.source.is_test]
    tests = [(number, chunk) for number, chunk in enumerate(chunks) if chunk.source.is_test]
    if not sum(read[number]["n_rows"] for number in train):
        raise DataError(
            f"{config.path}: all {n_rejected} rows were rejected, nothing is left to train on; check columns"
        )

    merge = [(work, p, n, train, MAX_WEIGHT) for p in range(n)]
    run_tasks(partitions.merge_partition, merge, label="merge")
    for number in train:
        (work / f"part-{number:06d}.arrow").unlink()
    vocabularies = {}
    for side in ("user", "item"):
        vocabularies[side] = Vocabulary.from_ids(partitions.unique_ids(work, side, n))
        vocabularies[side].save(work / f"{side}s.parquet")
    n_users, n_items = len(vocabularies["user"]), len(vocabularies["item"])

    encode = [(work, p, n, config.seed, tests, columns, config.bad_rows) for p in range(n)]
    encoded = run_tasks(partitions.encode_partition, encode, label="encode")
    problems = [facts["problem"] for facts in encoded if facts["problem"]]
    if problems:
        raise DataError(min(problems)[2])
    n_rejected += sum(facts["n_rejected"] for facts in encoded)
    np.save(work / "item_lowest.npy", partitions.lowest_of_items(work, n_items, n))

    given = config.split == "given"
    shares = (config.validation, 0.0 if given else config.test)
    run_tasks(partitions.split_partition, [(work, p, config.seed, *shares, given) for p in range(n)], label="split")
    graphs = _build(out, work, n_users, n_items, n, config.shards)
    for side in ("user", "item"):
        (work / f"{side}s.parquet").rename(out / f"{side}s.parquet")
    if n_rejected:
        _write_rejected(work, out / "rejected.parquet", sources, chunks, n)
    return {
        "n_users": n_users,
        "n_items": n_items,
        "n_train": graphs["train"].n_edges,
        "n_validation": graphs["validation"].n_edges,
        "n_test": graphs["test"].n_edges,
        "n_rejected": n_rejected,
        "users_hash": vocabularies["user"].content_hash,
        "items_hash": vocabularies["item"].content_hash,
    }


def _build(
    out: Path, work: Path, n_users: int, n_items: int, n_partitions: int, n_shards: int
) -> dict[str, ShardedCsr]:
    tasks, sizes = [], {}
    for name in ("train", "train_by_item", "validation", "test"):
        n_rows, n_cols = (n_items, n_users) if name == "train_by_item" else (n_users, n_items)
        starts = balanced_starts(partitions.count_rows(work, name, n_rows, n_partitions), n_shards).tolist()
        tasks += [
            (work, out, name, shard, starts[shard], starts[shard + 1], n_cols, n_partitions)
            for shard in range(n_shards)
        ]
        sizes[name] = n_cols
    facts = run_tasks(partitions.build_shard, tasks, label="build")
    return {
        name: finish(out / name, [f for task, f in zip(tasks, facts, strict=True) if task[2] == name], n_cols=n_cols)
        for name, n_cols in sizes.items()
    }


def _write_rejected(work: Path, file: Path, sources: list[Source], chunks: list[Chunk], n_partitions: int) -> None:
    """Rejected rows in reading order; test rows that do not fit train come last, in the same order."""
    schema = REJECTED_SCHEMA.remove(0).insert(0, pa.field("file", pa.string()))
    names = pa.array([source.file for source in sources])

    def named(table: pa.Table) -> pa.Table:
        return table.set_column(0, "file", pc.take(names, table["source"])).cast(schema)

    late = [work / f"rejected_test-{p:06d}.arrow" for p in range(n_partitions)]
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for number in range(len(chunks)):
            early = work / f"rejected-{number:06d}.arrow"
            if early.exists():
                writer.write_table(named(_read_table(early)))
        tables = [_read_table(part) for part in late if part.exists()]
        if tables:
            rows = pa.concat_tables(tables).sort_by(
                [("source", "ascending"), ("row", "ascending"), ("raw", "ascending")]
            )
            writer.write_table(named(rows))


def _read_table(file: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(file))).read_all()


def _publish(partial: Path, out: Path) -> None:
    """Put the finished folder in place.

    A folder cannot replace a full one in one step, so the old one steps aside.
    """
    aside = partial.with_suffix(".replaced")
    if out.exists():
        out.rename(aside)
    try:
        partial.rename(out)
    except OSError:
        if aside.exists():
            aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)
