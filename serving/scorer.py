"""Scorer: raw values of a click log's columns in, probabilities of a click out, from a checked bundle.

    scorer = Scorer("out/bundle")
    scorer.predict({"user_id": [42, None], "item_id": ["a", "b"], "price": [3.5, None]})

Needs numpy and onnxruntime. Tables stay compressed in memory, as they are in the file; of compressed columns with few ids the vectors are made
when the bundle is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from serving.bundle import METADATA, MODEL, BundleError, check_bundle, identity
from serving.raw_columns import as_bags, as_ids, as_numbers, part_of_times
from serving.session import ORT_TYPES, bound_run, check_options, first_line, open_session

# What is read of tables for one chunk of rows, about a third of what a run takes.
_CHUNK_BYTES = 32 * 2**20
_MAX_CHUNK_ROWS = 1 << 14


@dataclass(frozen=True, eq=False)
class Predictions:
    """Answers in the order of the rows.

    Attributes:
        probabilities: of a click, float32, shape (n,).
        logits: float32, shape (n,).
        known: of every categorical column by name, bool, shape (n,): False where training has not shown the value, which was then read as an
            average one. A missing value is known if it was missing in training as well.
    """

    probabilities: NDArray[np.float32]
    logits: NDArray[np.float32]
    known: dict[str, NDArray[np.bool_]]


class Scorer:
    """A loaded bundle of a click-through model.

    Args:
        path: the bundle's folder.
        provider: "cuda", "cpu", or "auto": CUDA where a session really gets it, else the CPU.
        threads: CPU threads of one run; None leaves it to ONNX Runtime (one per core).
        profile: begin of the name of a file for ONNX Runtime's profile, see :meth:`end_profiling`; None: none is written.

    Attributes:
        manifest: as in serving.ctr_manifest.
        provider: "cuda" or "cpu", the one in use.
        columns: names that :meth:`predict` needs. A column that is made of a time is asked for by the time's name, and may be given itself.

    Raises:
        BundleError: the bundle fails its check or is no click-through model's, ONNX Runtime cannot load it, or CUDA was asked for and is
            not in use.
    """

    def __init__(
        self,
        path: Path | str,
        provider: Literal["auto", "cpu", "cuda"] = "auto",
        threads: int | None = None,
        profile: Path | None = None,
    ) -> None:
        check_options(provider, threads)
        self.path = Path(path)
        self.manifest = check_bundle(self.path)
        if self.manifest["task"] != "ctr" or self.manifest["format_version"] < 3:
            raise BundleError(
                f"{self.path}: made for the task {self.manifest['task']!r}, not 'ctr'; pass the bundle of a click-through model"
            )
        self._columns: list[dict[str, Any]] = self.manifest["columns"]
        self._session = open_session(self.path / MODEL, provider, threads, profile)
        self.provider = "cuda" if "CUDAExecutionProvider" in self._session.get_providers() else "cpu"
        self._check_signature()
        sources = (column["time"]["column"] if "time" in column else column["name"] for column in self._columns)
        self.columns = tuple(dict.fromkeys(sources))
        self._outputs = [name for name in ("probability", "logit", "known") if name in self.manifest["outputs"]]
        # ONNX Runtime binds no strings; it copies the other inputs itself then.
        self._bound = self.provider == "cuda" and all(column["dtype"] != "string" for column in self._columns)
        reads = sum(column.get("indices_per_id", 0) * column.get("width", 1) for column in self._columns)
        self._chunk = max(1, min(_MAX_CHUNK_ROWS, _CHUNK_BYTES // (4 * self.manifest["dim"] * max(1, reads))))

    def predict(self, columns: Mapping[str, Any]) -> NDArray[np.float32]:
        """Probabilities of a click, float32, shape (n,); see :meth:`details`."""
        return self.details(columns).probabilities

    def details(self, columns: Mapping[str, Any]) -> Predictions:
        """Probabilities, logits, and which values are known, of any number of rows; they are run in chunks.

        Args:
            columns: name -> values of all rows, a list or array of length n; a pandas frame is one as well. Columns that the model does not
                read are left alone. None, NaN and empty texts are missing. Categorical columns take ids of the type in the manifest, dense
                ones numbers, multi-valued ones a list of ids, a text of ids between separators, or None per row. A time is given as text or
                number of its format, or as datetime.

        Raises:
            ValueError: a column is not there, is of another length, or has a value of another type; one line with column, row and value.
        """
        return self.answer(self.tensors(columns))

    def tensors(self, columns: Mapping[str, Any]) -> dict[str, NDArray]:
        """Checked values as the graph takes them, by input; see :meth:`details`."""
        feed = {column["input"]: self._tensor(column, columns) for column in self._columns}
        n_rows = len(next(iter(feed.values())))
        for column in self._columns:
            if len(feed[column["input"]]) != n_rows:
                raise ValueError(
                    f"column {column['name']!r} has {len(feed[column['input']])} rows, {self._columns[0]['name']!r} has {n_rows}; "
                    "pass as many values of every column"
                )
        return feed

    def answer(self, feed: Mapping[str, NDArray]) -> Predictions:
        """Answers of what :meth:`tensors` gives."""
        n_rows = len(next(iter(feed.values())))
        probabilities, logits = np.empty(n_rows, np.float32), np.empty(n_rows, np.float32)
        categorical = [column["name"] for column in self._columns if column["role"] == "categorical"]
        known = np.empty((n_rows, len(categorical)), np.bool_)
        for start in range(0, n_rows, self._chunk):
            part = slice(start, start + self._chunk)
            results = self._run({name: values[part] for name, values in feed.items()})
            probabilities[part], logits[part] = results[:2]
            known[part] = results[2] if categorical else known[part]
        if not np.isfinite(logits).all():
            row = int(np.argmin(np.isfinite(logits)))
            raise ValueError(
                f"row {row} gives no finite number; its dense columns are too far from those of training, fix them or pass None"
            )
        return Predictions(probabilities, logits, {name: known[:, i] for i, name in enumerate(categorical)})

    def end_profiling(self) -> str:
        """Write the profile, a JSON file in Chrome's trace format, and return its path."""
        return self._session.end_profiling()

    def _tensor(self, column: dict[str, Any], columns: Mapping[str, Any]) -> NDArray:
        name = column["name"]
        time = column.get("time")
        if name not in columns and time is not None and time["column"] in columns:
            return part_of_times(
                columns[time["column"]], time["format"], time["part"], column["missing"], time["column"]
            )
        if name not in columns:
            made = f" (it is the {time['part']} of {time['column']!r}, which will do)" if time else ""
            raise ValueError(f"no column {name!r}{made}; this model reads {', '.join(map(repr, self.columns))}")
        if column["role"] == "dense":
            return as_numbers(columns[name], column["mean"], column["std"], name)
        if column["role"] == "bag":
            return as_bags(
                columns[name], column["dtype"], column["missing"], column["width"], column["separator"], name
            )
        return as_ids(columns[name], column["dtype"], column["missing"], name)

    def _run(self, feed: dict[str, NDArray]) -> list[NDArray]:
        try:
            if self._bound:
                return bound_run(self._session, self._outputs, feed, "cuda")
            return self._session.run(self._outputs, feed)
        except Exception as error:  # onnxruntime's own classes have no common base but Exception.
            raise BundleError(
                f"{self.path}: ONNX Runtime failed ({first_line(error)}); ask for fewer rows at a time"
            ) from error

    def _check_signature(self) -> None:
        """The manifest speaks for the graph, so they must agree on every name and type, and on whose they are."""
        for side, nodes in (("inputs", self._session.get_inputs()), ("outputs", self._session.get_outputs())):
            stated = {name: ORT_TYPES.get(spec["dtype"]) for name, spec in self.manifest[side].items()}
            actual = {node.name: node.type for node in nodes}
            if stated != actual:
                raise BundleError(
                    f"{self.path}: the manifest states {side} {stated}, the model has {actual}; export the bundle again"
                )
        if self._session.get_modelmeta().custom_metadata_map.get(METADATA) != identity(self.manifest):
            raise BundleError(f"{self.path}: manifest and model are of different bundles; export the bundle again")
