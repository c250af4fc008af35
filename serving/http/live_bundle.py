"""The bundle that a server answers from, replaced by a newer one while requests go on.

A server holds one `LiveBundle`. Each request takes `current` once and keeps it to its end, so a replacement drops no request: the old
session goes when its last request is done. `refresh()` looks at the folder, and loads a bundle that is new there:

    live = LiveBundle(Retriever, "out/bundle")
    live.current.recommend([42])
    live.refresh()        # every few seconds, from a thread

What is replaced is the folder or a link to it, as `graphhash export` and `graphhash update` do it. A new bundle that fails its check or
takes other requests is refused, and the old one stays until the folder changes again. A new bundle that cannot be read or loaded now
(an I/O error, no memory) is tried again, with pauses that double from FIRST_RETRY_S to MAX_RETRY_S.

A model is loaded from a private copy of the folder (`serving.private_copy`), so that no change of its files ends the process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic

from serving.bundle_model import Provider
from serving.errors import BundleError, BundleLoadError, first_line
from serving.manifest import MANIFEST
from serving.private_copy import Model, fingerprint, load_privately

FIRST_RETRY_S = 2.0
MAX_RETRY_S = 300.0

_UNREACHABLE = "looking for a newer bundle failed "


class LiveBundle(Generic[Model]):
    """See above. All methods may be called from any thread; one `refresh` runs at a time.

    Args:
        model_class: the class that loads the bundle, `Retriever` or `Scorer`.
        path, provider, threads: as for `model_class`.
        fetch: brings the folder up to date, where it is the copy of one elsewhere; called before each look.

    Attributes:
        current: the model to answer from.
        refused: why the newest bundle in the folder is not in use, one line; None while it is.
        n_failures: attempts in a row that could not load the newest bundle and will be repeated.

    Raises:
        BundleError: as `model_class`.
    """

    def __init__(
        self,
        model_class: type[Model],
        path: Path | str,
        provider: Provider = "auto",
        threads: int | None = None,
        *,
        fetch: Callable[[], object] | None = None,
    ) -> None:
        self.path = Path(path)
        self._fetch = fetch
        self._model_class, self._provider, self._threads = model_class, provider, threads
        self._lock = threading.Lock()
        # Taken before loading: a replacement meanwhile is then seen by the next refresh.
        self._seen = fingerprint(self.path)
        self._retry_at: float | None = None
        self.refused: str | None = None
        self.n_failures = 0
        self.current: Model = self._load()

    def refresh(self) -> Model | None:
        """Load the folder's bundle if it is another one, and answer from it from now on. Returns it, or None.

        A folder that has not changed since the last look is not read again, unless loading it failed and the pause is over. A missing
        folder is
        ignored: while a folder is replaced there is none for a moment.
        """
        with self._lock:
            if self._fetch is not None:
                try:
                    self._fetch()
                except Exception as error:  # Such as a network that is away; the next look may find it.
                    self.refused = _UNREACHABLE + f"({first_line(error)})"
                    return None
                if (self.refused or "").startswith(_UNREACHABLE):
                    self.refused = None
            seen = fingerprint(self.path)
            if not any(name == MANIFEST for name, *_ in seen):
                return None
            if seen == self._seen and not self._is_retry_due():
                return None
            if seen != self._seen:
                self.n_failures = 0
            self._seen, self._retry_at = seen, None
            try:
                loaded = self._load()
                self._check_requests(loaded)
            except BundleLoadError as error:
                self._try_again(str(error))
                return None
            except BundleError as error:
                self.refused, self.n_failures = str(error), 0
                return None
            except Exception as error:  # Whatever it is, the old bundle goes on, and the new one is not given up.
                self._try_again(f"{self.path}: {type(error).__name__}: {first_line(error)}")
                return None
            if fingerprint(self.path) != seen:  # Replaced again while it was read: it may be of both.
                self._seen = ()
                return None
            self.refused, self.n_failures = None, 0
            if loaded.name == self.current.name:
                return None
            self.current = loaded
            return loaded

    def _load(self) -> Model:
        # Resolved, because a link may point elsewhere between two of its files.
        return load_privately(
            self.path.resolve(), lambda folder: self._model_class(folder, self._provider, self._threads)
        )

    def _check_requests(self, loaded: Model) -> None:
        """Raise BundleError if the model needs what clients of the one in use do not send, or in another type.

        Requests that wait were checked with the model in use.
        """
        for name, kind in sorted(loaded.request_fields - self.current.request_fields):
            raise BundleError(
                f"{self.path}: takes {name!r} ({kind}), which clients of the bundle in use do not send; start another server for it"
            )

    def _is_retry_due(self) -> bool:
        return self._retry_at is not None and time.monotonic() >= self._retry_at

    def _try_again(self, reason: str) -> None:
        pause_s = min(MAX_RETRY_S, FIRST_RETRY_S * 2 ** min(self.n_failures, 30))
        self.n_failures += 1
        self._retry_at = time.monotonic() + pause_s
        self.refused = (
            f"a bundle newer than the one in use could not be loaded ({reason}); trying again in {pause_s:g} s "
            f"(attempts so far: {self.n_failures})"
        )
