"""Publish a trained retrieval model as a bundle: write the graph, compare it with the model, then put it in place.

ONNX Runtime and the trained model must agree on a sample of users before anything is published
(`pipeline.retrieval.agreement`), and a failure of any kind leaves the previous bundle as it was.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from graphhash.errors import ArgumentError
from graphhash.graph.vocabulary import Vocabulary
from graphhash.maps.bucket_map import BucketMap, full_map
from graphhash.models.lightgcn import LightGCN
from graphhash.models.mf import RetrievalModel, VectorModel
from graphhash.nn.compressed import CompressedEmbedding
from pipeline.export.graph import describe
from pipeline.export.ids import inside_bytes
from pipeline.export.publish import oov_id, save_graph, staged_bundle
from pipeline.export.requests import answered, onnx_facts
from pipeline.retrieval.agreement import TOLERANCE, check_agreement
from pipeline.retrieval.defaults import CUTOFFS, measures_of
from pipeline.retrieval.models import name_of
from pipeline.retrieval.onnx_graph import retrieval_graph
from pipeline.retrieval.onnx_parts import materialized_bytes, stores_vectors
from pipeline.retrieval.stored import as_shipped
from serving.bundle import write_manifest
from serving.errors import BundleError
from serving.manifest import MANIFEST, METADATA, identity
from serving.retriever import Retriever

TIE_RULE = "higher score first, equal scores by lower item row"
PRECISIONS = ("float32", "float16", "int8", "int4")
RUNTIMES = ("auto", "materialized", "compressed")
# `auto` materializes while ONNX Runtime needs no more for it at load than this.
_MOST_LOAD_BYTES = 2**32

_EXAMPLE_K = 3


@dataclass(frozen=True)
class TrainedRetrieval:
    """A trained model, and what it was trained on.

    Attributes:
        model: its OOV rows filled; on any device.
        user_map, item_map: the maps the model was made with, which know the weights' codebook.
        users, items: raw ids of the maps' entries.

    Raises:
        ArgumentError: model, maps and vocabularies do not belong together.
    """

    model: RetrievalModel
    user_map: BucketMap
    item_map: BucketMap
    users: Vocabulary
    items: Vocabulary

    def __post_init__(self) -> None:
        _check_fit("user", self.model.user_embedding, self.user_map, self.users)
        _check_fit("item", self.model.item_embedding, self.item_map, self.items)

    @property
    def materialized_bytes(self) -> tuple[int, int]:
        """About what a session keeps of materialized vectors, and what it needs for them while it loads."""
        maps = self.user_map, self.item_map
        if isinstance(self.model, LightGCN):
            maps = full_map(len(self.users)), full_map(len(self.items))
        n_biases = 0 if self.model.item_bias is None else len(self.items)
        return materialized_bytes(*maps, self.model.user_embedding.dim, n_biases)


@dataclass(frozen=True)
class ExportOptions:
    """How a retrieval bundle is made.

    Attributes:
        precision: type of the tables in the file, "float32", "float16", "int8" or "int4"; the item bias is of the
            same type, or of 8 bits beside 4 (``graphhash.maps.quantization.rounded_bias``).
        runtime: "materialized", "compressed" (see `pipeline.retrieval.onnx_scores`), or "auto": materialized, where loading takes no more
            than 4 GiB.
        external_data_mib: tensors of more than this together go to a second file.
        n_check: users compared, an OOV one among them.
        seed: draws the users to compare on.

    Raises:
        ArgumentError: `precision` or `runtime` is not a choice, or `n_check` is below 1.
    """

    precision: str = "float32"
    runtime: str = "auto"
    external_data_mib: float = 1024
    n_check: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("precision", self.precision, PRECISIONS),
            ("runtime", self.runtime, RUNTIMES),
        ):
            if value not in choices:
                raise ArgumentError(f"{name} is {value!r}; use one of {', '.join(choices)}")
        if self.n_check < 1:
            raise ArgumentError(f"n_check is {self.n_check}; compare at least 1 user")


DEFAULT_OPTIONS = ExportOptions()


def export_retrieval(
    trained: TrainedRetrieval,
    out: Path,
    options: ExportOptions = DEFAULT_OPTIONS,
    *,
    metrics: dict[str, Any],
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """Write the bundle `out`, whole or not at all; a bundle that was there is replaced at the end.

    Args:
        metrics, provenance: for the manifest; JSON values.

    Returns: the manifest.

    Raises:
        BundleError: scores or ids of ONNX Runtime and the model disagree, a value does not fit the precision,
            or `out` is something else than a bundle. Nothing is published then.
    """
    users, items = trained.users, trained.items
    with staged_bundle(Path(out).absolute()) as folder:
        runtime = _chosen_runtime(trained, options)
        graph = _graph(trained, options.precision, runtime)
        content = _content(trained, graph, options.precision, runtime)
        content |= {"precision_loss": precision_loss(metrics), "metrics": metrics, "provenance": provenance}
        onnx.helper.set_model_props(graph, {METADATA: identity(content)})
        _save(graph, folder, users, items, options.external_data_mib)
        del graph
        write_manifest(folder, content | {"example": {}})
        with torch.no_grad():
            scores_of = as_shipped(copy.deepcopy(trained.model).cpu(), options.precision).score_all_items()
        retriever = Retriever(folder, provider="cpu")
        check_agreement(retriever, scores_of, users, items, options.n_check, np.random.default_rng(options.seed))
        (folder / MANIFEST).unlink()
        return write_manifest(folder, content | {"example": _example(retriever, users, items)})


def _example(retriever: Retriever, users: Vocabulary, items: Vocabulary) -> dict[str, Any]:
    """A request of a known user and of an OOV one, and its answer; the first item is excluded for one, and no item for the other."""
    user_ids = [users.take([0])[0], oov_id(users)]
    padding, first = oov_id(items), items.take([0])[0]
    types: dict[str, Any] = {"int64": np.int64, "string": object}
    inputs = {
        "user_id": np.array(user_ids, types[users.kind]),
        "k": np.array(min(_EXAMPLE_K, len(items)), np.int64),
        "exclude_item_id": np.array([[first], [padding]], types[items.kind]),
        "candidate_item_id": np.array([[first, padding]], types[items.kind]),
    }
    outputs = list(retriever.manifest["outputs"])
    answer = retriever.run(outputs, inputs)
    # JSON has no infinity: with one item, or two, a slot of an excluded one would be left over.
    n_open = int(np.isfinite(answer[outputs.index("score")]).all(axis=0).sum())
    if n_open < inputs["k"]:
        inputs["k"] = np.array(n_open, np.int64)
        answer = retriever.run(outputs, inputs)
    return answered(outputs, answer, inputs)


def _chosen_runtime(trained: TrainedRetrieval, options: ExportOptions) -> str:
    """ "materialized" or "compressed".

    Raises:
        BundleError: "compressed" was asked for, and the graph has to hold a vector per id.
    """
    if stores_vectors(trained.model):
        if options.runtime == "compressed":
            raise BundleError(
                "embeddings of this kind are exported as a vector per id: runtime=compressed would save nothing; "
                "use materialized"
            )
        return "materialized"
    if options.runtime != "auto":
        return options.runtime
    return "materialized" if trained.materialized_bytes[1] <= _MOST_LOAD_BYTES else "compressed"


def _graph(trained: TrainedRetrieval, precision: str, runtime: str) -> onnx.ModelProto:
    """The graph of a model, or of the vectors of all ids where it cannot compute them from what is stored."""
    model: RetrievalModel = trained.model
    if stores_vectors(model):
        # Vectors from parameters as they are stored, which are not rounded once more.
        shipped = as_shipped(copy.deepcopy(model).cpu(), precision)
        assert isinstance(shipped, RetrievalModel)
        model, precision = shipped, "float32"
    return retrieval_graph(model, trained.user_map, trained.item_map, trained.users, trained.items, precision, runtime)


def _content(trained: TrainedRetrieval, graph: onnx.ModelProto, precision: str, runtime: str) -> dict[str, Any]:
    """The manifest but for metrics and provenance."""
    model, users, items = trained.model, trained.users, trained.items
    maps = {"users": trained.user_map, "items": trained.item_map}
    return {
        "task": "retrieval",
        "inputs": describe(graph.graph.input),
        "outputs": describe(graph.graph.output),
        "id_types": {"user_id": users.kind, "item_id": items.kind},
        "padding_item_id": oov_id(items),
        "ids_as_text": {"padding_item_id": str(oov_id(items))},
        "empty_inputs": {"exclude_item_id": ["batch", 0], "candidate_item_id": [1, 0]},
        "onnx": onnx_facts(),
        "n_users": len(users),
        "n_items": len(items),
        "dim": model.user_embedding.dim,
        "model": name_of(model),
        "runtime": _runtime(model, runtime, graph, *trained.materialized_bytes),
        "method": {side: bucket_map.method for side, bucket_map in maps.items()},
        "n_buckets": {side: bucket_map.n_buckets for side, bucket_map in maps.items()},
        "indices_per_id": {side: bucket_map.indices_per_id for side, bucket_map in maps.items()},
        "item_bias": model.item_bias is not None,
        "cosine": isinstance(model, VectorModel) and model.cosine,
        "precision": precision,
        "tie_rule": TIE_RULE,
        "tolerance": {"absolute": TOLERANCE, "relative": TOLERANCE},
        "bucket_map_hashes": {side: bucket_map.content_hash for side, bucket_map in maps.items()},
        "vocabulary_hashes": {"users": users.content_hash, "items": items.content_hash},
    }


def precision_loss(metrics: dict[str, Any]) -> dict[str, float | None]:
    """Recall at the first cut-off, as stored and in float32, as the evaluation measured them, and what is lost of the latter.

    None where it did not.
    """
    key = measures_of(metrics.get("k", CUTOFFS))[0].key
    stored, exact = metrics.get(key), metrics.get(f"{key}_float32")
    lost = 1 - stored / exact if stored is not None and exact else None
    return {key: stored, f"{key}_float32": exact, "relative": lost}


def _runtime(
    model: RetrievalModel, mode: str, graph: onnx.ModelProto, kept_bytes: int, load_bytes: int
) -> dict[str, Any]:
    """The manifest's account of what a choice costs."""
    stored = sum(len(tensor.raw_data) for tensor in graph.graph.initializer)
    costs = {
        "materialized": "ONNX Runtime makes a float32 vector of every item when it loads the file, and keeps them all, and so it does "
        "with users and with small tables, each up to 64 MiB",
        "compressed": "table and map stay in memory as they are stored, and every request reads the items' vectors from them, which takes "
        "two to five times as long",
    }
    cost = costs[mode]
    if stores_vectors(model):
        cost += "; the file holds a float32 vector per user and item, and not what the method stores"
    if isinstance(model, LightGCN):
        cost += "; the file holds propagated vectors, one per user and item, which is the full catalogue's size in this precision"
    return {
        "mode": mode,
        "stored_bytes": stored,
        "resident_bytes": stored + (kept_bytes if mode == "materialized" else 0),
        "load_bytes": stored + (load_bytes if mode == "materialized" else 0),
        "cost": cost,
    }


def _check_fit(side: str, embedding: CompressedEmbedding, bucket_map: BucketMap, vocabulary: Vocabulary) -> None:
    if len(vocabulary) != bucket_map.n_ids:
        raise ArgumentError(
            f"{len(vocabulary)} {side} ids, but the {side} map has {bucket_map.n_ids}; "
            "pass the vocabulary of the same run"
        )
    # The first part is the one that reads its table through the map.
    for part in embedding.bucket_parts()[:1]:
        # As large as the map, and cheap beside what a mix-up of two runs would cost.
        same = part.n_buckets == bucket_map.n_buckets and np.array_equal(part.rows.cpu().numpy(), bucket_map.rows)
        if same and np.array_equal(part.row_weights.cpu().numpy(), bucket_map.weights):
            continue
        raise ArgumentError(f"the {side} map is not the one the model was made with; pass the map of the same run")


def _save(graph: onnx.ModelProto, folder: Path, users: Vocabulary, items: Vocabulary, external_data_mib: float) -> None:
    save_graph(graph, folder, inside_bytes(users, decoded=False) + inside_bytes(items, decoded=True), external_data_mib)
