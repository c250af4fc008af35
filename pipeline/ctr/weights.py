"""A trained CTR model on disk, beside its bucket maps: plain arrays, no pickle.

Files (``RUN/methods/<method>/``): ``maps/NN.npz`` (bucket map of column NN, in the order of schema.json: categorical, then multi-valued)
and ``checkpoint/model.npz``: ``spec``, the model's description as JSON, every weight by its name in the module, float32, and what training
has changed beside them, such as codes. Methods whose rows begin as mixtures have ``checkpoint/mixtures.npz`` as well: the tables that were
mixed, float32, shape (n_rows, dim), and the content hashes of the maps, by column, for :class:`Mixture`. Only updates read it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from graphhash.errors import DataError
from graphhash.graph.vocabulary import Vocabulary
from graphhash.maps.bucket_map import BucketMap
from graphhash.maps.embedding_spec import EmbeddingSpec
from graphhash.maps.folded_map import FoldedMap, FoldIndex
from graphhash.models.ctr import CtrModel, CtrSpec
from pipeline.ctr.data import Features
from pipeline.storage.atomic import write_json_atomic

MIXTURES = Path("checkpoint") / "mixtures.npz"


@dataclass(frozen=True, eq=False)
class TrainedCtr:
    """All that answers a raw row: model, maps, vocabularies and the statistics of dense columns.

    Args:
        model: on the CPU, in evaluation mode.
        maps: of every column, categorical, then multi-valued.
        vocabularies: of every column; ``features`` states the entries of a missing value and of OOV ids.
        features: columns, and mean and deviation of the dense ones.
    """

    model: CtrModel
    maps: list[BucketMap]
    vocabularies: list[Vocabulary]
    features: Features


@dataclass(frozen=True, eq=False)
class Mixture:
    """What the vectors of a column were mixed from in training, before they were stored as full rows.

    Args:
        table: float32, shape (n_rows, dim).
        map_hash: content hash of the bucket map that mixed its rows.
    """

    table: NDArray[np.float32]
    map_hash: str


def save_mixtures(mixtures: Mapping[int, Mixture], method_dir: Path) -> None:
    """Write mixtures, by the number of their columns."""
    (method_dir / MIXTURES).parent.mkdir(exist_ok=True)
    arrays: dict[str, Any] = {f"{number:02d}": mixture.table for number, mixture in mixtures.items()}
    arrays |= {f"{number:02d}_hash": np.array(mixture.map_hash) for number, mixture in mixtures.items()}
    np.savez(method_dir / MIXTURES, **arrays)


def load_mixtures(method_dir: Path) -> dict[int, Mixture]:
    """What :func:`save_mixtures` wrote.

    Raises:
        DataError: it is damaged, or not there, as where an earlier version trained.
    """
    path = method_dir / MIXTURES
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = [name for name in arrays.files if not name.endswith("_hash")]
            return {int(name): Mixture(arrays[name], str(arrays[f"{name}_hash"])) for name in names}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(
            f"{path}: not readable ({error}), as after a training by an earlier version; remove {method_dir}, and run 'graphhash run' again"
        ) from error


def save_maps(maps: Sequence[BucketMap], method_dir: Path) -> None:
    """Write the bucket maps of all columns."""
    (method_dir / "maps").mkdir(exist_ok=True)
    for number, bucket_map in enumerate(maps):
        save_map(bucket_map, method_dir, number)


def save_map(bucket_map: BucketMap, method_dir: Path, number: int) -> None:
    """Write the map of one column."""
    bucket_map.save(method_dir / "maps" / f"{number:02d}.npz")


def load_maps(method_dir: Path, features: Features) -> list[BucketMap]:
    """The bucket maps of a method.

    Raises:
        DataError: one is missing, damaged, or of another vocabulary.
    """
    maps = [BucketMap.load(method_dir / "maps" / f"{number:02d}.npz") for number in range(len(features.all_columns))]
    for column, bucket_map in zip(features.all_columns, maps, strict=True):
        if bucket_map.n_ids != column.n_ids:
            raise DataError(
                f"{method_dir}: the map of {column.name!r} has {bucket_map.n_ids} ids, the log {column.n_ids}; run 'graphhash train' again"
            )
    return maps


def save_folds(folder: Path, folded: Mapping[int, FoldedMap]) -> None:
    """Write maps by folds, by the number of their columns, as plain ``.npy`` files, which can be mapped."""
    for number, each in folded.items():
        assert each.index is not None
        own = folder / f"{number:02d}"
        own.mkdir()
        for name in ("rows", "codebook", "codes"):
            np.save(own / f"{name}.npy", getattr(each, name))
        np.save(own / "masks.npy", each.index.masks)
        facts = {"n_buckets": each.n_buckets, "n_folds": each.index.n_folds}
        write_json_atomic(own / "folded.json", facts, durable=False)


def load_folds(folder: Path) -> tuple[dict[int, FoldedMap], NDArray[np.uint8]]:
    """What :func:`save_folds` wrote, and ``fold.npy``, the fold of every training row; maps are memory maps, which workers share."""
    folded = {}
    for own in sorted(path for path in folder.iterdir() if path.is_dir()):
        # Private: PyTorch takes no array that is read-only, and nobody writes into these.
        rows, codebook, codes, masks = (
            np.load(own / f"{name}.npy", mmap_mode="c", allow_pickle=False)
            for name in ("rows", "codebook", "codes", "masks")
        )
        facts = json.loads((own / "folded.json").read_text(encoding="utf-8"))
        folded[int(own.name)] = FoldedMap(rows, codebook, codes, facts["n_buckets"], FoldIndex(masks, facts["n_folds"]))
    return folded, np.load(folder / "fold.npy", allow_pickle=False)


def save_ctr(model: CtrModel, method_dir: Path) -> None:
    """Write the trained weights to ``method_dir/checkpoint/model.npz``."""
    weights = {name: value.detach().cpu().numpy() for name, value in stored_weights(model).items()}
    (method_dir / "checkpoint").mkdir(exist_ok=True)
    arrays: dict[str, Any] = {"spec": np.array(json.dumps(dataclasses.asdict(model.spec))), **weights}
    np.savez(method_dir / "checkpoint" / "model.npz", **arrays)


def stored_weights(model: CtrModel) -> dict[str, torch.Tensor]:
    """Parameters, and the buffers of embeddings that training has changed, by name in the module."""
    return dict(model.named_parameters()) | model.learned_buffers()


def load_ctr(method_dir: Path, ingest_dir: Path) -> TrainedCtr:
    """The trained model of a method with all that belongs to it.

    Raises:
        DataError: a file is missing, damaged, or does not go with the others.
    """
    features = Features.open(ingest_dir)
    maps = load_maps(method_dir, features)
    path = method_dir / "checkpoint" / "model.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            weights = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "spec"}
            spec = json.loads(str(arrays["spec"]))
        # Models of version 0.1 are not calibrated.
        weights.setdefault("calibration", torch.tensor([1.0, 0.0]))
        others = [(column, EmbeddingSpec(**embedding)) for column, embedding in spec.pop("embeddings", ())]
        spec |= {name: tuple(value) for name, value in spec.items() if isinstance(value, list)}
        spec["embeddings"] = tuple(others)
        model = CtrSpec(**spec).build(maps, len(features.dense), len(features.multi_valued))
        if set(weights) != set(stored_weights(model)):
            raise ValueError(f"it holds {', '.join(sorted(weights))}")
        # The maps are buffers and come from their own files.
        model.load_state_dict(weights, strict=False)
    except Exception as error:
        raise DataError(f"{path}: not a readable checkpoint ({error}); run 'graphhash train' again") from error
    return TrainedCtr(model.eval(), maps, [features.vocabulary(column) for column in features.all_columns], features)
