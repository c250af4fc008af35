"""Writing the arrays of train, validation or test of a CTR data set, which `pipeline.ctr.data.Part` reads."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.ctr.encoders import Encoders


def new_part(folder: Path, n_rows: int, encoders: Encoders, group: str | None) -> None:
    """Make the folder of a part, with arrays of the size that they will have.

    Args:
        group: column of the groups; train has none.
    """
    folder.mkdir()
    shapes: dict[str, tuple[tuple[int, ...], type]] = {
        "labels": ((n_rows,), np.uint8),
        "categorical": ((n_rows, len(encoders.columns)), np.int32),
        "dense": ((n_rows, len(encoders.dense)), np.float32),
    }
    shapes |= {f"multi_valued_{i}": ((n_rows, width), np.int32) for i, width in enumerate(encoders.widths)}
    if group is not None and folder.name != "train":
        shapes["groups"] = ((n_rows,), np.int64)
    for name, (shape, dtype) in shapes.items():
        with (folder / f"{name}.npy").open("wb") as file:
            descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
            np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
            file.truncate(file.tell() + int(np.prod(shape)) * np.dtype(dtype).itemsize)


class PartWriter:
    """Fills consecutive rows of the arrays of one part, in order.

    Args:
        folder: of the part, as :func:`new_part` made it.
        first: the row to begin at.
    """

    def __init__(self, folder: Path, first: int):
        self._opened, self._files = ExitStack(), dict[str, tuple[BinaryIO, np.dtype]]()
        for path in folder.iterdir():
            # Written in order and not through a memory map, whose pages would count as memory of the process.
            file = self._opened.enter_context(path.open("r+b"))
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            file.seek(first * int(np.prod(shape[1:])) * dtype.itemsize, 1)
            self._files[path.stem] = file, dtype

    def add(self, arrays: dict[str, NDArray]) -> None:
        """Write rows of every array behind those before."""
        for name, (file, dtype) in self._files.items():
            file.write(np.ascontiguousarray(arrays[name], dtype).tobytes())

    def close(self) -> None:
        """Close the files."""
        self._opened.close()
