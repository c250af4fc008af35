"""The two passes of the ingestion of CTR over consecutive files of a log: the first counts, the second encodes.

Both hold a batch of rows, and what is kept per distinct id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from graphhash.errors import DataError
from graphhash.graph.interactions import TEST, TRAIN, VALIDATION, edge_hash
from graphhash.graph.vocabulary import Vocabulary
from pipeline.ctr.columns import checked_ids, dense_of, ids_of, labels_of, multi_valued_of
from pipeline.ctr.counts import PARTS, Counts, IdCounts, Moments, OovCounts
from pipeline.ctr.encoders import Encoders
from pipeline.ctr.log import CtrLog
from pipeline.ctr.part_writer import PartWriter
from pipeline.ctr.schema import Category, MultiValued
from pipeline.distributed.session import run_tasks
from pipeline.logs.sources import open_parquet
from pipeline.logs.tables import Rows

if TYPE_CHECKING:
    from pipeline.config.run_config import DataConfig


@dataclass(frozen=True, eq=False)
class Share:
    """Consecutive files of a log, which one task reads in both passes.

    Args:
        log: of these files.
        n_before: rows in the files before them, but for those of test and validation files.
        has_validation: whether a file of the whole log is the validation file.
        by_time: the parts of their rows, of a split by time.
    """

    log: CtrLog
    data: DataConfig
    n_before: int
    has_validation: bool
    by_time: NDArray[np.uint8] | None


def cut_shares(log: CtrLog, data: DataConfig, by_time: NDArray[np.uint8] | None, n_shares: int) -> list[Share]:
    """At most ``n_shares`` shares of the files of a log, of about as many bytes each."""
    has_validation = any(file.is_validation for file in log.files)
    if (n_shares := min(n_shares, len(log.files))) < 2:
        return [Share(log, data, 0, has_validation, by_time)]
    ends = np.cumsum([Path(file.path).stat().st_size for file in log.files])
    # The share of a file is that of its middle.
    middles = ends - np.diff(ends, prepend=0) / 2
    numbers = np.minimum(middles * n_shares // ends[-1], n_shares - 1).astype(int)
    logs = [
        replace(log, files=tuple(file for file, own in zip(log.files, numbers, strict=True) if own == number))
        for number in np.unique(numbers)
    ]
    sizes = run_tasks(_n_rows, [(each, data.seed) for each in logs[:-1]], label="rows")
    starts = np.cumsum([0, *sizes]).tolist()
    shares = []
    for each, start, stop in zip(logs, starts, [*starts[1:], None], strict=True):
        own = None if by_time is None else by_time[start:stop]
        shares.append(Share(each, data, start, has_validation, own))
    return shares


def _n_rows(log: CtrLog, seed: int) -> int:
    """Rows of the files, but for those of test and validation files."""
    n_rows = 0
    for file in log.files:
        if file.is_test or file.is_validation:
            continue
        if file.format == "parquet":
            n_rows += open_parquet(file.path).metadata.num_rows
        else:
            n_rows += sum(map(len, replace(log, files=(file,)).rows(seed)))
    return n_rows


def count_rows(share: Share) -> Counts:
    """The first pass over the rows of a share."""
    schema = share.log.schema
    counts = Counts(
        {c.name: IdCounts(c.kind) for c in schema.categories},
        {feature.name: IdCounts(feature.kind) for feature in schema.multi_valued},
        {name: Moments() for name in schema.dense},
        IdCounts("string"),
        {feature.name: 0 for feature in schema.multi_valued},
    )
    for rows, parts in _with_parts(share):
        labels = labels_of(rows, schema.label, schema.label_from)
        for number in PARTS.values():
            counts.n_rows[number] += int((parts == number).sum())
            counts.n_positive[number] += int(labels[parts == number].sum())
        trained, held_out = pa.array(parts == TRAIN), pa.array(parts != TRAIN)
        for c in schema.categories:
            counts.ids[c.name].add(ids_of(rows, c).filter(trained))
        for name in schema.dense:
            counts.dense[name].add(dense_of(rows, name)[parts == TRAIN])
        for feature in schema.multi_valued:
            lengths, values = multi_valued_of(rows, feature.name, feature.separator, feature.kind)
            counts.multi_valued[feature.name].add(values.filter(pa.array(np.repeat(parts == TRAIN, lengths))))
            counts.widths[feature.name] = max(counts.widths[feature.name], int(lengths[parts == TRAIN].max(initial=0)))
        if schema.group is not None:
            counts.groups.add(_group(rows, schema.group).filter(held_out))
    return counts


def _with_parts(share: Share) -> Iterator[tuple[Rows, NDArray[np.uint8]]]:
    """Rows with the part of each, in both passes alike."""
    n_before, data, by_time = share.n_before, share.data, share.by_time
    test = data.test if data.split == "random" else 0.0
    validation = 0.0 if share.has_validation else data.validation
    for rows in share.log.rows(data.seed):
        if rows.file.is_test:
            yield rows, np.full(len(rows), TEST, np.uint8)
            continue
        if rows.file.is_validation:
            yield rows, np.full(len(rows), VALIDATION if data.validation else TRAIN, np.uint8)
            continue
        if by_time is not None:
            first = n_before - share.n_before
            yield rows, by_time[first : first + len(rows)]
        else:
            yield rows, row_parts(n_before, len(rows), seed=data.seed, validation=validation, test=test)
        n_before += len(rows)


def row_parts(first: int, n_rows: int, *, seed: int, validation: float, test: float) -> NDArray[np.uint8]:
    """TRAIN, VALIDATION or TEST of the rows first, first + 1, ... of a log, shape (n_rows,)."""
    numbers = np.arange(first, first + n_rows)
    share = edge_hash(numbers, np.zeros_like(numbers), seed=seed).astype(np.float64) / 2.0**64
    return np.where(share < test, TEST, np.where(share < test + validation, VALIDATION, TRAIN)).astype(np.uint8)


def _group(rows: Rows, name: str) -> pa.Array:
    return checked_ids(rows, name, rows.columns[name], "string")


def encode_rows(share: Share, encoders: Encoders, out: Path, first: Sequence[int]) -> tuple[int, OovCounts]:
    """The second pass over the rows of a share: write them into the parts of the folder ``out``, which :func:`new_part` has made.

    Args:
        first: by number of the part, how many of its rows the shares before have.

    Returns: values that were cut, and what the test has of OOV values.
    """
    schema = share.log.schema
    writers = {number: PartWriter(out / part, first[number]) for part, number in PARTS.items()}
    n_cut, oov = 0, OovCounts()
    for rows, parts in _with_parts(share):
        labels, is_test = labels_of(rows, schema.label, schema.label_from), parts == TEST
        # Straight into column order, and every part takes its rows.
        categorical = np.empty((len(rows), len(encoders.columns)), np.int32)
        for i, encoder in enumerate(encoders.columns):
            assert isinstance(encoder.column, Category)
            ids = ids_of(rows, encoder.column)
            categorical[:, i] = encoder.entries(ids)
            oov.add(
                encoder.name,
                encoder.column.kind,
                ids.filter(pa.array(is_test)),
                categorical[is_test, i] == encoder.n_ids,
            )
        dense = np.empty((len(rows), len(encoders.dense)), np.float32)
        for i, (name, moments) in enumerate(encoders.dense.items()):
            dense[:, i] = _standardised(rows, name, moments)
        multi_valued = []
        for encoder, width in zip(encoders.multi_valued, encoders.widths, strict=True):
            assert isinstance(encoder.column, MultiValued)
            lengths, values = multi_valued_of(rows, encoder.name, encoder.column.separator, encoder.column.kind)
            entries, tested = encoder.entries(values), np.repeat(is_test, lengths)
            oov.add(
                encoder.name, encoder.column.kind, values.filter(pa.array(tested)), entries[tested] == encoder.n_ids
            )
            table, cut = _padded(lengths, entries, width)
            multi_valued.append(table)
            n_cut += cut
        for number, writer in writers.items():
            chosen = parts == number
            arrays: dict[str, NDArray] = {"labels": labels, "categorical": categorical, "dense": dense}
            arrays |= {f"multi_valued_{i}": table for i, table in enumerate(multi_valued)}
            if number != TRAIN and schema.group is not None:
                arrays["groups"] = _group_numbers(_group(rows, schema.group), encoders.groups)
            writer.add({name: array[chosen] for name, array in arrays.items()})
    for writer in writers.values():
        writer.close()
    return n_cut, oov


def _standardised(rows: Rows, name: str, moments: Moments) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        scaled = ((dense_of(rows, name) - moments.mean) / moments.std).astype(np.float32)
    if np.isinf(scaled).any():
        raise DataError(
            f"{rows.where(np.isinf(scaled))}: column {name!r} is too far from the rest for float32; fix or empty it"
        )
    return np.nan_to_num(scaled, nan=0.0)


def _padded(lengths: NDArray[np.int64], entries: NDArray[np.int32], width: int) -> tuple[NDArray[np.int32], int]:
    """Entries of every row's values, -1 behind them, shape (n, width), and how many were cut."""
    table = np.full((len(lengths), width), -1, np.int32)
    place = np.arange(len(entries)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    fits = place < width
    table[owner[fits], place[fits]] = entries[fits]
    return table, int((~fits).sum())


def _group_numbers(values: pa.Array, groups: Vocabulary) -> NDArray[np.int64]:
    """Number of every row's group; all rows without one are a group."""
    found = pc.index_in(values, value_set=groups.ids.cast(pa.large_string()))
    return found.fill_null(len(groups)).to_numpy(zero_copy_only=False).astype(np.int64)
