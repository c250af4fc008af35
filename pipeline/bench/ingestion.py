"""Benchmark of ingestion: GraphHash against polars, on the same synthetic log, in turns, each time in a fresh process.

GraphHash runs the whole stage: it reads and checks the log, makes sorted vocabularies, merges duplicates, splits, and writes three graphs
and the transpose of train with their checksums (`pipeline.retrieval.ingest`). polars does the core of it in memory and writes nothing:
read, a code for each id of both columns, pairs without duplicates in order of users, and the CSR matrix in both directions.

A process first does the same on a log of a thousand rows, untimed: kernels are loaded, libraries imported. Seconds are medians over the
rounds. Memory is the kernel's high-water mark of resident memory per phase, interpreter and libraries included, pages of mapped files too.
"""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from pipeline.training.memory import peak_mib

_log = logging.getLogger(__name__)

OURS = "graphhash"
PEER = "polars"
DIGITS = 12


@dataclass(frozen=True)
class IngestionBench:
    """What is measured.

    Args:
        rows: interactions of the log.
        ids: "integer" or "string".
        format: "parquet" or "csv".
        rounds: timed runs of each program.
        seed: of the log.
    """

    rows: int
    ids: str
    format: str
    rounds: int
    seed: int = 0


def bench(settings: IngestionBench) -> list[dict[str, Any]]:
    """Run the programs in turns. Returns an object per program: seconds, CPU seconds, rows per second, and phases with seconds and MiB."""
    programs = [OURS] + ([PEER] if importlib.util.find_spec(PEER) else [])
    if PEER not in programs:
        _log.info("polars is not installed: pip install 'graphhash[bench]'")
    with tempfile.TemporaryDirectory(prefix="graphhash-bench-") as folder:
        logs = Path(folder, "small"), Path(folder, "log")
        for log, n_rows in zip(logs, (1000, settings.rows), strict=True):
            write_log(log, n_rows, settings)
        size = sum(file.stat().st_size for file in logs[1].iterdir())
        runs: dict[str, list[dict[str, Any]]] = {program: [] for program in programs}
        for _ in range(settings.rounds):
            for program in programs:
                runs[program].append(_in_fresh_process(program, logs, Path(folder), settings))
    return [_summary(program, runs[program], settings, size) for program in programs]


