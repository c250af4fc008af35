"""Features of users and items from files, for the method `lsh`.

One file per side, `data.user_features` and `data.item_features`: csv (with commas), tsv or parquet, with a
column of ids named as the log's (`data.user_column`, `data.item_column`) and one column or more of finite
numbers; categories have to be numbers already, such as a column of 0 and 1 for each. Rows are counted as in
`pipeline.logs.readers`: from 1, a csv header being row 1.

Every column is scaled to mean 0 and deviation 1 over the log's ids, so that the signs of projections do not
depend on units, and a column of one value says nothing. An id without a row gets zeros, the average of the
others. Ids that the training part of the log does not have are passed over: a catalogue may be larger than a
log. An id with two rows, an empty field, NaN and text are errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from graphhash.errors import DataError, first_line
from graphhash.graph.vocabulary import Vocabulary
from pipeline.errors import ConfigError
from pipeline.logs.csv import CsvFormat, header_of, read_records
from pipeline.logs.sources import EXTENSIONS, format_by_name
from pipeline.logs.values import is_id, numbers, texts, whole_numbers

if TYPE_CHECKING:
    from pipeline.config.run_config import DataConfig

SIDES = ("user", "item")
# Of a column's largest value: less is rounding, not a difference between ids.
LEAST_DEVIATION = 1e-9


def feature_files(data: DataConfig) -> tuple[Path, Path]:
    """The files of users and of items.

    Raises:
        ConfigError: one is not named.
        DataError: one is not there.
    """
    files = []
    for side, named in zip(SIDES, (data.user_features, data.item_features), strict=True):
        if not named:
            raise ConfigError(
                f"method lsh needs data.{side}_features; name a csv, tsv or parquet file of ids and numbers "
                f"(--{side}-features), or use lsh_structure, which needs none"
            )
        files.append(Path(named))
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: no such file of features; check the path")
    return files[0], files[1]


def load_features(data: DataConfig, ingest_dir: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features of every user and of every item of an ingested log, each of shape (n_ids, n_features).

    Raises:
        ConfigError, DataError: as :func:`feature_files` and :func:`read_features`.
    """
    users, items = feature_files(data)
    return (
        read_features(users, data.user_column, Vocabulary.load(ingest_dir / "users.parquet")),
        read_features(items, data.item_column, Vocabulary.load(ingest_dir / "items.parquet")),
    )


def read_features(file: Path, column: str, vocabulary: Vocabulary) -> NDArray[np.float32]:
    """Scaled features in the vocabulary's order, shape (n_ids, n_features); zeros where the file has no row.

    Args:
        column: the ids.

    Raises:
        DataError: one line with file, row, column and remedy.
    """
    table, first_row = _read_table(file)
    names = [name for name in table.column_names if name != column]
    if column not in table.column_names:
        raise DataError(f"{file}: no column {column!r} for the ids, columns are {', '.join(names)}; rename one")
    if not names:
        raise DataError(f"{file}: no column of features beside {column!r}; add one of numbers")
    if table.num_rows == 0:
        raise DataError(f"{file}: no rows; write the features of some ids, or use another method")
    ids = _ids(table[column], file, column, vocabulary.kind, first_row)
    rows = vocabulary.rows(ids, missing="fallback")
    known = rows < len(vocabulary)
    if not known.any():
        raise DataError(
            f"{file}: none of its {len(ids)} ids (column {column!r}, first {ids[0].as_py()!r}) is in the "
            "log; check that both name ids alike"
        )
    features = np.zeros((len(vocabulary), len(names)), np.float32)
    for i, name in enumerate(names):
        features[rows[known], i] = _scaled(_numbers(table[name], file, name, first_row)[known])
    return features


def _read_table(file: Path) -> tuple[pa.Table, int]:
    """The file, text where it is csv, and the number of its first row."""
    format = format_by_name(file)
    if format is None:
        raise DataError(f"{file}: features are read from {', '.join(EXTENSIONS)}; write it as one of them")
    if file.stat().st_size == 0:
        raise DataError(f"{file}: the file is empty; write a column of ids and columns of numbers")
    try:
        table = pq.read_table(file) if format == "parquet" else _read_text(file, format)
    except DataError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{file}: no readable {format} ({first_line(error)}); write it again") from None
    twice = [name for name in table.column_names if table.column_names.count(name) > 1]
    if twice:
        raise DataError(f"{file}: two columns are named {twice[0]!r}; rename one")
    return table, 1 if format == "parquet" else 2


def _read_text(file: Path, format: str) -> pa.Table:
    # Unlike logs, a .csv file of features is never read as tab-separated.
    layout = CsvFormat(separator="\t" if format == "tsv" else ",")
    names = header_of(str(file), format, layout)
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{file}: two columns are named {twice[0]!r}; rename one")
    batches = []
    for part in read_records(str(file), format, layout, names):
        if part.malformed:
            row, reason, _text = part.malformed[0]
            raise DataError(f"{file}: row {row}: {reason}; write as many fields in every row")
        batches.append(part.batch)
    return pa.Table.from_batches(batches, pa.schema([(name, pa.string()) for name in names]))


def _ids(column: pa.ChunkedArray, file: Path, name: str, kind: str, first_row: int) -> pa.Array:
    """Ids of the vocabulary's kind, each once."""
    _refuse(pc.is_null(column), column, file, name, first_row, "drop the row, or write its id")
    joined = as_one_array(column)
    ids, wrong = texts(joined) if kind == "string" else whole_numbers(joined)
    remedy = "the log's ids are texts" if kind == "string" else "the log's ids are whole numbers of int64"
    _refuse(pa.chunked_array([pa.array(wrong)]), column, file, name, first_row, f"{remedy}; write the same here")
    if pc.count_distinct(ids).as_py() < len(ids):
        counts = pc.value_counts(ids)
        repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))[0].as_py()
        raise DataError(f"{file}: id {repeated!r} has more than one row; keep one")
    return ids


def as_one_array(column: pa.ChunkedArray) -> pa.Array:
    """A column in one piece."""
    joined = column.combine_chunks()
    return pa.concat_arrays(joined.chunks) if isinstance(joined, pa.ChunkedArray) else joined


def _numbers(column: pa.ChunkedArray, file: Path, name: str, first_row: int) -> NDArray[np.float64]:
    remedy = "features are finite numbers; fill or encode it, or drop the column or the row"
    _refuse(pc.is_null(column), column, file, name, first_row, remedy)
    if not is_id(column.type):
        raise DataError(f"{file}: column {name!r} is {column.type}; {remedy}")
    values, _ = numbers(as_one_array(column))
    _refuse(pa.chunked_array([pa.array(~np.isfinite(values))]), column, file, name, first_row, remedy)
    return values


def _refuse(bad: pa.ChunkedArray, column: pa.ChunkedArray, file: Path, name: str, first_row: int, remedy: str) -> None:
    places = np.flatnonzero(bad.to_numpy())
    if len(places):
        value = column[int(places[0])].as_py()
        what = "empty" if value is None else repr(value)
        raise DataError(f"{file}: row {first_row + places[0]}: column {name!r} is {what}; {remedy}")


def _scaled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean 0 and deviation 1; zeros where all values are the same."""
    # Squares of the largest floats would overflow.
    values = values / max(np.abs(values).max(), np.finfo(np.float64).tiny)
    values -= values.mean()
    deviation = values.std()
    return values / deviation if deviation > LEAST_DEVIATION else np.zeros_like(values)
