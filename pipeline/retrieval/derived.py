"""Methods that store trained full tables otherwise: in small types, as product codes, or as additive codes. Nothing is trained for them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graphhash.errors import ArgumentError, DataError
from graphhash.maps.bucket_map import BucketMap
from graphhash.maps.embedding_spec import EmbeddingSpec
from graphhash.models.mf import MatrixFactorization
from graphhash.nn.codes import CodeEmbedding
from pipeline.distributed.shards import ShardedCsr
from pipeline.maps.derived import product_coded, take_over
from pipeline.maps.methods import METHODS, ResolvedMethod
from pipeline.retrieval.additive import encoded
from pipeline.retrieval.budget import GraphSize, resolve_method
from pipeline.retrieval.interactions import load_interactions
from pipeline.retrieval.maps import SIDES
from pipeline.retrieval.models import name_of
from pipeline.retrieval.weights import load_method, load_spec, save_model
from pipeline.task import TRAIN_PARTS, StageContext


def derive_method(context: StageContext, method: str, source: Path, out: Path) -> dict[str, Any]:
    """The files of a method (``pipeline.retrieval.train``) from those of the one that it is trained as.

    Args:
        source: folder of that one's training, or of its refit.

    Returns: what the training returned, and ``trained_as`` and ``compressed``.

    Raises:
        DataError: the model cannot be product-quantized, or FAISS is missing.
    """
    spec = METHODS[method]
    assert spec.trained_as is not None
    files = [Path(f"{side}.npz") for side in SIDES]
    files += [Path("checkpoint") / "model.npz"] if spec.embedding == "bucket" else []
    facts = take_over(spec.trained_as, source, out, files)
    if spec.embedding != "bucket":
        _quantize(context, method, source, out)
    return facts


def _quantize(context: StageContext, method: str, source: Path, out: Path) -> None:
    """Store the trained vectors of both sides as codes."""
    resolved = _resolved(context, method)
    trained, users, items = _trained(context, method, source)
    if resolved.embedding.kind == "additive":
        spec = replace(load_spec(source), embedding=resolved.embedding)
        degrees = np.asarray(load_interactions(context.ingest_dir, TRAIN_PARTS).count_nonzero(axis=0))
        save_model(encoded(trained, spec, resolved.embedding, degrees), spec, out)
        return
    try:
        embeddings = [_quantized(trained, side, resolved) for side in ("user", "item")]
    except ArgumentError as error:
        raise DataError(f"method {method!r}: {error}") from error
    # Fewer ids than codewords have fewer of them.
    words = {f"{side}_codewords": made.n_codewords for side, made in zip(SIDES, embeddings, strict=True)}
    embedding = EmbeddingSpec("product", {**resolved.embedding.sizes, **words}, resolved.embedding.seed)
    spec = replace(load_spec(source), embedding=embedding)
    model = spec.build(users, items, None)
    assert isinstance(model, MatrixFactorization)
    model.user_embedding, model.item_embedding, model.item_bias = *embeddings, trained.item_bias
    save_model(model, spec, out)


def _resolved(context: StageContext, method: str) -> ResolvedMethod:
    graph = ShardedCsr.open(context.ingest_dir / "train")
    size = GraphSize(graph.n_rows, graph.n_cols, graph.n_edges)
    return resolve_method(context.config, method, size, rows_of_clustering(context))


def _trained(context: StageContext, method: str, source: Path) -> tuple[MatrixFactorization, BucketMap, BucketMap]:
    """The trained model, and its maps.

    Raises:
        DataError: it is none whose scores are products of the vectors of an embedding.
    """
    trained, users, items = load_method(source, context.ingest_dir)
    if not isinstance(trained, MatrixFactorization):
        raise DataError(f"method {method!r} needs train.model=mf, got {name_of(trained)}")
    return trained, users, items


@torch.no_grad()
def _quantized(trained: MatrixFactorization, side: str, resolved: ResolvedMethod) -> CodeEmbedding:
    """The vectors of one side, that of the OOV id among them, product-quantized."""
    embedding, spec = getattr(trained, f"{side}_embedding"), resolved.embedding
    vectors = embedding(torch.arange(embedding.n_ids + 1, device=embedding.device)).cpu()
    # The model looks at directions alone where it scores by cosines.
    vectors = torch.nn.functional.normalize(vectors, dim=-1) if trained.cosine else vectors
    words = {"users_codewords": spec.sizes[f"{side}s_codewords"]}
    return product_coded(vectors.numpy(), replace(spec, sizes={**spec.sizes, **words}), seed=spec.seed)


def rows_of_clustering(context: StageContext) -> int:
    """Rows of the clustering, both sides together; 0 where it has not run."""
    file = context.cluster_dir / "cluster.json"
    if not file.is_file():
        return 0
    facts = json.loads(file.read_text(encoding="utf-8"))
    return facts["user_rows"] + facts["item_rows"]