def write_log(folder: Path, n_rows: int, settings: IngestionBench) -> None:
    """A synthetic log of ten rows a user and fifty an item, with ids such as 1000012345 or "user-001000012345"."""
    from pipeline.logs.synthetic import synth

    made = folder.with_name(folder.name + "-made")
    n_items = max(10, n_rows // 50)
    synth(made, n_users=max(1, n_rows // 10), n_items=n_items, n_interactions=n_rows,
          n_communities=max(1, n_items // 100), mixing=0.2, seed=settings.seed)  # fmt: skip
    folder.mkdir()
    for file in sorted(made.glob("log-*.parquet")):
        if settings.ids == "integer" and settings.format == "parquet":
            file.rename(folder / file.name)
            continue
        _convert(file, folder, settings)
        file.unlink()


def table(results: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Figures as a header and a line per program and phase."""
    header = ("program", "phase", "seconds", "rows/s", "peak MiB", "CPU s")
    lines: list[tuple[str, ...]] = []
    for entry in results:
        total = {"phase": "all", **{key: entry[key] for key in ("seconds", "cpu_seconds", "peak_mib")}}
        for phase in (total, *entry["phases"]):
            lines.append(
                (entry["program"], phase["phase"], f"{phase['seconds']:.2f}", f"{entry['rows'] / max(phase['seconds'], 1e-9):,.0f}",
                 f"{phase['peak_mib']:,.0f}", f"{phase['cpu_seconds']:.2f}")
            )  # fmt: skip
    return header, lines


class PhaseTimes:
    """Seconds, CPU seconds and peak memory of each phase of this process, as it ends."""

    def __init__(self) -> None:
        self.phases: list[dict[str, Any]] = []
        peak_mib(reset=True)
        self._started, self._cpu = time.perf_counter(), time.process_time()

    def end(self, phase: str) -> None:
        """Note a phase that has ended; the next one begins."""
        now, cpu = time.perf_counter(), time.process_time()
        seconds = {"seconds": now - self._started, "cpu_seconds": cpu - self._cpu}
        self.phases.append({"phase": phase, **seconds, "peak_mib": peak_mib()})
        peak_mib(reset=True)
        self._started, self._cpu = time.perf_counter(), time.process_time()


def _convert(file: Path, folder: Path, settings: IngestionBench) -> None:
    """Write a file of the synthetic log with other ids or in the other format."""
    source = pq.ParquetFile(file)
    writer: Any = None
    for batch in source.iter_batches(1_000_000):
        made = pa.Table.from_batches([batch])
        if settings.ids == "string":
            made = pa.table(
                {name: _as_text(made[name], name.removesuffix("id").replace("_", "-")) for name in made.column_names}
            )
        if writer is None and settings.format == "csv":
            writer = pa_csv.CSVWriter(folder / file.with_suffix(".csv").name, made.schema)
        elif writer is None:
            writer = pq.ParquetWriter(folder / file.name, made.schema, compression="zstd")
        writer.write_table(made)
    writer.close()


def _as_text(ids: pa.ChunkedArray, prefix: str) -> pa.ChunkedArray:
    digits = pc.utf8_lpad(ids.cast(pa.string()), DIGITS, "0")
    return pc.binary_join_element_wise(pa.scalar(prefix), digits, pa.scalar(""))


def _in_fresh_process(program: str, logs: Sequence[Path], folder: Path, settings: IngestionBench) -> dict[str, Any]:
    run = {OURS: _run_ours, PEER: _run_polars}[program]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, run, logs, folder, settings.format).result()


def _measured(run: Callable[..., int], logs: Sequence[Path], folder: Path, format: str) -> dict[str, Any]:
    small, log = logs
    run(small, folder, format, PhaseTimes())
    times = PhaseTimes()
    started, cpu = time.perf_counter(), time.process_time()
    n_edges = run(log, folder, format, times)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "edges": n_edges,
        "phases": times.phases,
    }


def _run_ours(log: Path, folder: Path, format: str, times: PhaseTimes) -> int:
    from pipeline.config.run_config import DataConfig
    from pipeline.retrieval.ingest import ingest

    facts = ingest(DataConfig(str(log)), folder / "out", on_phase=times.end)
    return facts["n_train"] + facts["n_validation"] + facts["n_test"]


def _run_polars(log: Path, folder: Path, format: str, times: PhaseTimes) -> int:
    """The fastest way that we know: dense ranks of integers, categories of strings, pairs as one number."""
    import polars as pl

    read = pl.read_parquet if format == "parquet" else pl.read_csv
    frame = read(f"{log}/log-*.{format}")
    times.end("read")
    codes = []
    for name in ("user_id", "item_id"):
        column = frame.get_column(name)
        is_text = column.dtype == pl.String
        ranks = column.cast(pl.Categorical).to_physical() if is_text else column.rank("dense") - 1
        codes.append(ranks.cast(pl.UInt64))
    del frame
    times.end("ids")
    pairs = (codes[0] * 2**32 + codes[1]).unique().sort().to_numpy()
    codes.clear()
    times.end("merge")
    users, items = (pairs >> np.uint64(32)).astype(np.int32), (pairs & np.uint64(2**32 - 1)).astype(np.int32)
    by_user = np.concatenate([[0], np.cumsum(np.bincount(users))]), items
    order = pl.Series(items).arg_sort().to_numpy()
    by_item = np.concatenate([[0], np.cumsum(np.bincount(items))]), users[order]
    times.end("csr")
    assert by_user[0][-1] == by_item[0][-1]
    return len(pairs)


def _summary(program: str, runs: Sequence[dict[str, Any]], settings: IngestionBench, size: int) -> dict[str, Any]:
    seconds = statistics.median(run["seconds"] for run in runs)
    phases = [
        {
            "phase": name,
            **{
                key: statistics.median(run["phases"][number][key] for run in runs)
                for key in ("seconds", "cpu_seconds", "peak_mib")
            },
        }
        for number, name in enumerate(phase["phase"] for phase in runs[0]["phases"])
    ]
    return {
        "program": program,
        "rows": settings.rows,
        "ids": settings.ids,
        "format": settings.format,
        "rounds": settings.rounds,
        "bytes": size,
        "edges": runs[0]["edges"],
        "seconds": seconds,
        "rows_per_s": settings.rows / seconds,
        "cpu_seconds": statistics.median(run["cpu_seconds"] for run in runs),
        "peak_mib": max(phase["peak_mib"] for phase in phases),
        "phases": phases,
    }
