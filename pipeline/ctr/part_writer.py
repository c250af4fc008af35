"""Writing the arrays of train, validation or test of a CTR data set, which `pipeline.ctr.data.Part` reads."""

from __future__ import annotations

from pathlib import Path

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
        self.n_written = 0
        self.arrays: dict[str, np.memmap] = {}
        for name, (shape, dtype) in shapes.items():
            file = folder / f"{name}.npy"
            if 0 in shape:
                np.save(file, np.zeros(shape, dtype))  # Nothing to map.
            else:
                self.arrays[name] = np.lib.format.open_memmap(file, "w+", dtype, shape)

    def add(self, arrays: dict[str, NDArray], n: int) -> None:
        for name, array in self.arrays.items():
            array[self.n_written : self.n_written + n] = arrays[name]
        self.n_written += n

    def close(self) -> None:
        for array in self.arrays.values():
            array.flush()
        self.arrays = {}
