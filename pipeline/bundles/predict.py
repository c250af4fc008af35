"""Predictions of a click bundle for the rows of files, as ``graphhash predict`` writes them: the same rows, and one column more."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from graphhash.errors import DataError, did_you_mean, first_line
from pipeline.logs.csv import DEFAULT_FORMAT, CsvFormat
from pipeline.logs.tables import Rows, column_names, find_files, listed_names, read_rows
from pipeline.storage.atomic import new_file
from serving.bundle_model import Provider
from serving.errors import InputError
from serving.private_copy import load_privately
from serving.scorer import Predictions, Scorer

logger = logging.getLogger(__name__)
# Rows that are Python objects at a time.
SLICE_ROWS = 50_000
# The separator of each kind of text; None: parquet.
SUFFIXES: dict[str, str | None] = {".parquet": None, ".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Predicted:
    """What was predicted.

    Args:
        n_rows: rows written.
        mean_prediction: mean probability.
        oov_rate: share of out-of-vocabulary values, by categorical column.
    """

    n_rows: int
    mean_prediction: float
    oov_rate: dict[str, float]

    def text(self) -> str:
        """One line."""
        return f"{self.n_rows:,} rows, mean prediction {self.mean_prediction:.4f}{oov_text(self.oov_rate)}"


def oov_text(rates: Mapping[str, float]) -> str:
    """The end of a line that tells the shares of out-of-vocabulary values, by column; empty without any."""
    oov = [f"{name} {100 * rate:.1f} %" for name, rate in rates.items() if rate]
    return f"; out of vocabulary: {', '.join(oov)}" if oov else ""


def slices(rows: Iterable[Rows]) -> Iterator[Rows]:
    """The same rows, at most SLICE_ROWS together."""
    for part in rows:
        for start in range(0, len(part), SLICE_ROWS):
            columns = {name: values.slice(start, SLICE_ROWS) for name, values in part.columns.items()}
            yield Rows(columns, part.first + start, part.file)


def predict_rows(scorer: Scorer, rows: Rows) -> Predictions:
    """Answers for consecutive rows of a file.

    Raises:
        DataError: a column is missing, or a value is of another type than the bundle's.
    """
    try:
        return scorer.details({name: values.to_pylist() for name, values in rows.columns.items()})
    except InputError as error:
        raise DataError(f"{rows.file.path}: from row {rows.first} on: {error}") from None


def predict_files(
    bundle: Path,
    log: str,
    out: Path,
    *,
    column: str = "probability",
    keep: Sequence[str] | None = None,
    layout: CsvFormat = DEFAULT_FORMAT,
    provider: Provider = "auto",
    threads: int | None = None,
) -> Predicted:
    """Write rows with their click probabilities. Files are read in batches, and the rows come in the order of the log.

    Args:
        log: a file, a folder or a glob: csv, tsv or parquet. Labels are not needed.
        out: file to write: .parquet, .csv or .tsv. It appears when it is whole.
        column: name of the probabilities, float32, in the written file.
        keep: columns of the log to write; None: all.
        layout: of csv and tsv files.
        threads: of ONNX Runtime; None: one per core.

    Raises:
        BundleError: the bundle is not one of a CTR model.
        DataError: ``out`` ends otherwise or cannot be written, a column is missing or there already, or a value is of another type than the
            bundle's.
    """
    if out.suffix not in SUFFIXES:
        raise DataError(f"{out}: the name of the file to write must end in {', '.join(SUFFIXES)}")
    scorer = load_privately(bundle, lambda folder: Scorer(folder, provider, threads))
    files = find_files(log, "auto", "random", layout)
    kept = _kept(files[0].path, column_names(files[0]), keep, column)
    names = list(dict.fromkeys((*kept, *(n for n in column_names(files[0]) if n in _readable(scorer)))))
    n_rows, total, n_oov = 0, 0.0, dict[str, int]()
    with _writer(out) as write:
        for rows in slices(rows for file in files for rows in read_rows(file, names)):
            answer = predict_rows(scorer, rows)
            write({name: rows.columns[name] for name in kept} | {column: pa.array(answer.probabilities)}, rows)
            n_rows, total = n_rows + len(rows), total + float(answer.probabilities.sum(dtype="float64"))
            n_oov = {name: n_oov.get(name, 0) + int((~known).sum()) for name, known in answer.known.items()}
            logger.info("predict: %s rows", f"{n_rows:,}")
    return Predicted(n_rows, total / n_rows, {name: n / n_rows for name, n in n_oov.items()})


def _readable(scorer: Scorer) -> set[str]:
    """Names of columns that the model can read: its own, and those that they are made of."""
    return {*scorer.columns, *(column["name"] for column in scorer.manifest["columns"])}


def _kept(path: str, present: Sequence[str], keep: Sequence[str] | None, column: str) -> list[str]:
    kept = list(dict.fromkeys(name for name in (present if keep is None else keep) if name))
    for name in kept:
        if name not in present:
            raise DataError(
                f"{path}: no column {name!r} to keep; {did_you_mean(name, present)}the columns are {listed_names(present)}"
            )
    if column in kept:
        raise DataError(f"{path}: there is a column {column!r} already; name that of the predictions with --column")
    return kept


@contextmanager
def _writer(out: Path) -> Iterator[Callable[[Mapping[str, Any], Rows], None]]:
    """A function that appends rows, given as arrays by name and where they come from; ``out`` is replaced at the end."""
    with new_file(out) as partial, ExitStack() as stack:
        open_file: pq.ParquetWriter | pa_csv.CSVWriter | None = None
        separator = SUFFIXES[out.suffix]

        def write(columns: Mapping[str, Any], rows: Rows) -> None:
            nonlocal open_file
            batch = pa.table(dict(columns))
            try:
                if open_file is None and separator is None:
                    open_file = stack.enter_context(pq.ParquetWriter(partial, batch.schema))
                elif open_file is None:
                    options = pa_csv.WriteOptions(delimiter=separator, quoting_style="needed")
                    open_file = stack.enter_context(pa_csv.CSVWriter(partial, batch.schema, write_options=options))
                open_file.write_table(batch.cast(open_file.schema) if separator is None else batch)
            except (pa.ArrowException, ValueError) as error:
                advice = "name the columns to write with --keep" + ("" if separator is None else ", or write parquet")
                raise DataError(
                    f"{rows.file.path}: cannot be written to {out} ({first_line(error)}); {advice}"
                ) from None

        yield write
