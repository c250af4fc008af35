"""Small CTR models with every kind of column, and the obvious way from raw values to their entries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from graphhash.graph.vocabulary import Vocabulary
from graphhash.maps.bucket_map import full_map
from graphhash.models.ctr import CtrSpec, FeatureBatch
from pipeline.ctr.data import Column, DenseColumn, Features, Part, batch_of
from pipeline.ctr.export import ExportOptions, export_ctr
from pipeline.ctr.schema import Category, CtrSchema, MultiValued
from pipeline.ctr.weights import TrainedCtr
from tests.helpers.ctr_batches import N_ITEMS, N_USERS, draw_statistics, pair_maps

DENSE = (DenseColumn("price", 10.0, 2.5), DenseColumn("seen at", 1.6e9, 40.0))
MODELS = {
    "widedeep": {},
    "deepfm": {},
    "dcnv2 parallel": {},
    "dcnv2 stacked": {"structure": "stacked"},
    "dcnv2 low-rank": {"cross_rank": 3},
    "dlrm": {},
    "finalnet": {},
}


def small_ctr(
    model: str = "dlrm", kind: str = "double_soft", *, dense: bool = True, multi_valued: bool = True, **sizes: Any
) -> TrainedCtr:
    """A model over users and items, two small columns, an hour, two multi-valued features and two numbers, with random weights.

    Missing values are known in `user` and `device` and OOV in the others.
    """
    vocabularies = {
        "user": Vocabulary([*(f"u{n}" for n in range(N_USERS - 3)), "日本", " "]),
        "device": Vocabulary(np.array([-(2**63), 2**63 - 1, 0])),
        "item": Vocabulary(np.arange(10, 10 + 2 * N_ITEMS, 2)),
        "hour_hour": Vocabulary(np.arange(24)),
        "only missing": Vocabulary(np.empty(0, np.int64)),
        "genres": Vocabulary(["war", "drama", "comedy"]),
        "tags": Vocabulary(np.array([5, 6, 9, 2**40])),
    }
    has_missing = {"user", "device", "only missing"}
    widths = {"genres": 2, "tags": 3} if multi_valued else {}
    if not multi_valued:
        del vocabularies["genres"], vocabularies["tags"]
    columns = [
        Column(
            name, v.kind, len(v) + (name in has_missing), name in has_missing, "", "", v.content_hash, widths.get(name)
        )
        for name, v in vocabularies.items()
    ]
    users, items = pair_maps(kind)
    made = {"user": users, "item": items}
    maps = [made.get(column.name) or full_map(column.n_ids) for column in columns]
    categorical = [column for column in columns if column.width is None]
    schema = CtrSchema(
        "click",
        tuple(Category(column.name) for column in categorical),
        tuple(d.name for d in DENSE) if dense else (),
        tuple(MultiValued(name, "|" if name == "genres" else ",") for name in widths),
        (("hour", "%y%m%d%H"),),
    )
    features = Features(
        Path(),
        schema,
        tuple(categorical),
        tuple(c for c in columns if c.width is not None),
        DENSE if dense else (),
        "hash",
    )
    options = {
        "dim": 4,
        "hidden": (8, 4),
        "dense_hidden": (6,),
        "id_bias": True,
        "seed": 0,
        **MODELS.get(model, {}),
        **sizes,
    }
    built = CtrSpec(model.split()[0], **options).build(maps, len(features.dense), len(features.multi_valued))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=0.4, generator=generator)
    draw_statistics(built, generator)
    return TrainedCtr(built.eval(), maps, list(vocabularies.values()), features)


def raw_log(n: int, seed: int = 0) -> dict[str, list]:
    """Raw rows: known, OOV and missing values in every column."""
    rng = np.random.default_rng(seed)

    def pick(values: list) -> list:
        return [values[i] for i in rng.integers(len(values), size=n)]

    return {
        "user": pick(["u0", "u3", "u7", "日本", " ", "", None, "nobody", "u"]),
        "device": pick([-(2**63), 2**63 - 1, 0, 1, None, -7]),
        "item": pick([10, 12, 14, 16, 11, 9, -1, 2**62, None, 8 + 2 * N_ITEMS]),
        "hour_hour": pick([0, 13, 23, 24, None]),
        "only missing": pick([None, 3]),
        "genres": pick(
            [
                ["war"],
                [],
                None,
                ["war", "drama", "comedy"],
                ["comedy", "comedy"],
                ["new", "war"],
                ["", "war", None, "drama"],
            ]
        ),
        "tags": pick([[5, 6], [2**40], [], None, [1, 5, 6, 9], [9, 9, 9, 9, 9]]),
        "price": pick([10.0, 1, 13.25, None, float("nan")]),
        "seen at": pick([1_600_000_033, 1_599_999_900.5, None]),
    }


def entries_of(trained: TrainedCtr, log: dict[str, list]) -> FeatureBatch:
    """What ingestion makes of raw rows, one value at a time."""
    features = trained.features
    known = {c.name: (c, v.ids.to_pylist()) for c, v in zip(features.all_columns, trained.vocabularies, strict=True)}

    def entry(name: str, value: Any) -> int:
        column, ids = known[name]
        if value is None or value == "":
            return len(ids) if column.has_missing else column.n_ids
        return ids.index(value) if value in ids else column.n_ids

    n = len(log["user"])
    categorical = np.array([[entry(c.name, log[c.name][row]) for c in features.columns] for row in range(n)], np.int32)
    multi_valued = []
    for column in features.multi_valued:
        table = np.full((n, column.width), -1, np.int32)
        for row, values in enumerate(log[column.name]):
            kept = [entry(column.name, v) for v in values or [] if v is not None and v != ""][: column.width]
            table[row, : len(kept)] = kept
        multi_valued.append(table)
    dense = np.zeros((n, len(features.dense)), np.float32)
    for i, column in enumerate(features.dense):
        for row, value in enumerate(log[column.name]):
            dense[row, i] = 0 if value is None or value != value else (value - column.mean) / column.std
    part = Part(np.zeros(n, np.uint8), categorical.reshape(n, -1), dense, tuple(multi_valued), None)
    return batch_of(part.tensors(), len(part.multi_valued))


def as_part(batch: FeatureBatch) -> Part:
    """The batch as rows of a log."""
    arrays = batch.categorical.numpy().astype(np.int32), batch.dense.numpy()
    return Part(
        np.zeros(len(batch), np.uint8),
        *arrays,
        tuple(feature.numpy().astype(np.int32) for feature in batch.multi_valued),
        None,
    )


def precisions_for(trained: TrainedCtr, precision: str) -> list[str]:
    """As the run's "auto" has them: full columns are float32."""
    return (
        ["float32" if m.identity else precision for m in trained.maps]
        if precision == "int8"
        else [precision] * len(trained.maps)
    )


def export_small(trained: TrainedCtr, out: Path, precision: str = "int8", **options: Any) -> dict:
    named = {name: options.pop(name) for name in ("external_data_mib", "n_check", "seed") if name in options}
    given = {
        "part": as_part(entries_of(trained, raw_log(50))),
        "metrics": {"log_loss": 0.3},
        "provenance": {"run": "test"},
        **options,
    }
    return export_ctr(trained, precisions_for(trained, precision), out, ExportOptions("m", precision, **named), **given)
