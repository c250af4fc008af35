"""What the benchmark of serving asks of a bundle: requests of its own ids, their answers, and the same from PyTorch eager.

A retrieval bundle is asked for the best items of users, a CTR bundle for probabilities of rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from pipeline.export.ids import stored_ids
from pipeline.task import TRAIN_PARTS
from serving.bundle_model import Provider
from serving.errors import BundleError
from serving.manifest import MODEL
from serving.raw_ids import RawIds
from serving.retriever import Retriever
from serving.scorer import Scorer
from serving.tasks import open_bundle

if TYPE_CHECKING:
    from pipeline.ctr.data import Part
    from pipeline.ctr.weights import TrainedCtr

Answer = Callable[[Any], Any]


class Subject(Protocol):
    """A loaded bundle.

    Attributes:
        manifest, provider: as loaded.
        fields: names and types of the values that a request holds.
        unit: what a request holds many of.
        name: of the program, for tables.
    """

    manifest: dict[str, Any]
    provider: str
    fields: dict[str, Any]
    unit: str
    name: str

    def draw(self, rng: np.random.Generator, n: int) -> Any:
        """A request of n users or rows, known to the model, for `answer`."""

    def call(self, rng: np.random.Generator, n: int) -> tuple[str, list[Any]]:
        """Name of a method of the loaded bundle and its arguments, as JSON, for n users or rows."""

    def answer(self, request: Any) -> Any: ...

    def eager(self) -> Answer | None:
        """The trained model of the run folder around the bundle, from raw values; None where there is none, or of other ids."""


def subject_of(bundle: Path, provider: Provider, threads: int | None, k: int) -> Subject:
    """Load a bundle.

    Raises:
        BundleError: it is refused.
    """
    loaded = open_bundle(bundle, provider, threads)
    return CtrSubject(loaded, threads) if isinstance(loaded, Scorer) else RetrievalSubject(loaded, threads, k)


def check_comparable(bundle: Path, one: Subject, against: Path, other: Subject) -> None:
    """Raise BundleError if both bundles cannot take the same requests."""
    if one.fields != other.fields:
        raise BundleError(f"{against}: takes other ids or columns than {bundle}; compare bundles of the same log")


class RetrievalSubject:
    unit = "users"

    def __init__(self, loaded: Retriever, threads: int | None, k: int) -> None:
        self._loaded, self.path, self.threads, self.k = loaded, loaded.path, threads, k
        self.manifest, self.provider = loaded.manifest, loaded.provider
        self.fields = dict(self.manifest["id_types"])
        self.name = f"{self.manifest['model']} {self.manifest['method']['users']}"
        self._ids = stored_ids(onnx.load(str(self.path / MODEL)), "user")

    def draw(self, rng: np.random.Generator, n: int) -> NDArray:
        return self._ids[rng.integers(0, len(self._ids), n)]

    def call(self, rng: np.random.Generator, n: int) -> tuple[str, list[Any]]:
        return "recommend", [_plain(self.draw(rng, n)), self.k]

    def answer(self, request: NDArray) -> Any:
        return self._loaded.recommend(request, self.k)

    def eager(self) -> Answer | None:
        run = self.path.resolve().parent
        method = _method_dir(run, self.manifest)
        if method is None:
            return None
        import torch

        from graphhash.graph.vocabulary import Vocabulary
        from pipeline.retrieval.stored import as_shipped
        from pipeline.retrieval.weights import load_method

        users, items = (Vocabulary.load(run / "ingest" / f"{side}.parquet") for side in ("users", "items"))
        if users.content_hash != self.manifest["vocabulary_hashes"]["users"]:
            return None
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        with torch.no_grad():
            scores_of = as_shipped(load_method(method, run / "ingest")[0], self.manifest["precision"]).score_all_items()
        item_ids, k = items.take(np.arange(len(items))), min(self.k, len(items))

        @torch.no_grad()
        def answer(raw: NDArray) -> tuple[NDArray, NDArray]:
            rows = torch.from_numpy(users.rows(raw, missing="fallback").astype(np.int64))
            best = torch.topk(scores_of(rows), k)
            return item_ids[best.indices.numpy()], best.values.numpy()

        return answer


class CtrSubject:
    unit = "rows"

    def __init__(self, loaded: Scorer, threads: int | None) -> None:
        self._loaded, self.path, self.threads = loaded, loaded.path, threads
        self.manifest, self.provider = loaded.manifest, loaded.provider
        self.fields = {column["name"]: (column["role"], column["dtype"]) for column in self.manifest["columns"]}
        self.name = f"{self.manifest['model']} {self.manifest['method']}"
        graph = onnx.load(str(self.path / MODEL))
        columns = [column for column in self.manifest["columns"] if column["role"] != "dense"]
        self._ids: dict[str, NDArray] = {}
        for number, column in enumerate(columns):
            # Where a missing value is the only one that is known, the graph has no encoder.
            with contextlib.suppress(BundleError):
                self._ids[column["name"]] = stored_ids(graph, f"/{number}")

    def draw(self, rng: np.random.Generator, n: int) -> dict[str, Any]:
        """Ids uniformly from the vocabulary, column by column; numbers with the mean and deviation of training; lists of one value."""
        request: dict[str, Any] = {}
        for column in self.manifest["columns"]:
            name = column["name"]
            if column["role"] == "dense":
                request[name] = rng.normal(column["mean"], column["std"], n)
            elif name not in self._ids:
                request[name] = np.full(n, None, object)
            else:
                values = self._ids[name][rng.integers(0, len(self._ids[name]), n)]
                request[name] = values if column["role"] == "categorical" else [[value] for value in _plain(values)]
        return request

    def call(self, rng: np.random.Generator, n: int) -> tuple[str, list[Any]]:
        return "predict", [{name: _plain(values) for name, values in self.draw(rng, n).items()}]

    def answer(self, request: dict[str, Any]) -> Any:
        return self._loaded.predict(request)

    def eager(self) -> Answer | None:
        run = self.path.resolve().parent
        method = _method_dir(run, self.manifest)
        if method is None:
            return None
        import torch

        from graphhash.models.ctr_bytes import store_rounded
        from pipeline.ctr.evaluate import predict
        from pipeline.ctr.weights import load_ctr

        trained = load_ctr(method, run / "ingest")
        features = trained.features
        hashes = zip(features.all_columns, trained.vocabularies, strict=True)
        if {column.name: ids.content_hash for column, ids in hashes} != self.manifest["vocabulary_hashes"]:
            return None
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        stored = {column["name"]: column.get("precision") for column in self.manifest["columns"]}
        store_rounded(trained.model, [stored[column.name] for column in features.all_columns])

        def answer(raw: dict[str, Any]) -> NDArray[np.floating]:
            with torch.no_grad():
                logits = predict(trained.model, self._entries_of(trained, raw))
            return 1 / (1 + np.exp(-logits))

        return answer

    def _entries_of(self, trained: TrainedCtr, raw: dict[str, Any]) -> Part:
        """Rows of raw values as `draw` makes them, as the model in PyTorch takes them."""
        from pipeline.ctr.data import Part

        features, n = trained.features, len(next(iter(raw.values())))
        vocabularies = {c.name: v for c, v in zip(features.all_columns, trained.vocabularies, strict=True)}

        def entries(name: str, values: Any) -> NDArray[np.int32]:
            # A missing value comes behind the vocabulary if training has seen one, where an OOV one is if it has not.
            return vocabularies[name].rows(values, missing="fallback").astype(np.int32)

        categorical = np.empty((n, len(features.columns)), np.int32)
        for i, column in enumerate(features.columns):
            categorical[:, i] = entries(column.name, raw[column.name]) if column.name in self._ids else 0
        dense = np.empty((n, len(features.dense)), np.float32)
        for i, number in enumerate(features.dense):
            dense[:, i] = (raw[number.name] - number.mean) / number.std
        multi_valued = []
        for column in features.multi_valued:
            assert column.width is not None, column
            values = np.full((n, column.width), -1, np.int32)
            if column.name in self._ids:
                values[:, 0] = entries(column.name, [value for (value,) in raw[column.name]])
            multi_valued.append(values)
        return Part(np.zeros(n, np.uint8), categorical, dense, tuple(multi_valued), None)


def _method_dir(run: Path, manifest: dict[str, Any]) -> Path | None:
    trained_on = manifest.get("metrics", {}).get("trained_on", TRAIN_PARTS)
    place = "methods" if tuple(trained_on) == TRAIN_PARTS else "refit"
    method = run / place / str(manifest["provenance"].get("method"))
    return method if (method / "checkpoint").is_dir() else None


def _plain(values: RawIds) -> list[Any]:
    return [value.item() if isinstance(value, np.generic) else value for value in values]
