"""Methods that store trained full tables otherwise, in small types or as codes: what both tasks do for them. Nothing is trained."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphhash.maps.embedding_spec import EmbeddingSpec
from graphhash.maps.product import product_quantize
from graphhash.maps.vector_codes import MAX_CODEWORDS
from graphhash.nn.codes import CodeEmbedding
from pipeline.storage.atomic import link_or_copy, write_json_atomic

# What `compressed` says in the metrics of such a method.
AFTER_TRAINING = "after training"


def take_over(
    trained_as: str, source: Path, out: Path, files: Iterable[Path], further: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Begin the files of a method from those of the one that it is trained as.

    Args:
        source: folder of that one's training, or of its refit; ``history.json`` in it tells of the training as ``facts``.
        files: those that stay as they are, relative to ``source``.
        further: facts that are others than those of ``source``.

    Returns: the facts of the training, and ``trained_as`` and ``compressed``; they are in ``out/history.json`` as well.
    """
    history = json.loads((source / "history.json").read_text(encoding="utf-8"))
    history["facts"] |= {"trained_as": trained_as, "compressed": AFTER_TRAINING} | dict(further or {})
    for file in files:
        (out / file).parent.mkdir(exist_ok=True)
        link_or_copy(str(source / file), str(out / file))
    write_json_atomic(out / "history.json", history)
    return history["facts"]


def product_coded(vectors: NDArray[np.float32], spec: EmbeddingSpec, *, seed: int) -> CodeEmbedding:
    """An embedding of product codes of trained vectors.

    Args:
        vectors: of all ids, that of the OOV id last, shape (n_ids + 1, dim). Codebooks are made of the ids alone.
        spec: with the sizes ``codes_per_id``, ``rotated`` and, where codebooks have fewer than 256 codewords, ``users_codewords``.
        seed: of the k-means.

    Raises:
        ArgumentError: the codes do not divide the dim, or FAISS is not installed.
    """
    n_ids, dim = len(vectors) - 1, vectors.shape[1]
    n_codes, rotated = spec.sizes["codes_per_id"], bool(spec.sizes["rotated"])
    words = spec.sizes.get("users_codewords", MAX_CODEWORDS)
    codes = product_quantize(vectors, n_codes, n_codewords=words, rotated=rotated, n_trained=n_ids, seed=seed)
    # Fewer ids than codewords have fewer of them.
    made = CodeEmbedding(n_ids, dim, n_codes=n_codes, n_codewords=codes.codebooks.shape[1], rotated=rotated)
    made.set_codes(codes)
    return made


def trained_facts(method_dir: Path) -> dict[str, Any]:
    """Bytes that the training of a method held, computed and measured, and when its tables were compressed: ``"in training"``,
    ``"after training"`` of full tables, whose bytes these then are, or None, not at all.

    Args:
        method_dir: holds ``history.json``.
    """
    facts = json.loads((method_dir / "history.json").read_text(encoding="utf-8"))["facts"]
    return {key: facts[key] for key in ("training_bytes", "training_bytes_measured", "compressed")}
