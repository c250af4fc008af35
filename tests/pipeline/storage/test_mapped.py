"""Rows read from the file of a memory map are those of the map."""

import numpy as np
import pytest

from pipeline.storage.mapped import read_slice


@pytest.mark.parametrize("shape", [(10,), (10, 3), (10, 0), (0, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32])
@pytest.mark.parametrize("bounds", [(0, 10), (3, 7), (8, 20), (5, 5)])
def test_rows_are_those_of_the_array(tmp_path, shape, dtype, bounds):
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    stored = np.load(tmp_path / "a.npy", mmap_mode="r") if array.size else np.load(tmp_path / "a.npy")
    for rows in (read_slice(stored, *bounds), read_slice(array, *bounds)):
        assert rows.dtype == dtype
        assert rows.flags.writeable
        assert np.array_equal(rows, array[slice(*bounds)])


def test_a_view_of_a_map_is_not_taken_for_the_whole(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(20).reshape(10, 2))
    stored = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert np.array_equal(read_slice(stored[4:], 1, 3), stored[5:7])
    assert np.array_equal(read_slice(stored[:, 1], 1, 3), stored[1:3, 1])
