"""The bundle that a server answers from, replaced by a newer one while requests go on.

A server holds one `LiveBundle`. Each request takes `current` once and keeps it to its end, so a replacement drops
nothing: the old session goes when its last request is done. `refresh()` looks at the folder, and loads what is new:

    live = LiveBundle("out/bundle")
    live.current.retriever.recommend([42])
    live.refresh()        # every few seconds, from a thread

What is replaced is the folder or a link to it, as `graphhash export` and `graphhash update` do it. A new bundle that
fails its check, cannot be loaded or takes ids of other types is refused, and the old one goes on.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

from serving.bundle import MANIFEST, BundleError
from serving.retriever import Retriever
from serving.scorer import Scorer

# Name, size, time and number of each file: what changes when a folder is replaced or written to.
Fingerprint = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True, eq=False)
class LoadedBundle:
    """A loaded bundle and `name`, the first 12 digits of its manifest's hash, which is in every answer."""

    retriever: Retriever
    name: str


@dataclass(frozen=True, eq=False)
class LoadedScorer:
    """The same of a click-through model."""

    scorer: Scorer
    name: str


Loaded = TypeVar("Loaded", LoadedBundle, LoadedScorer)


class _Live(ABC, Generic[Loaded]):
    """See above. All methods may be called from any thread; one `refresh` runs at a time.

    Args:
        path, provider, threads: as for `Retriever`.

    Attributes:
        current: the bundle to answer from.
        refused: why the newest bundle in the folder is not in use, one line; None while it is.

    Raises:
        BundleError: as `Retriever`.
    """

    def __init__(
        self, path: Path | str, provider: Literal["auto", "cpu", "cuda"] = "auto", threads: int | None = None
    ) -> None:
        self.path = Path(path)
        self._provider, self._threads = provider, threads
        self._lock = threading.Lock()
        # Taken before loading: a replacement meanwhile is then seen by the next refresh.
        self._seen = _fingerprint(self.path)
        self.refused: str | None = None
        self.current: Loaded = self._load()

    def refresh(self) -> Loaded | None:
        """Load the folder's bundle if it is another one, and answer from it from now on. Returns it, or None.

        A folder that is as it was at the last look is not read again, refused or not. A folder that is not there is
        no reason to complain: while it is replaced there is none for a moment.
        """
        with self._lock:
            seen = _fingerprint(self.path)
            if seen == self._seen or not any(name == MANIFEST for name, *_ in seen):
                return None
            self._seen = seen
            try:
                loaded = self._load()
                self._check_types(loaded)
            except BundleError as error:
                self.refused = str(error)
                return None
            if _fingerprint(self.path) != seen:  # Replaced again while it was read: it may be of both.
                self._seen = ()
                return None
            self.refused = None
            if loaded.name == self.current.name:
                return None
            self.current = loaded
            return loaded

    @abstractmethod
    def _load(self) -> Loaded:
        """The bundle at the path, after a first run."""

    @abstractmethod
    def _check_types(self, loaded: Loaded) -> None:
        """Raise BundleError if the clients of the bundle in use could not ask this one."""


class LiveBundle(_Live[LoadedBundle]):
    """The bundle of a retrieval model; see the head of this file, and :class:`_Live` for arguments and attributes."""

    def _load(self) -> LoadedBundle:
        # A link may point elsewhere between two of its files.
        retriever = Retriever(self.path.resolve(), self._provider, self._threads)
        # The first run of a session allocates its memory; no client is to wait for it.
        unknown = {"int64": 0, "string": ""}[retriever.manifest["id_types"]["user_id"]]
        retriever.recommend([unknown], k=1)
        return LoadedBundle(retriever, retriever.manifest["manifest_sha256"][:12])

    def _check_types(self, loaded: LoadedBundle) -> None:
        before, after = (one.retriever.manifest["id_types"] for one in (self.current, loaded))
        if before != after:
            raise BundleError(
                f"{self.path}: takes ids of types {after}, the clients of the one in use send {before}; "
                "start another server for it"
            )


class LiveScorer(_Live[LoadedScorer]):
    """The same for a click-through model: `current.scorer` answers, and a bundle that takes other columns is refused."""

    def _load(self) -> LoadedScorer:
        scorer = Scorer(self.path.resolve(), self._provider, self._threads)
        scorer.predict({name: [None] for name in scorer.columns})
        return LoadedScorer(scorer, scorer.manifest["manifest_sha256"][:12])

    def _check_types(self, loaded: LoadedScorer) -> None:
        # Requests that wait were checked with the one in use.
        before, after = (
            {
                (column["name"], column["dtype"], column["role"], column.get("missing"))
                for column in one.scorer.manifest["columns"]
            }
            for one in (self.current, loaded)
        )
        for name, dtype, role, _ in sorted(after - before, key=str):
            raise BundleError(
                f"{self.path}: takes {name!r}, {role}, as {dtype}; the clients of the one in use do not send that; start another server for it"
            )


def _fingerprint(folder: Path) -> Fingerprint:
    try:
        with os.scandir(folder) as entries:
            stats = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    except OSError:
        return ()
    return tuple(sorted((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats))
