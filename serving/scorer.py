"""Scorer: raw values of columns in, click probabilities out, from a checked bundle.

    scorer = Scorer("out/bundle")
    scorer.predict({"user_id": [42, None], "item_id": ["a", "b"], "price": [3.5, None]})

Needs numpy and onnxruntime. Tables of columns with many ids stay compressed in memory, as they are in the file; the vectors of columns with
few ids are materialized in float32, at most 4 MiB a column, when the bundle is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.bundle_model import BundleModel, Provider
from serving.ctr_manifest import ColumnSpec
from serving.errors import InputError
from serving.raw_columns import as_ids, as_multi_valued, as_numbers, buckets_of, part_of_times

# Bytes that one chunk of rows reads from tables, about a third of what a run takes.
_CHUNK_BYTES = 32 * 2**20
_MAX_CHUNK_ROWS = 1 << 14


@dataclass(frozen=True, eq=False)
class Predictions:
    """Answers in the order of the rows.

    Attributes:
        probabilities: click probabilities, float32, shape (n,).
        logits: float32, shape (n,).
        known: of every categorical column by name, bool, shape (n,): False where the value is out of vocabulary, and was read from the
            OOV row. A missing value is known if training has seen a missing one.
    """

    probabilities: NDArray[np.float32]
    logits: NDArray[np.float32]
    known: dict[str, NDArray[np.bool_]]


class Scorer(BundleModel):
    """A CTR model that is loaded from a bundle; arguments, attributes and errors are those of :class:`BundleModel`.

    Attributes:
        columns: names that :meth:`predict` needs. A column that is made of a time, or of a number, is asked for by that one's name, and may
            be given itself.
    """

    task = "ctr"
    _run_smaller = "ask for fewer rows"

    def __init__(
        self, path: Path | str, provider: Provider = "auto", threads: int | None = None, profile: Path | None = None
    ) -> None:
        super().__init__(path, provider, threads, profile)
        self._columns: list[ColumnSpec] = self.manifest["columns"]
        sources = (source_of(column) for column in self._columns)
        self.columns = tuple(dict.fromkeys(sources))
        self._outputs = [name for name in ("probability", "logit", "known") if name in self.manifest["outputs"]]
        n_reads = sum(column.get("indices_per_id", 0) * column.get("width", 1) for column in self._columns)
        self._chunk = max(1, min(_MAX_CHUNK_ROWS, _CHUNK_BYTES // (4 * self.manifest["dim"] * max(1, n_reads))))

    @property
    def request_fields(self) -> frozenset[tuple[str, str]]:
        """The type names the role and, because clients may send it, the value that stands for a missing one."""
        return frozenset(
            (column["name"], f"{column['role']}, {column['dtype']}, missing {column.get('missing')!r}")
            for column in self._columns
        )

    def warm_up(self) -> None:
        self.predict({name: [None] for name in self.columns})

    def predict(self, columns: Mapping[str, Any]) -> NDArray[np.float32]:
        """Click probabilities, float32, shape (n,); see :meth:`details`."""
        return self.details(columns).probabilities

    def details(self, columns: Mapping[str, Any]) -> Predictions:
        """Probabilities, logits, and which values are in the vocabulary, of any number of rows; rows run in chunks.

        Args:
            columns: name -> values of all rows, a list or array of length n; a pandas frame is one as well. Columns that the model does not
                read are left alone. A value is what it was in training, whatever carries it (`serving.values`): None, NaN and the texts
                that pandas reads as missing are missing, numbers may be texts, and booleans are the same in any spelling. Multi-valued
                columns take a list of ids, a text of ids between separators, or None per row. A time is a text or number of its format,
                or a datetime.

        Raises:
            InputError: a column is not there, is of another length, or has a value of another type; one line with column, row and value.
        """
        return self.answer(self.tensors(columns))

    def tensors(self, columns: Mapping[str, Any]) -> dict[str, NDArray]:
        """Checked values as the graph takes them, by input; see :meth:`details`."""
        feed = {column["input"]: self._tensor(column, columns) for column in self._columns}
        n_rows = len(next(iter(feed.values())))
        for column in self._columns:
            if len(feed[column["input"]]) != n_rows:
                raise InputError(
                    f"column {column['name']!r} has {len(feed[column['input']])} rows, {self._columns[0]['name']!r} has {n_rows}; "
                    "pass as many values of every column"
                )
        return feed

    def answer(self, feed: Mapping[str, NDArray]) -> Predictions:
        """Answers for the tensors that :meth:`tensors` returned."""
        n_rows = len(next(iter(feed.values())))
        probabilities, logits = np.empty(n_rows, np.float32), np.empty(n_rows, np.float32)
        categorical = [column["name"] for column in self._columns if column["role"] == "categorical"]
        known = np.empty((n_rows, len(categorical)), np.bool_)
        for start in range(0, n_rows, self._chunk):
            part = slice(start, start + self._chunk)
            results = self.run(self._outputs, {name: values[part] for name, values in feed.items()})
            probabilities[part], logits[part] = results[:2]
            known[part] = results[2] if categorical else known[part]
        if not np.isfinite(logits).all():
            row = int(np.argmin(np.isfinite(logits)))
            raise InputError(
                f"row {row} gives no finite number; its dense columns are too far from those of training, fix them or pass None"
            )
        return Predictions(probabilities, logits, {name: known[:, i] for i, name in enumerate(categorical)})

    def _tensor(self, column: ColumnSpec, columns: Mapping[str, Any]) -> NDArray:
        name = column["name"]
        time = column.get("time")
        if name not in columns and time is not None and time["column"] in columns:
            return part_of_times(
                columns[time["column"]], time["format"], time["part"], column["missing"], time["column"]
            )
        if name not in columns and column.get("bucket", name) in columns:
            return buckets_of(columns[column["bucket"]], column["bucket"])
        if name not in columns:
            made = f" (it is the {time['part']} of {time['column']!r}, which will do)" if time else ""
            made = f" (it is the bucket of {column['bucket']!r}, which will do)" if "bucket" in column else made
            raise InputError(f"no column {name!r}{made}; this model reads {', '.join(map(repr, self.columns))}")
        if column["role"] == "dense":
            return as_numbers(columns[name], column["mean"], column["std"], name)
        if column["role"] == "multi_valued":
            return as_multi_valued(
                columns[name], column["dtype"], column["missing"], column["width"], column["separator"], name,
                text_only=column.get("text_only", False),
            )  # fmt: skip
        return as_ids(columns[name], column["dtype"], column["missing"], name, text_only=column.get("text_only", False))


def source_of(column: ColumnSpec) -> str:
    """The column of the log that a column of the model is made of: a time, a number, or itself."""
    return column["time"]["column"] if "time" in column else column.get("bucket", column["name"])
