"""Rejected rows: a file per task while the stage runs, and one file of all at its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.logs.columns import REJECTED_SCHEMA
from pipeline.retrieval.ingestion.files import Workspace, read_table


def write_rejected(file: Path, tables: Sequence[pa.Table]) -> int:
    """Write rejected rows, if there are any. Returns their number."""
    n_rejected = sum(table.num_rows for table in tables)
    if n_rejected:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, REJECTED_SCHEMA) as writer:
            for table in tables:
                writer.write_table(table)
    return n_rejected


def gather_rejected(file: Path, work: Workspace, files: Sequence[str], n_chunks: int, n_partitions: int) -> None:
    """Write all rejected rows in reading order; test rows that do not fit train come last, in the same order.

    Args:
        files: of the log, by the numbers that the rows have.
    """
    schema = REJECTED_SCHEMA.remove(0).insert(0, pa.field("file", pa.string()))
    names = pa.array(files)

    def named(table: pa.Table) -> pa.Table:
        return table.set_column(0, "file", pc.take(names, table["source"])).cast(schema)

    while_reading = _tables([work.rejected(number) for number in range(n_chunks)])
    test_rows = _tables([work.rejected_test(partition) for partition in range(n_partitions)])
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for table in while_reading:
            writer.write_table(named(table))
        if test_rows:
            order = [("source", "ascending"), ("row", "ascending"), ("raw", "ascending")]
            writer.write_table(named(pa.concat_tables(test_rows).sort_by(order)))


def _tables(files: Sequence[Path]) -> list[pa.Table]:
    return [read_table(file) for file in files if file.exists()]
