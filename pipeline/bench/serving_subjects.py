"""What the benchmark of serving asks of a bundle: requests of its own ids, their answers, and the same from PyTorch eager.

A retrieval bundle is asked for the best items of users, a click-through model's for probabilities of rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from pipeline.export.nodes import stored_ids
from serving.bundle import MODEL, BundleError, task_of
from serving.retriever import Retriever
from serving.scorer import Scorer

Answer = Callable[[Any], Any]


class Subject(Protocol):
    """A loaded bundle.

    Attributes:
        manifest, provider: as loaded.
        unit: what a request holds many of.
        name: of the program, for tables.
    """

    manifest: dict[str, Any]
    provider: str
    unit: str
    name: str

    def draw(self, rng: np.random.Generator, n: int) -> Any:
        """A request of n users or rows, known to the model, for `answer`."""

    def sample(self, rng: np.random.Generator, n: int) -> Any:
        """The same as JSON."""

    def answer(self, request: Any) -> Any: ...

    def eager(self) -> Answer | None:
        """The trained model of the run folder around the bundle, from raw values; None where there is none, or of other ids."""


def subject_of(bundle: Path, provider: str, threads: int | None, k: int) -> Subject:
    """Load a bundle.

    Raises:
        BundleError: it is refused.
    """
    kind = ClickSubject if task_of(bundle) == "ctr" else RetrievalSubject
    return kind(bundle, provider, threads, k)


def check_comparable(bundle: Path, one: Subject, against: Path, other: Subject) -> None:
    """Raise BundleError if both bundles cannot take the same requests."""
    if _types(one.manifest) != _types(other.manifest):
        raise BundleError(f"{against}: takes other ids or columns than {bundle}; compare bundles of the same log")


def _types(manifest: dict[str, Any]) -> dict[str, Any]:
    if manifest["task"] == "ctr":
        return {column["name"]: (column["role"], column["dtype"]) for column in manifest["columns"]}
    return dict(manifest["id_types"])


class RetrievalSubject:
    unit = "users"

    def __init__(self, bundle: Path, provider: str, threads: int | None, k: int) -> None:
        self._loaded = Retriever(bundle, provider=provider, threads=threads)
        self.path, self.threads, self.k = bundle, threads, k
        self.manifest, self.provider = self._loaded.manifest, self._loaded.provider
        self.name = f"{self.manifest.get('model', 'mf')} {self.manifest['method']['users']}"
        self._ids = stored_ids(onnx.load(str(bundle / MODEL)), "user")

    def draw(self, rng: np.random.Generator, n: int) -> NDArray:
        return self._ids[rng.integers(0, len(self._ids), n)]

    def sample(self, rng: np.random.Generator, n: int) -> list[Any]:
        return _plain(self.draw(rng, n))

    def answer(self, request: NDArray) -> Any:
        return self._loaded.recommend(request, self.k)

    def eager(self) -> Answer | None:
        run = self.path.resolve().parent
        method = _method_dir(run, self.manifest)
        if method is None:
            return None
        import torch

        from graphhash.graph.vocabulary import Vocabulary
        from pipeline.retrieval.evaluate import as_shipped
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


class ClickSubject:
    unit = "rows"

    def __init__(self, bundle: Path, provider: str, threads: int | None, k: int) -> None:
        self._loaded = Scorer(bundle, provider=provider, threads=threads)
        self.path, self.threads = bundle, threads
        self.manifest, self.provider = self._loaded.manifest, self._loaded.provider
        self.name = f"{self.manifest['model']} {self.manifest['method']}"
        graph = onnx.load(str(bundle / MODEL))
        columns = [column for column in self.manifest["columns"] if column["role"] != "dense"]
        self._ids: dict[str, NDArray] = {}
        for number, column in enumerate(columns):
            # Where a missing value is the only one that is known, the graph has no encoder.
            with contextlib.suppress(BundleError):
                self._ids[column["name"]] = stored_ids(graph, f"/{number}")

    def draw(self, rng: np.random.Generator, n: int) -> dict[str, Any]:
        """Every value for itself, uniformly from those known; numbers as they spread in training; one value in every list."""
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

    def sample(self, rng: np.random.Generator, n: int) -> dict[str, list[Any]]:
        return {name: _plain(values) for name, values in self.draw(rng, n).items()}

    def answer(self, request: dict[str, Any]) -> Any:
        return self._loaded.predict(request)

    def eager(self) -> Answer | None:
        run = self.path.resolve().parent
        method = _method_dir(run, self.manifest)
        if method is None:
            return None
        import torch

        from graphhash.models.ctr_bytes import store_rounded
        from pipeline.ctr.data import Part
        from pipeline.ctr.evaluate import predict
        from pipeline.ctr.weights import load_ctr

        trained = load_ctr(method, run / "ingest")
        features = trained.features
        vocabularies = {c.name: v for c, v in zip(features.all_columns, trained.vocabularies, strict=True)}
        if {name: v.content_hash for name, v in vocabularies.items()} != self.manifest["vocabulary_hashes"]:
            return None
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        stored = {column["name"]: column.get("precision") for column in self.manifest["columns"]}
        store_rounded(trained.model, [stored[column.name] for column in features.all_columns])

        def entries(name: str, values: Any) -> NDArray[np.int32]:
            # A missing value that is known comes behind the vocabulary, where an unknown one is if it is not.
            return vocabularies[name].rows(values, missing="fallback").astype(np.int32)

        def answer(raw: dict[str, Any]) -> NDArray[np.float32]:
            n = len(next(iter(raw.values())))
            categorical, dense = (
                np.empty((n, len(features.columns)), np.int32),
                np.empty((n, len(features.dense)), np.float32),
            )
            for i, column in enumerate(features.columns):
                categorical[:, i] = entries(column.name, raw[column.name]) if column.name in self._ids else 0
            for i, number in enumerate(features.dense):
                dense[:, i] = (raw[number.name] - number.mean) / number.std
            bags = []
            for column in features.bags:
                bag = np.full((n, column.width), -1, np.int32)
                if column.name in self._ids:
                    bag[:, 0] = entries(column.name, [value for (value,) in raw[column.name]])
                bags.append(bag)
            with torch.no_grad():
                logits = predict(trained.model, Part(np.zeros(n, np.uint8), categorical, dense, tuple(bags), None))
            return 1 / (1 + np.exp(-logits))

        return answer


def _method_dir(run: Path, manifest: dict[str, Any]) -> Path | None:
    method = run / "methods" / str(manifest["provenance"].get("method"))
    return method if (method / "checkpoint").is_dir() else None


def _plain(values: Sequence[Any]) -> list[Any]:
    return [value.item() if isinstance(value, np.generic) else value for value in values]
