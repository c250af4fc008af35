"""Arrays on disk are those that were saved, for any number of threads, and rows read from the file of a memory map are those of the map."""

import gc
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipeline.storage.mapped import load_array, read_slice


@pytest.mark.parametrize("shape", [(0,), (0, 3), (1000,), (1000, 3)])
def test_a_large_file_is_mapped_and_a_small_one_read(tmp_path, shape):
    array = np.arange(np.prod(shape)).reshape(shape)
    np.save(tmp_path / "a.npy", array)
    loaded = load_array(tmp_path / "a.npy")
    assert isinstance(loaded, np.memmap) == (array.size > 0)
    assert np.array_equal(loaded, array)


class Garbage:
    """In a cycle, so that the garbage collector ends it, which lets other threads run and leaves more garbage."""

    left = 0

    def __init__(self):
        self.itself = self

    def __del__(self):
        time.sleep(1e-5)
        if Garbage.left:
            Garbage.left -= 1
            Garbage()


def test_threads_load_at_once_also_where_the_collector_lets_them_alternate(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(10))

    def load(_):
        Garbage()
        for _ in range(100):
            assert load_array(tmp_path / "a.npy")[-1] == 9

    threshold = gc.get_threshold()
    Garbage.left = 10_000
    gc.set_threshold(5)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(load, range(4)))
    finally:
        gc.set_threshold(*threshold)
        Garbage.left = 0


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
