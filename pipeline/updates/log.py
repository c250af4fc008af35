"""A later interaction log, read for ``graphhash update``: users and items numbered as in the run, new ids after the known ones.

It is read in this process, batch by batch, and held in memory: a later log is small beside the one that was trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graphhash.errors import DataError
from graphhash.graph.bipartite import SIDES, biadjacency
from graphhash.graph.vocabulary import Vocabulary, as_ids
from pipeline.config.run_config import DataConfig
from pipeline.logs.columns import Columns
from pipeline.logs.csv import CsvFormat
from pipeline.logs.kinds import find_kinds, holds_whole_numbers
from pipeline.logs.readers import read_chunk
from pipeline.logs.sources import Source, cut_chunks, find_sources, skip_empty


@dataclass(frozen=True, eq=False)
class NewLog:
    """The interactions of a later log, and its ids.

    Args:
        vocabularies: by side: the known ids, then the new ones, ascending.
        n_known: the number of known ids, by side.
        graph: the log's interactions, shape (all users, all items); equal pairs are merged, their weights add up.
        n_rejected: bad rows left out with ``bad_rows="skip"``.
        sha256: of the files' content, in the order of their names.
    """

    vocabularies: dict[str, Vocabulary]
    n_known: dict[str, int]
    graph: csr_array
    n_rejected: int
    sha256: str

    @property
    def n_new(self) -> dict[str, int]:
        """The number of new ids, by side."""
        return {side: len(self.vocabularies[side]) - self.n_known[side] for side in SIDES}


def read_new_log(path: str, data: DataConfig, known: dict[str, Vocabulary]) -> NewLog:
    """Read all files of a log, whatever the run's split.

    Args:
        data: format, columns and how csv is written, ``positive_from`` and ``bad_rows``.
        known: the run's ids, by side.

    Raises:
        DataError: as ``pipeline.retrieval.ingest`` for files and rows; no good rows; or ids of another type than the run's.
    """
    sources = skip_empty(find_sources(path, data.format, layout=CsvFormat.of(data)), path)
    columns = Columns.of(data)
    chunks = cut_chunks(sources)
    kinds = _kinds(sources, columns, data, known)
    columns = replace(columns, user_kind=kinds[0], item_kind=kinds[1])
    ids: dict[str, list[pa.Array]] = {side: [] for side in SIDES}
    weights: list[NDArray[np.floating]] = []
    n_rejected = n_below = 0
    for chunk in chunks:
        for batch in read_chunk(chunk, columns, bad_rows=data.bad_rows):
            ids["users"].append(batch.users)
            ids["items"].append(batch.items)
            weights.append(np.ones(len(batch.rows)) if batch.weights is None else batch.weights)
            n_rejected += batch.rejected.num_rows
            n_below += batch.n_below
    if not sum(map(len, weights)):
        below = f", {n_below} are rated below {data.positive_from:g}" if n_below else ""
        raise DataError(
            f"{path}: no interactions ({n_rejected} rows were rejected{below}); check the file and the columns"
        )
    vocabularies, rows = {}, {}
    for side in SIDES:
        vocabularies[side], rows[side] = _number(as_ids(pa.chunked_array(ids[side])), known[side])
    graph = biadjacency(
        rows["users"],
        rows["items"],
        np.concatenate(weights),
        n_users=len(vocabularies["users"]),
        n_items=len(vocabularies["items"]),
    )
    return NewLog(
        vocabularies,
        {side: len(known[side]) for side in SIDES},
        graph,
        n_rejected,
        content_sha256(source.file for source in sources),
    )


def _kinds(
    sources: list[Source], columns: Columns, data: DataConfig, known: dict[str, Vocabulary]
) -> list[Literal["int64", "string"]]:
    """Types of the ids: those of the run, whatever type the files have."""
    kinds = [known[side].kind for side in SIDES]
    for side, key, kind in zip(SIDES, ("user_kind", "item_kind"), kinds, strict=True):
        if getattr(data, key) not in ("auto", kind):
            raise DataError(
                f"{key}={getattr(data, key)} contradicts the run, whose {side} are {kind}; leave it out (--{key.replace('_', '-')})"
            )
    find_kinds(sources, columns, (kinds[0], kinds[1]))  # Columns are there, and can be ids.
    for source in sources:
        for side, name, kind, whole in zip(
            SIDES, (columns.user, columns.item), kinds, holds_whole_numbers(source, columns), strict=True
        ):
            if kind == "int64" and not whole:
                raise DataError(
                    f"{source.file}: column {name!r} holds string ids, the run's {side} are int64; "
                    "write them as the run's log has them"
                )
    return kinds


def _number(ids: pa.Array, known: Vocabulary) -> tuple[Vocabulary, NDArray[np.integer]]:
    """The vocabulary with what is new in ``ids`` behind it, and the row of every one of them."""
    rows = known.rows(ids, missing="fallback").astype(np.int64)
    is_new = rows == len(known)
    if not is_new.any():
        return known, rows
    new = Vocabulary.from_ids(ids.filter(pa.array(is_new)))
    rows[is_new] += new.rows(ids.filter(pa.array(is_new)))
    text = pa.large_string() if known.kind == "string" else pa.int64()
    return Vocabulary(pa.concat_arrays([known.ids.cast(text), new.ids.cast(text)])), rows


def content_sha256(files: Iterable[str]) -> str:
    """The sha256 of the files' content, in their order."""
    digest = hashlib.sha256()
    for file in files:
        with Path(file).open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
