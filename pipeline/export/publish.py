"""What every export does with a finished graph: the file, and the bundle's folder in its place, whole or not at all."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx

from graphhash.graph.vocabulary import Vocabulary
from pipeline.storage.atomic import replace_folder
from serving.errors import BundleError
from serving.manifest import MANIFEST, MODEL

EXTERNAL_DATA = "model.onnx.data"
# Protobuf ends at 2^31 - 1 bytes; the rest is room for lengths and the nodes.
_PROTOBUF_LIMIT = 15 * 2**27


def check_place(out: Path) -> None:
    """Raise BundleError if a bundle at `out` would replace something else."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).exists())):
        raise BundleError(f"{out}: exists and is no bundle; choose another place, or remove it")


def save_graph(graph: onnx.ModelProto, folder: Path, inside: int, external_data_mib: float) -> None:
    """Write `model.onnx`, and check it.

    Args:
        inside: bytes of ids, which have to be in the file itself.
        external_data_mib: tensors of more than this together go to a second file.

    Raises:
        BundleError: the ids are larger than an ONNX file can be.
    """
    if inside > _PROTOBUF_LIMIT:
        raise BundleError(
            f"the ids take {inside / 2**30:.1f} GiB in the graph, an ONNX file ends at 2 GiB; use int64 ids"
        )
    tensors = sum(len(tensor.raw_data) for tensor in graph.graph.initializer)
    external = tensors > min(external_data_mib * 2**20, _PROTOBUF_LIMIT - inside)
    onnx.save_model(
        graph,
        str(folder / MODEL),
        save_as_external_data=external,
        location=EXTERNAL_DATA,
        size_threshold=1024,
    )
    if external:
        # The onnx package makes this file for its owner alone, whatever the umask says.
        (folder / EXTERNAL_DATA).chmod((folder / MODEL).stat().st_mode & 0o777)
    onnx.checker.check_model(str(folder / MODEL), full_check=True)


@contextmanager
def staged_bundle(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, which takes its place when the block ends without an error, and is removed otherwise.

    Raises:
        BundleError: `out` is something else than a bundle.
    """
    check_place(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        folder = work / "bundle"
        folder.mkdir()
        yield folder
        publish(folder, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def publish(folder: Path, out: Path) -> None:
    """Put `folder` in the place of `out`. A folder cannot be replaced in one step, so the old one is renamed first."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    replace_folder(folder, out)
    parent = os.open(out.parent, os.O_RDONLY)
    os.fsync(parent)
    os.close(parent)


def oov_id(vocabulary: Vocabulary) -> int | str:
    """An id that is not in the vocabulary."""
    for start in itertools.count(step=1000):
        numbers = range(start, start + 1000)
        candidates = [-1 - i for i in numbers] if vocabulary.kind == "int64" else [f"unknown-{i}" for i in numbers]
        oov = np.flatnonzero(vocabulary.rows(candidates, missing="fallback") == len(vocabulary))
        if len(oov):
            return candidates[oov[0]]
    raise AssertionError("a vocabulary is finite")
