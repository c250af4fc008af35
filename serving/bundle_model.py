"""What every model that is loaded from a bundle has: the checked manifest, and a session that agrees with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import onnxruntime
from numpy.typing import NDArray

from serving.bundle import check_bundle
from serving.errors import BundleError, first_line
from serving.manifest import METADATA, MODEL, identity
from serving.session import ORT_TYPES, bound_run, check_options, open_session

Provider = Literal["auto", "cpu", "cuda"]


class BundleModel(ABC):
    """A model that is loaded from a bundle.

    Args:
        path: the bundle's folder.
        provider: "cuda", "cpu", or "auto": CUDA where a session really gets it, else the CPU.
        threads: CPU threads of one run; None leaves it to ONNX Runtime (one per core).
        profile: prefix of the file that ONNX Runtime's profile goes to, see :meth:`end_profiling`; None: no profile.

    Attributes:
        path: as given.
        manifest: see `serving.manifest`.
        provider: "cuda" or "cpu", the one in use.

    Raises:
        BundleError: the bundle fails its check, is of another task, or CUDA was requested and is not in use.
        BundleLoadError: a file cannot be read, or ONNX Runtime cannot load the model.
        InputError: `provider` or `threads` is out of range.
    """

    task: ClassVar[str]
    _run_smaller: ClassVar[str]
    """What a request that ONNX Runtime cannot answer is to ask for instead."""

    def __init__(
        self, path: Path | str, provider: Provider = "auto", threads: int | None = None, profile: Path | None = None
    ) -> None:
        check_options(provider, threads)
        self.path = Path(path)
        self.manifest: dict[str, Any] = check_bundle(self.path)
        if self.manifest["task"] != self.task:
            raise BundleError(
                f"{self.path}: made for the task {self.manifest['task']!r}, not {self.task!r}; use serving.open_bundle"
            )
        self._session = open_session(self.path / MODEL, provider, threads, profile)
        self.provider = "cuda" if "CUDAExecutionProvider" in self._session.get_providers() else "cpu"
        self._check_signature()
        if self._session.get_modelmeta().custom_metadata_map.get(METADATA) != identity(self.manifest):
            raise BundleError(f"{self.path}: manifest and model are of different bundles; export the bundle again")
        # ONNX Runtime binds no strings; it copies the other inputs itself then.
        has_text = any(spec["dtype"] == "string" for spec in self.manifest["inputs"].values())
        self._bound = self.provider == "cuda" and not has_text

    @property
    def name(self) -> str:
        """The first 12 digits of the manifest's hash, which name the bundle in answers and metrics."""
        return self.manifest["manifest_sha256"][:12]

    @property
    @abstractmethod
    def request_fields(self) -> frozenset[tuple[str, str]]:
        """Names and types of the raw values that a request holds."""

    @abstractmethod
    def warm_up(self) -> None:
        """Run the smallest request: every node of the graph takes part, and the session allocates its memory."""

    def end_profiling(self) -> str:
        """Write the profile, a JSON file in Chrome's trace format, and return its path."""
        return self._session.end_profiling()

    def run(
        self, outputs: list[str], feed: Mapping[str, NDArray], options: onnxruntime.RunOptions | None = None
    ) -> list[NDArray]:
        """Some outputs of the graph for tensors of all its inputs, as the manifest describes them.

        Raises:
            BundleError: ONNX Runtime fails.
        """
        try:
            if self._bound:
                return bound_run(self._session, outputs, feed, "cuda")
            return self._session.run(outputs, feed, options)
        except Exception as error:  # onnxruntime's own classes have no common base but Exception.
            raise BundleError(
                f"{self.path}: ONNX Runtime failed ({first_line(error)}); {self._run_smaller} at a time"
            ) from error

    def _check_signature(self) -> None:
        """Raise BundleError unless the manifest and the graph agree on the name and type of every input and output."""
        sides = (
            ("inputs", self._session.get_inputs()),
            ("optional_inputs", self._session.get_overridable_initializers()),
            ("outputs", self._session.get_outputs()),
        )
        for side, nodes in sides:
            stated = {name: ORT_TYPES.get(spec["dtype"]) for name, spec in self.manifest.get(side, {}).items()}
            actual = {node.name: node.type for node in nodes}
            if stated != actual:
                raise BundleError(
                    f"{self.path}: the manifest states {side} {stated}, the model has {actual}; export the bundle again"
                )
