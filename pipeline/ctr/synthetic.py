"""Synthetic CTR logs, streamed to parquet: 26 categorical columns, 13 numbers, labels of a stated model whose best log loss is known.

`pipeline.ctr.synthetic_model` states the model; `docs/formats.md` (Synthetic CTR logs) lists the files. Rows are drawn in blocks of BLOCK
with a generator each: memory is that of a block, and the seed and the settings fix every row, whatever the files.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.ctr.counts import PARTS
from pipeline.ctr.passes import row_parts
from pipeline.ctr.synthetic_model import N_NUMBERS, LabelModel, LogSettings, Samples, entropies
from pipeline.logs.synthetic import check_replaceable
from pipeline.storage.atomic import new_folder, write_json_atomic, write_text_atomic

BLOCK = 1 << 17
BLOCKS_PER_FILE = 32
# The split of a run's defaults, for which the best log loss is told by part.
RANDOM_SPLIT: dict[str, Any] = {"seed": 0, "validation": 0.1, "test": 0.1}
FIRST_DAY = np.datetime64("2024-01-01", "s")
SECONDS_PER_DAY = 86_400
TRUTH = "truth"


class _Bounds:
    """Sums of the best log loss by part of the log."""

    def __init__(self) -> None:
        self._sums: dict[str, NDArray[np.float64]] = {}

    def add(self, name: str, samples: Samples, rows: NDArray[np.bool_]) -> None:
        p, labels = samples.probabilities[rows], samples.labels[rows]
        drawn = -np.log(np.where(labels, p, 1 - p)).sum()
        self._sums[name] = self._sums.get(name, 0) + np.array([len(p), entropies(p).sum(), drawn, labels.sum()])

    def facts(self) -> dict[str, dict[str, float]]:
        """Rows, mean entropy, log loss of the true probabilities beside the labels that were drawn, and share of positive labels."""
        return {
            name: {
                "rows": int(n),
                "best_log_loss": float(entropy / n),
                "log_loss_of_truth": float(drawn / n),
                "positive_rate": float(positive / n),
            }
            for name, (n, entropy, drawn, positive) in self._sums.items()
            if n
        }


def synth_ctr(out: Path | str, settings: LogSettings) -> dict[str, Any]:
    """Write a log into the folder ``out``, replacing one that was written here before.

    Returns: the settings, ``n_files``, ``bias``, ``seconds``, and ``all``, ``by_day`` and ``random_split`` (parts of a run with
        ``--split random``, ``data.seed=0`` and shares of 0.1), each with ``rows``, ``best_log_loss`` (mean entropy of the true
        probabilities, in nats), ``log_loss_of_truth`` (theirs beside the labels) and ``positive_rate``.

    Raises:
        ArgumentError: the folder holds anything else.
    """
    started = time.perf_counter()
    out = Path(out).absolute()
    check_replaceable(out)
    model = LabelModel(settings)
    with new_folder(out) as partial:
        (partial / TRUTH).mkdir()
        n_files, bounds = _write_log(partial, settings, model)
        write_text_atomic(partial / "schema.toml", schema_text(settings))
        facts = bounds.facts()
        result = {
            "task": "ctr",
            **dataclasses.asdict(settings),
            "n_files": n_files,
            "bias": model.bias,
            "all": facts["all"],
            "by_day": {name: fact for name, fact in facts.items() if name.startswith("20")},
            "random_split": {name: facts[name] for name in PARTS if name in facts},
            "seconds": round(time.perf_counter() - started, 3),
        }
        write_json_atomic(partial / "synth.json", result)
    return result


def schema_text(settings: LogSettings) -> str:
    """The schema of the log as TOML: partners, and the numbers as dense columns."""
    lines = [
        'label = "label"',
        f"dense = [{', '.join(_toml(name) for name in number_names())}]",
        f"categorical = [{', '.join(_toml(column.name) for column in settings.columns)}]",
    ]
    for first, second in settings.pairs:
        for column, partner in ((first, second), (second, first)):
            lines += [f"[columns.{column.name}]", f'partner = "{partner.name}"', 'kind = "int64"']
    return "\n".join(lines) + "\n"


def number_names() -> list[str]:
    """Names of the dense columns."""
    return [f"I{number + 1}" for number in range(N_NUMBERS)]


def _toml(text: str) -> str:
    return f'"{text}"'


def _write_log(folder: Path, settings: LogSettings, model: LabelModel) -> tuple[int, _Bounds]:
    """Write the log and the true probabilities block by block, a row group each; returns the number of files."""
    bounds, n_files = _Bounds(), 0
    writers: list[pq.ParquetWriter] = []
    starts = range(0, settings.n_rows, BLOCK)
    try:
        for block, start in enumerate(
            tqdm(starts, desc="synth", unit="block", file=sys.stderr, disable=None, leave=False)
        ):
            rows = np.arange(start, min(start + BLOCK, settings.n_rows))
            days = rows * settings.n_days // settings.n_rows
            samples = model.draw(np.random.default_rng([settings.seed, 1, block]), days)
            tables = [_table(settings, rows, samples), pa.table({"probability": samples.probabilities})]
            if block % BLOCKS_PER_FILE == 0:
                for writer in writers:
                    writer.close()
                name = f"log-{n_files:05d}.parquet"
                paths = (folder / name, folder / TRUTH / name)
                writers = [
                    pq.ParquetWriter(path, table.schema, compression="zstd")
                    for path, table in zip(paths, tables, strict=True)
                ]
                n_files += 1
            for writer, table in zip(writers, tables, strict=True):
                writer.write_table(table)
            _add_bounds(bounds, samples, rows, days)
    finally:
        for writer in writers:
            writer.close()
    return n_files, bounds


def _table(settings: LogSettings, rows: NDArray[np.int64], samples: Samples) -> pa.Table:
    seconds = rows * (settings.n_days * SECONDS_PER_DAY) // settings.n_rows
    columns = {"time": pa.array(FIRST_DAY + seconds.astype("timedelta64[s]")), "label": pa.array(samples.labels)}
    for number, name in enumerate(number_names()):
        columns[name] = pa.array(samples.numbers[:, number], from_pandas=True)
    for column in settings.columns:
        columns[column.name] = pa.array(raw_ids(column.number, samples.values[:, column.number]))
    return pa.table(columns)


def raw_ids(column: int, values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Distinct ids in no order of the values of a column, so that nothing works by taking them for row numbers, shape (n,)."""
    # An odd factor makes a permutation of the numbers below 2^32.
    return (values * 2_654_435_761 + 40_503 * (column + 1)) % 2**32


def _add_bounds(bounds: _Bounds, samples: Samples, rows: NDArray[np.int64], days: NDArray[np.int64]) -> None:
    bounds.add("all", samples, np.ones(len(rows), bool))
    for day in np.unique(days):
        bounds.add(str(FIRST_DAY.astype("datetime64[D]") + day), samples, days == day)
    parts = row_parts(int(rows[0]), len(rows), **RANDOM_SPLIT)
    for name, part in PARTS.items():
        bounds.add(name, samples, parts == part)
