"""The ingest stage of CTR: labelled samples -> vocabularies, statistics, and encoded samples on disk, in two passes.

The first pass counts, the second encodes (`pipeline.ctr.passes`). Vocabularies, statistics of dense features and all that is left out
are those of the training samples alone. Both passes run in this process; on a cluster Ray tasks share the files, and write the same
bytes. `docs/formats.md` (Ingest folder of CTR) lists the files.

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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.ctr.counts import PARTS
from pipeline.ctr.encoders import Encoders, make_encoders
from pipeline.ctr.log import CtrLog, check_published, open_log
from pipeline.ctr.part_writer import new_part
from pipeline.ctr.partners import EncodedColumn, with_partners
from pipeline.ctr.passes import Share, count_rows, cut_shares, encode_rows
from pipeline.ctr.schema import AUTO, TIME_PARTS, CtrSchema
from pipeline.ctr.times import split_by_time
from pipeline.distributed.session import cpus_of_machines, is_running, put, run_tasks
from pipeline.storage.atomic import write_json_atomic
from pipeline.storage.mapped import load_array

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
    result = ingest_log(log, data, out, n_shares=sum(cpus_of_machines()) if is_running() else 1)
    return result if published is None else result | {"published": published}


def ingest_log(log: CtrLog, data: DataConfig, out: Path, *, n_shares: int = 1) -> dict[str, Any]:
    """:func:`ingest_ctr` of the rows of a log that is open; the facts are without ``published``.

    Args:
        n_shares: tasks that share the files.
    """
    started = time.perf_counter()
    by_time, times = None, dict[str, Any]()
    if log.time is not None:
        by_time, times["times"] = split_by_time(data, log.time, log.times(data.seed))
    shares = cut_shares(log, data, by_time, n_shares)
    counts, *others = _mapped(count_rows, [(share,) for share in shares], "count")
    n_rows = [list(each.n_rows) for each in (counts, *others)]
    while others:
        counts.include(others.pop(0))
    counts.check(data)
    encoders, dropped = make_encoders(log.schema, counts, out)
    _say_columns(log, dropped)
    facts = _encode(shares, n_rows, encoders, out) | times
    _say_unknown(facts)
    if times:
        _say_times(facts, counts.n_rows)
    schema = {
        "format_version": FORMAT_VERSION,
        "log": _with_partners(log.schema, encoders, out).as_dict(),
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


def _with_partners(schema: CtrSchema, encoders: Encoders, out: Path) -> CtrSchema:
    """:func:`pipeline.ctr.partners.with_partners`, with the training samples that were written."""
    if all(category.partner != AUTO for category in schema.categories):
        return schema
    columns = [EncodedColumn(encoder.name, encoder.counts) for encoder in encoders.columns]
    labels, categorical = (load_array(out / "train" / f"{name}.npy") for name in ("labels", "categorical"))
    return with_partners(schema, columns, labels, categorical)


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


def _mapped(function: Callable[..., Any], arguments: Sequence[tuple], label: str) -> list[Any]:
    """The results for all shares; one is read in this process."""
    return [function(*arguments[0])] if len(arguments) == 1 else run_tasks(function, arguments, label=label)


def _encode(shares: Sequence[Share], n_rows: Sequence[list[int]], encoders: Encoders, out: Path) -> dict[str, Any]:
    """The second pass over all shares.

    Args:
        n_rows: of every share, its rows in each part.
    """
    first = np.cumsum([[0] * len(PARTS), *n_rows], axis=0).tolist()
    for part, number in PARTS.items():
        new_part(out / part, first[-1][number], encoders, shares[0].log.schema.group)
    known = encoders if len(shares) == 1 else put(encoders)
    (n_cut, oov), *others = _mapped(
        encode_rows,
        [(share, known, out.absolute(), before) for share, before in zip(shares, first, strict=False)],
        "encode",
    )
    for n, more in others:
        n_cut += n
        oov.include(more)
    return {"oov_rate": oov.rates(), "oov_values": oov.n_different(), "n_cut": n_cut}
