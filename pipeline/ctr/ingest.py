"""The ingest stage of CTR: labelled samples -> vocabularies, statistics, and encoded samples on disk, in two passes.

The first pass counts, the second encodes; both hold a batch of rows, and what is kept per distinct id. Vocabularies, statistics of
dense features and all that is left out are those of the training samples alone. Both passes run in this process, over whole columns
at a time. `docs/formats.md` (Ingest folder of CTR) lists the files.

**Entries.** Ids that `min_count` training samples or more have, ascending, are entries 0..; *missing* is the next entry, where train
has it as often; the last one, ``n_ids``, is out-of-vocabulary (OOV). **Dense** features are scaled to mean 0 and deviation 1 of train,
and a missing number is its mean, 0. A feature that is the same in all of train, or has no entry, is dropped and named in schema.json.
**Multi-valued** features are as wide as the longest row of train; later values of a longer row are cut, and counted.

**Split.** "random": every row, numbered in reading order, draws its part from the seed (`graphhash.graph.interactions.edge_hash`).
"given": test is the test file, and validation is drawn from train; a published split has a file of it. "temporal": `pipeline.ctr.times`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from graphhash.errors import DataError
from graphhash.graph.interactions import TEST, TRAIN, VALIDATION, edge_hash
from graphhash.graph.vocabulary import Vocabulary
from pipeline.ctr.columns import checked_ids, dense_of, ids_of, labels_of, multi_valued_of
from pipeline.ctr.counts import PARTS, Counts, IdCounts, Moments, OovCounts
from pipeline.ctr.encoders import Encoders, make_encoders
from pipeline.ctr.log import CtrLog, check_published, open_log
from pipeline.ctr.part_writer import PartWriter
from pipeline.ctr.schema import TIME_PARTS, Category, CtrSchema, MultiValued
from pipeline.ctr.times import split_by_time
from pipeline.logs.tables import Rows
from pipeline.storage.atomic import write_json_atomic

if TYPE_CHECKING:
    from pipeline.config.run_config import DataConfig

FORMAT_VERSION = 1
# Share of the test's values from which on a column counts as mostly unknown.
MOSTLY = 0.5

logger = logging.getLogger(__name__)


def ingest_ctr(data: DataConfig, out: Path) -> dict[str, Any]:
    """Read, check, split and store a CTR data set in the folder `out`.

    Returns: n_train, n_validation, n_test (rows), positive_rate (by part), columns (entries by name), dense (names), dropped and left_out
        (reason by name), oov_rate (share of the test's values by feature), oov_values (different ones), n_cut (values), schema_hash,
        seconds; times (`pipeline.ctr.times.TimeFacts`) with a split by time; published, whether the files are those of a published split,
        of data sets that have one.

    Raises:
        DataError: one line with file, row or column, value and remedy.
    """
    log, published = open_log(data), check_published(data)
    result = ingest_log(log, data, out)
    return result if published is None else result | {"published": published}


def ingest_log(log: CtrLog, data: DataConfig, out: Path) -> dict[str, Any]:
    """:func:`ingest_ctr` of the rows of a log that is open; the facts are without ``published``."""
    started = time.perf_counter()
    by_time, times = None, dict[str, Any]()
    if log.time is not None:
        by_time, times["times"] = split_by_time(data, log.time, log.times(data.seed))
    counts = _count(log, data, by_time)
    counts.check(data)
    encoders, dropped = make_encoders(log.schema, counts, out)
    _say_columns(log, dropped)
    facts = _encode(_with_parts(log, data, by_time), log.schema, counts, encoders, out) | times
    _say_unknown(facts)
    if times:
        _say_times(facts, counts.n_rows)
    schema = {
        "format_version": FORMAT_VERSION,
        "log": log.schema.as_dict(),
        "columns": [encoder.describe() for encoder in encoders.columns],
        "multi_valued": [
            encoder.describe() | {"width": width}
            for encoder, width in zip(encoders.multi_valued, encoders.widths, strict=True)
        ],
        "dense": [{"name": name, "mean": d.mean, "std": d.std} for name, d in encoders.dense.items()],
        "dropped": dropped,
    }
    digest = hashlib.sha256(json.dumps(schema, sort_keys=True).encode()).hexdigest()
    write_json_atomic(out / "schema.json", schema | {"content_hash": digest})
    sizes = {f"n_{part}": counts.n_rows[number] for part, number in PARTS.items()}
    rates = {part: counts.n_positive[n] / counts.n_rows[n] if counts.n_rows[n] else None for part, n in PARTS.items()}
    return {
        **sizes,
        "positive_rate": rates,
        "columns": {encoder.name: encoder.n_ids for encoder in (*encoders.columns, *encoders.multi_valued)},
        "dense": list(encoders.dense),
        "dropped": dropped,
        "left_out": log.left_out,
        **facts,
        "schema_hash": digest,
        "seconds": round(time.perf_counter() - started, 3),
    }


def _say_columns(log: CtrLog, dropped: dict[str, str]) -> None:
    """Log what each column was taken for, and why one is not used."""
    schema = log.schema
    made = {f"{name}_{part}" for name, _ in schema.times for part in TIME_PARTS}
    made |= {f"{name}_bucket" for name in schema.buckets}
    parts = {
        "label": [schema.label],
        "categorical": [f"{c.name} ({c.kind})" for c in schema.categories if c.name not in made],
        "multi-valued": [f"{feature.name} ({feature.kind})" for feature in schema.multi_valued],
        "dense": list(schema.dense),
        "times": [name for name, _ in schema.times],
        "in buckets": list(schema.buckets),
    }
    logger.info("columns: %s", "; ".join(f"{part} {', '.join(names)}" for part, names in parts.items() if names))
    for name, reason in {**log.left_out, **dropped}.items():
        logger.info("column %s is left out: %s", name, reason)


def _say_unknown(facts: dict[str, Any]) -> None:
    """Warn of features whose values are mostly out of vocabulary in the test: a model learns nothing of them that it could use."""
    mostly = [f"{name} ({100 * rate:.0f} %)" for name, rate in facts["oov_rate"].items() if rate > MOSTLY]
    if mostly:
        logger.warning(
            "mostly out of vocabulary in the test: %s; leave such a column out, or check the split", ", ".join(mostly)
        )


def _say_times(facts: dict[str, Any], n_rows: list[int]) -> None:
    """Log where parts begin, and how many values of the test train lacks."""
    for name, first in facts["times"]["first"].items():
        if first:
            logger.info("split temporal: %s from %s: %s rows", name, first, f"{n_rows[PARTS[name]]:,}")
    rates = facts["oov_rate"]
    unknown = [f"{name} {n:,} ({100 * rates[name]:.1f} %)" for name, n in facts["oov_values"].items() if rates[name]]
    if unknown:
        logger.info("different values in the test that train lacks (share of the test's): %s", ", ".join(unknown))


def _count(log: CtrLog, data: DataConfig, by_time: NDArray[np.uint8] | None) -> Counts:
    schema = log.schema
    counts = Counts(
        {c.name: IdCounts(c.kind) for c in schema.categories},
        {feature.name: IdCounts(feature.kind) for feature in schema.multi_valued},
        {name: Moments() for name in schema.dense},
        IdCounts("string"),
        {feature.name: 0 for feature in schema.multi_valued},
    )
    for rows, parts in _with_parts(log, data, by_time):
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


def _with_parts(
    log: CtrLog, data: DataConfig, by_time: NDArray[np.uint8] | None
) -> Iterator[tuple[Rows, NDArray[np.uint8]]]:
    """Rows with the part of each, in both passes alike.

    Args:
        by_time: the parts of all rows, of a split by time.
    """
    n_before = 0
    test = data.test if data.split == "random" else 0.0
    validation = 0.0 if any(file.is_validation for file in log.files) else data.validation
    for rows in log.rows(data.seed):
        if rows.file.is_test:
            yield rows, np.full(len(rows), TEST, np.uint8)
            continue
        if rows.file.is_validation:
            yield rows, np.full(len(rows), VALIDATION if data.validation else TRAIN, np.uint8)
            continue
        if by_time is not None:
            yield rows, by_time[n_before : n_before + len(rows)]
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


def _encode(
    rows_with_parts: Iterable[tuple[Rows, NDArray[np.uint8]]],
    schema: CtrSchema,
    counts: Counts,
    encoders: Encoders,
    out: Path,
) -> dict[str, Any]:
    writers = {
        number: PartWriter(out / part, counts.n_rows[number], encoders, schema.group) for part, number in PARTS.items()
    }
    n_cut, oov = 0, OovCounts()
    for rows, parts in rows_with_parts:
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
    return {"oov_rate": oov.rates(), "oov_values": oov.n_different(), "n_cut": n_cut}


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
