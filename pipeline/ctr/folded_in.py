"""Values that updates have folded into a CTR run after its training, with everything that a bundle and a further update need of them.

The folder, ``RUN/update/<method>/``, which appears complete or not at all:

    columns/NN.parquet    Vocabulary of column NN: the trained ids, then the folded-in ones in the order of their updates
    columns/NN.npz        BucketMap of its entries: ids, the missing value where training has seen one, and OOV values
    columns/NN.npy        of a column that has a row for every id: the rows of the folded-in ones, float32 (n, dim)
    groups/G.npz          of group G (``pipeline.updates.columns_ctr``), in the order trained entries, folded-in ids: user_labels and
                          item_labels, int32 (n_levels, n); edges, int64 (n, 2), of positive samples with an end that is not trained
    groups/G_users.npz    BucketMap of both sides of the group's pair, in the same order; and G_items.npz
    update.json           train_key (of the training it belongs to), id, and a list of what each update did

The folder belongs to one training; another training starts without it. ``id`` changes with the folded-in values.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from graphhash.errors import DataError
from graphhash.graph.bipartite import SIDES
from graphhash.graph.vocabulary import Vocabulary
from graphhash.maps.bucket_map import BucketMap
from graphhash.models.ctr import CtrModel
from graphhash.models.ctr_fields import TableSlice
from graphhash.nn.embedding import BucketEmbedding
from pipeline.ctr.data import Column, Part
from pipeline.ctr.weights import TrainedCtr, stored_weights
from pipeline.storage.atomic import write_json_atomic

FACTS = "update.json"


@dataclass(frozen=True, eq=False)
class GroupState:
    """What later updates need of a group of columns that are assigned together.

    Args:
        maps: by side, of trained entries and then folded-in ids.
        labels: communities of the folded-in ids, by side, int32, shape (n_levels, n_folded_in).
        edges: numbers of both ends of positive samples, int64, shape (n, 2).
    """

    maps: dict[str, BucketMap]
    labels: dict[str, NDArray[np.int32]]
    edges: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class FoldedColumns:
    """The columns of a run that have folded-in values.

    Args:
        vocabularies, maps: by number of the column, of all entries, as in the files above.
        groups: by name.
        rows: by number of the column, of the folded-in ids, where each has a row of its own.
        updates: what each update did, for reports.
    """

    vocabularies: dict[int, Vocabulary] = field(default_factory=dict)
    maps: dict[int, BucketMap] = field(default_factory=dict)
    groups: dict[str, GroupState] = field(default_factory=dict)
    rows: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    updates: tuple[dict[str, Any], ...] = ()

    @classmethod
    def load(cls, folder: Path) -> FoldedColumns:
        """What :meth:`save` wrote.

        Raises:
            DataError: a file is missing or damaged.
        """
        numbers = sorted(int(file.stem) for file in (folder / "columns").glob("*.parquet"))
        vocabularies = {number: Vocabulary.load(folder / "columns" / f"{number:02d}.parquet") for number in numbers}
        maps = {number: BucketMap.load(folder / "columns" / f"{number:02d}.npz") for number in numbers}
        try:
            facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            groups = {name: _load_group(folder / "groups", name) for name in facts["groups"]}
            rows = {int(f.stem): np.load(f, allow_pickle=False) for f in sorted((folder / "columns").glob("*.npy"))}
            return cls(vocabularies, maps, groups, rows, tuple(facts["updates"]))
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise DataError(f"{folder}: not readable ({error}); remove it, and run 'graphhash update' again") from error

    def save(self, folder: Path, train_key: str) -> None:
        """Write the files above."""
        for part in ("columns", "groups"):
            (folder / part).mkdir()
        for number, vocabulary in self.vocabularies.items():
            vocabulary.save(folder / "columns" / f"{number:02d}.parquet")
            self.maps[number].save(folder / "columns" / f"{number:02d}.npz")
        for number, rows in self.rows.items():
            np.save(folder / "columns" / f"{number:02d}.npy", rows)
        for name, group in self.groups.items():
            for side in SIDES:
                group.maps[side].save(folder / "groups" / f"{name}_{side}.npz")
            np.savez(
                folder / "groups" / f"{name}.npz",
                edges=group.edges,
                user_labels=group.labels["users"],
                item_labels=group.labels["items"],
            )
        facts = {"train_key": train_key, "id": self.id, "groups": list(self.groups), "updates": list(self.updates)}
        write_json_atomic(folder / FACTS, facts)

    @property
    def id(self) -> str | None:
        """What a bundle depends on; None while no value is folded in."""
        if not self.vocabularies:
            return None
        parts = [
            f"{number}-{self.maps[number].content_hash}-{v.content_hash}" for number, v in self.vocabularies.items()
        ]
        parts += [hashlib.sha256(rows.tobytes()).hexdigest() for _number, rows in sorted(self.rows.items())]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]


def _load_group(folder: Path, name: str) -> GroupState:
    with np.load(folder / f"{name}.npz", allow_pickle=False) as arrays:
        labels = {"users": arrays["user_labels"], "items": arrays["item_labels"]}
        edges = arrays["edges"]
    return GroupState({side: BucketMap.load(folder / f"{name}_{side}.npz") for side in SIDES}, labels, edges)


def folded_columns_dir(run: Path, method: str) -> Path:
    """The folder of a method's folded-in values, which need not exist."""
    return run / "update" / method


