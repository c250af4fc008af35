"""Writing the arrays of train, validation or test of a CTR data set, which `pipeline.ctr.data.Part` reads."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.ctr.encoders import Encoders


class PartWriter:
    """The arrays of one part, filled in order.

    Args:
        folder: of the part, which is made.
        n_rows: of the part.
        group: column of the groups; train has none.
    """

    def __init__(self, folder: Path, n_rows: int, encoders: Encoders, group: str | None):
        folder.mkdir()
        shapes: dict[str, tuple[tuple[int, ...], type]] = {
            "labels": ((n_rows,), np.uint8),
            "categorical": ((n_rows, len(encoders.columns)), np.int32),
            "dense": ((n_rows, len(encoders.dense)), np.float32),
        }
        shapes |= {f"multi_valued_{i}": ((n_rows, width), np.int32) for i, width in enumerate(encoders.widths)}
        if group is not None and folder.name != "train":
            shapes["groups"] = ((n_rows,), np.int64)
        self._opened, self._files = ExitStack(), dict[str, BinaryIO]()
        self._dtypes = {name: np.dtype(dtype) for name, (_, dtype) in shapes.items()}
        for name, (shape, dtype) in shapes.items():
            # Written in order and not through a memory map, whose pages would count as memory of the process.
            file = self._files[name] = self._opened.enter_context((folder / f"{name}.npy").open("wb"))
            descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
            np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})

    def add(self, arrays: dict[str, NDArray]) -> None:
        """Append rows to every array."""
        for name, file in self._files.items():
            file.write(np.ascontiguousarray(arrays[name], self._dtypes[name]).tobytes())

    def close(self) -> None:
        """Close the files, which are complete when all rows were added."""
        self._opened.close()
