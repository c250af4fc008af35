"""The trained weights of a method on disk: ``checkpoint/model.npz`` beside the bucket maps, plain arrays, no pickle.

``model`` names the model, ``dim`` is that of the embeddings, ``embedding`` their kind and sizes as JSON, ``n_layers`` is LightGCN's,
``cosine`` says whether scores are cosines; ``parts`` are the parts of the log that it was trained on; ``user_table`` and ``item_table`` are
float32, shape (n_buckets, dim), the OOV row last, and there is no ``item_table`` where both sides share one; ``item_bias`` is float32,
shape (n_items,), and there only where it was trained;
every other array is a weight of the model's own layers, or of an embedding of another kind, by its name in the module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from graphhash.errors import DataError
from graphhash.maps.bucket_map import BucketMap
from graphhash.maps.embedding_spec import EmbeddingSpec
from graphhash.models.mf import MatrixFactorization, RetrievalModel
from graphhash.nn.codes import CodeEmbedding
from pipeline.retrieval.interactions import load_interactions
from pipeline.retrieval.models import MODELS, ModelSpec
from pipeline.task import TRAIN_PARTS

TABLES = {"user_table": "user_embedding.table", "item_table": "item_embedding.table"}


def save_model(model: RetrievalModel, spec: ModelSpec, method_dir: Path) -> None:
    """Write the trained weights to ``method_dir/checkpoint/model.npz``."""
    weights = {name: value.detach().cpu().numpy() for name, value in _stored_weights(model).items()}
    arrays: dict[str, Any] = {stored: weights.pop(name) for stored, name in TABLES.items() if name in weights} | weights
    (method_dir / "checkpoint").mkdir(exist_ok=True)
    settings: dict[str, Any] = {
        "model": np.array(spec.kind),
        "dim": np.int64(spec.dim),
        "embedding": np.array(spec.embedding.to_json()),
        "n_layers": np.int64(spec.n_layers),
        "cosine": np.bool_(spec.cosine),
        "parts": np.array(spec.parts),
    }
    np.savez(method_dir / "checkpoint" / "model.npz", **settings, **arrays)


def _stored_weights(model: RetrievalModel) -> dict[str, torch.Tensor]:
    """Parameters, and the buffers of embeddings that training has changed, by name in the module."""
    weights: dict[str, torch.Tensor] = dict(model.named_parameters())
    for side in ("user_embedding", "item_embedding"):
        buffers = getattr(model, side).learned_buffers()
        weights |= {f"{side}.{name}": buffer for name, buffer in buffers.items()}
    return weights


def load_method(method_dir: Path, ingest_dir: Path) -> tuple[RetrievalModel, BucketMap, BucketMap]:
    """The trained model of a method and its bucket maps of users and items.

    Args:
        ingest_dir: holds the interactions that LightGCN propagates over.

    Raises:
        DataError: a file is missing, damaged, or of another map.
    """
    users, items = BucketMap.load(method_dir / "users.npz"), BucketMap.load(method_dir / "items.npz")
    path = method_dir / "checkpoint" / "model.npz"
    try:
        spec, weights = _read(path)
        state = {TABLES.get(name, name): torch.from_numpy(array) for name, array in weights.items()}
        graph = load_interactions(ingest_dir, spec.parts) if spec.kind == "lightgcn" else None
        model = spec.build(users, items, graph)
        if set(state) != set(_stored_weights(model)):
            raise ValueError(f"it holds {', '.join(sorted(weights))}")
        # The maps are buffers and come from their own files.
        model.load_state_dict(state, strict=False)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path}: not a readable checkpoint ({error}); run 'graphhash train' again") from error
    return model.eval(), users, items


def load_spec(method_dir: Path) -> ModelSpec:
    """What the trained model of a method is; ``method_dir`` as in :func:`load_method`."""
    return _read(method_dir / "checkpoint" / "model.npz")[0]


def _read(path: Path) -> tuple[ModelSpec, dict[str, NDArray]]:
    """What a stored model is, and its weights by stored name."""
    with np.load(path, allow_pickle=False) as arrays:
        weights = {name: arrays[name] for name in arrays.files}
    kind, dim, n_layers = str(weights.pop("model")), int(weights.pop("dim")), int(weights.pop("n_layers"))
    embedding = EmbeddingSpec.from_json(str(weights.pop("embedding")))
    # Trainings before there were cosines have none.
    cosine = bool(weights.pop("cosine", False))
    parts = tuple(map(str, weights.pop("parts", TRAIN_PARTS)))
    if kind not in MODELS:
        raise ValueError(f"model {kind!r} is unknown")
    spec = ModelSpec(kind, dim, "item_bias" in weights, n_layers, 0, embedding, cosine, parts=parts)
    return spec, weights


@torch.no_grad()
def with_more_ids(
    trained: MatrixFactorization,
    maps: Mapping[str, BucketMap],
    item_bias: NDArray[np.float32],
    rows: Mapping[str, NDArray[np.float32]],
) -> MatrixFactorization:
    """A trained model with ids that were folded in later; its tables are the trained ones, and rows of folded-in ids.

    Numbers of the new ids' own (``graphhash.nn.residual``) are zero.

    Args:
        maps: by side, "users" and "items", with the new ids after the trained ones.
        item_bias: of the new items, shape (n_new,). Where the model has none, and these are not all zero, trained items get zeros.
        rows: by side, of folded-in ids, float32, shape (n_rows, dim); they stand before the out-of-vocabulary row. Where vectors are
            stored as codes, they get codes.
    """
    has_bias = trained.item_bias is not None or bool(item_bias.any())
    dim, cosine, spec = trained.user_embedding.dim, trained.cosine, trained.embedding_spec
    both = maps["users"], maps["items"]
    model = MatrixFactorization(*both, dim, item_bias=has_bias, seed=0, embedding=spec, cosine=cosine)
    weights: dict[str, torch.Tensor] = dict(trained.named_parameters())
    if has_bias:
        weights.setdefault("item_bias", torch.zeros(trained.item_embedding.n_ids))
    more = {"item_bias": (len(weights.get("item_bias", ())), item_bias)}
    more |= {f"{side}_embedding.table": (-1, rows[f"{side}s"]) for side in ("user", "item")}
    for side in ("user_embedding", "item_embedding"):
        name = f"{side}.own.table"
        if name in weights:
            n_new = getattr(model, side).n_ids - getattr(trained, side).n_ids
            more[name] = (-1, np.zeros((n_new, weights[name].shape[1]), np.float32))
    for name, parameter in model.named_parameters():
        place, added = more.get(name, (0, item_bias[:0]))
        parts: Sequence[torch.Tensor] = (
            [weights[name]]
            if not len(added)
            else [weights[name][:place], torch.from_numpy(added).to(parameter), weights[name][place:]]
        )
        parameter.copy_(torch.cat(list(parts)))
    for side in ("user", "item"):
        before, after = (getattr(of, f"{side}_embedding") for of in (trained, model))
        if isinstance(after, CodeEmbedding):
            # A row of the map is one of the trained ids, of the folded-in ones, or that of OOV ids, in this order.
            codes = torch.cat([before.codes[:-1], before.encoded(rows[f"{side}s"]), before.codes[-1:]])
            after.codes.copy_(codes[torch.from_numpy(maps[f"{side}s"].rows[:, 0].astype(np.int64))])
    return model
