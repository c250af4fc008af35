"""``graphhash update`` of a CTR run: fold the new values of a later log's compressed columns in, and write the bundle anew.

Nothing is trained (``pipeline.updates.columns_ctr``), and rows of known values alone are answered as before. Folded-in values are kept in
``RUN/update/<method>`` (``pipeline.ctr.folded_in``) until the method is trained anew; later updates and exports read them there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from graphhash.errors import DataError
from graphhash.graph.bipartite import SIDES
from graphhash.graph.vocabulary import Vocabulary, as_ids
from graphhash.maps.bucket_map import full_map
from pipeline.config.run_config import RunConfig
from pipeline.ctr.budget import resolve_method
from pipeline.ctr.cluster import clustering_labels
from pipeline.ctr.columns import ids_of, labels_of
from pipeline.ctr.data import Features
from pipeline.ctr.folded_in import FoldedColumns, folded_columns_dir, open_folded_columns
from pipeline.ctr.log import open_later_log
from pipeline.ctr.maps import MapOptions, find_pairs, own_labels, pair_graph
from pipeline.ctr.weights import TrainedCtr, load_ctr, load_mixtures
from pipeline.errors import ConfigError
from pipeline.maps.methods import METHODS
from pipeline.runs.folder import RunFolder
from pipeline.runs.plan import check_methods
from pipeline.task import model_dir, model_parts, model_stage
from pipeline.updates.columns_ctr import (
    Group,
    assign_group,
    column_order,
    empty_state,
    make_groups,
    mixed_rows,
    single_hash,
)
from pipeline.updates.log import content_sha256
from pipeline.updates.rules_ctr import CTR_RULES, MIXED
from pipeline.updates.stages import checked_stages, write_bundle


class ColumnCounts(TypedDict):
    """New values of a column: all, those folded in, and those that stay unassigned."""

    new: int
    folded_in: int
    unassigned: int


class CtrUpdateResult(TypedDict):
    """What an update of a CTR run did. ``rule``: how new values were assigned; ``columns``: by name."""

    method: str
    rule: str
    columns: dict[str, ColumnCounts]
    n_rows: int
    log_sha256: str
    bundle: Literal["written", "unchanged"]
    seconds: float


@dataclass(frozen=True, eq=False)
class NewSamples:
    """A later log in memory: labels, uint8, shape (n,), and raw ids of the columns of compressed pairs, by number."""

    labels: NDArray[np.uint8]
    ids: dict[int, pa.Array]
    sha256: str


def update_ctr(
    config: RunConfig, log: str, *, method: str | None, data: dict[str, Any] | None, refit: bool
) -> CtrUpdateResult:
    """Fold the new values of a log into a run; arguments as for :func:`pipeline.updates.update.update`.

    Raises:
        DataError, ConfigError, RunFolderError, BundleError: each with one line for the user; the bundle is as it was.
    """
    started, method = time.perf_counter(), method or config.run.methods[0]
    check_methods([method], "ctr")
    if refit:
        raise ConfigError("--refit is not supported with run.task=ctr; leave it out")
    if method not in CTR_RULES:
        raise ConfigError(
            f"method {method!r} has no rows that a new value could read; run 'graphhash run' on all data, or name one of "
            f"{', '.join(CTR_RULES)}"
        )
    with RunFolder(Path(config.run.out)) as folder:
        stages = checked_stages(config, method, folder)
        train_key = stages[model_stage(config, method)].key
        trained = load_ctr(model_dir(config, folder.path, method), folder.path / "ingest")
        known = open_folded_columns(folder.path, method, train_key)
        new = _read(replace(config.data, path=log, **(data or {})), trained.features)
        now, columns = _fold_in(config, method, folder, trained, known, new)
        entry = {"method": method, "rule": CTR_RULES[method].description, "columns": columns, "n_rows": len(new.labels)}
        entry |= {"log_sha256": new.sha256}
        if now.id != known.id or _n_edges(now) > _n_edges(known):
            now = replace(now, updates=(*known.updates, entry))
            _save(folder, method, train_key, now)
        bundle: Literal["written", "unchanged"] = "unchanged"
        if now.id is not None and write_bundle(config, method, folder, stages):
            bundle = "written"
    return {
        "method": method,
        "rule": CTR_RULES[method].description,
        "columns": columns,
        "n_rows": len(new.labels),
        "log_sha256": new.sha256,
        "bundle": bundle,
        "seconds": round(time.perf_counter() - started, 2),
    }


def _n_edges(folded: FoldedColumns) -> int:
    return sum(len(group.edges) for group in folded.groups.values())


def _save(folder: RunFolder, method: str, train_key: str, now: FoldedColumns) -> None:
    """Replace RUN/update/METHOD, as a stage that is never skipped: it depends on what was folded in before."""

    def compute(out: Path) -> dict[str, Any]:
        now.save(out, train_key)
        return now.updates[-1]

    place = folded_columns_dir(folder.path, method).relative_to(folder.path)
    inputs = {"the training": train_key, "the logs": " ".join(entry["log_sha256"] for entry in now.updates)}
    folder.stage(f"update {method}", {}, inputs, str(place), compute)


def _read(data: Any, features: Features) -> NewSamples:
    """The later log: labels, and raw ids of all columns of pairs and of those that the schema hashes.

    Raises:
        DataError: a column is missing, or a value is of another type than the run's.
    """
    schema = features.schema
    log = open_later_log(data, schema)
    numbers = {c for pair in find_pairs(features) for c in pair.columns}
    numbers |= {c for c, column in enumerate(features.columns) if schema.category(column.name).rows is not None}
    labels: list[NDArray[np.uint8]] = []
    ids: dict[int, list[pa.Array]] = {c: [] for c in sorted(numbers)}
    for rows in log.rows(data.seed):
        labels.append(labels_of(rows, schema.label, schema.label_from))
        for c, parts in ids.items():
            parts.append(ids_of(rows, schema.category(features.columns[c].name)))
    if not sum(map(len, labels)):
        raise DataError(f"{data.path}: no samples; check the file")
    joined = {c: pa.chunked_array(parts).combine_chunks() for c, parts in ids.items()}
    return NewSamples(np.concatenate(labels), joined, content_sha256(file.path for file in log.files))


def _fold_in(
    config: RunConfig, method: str, folder: RunFolder, trained: TrainedCtr, known: FoldedColumns, new: NewSamples
) -> tuple[FoldedColumns, dict[str, ColumnCounts]]:
    """The columns with those new values that are assigned, and what the log brought."""
    # What stores trained rows in fewer bits has the maps of what it is trained as.
    features, maker = trained.features, METHODS[method].trained_as or method
    resolved = resolve_method(config, features, maker)
    options = MapOptions(resolved.indices_per_id, resolved.hops, config.map.seed)
    rows = features.rows_of(model_parts(config))
    graphs = [pair_graph(features, rows, pair) for pair in find_pairs(features)]
    mixtures = load_mixtures(model_dir(config, folder.path, method)) if method in MIXED else {}
    labels = [own_labels(g) for g in graphs] if method in MIXED else clustering_labels(folder.path / "cluster")
    tables = {number: mixture.table for number, mixture in mixtures.items()}
    groups = make_groups(features, graphs, labels, maker, options, tables)
    now = FoldedColumns(dict(known.vocabularies), dict(known.maps), dict(known.groups), dict(known.rows), known.updates)
    hashes = {number: bucket_map.content_hash for number, bucket_map in enumerate(trained.maps)}
    hashes |= {number: mixture.map_hash for number, mixture in mixtures.items()}
    columns: dict[str, ColumnCounts] = {}
    for group in groups:
        columns |= _fold_group(trained, group, now, new, hashes)
    for number, column in enumerate(features.columns):
        if features.schema.category(column.name).rows is not None and not trained.maps[number].identity:
            columns |= _fold_single(trained, number, now, new, config.map.seed)
    return now, columns


def _fold_group(
    trained: TrainedCtr, group: Group, now: FoldedColumns, new: NewSamples, hashes: Mapping[int, str]
) -> dict[str, ColumnCounts]:
    """Assign the new values of a group's columns; ``now`` gets them.

    Args:
        hashes: of the trained maps, by number of the column.
    """
    features, state = trained.features, now.groups.get(group.name) or empty_state(group)
    vocabularies: dict[str, Vocabulary] = {}
    ends: dict[str, NDArray[np.int64]] = {}
    for side, number in zip(SIDES, group.pair.columns, strict=True):
        own = group.columns[side]
        if own is not None and hashes[own] != group.column_map(side, group.trained).content_hash:
            raise DataError(
                f"the map of column {features.columns[own].name!r} is not what this program makes of the run's data and settings; "
                "run 'graphhash train' again"
            )
        known = trained.vocabularies[number] if own is None else now.vocabularies.get(own, trained.vocabularies[number])
        vocabularies[side], ends[side] = _numbered(features, number, known, new.ids[number], grows=own is not None)
    n_before = {
        side: len(now.vocabularies.get(number, trained.vocabularies[number]))
        for side, number in zip(SIDES, group.pair.columns, strict=True)
    }
    n_new = {side: len(vocabularies[side]) - n_before[side] if group.columns[side] is not None else 0 for side in SIDES}
    n_trained = dict(zip(SIDES, group.inputs.graph.shape, strict=True))
    pairs = np.column_stack([ends["users"], ends["items"]])[new.labels > 0]
    untrained = (pairs[:, 0] >= n_trained["users"]) | (pairs[:, 1] >= n_trained["items"])
    pairs = pairs[(pairs >= 0).all(1) & untrained]
    state, assigned = assign_group(group, state, n_new, pairs)
    now.groups[group.name] = state
    counts: dict[str, ColumnCounts] = {}
    for side, own in group.columns.items():
        if own is None:
            continue
        column, n_folded = features.columns[own], int(assigned[side].sum())
        counts[column.name] = {"new": n_new[side], "folded_in": n_folded, "unassigned": n_new[side] - n_folded}
        if n_folded:
            kept = np.concatenate([np.ones(n_before[side], np.bool_), assigned[side]])
            now.vocabularies[own] = vocabularies[side].only(kept)
            if own in group.tables:
                now.rows[own] = mixed_rows(group, side, state)
                now.maps[own] = full_map(len(now.vocabularies[own]) + column.has_missing)
            else:
                now.maps[own] = column_order(column, group.column_map(side, state.maps))
    return counts


def _fold_single(
    trained: TrainedCtr, number: int, now: FoldedColumns, new: NewSamples, seed: int
) -> dict[str, ColumnCounts]:
    """Hash the new values of a column that the schema hashes by itself; ``now`` gets them."""
    features, column = trained.features, trained.features.columns[number]
    known = now.vocabularies.get(number, trained.vocabularies[number])
    vocabulary, _ = _numbered(features, number, known, new.ids[number], grows=True)
    made, n_assigned = single_hash(features, number, vocabulary, seed, trained.maps[number])
    n_new, n_folded = len(vocabulary) - len(known), n_assigned - column.has_missing - len(known)
    if n_folded:
        kept = np.arange(len(vocabulary)) < n_assigned - column.has_missing
        now.vocabularies[number] = vocabulary if kept.all() else vocabulary.only(kept)
        now.maps[number] = column_order(column, made)
    return {column.name: {"new": n_new, "folded_in": n_folded, "unassigned": n_new - n_folded}}


def _numbered(
    features: Features, number: int, known: Vocabulary, ids: pa.Array, *, grows: bool
) -> tuple[Vocabulary, NDArray[np.int64]]:
    """The vocabulary of a column with what is new in ``ids`` behind it, and the number of every value.

    Numbers are those of trained entries, the missing value's among them, then of folded-in ids, then of new ones. -1 is a value without
    one: an id that occurs in fewer rows than training asks for, and any new id of a column that does not grow.
    """
    column = features.columns[number]
    missing = ids.is_null().to_numpy(zero_copy_only=False)
    there = as_ids(ids.drop_null()) if not missing.all() else ids.drop_null()
    rows = known.rows(there, missing="fallback").astype(np.int64) if len(there) else np.empty(0, np.int64)
    is_new, vocabulary = rows == len(known), known
    if grows and is_new.any():
        counted = pc.value_counts(there.filter(pa.array(is_new)))
        frequent = pc.greater_equal(counted.field("counts"), features.schema.category(column.name).min_count or 1)
        added = Vocabulary.from_ids(counted.field("values").filter(frequent))
        rows[is_new] += added.rows(there.filter(pa.array(is_new)), missing="fallback")
        rows[rows == len(known) + len(added)] = -1
        text = pa.large_string() if known.kind == "string" else pa.int64()
        vocabulary = Vocabulary(pa.concat_arrays([known.ids.cast(text), added.ids.cast(text)]))
    else:
        rows[is_new] = -1
    # The missing value's entry is the last trained one.
    n_trained = column.n_ids - column.has_missing
    rows = np.where(rows >= n_trained, rows + column.has_missing, rows)
    numbers = np.full(len(ids), n_trained if column.has_missing else -1, np.int64)
    numbers[~missing] = rows
    return vocabulary, numbers