def stored_facts(run: Path, method: str) -> Mapping[str, Any]:
    """``train_key`` and ``id`` of a method's updates; empty without any."""
    try:
        return json.loads((folded_columns_dir(run, method) / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def open_folded_columns(run: Path, method: str, train_key: str) -> FoldedColumns:
    """The values folded in so far; none where the updates there belong to another training."""
    belongs = stored_facts(run, method).get("train_key") == train_key
    return FoldedColumns.load(folded_columns_dir(run, method)) if belongs else FoldedColumns()


def with_folded_columns(trained: TrainedCtr, folded: FoldedColumns) -> TrainedCtr:
    """A trained model with the folded-in values: its weights are the trained ones, and new ids have the OOV value's scalars."""
    features = trained.features
    columns = [_longer(column, folded.vocabularies.get(number)) for number, column in enumerate(features.columns)]
    maps = [folded.maps.get(number, trained_map) for number, trained_map in enumerate(trained.maps)]
    vocabularies = [folded.vocabularies.get(number, known) for number, known in enumerate(trained.vocabularies)]
    n_trained = [column.n_ids for column in features.all_columns]
    n_multi_valued = len(features.multi_valued)
    model = trained.model.spec.build(maps, len(features.dense), n_multi_valued, n_trained=n_trained)
    _copy_weights(trained.model, model, [column.has_missing for column in features.all_columns], folded.rows)
    return TrainedCtr(model.eval(), maps, vocabularies, replace(features, columns=tuple(columns)))


def _longer(column: Column, vocabulary: Vocabulary | None) -> Column:
    if vocabulary is None:
        return column
    return replace(column, n_ids=len(vocabulary) + column.has_missing, hash=vocabulary.content_hash)


@torch.no_grad()
def _copy_weights(
    trained: CtrModel, model: CtrModel, has_missing: list[bool], rows: Mapping[int, NDArray[np.float32]]
) -> None:
    """Layers, and tables that have their shapes, are copied. In a table with a row for every id those of new ids stand between those of
    trained ids and of missing and OOV values: ``rows`` of vectors, and the OOV value's of scalars."""
    shapes = {name: weight.shape for name, weight in stored_weights(model).items()}
    weights = {name: weight for name, weight in stored_weights(trained).items() if weight.shape == shapes[name]}
    model.load_state_dict(weights, strict=False)
    columns = list(range(len(has_missing)))
    for new_part, old_part, numbers in (
        (model.fields, trained.fields, columns),
        (model.wide, trained.wide, columns),
        (model.bias, trained.bias, trained.bias_columns.tolist()),
    ):
        if new_part is None or old_part is None:
            continue
        for number, new, old in zip(numbers, new_part.columns, old_part.columns, strict=True):
            if not isinstance(new, (BucketEmbedding, TableSlice)):
                continue
            assert isinstance(old, (BucketEmbedding, TableSlice))
            n_last, n_new = 1 + has_missing[number], len(new.table) - len(old.table)
            added = old.table[-1:].expand(n_new, -1)
            if new_part is model.fields and number in rows:
                added = torch.from_numpy(rows[number])
            new.table.copy_(torch.cat([old.table[:-n_last], added, old.table[-n_last:]]))


def renumbered(part: Part, trained: tuple[Column, ...], now: tuple[Column, ...]) -> Part:
    """Rows of a part with the entries of missing and OOV values where longer vocabularies have them."""
    categorical = np.array(part.categorical)
    for number, (old, new) in enumerate(zip(trained, now, strict=True)):
        if new.n_ids != old.n_ids:
            values = part.categorical[:, number]
            last = old.n_ids - old.has_missing
            categorical[:, number] = np.where(values >= last, values + (new.n_ids - old.n_ids), values)
    return replace(part, categorical=categorical)
