"""Examples of a training: in memory, or on disk, where they are read in blocks and shuffled in a buffer, ahead of the step that takes them.

A log of at most IN_MEMORY_BYTES is held in memory, and an order of all of its rows is drawn. A larger one is read in
every epoch: its blocks of BLOCK_ROWS consecutive rows come in an order drawn anew, BUFFER_BLOCKS of them fill a buffer, and the rows of a
buffer come in an order drawn anew. A thread fills the next buffer meanwhile. Memory is that of three buffers, whatever the log.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphhash.nn.workers import Workers
from pipeline.storage.mapped import read_slice

ValueT = TypeVar("ValueT")
# Encoded rows that are held in memory at most; it decides on the order of the rows, so it is the same on all machines.
IN_MEMORY_BYTES = 512 * 2**20
# Examples in memory of at most this many numbers are permuted all at once, larger ones batch by batch.
SMALL_EXAMPLE = 4
BLOCK_ROWS, BUFFER_BLOCKS = 4096, 64
# How often a thread that waits for room in its queue looks whether it is still wanted.
WAIT_S = 0.2


class StreamedExamples:
    """Examples that are read from arrays on disk.

    Args:
        pieces: of every array its parts, shape (n_part, ...) each, one after the other; memory maps are read from their files. Parts of
            one number have as many rows in all arrays.
        first, last: the examples that are meant, of all of them; by default all. They are a worker's share.

    Attributes:
        device: where batches are put.
    """

    def __init__(self, pieces: Sequence[Sequence[NDArray]], first: int = 0, last: int | None = None) -> None:
        self._pieces = pieces
        self._ends = np.cumsum([len(part) for part in pieces[0]])
        self._first, self._last = first, int(self._ends[-1]) if last is None else last
        self.device = torch.device("cpu")

    def __len__(self) -> int:
        return self._last - self._first

    def share(self, workers: Workers, device: torch.device) -> StreamedExamples:
        """A worker's share: consecutive rows, as many as :meth:`Workers.share` has, so that no worker reads those of another."""
        sizes = [len(range(len(self))[Workers(rank, workers.size).share(len(self))]) for rank in range(workers.size)]
        first = self._first + sum(sizes[: workers.rank])
        own = StreamedExamples(self._pieces, first, first + sizes[workers.rank])
        own.device = device
        return own

    def batches(self, sizes: Sequence[int], generator: torch.Generator, n_done: int = 0) -> Iterator[list[Tensor]]:
        """Batches of an epoch, in an order drawn anew; a tensor for every array.

        Args:
            sizes: examples of every batch.
            generator: gives the seed of the order, before the first batch is asked for.
            n_done: batches at the beginning that are left out; only the buffer that they end in is read.
        """
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        return self._batches(sizes, seed, n_done)

    def _batches(self, sizes: Sequence[int], seed: int, n_done: int) -> Iterator[list[Tensor]]:
        with ReadAhead(self._buffers(seed, sum(sizes[:n_done]))) as buffers:
            rest: list[Tensor] = []
            for size in sizes[n_done:]:
                while (n_rest := len(rest[0]) if rest else 0) < size:
                    more = next(buffers)
                    rest = [torch.cat(pair) for pair in zip(rest, more, strict=True)] if n_rest else more
                yield [tensor[:size].to(self.device) for tensor in rest]
                rest = [tensor[size:] for tensor in rest]

    def _buffers(self, seed: int, n_done: int) -> Iterator[list[Tensor]]:
        """Buffers of shuffled rows, without the first ``n_done`` rows of the epoch."""
        starts = np.arange(self._first, self._last, BLOCK_ROWS)
        order = np.random.default_rng([seed, 0]).permutation(len(starts))
        for number, first in enumerate(range(0, len(order), BUFFER_BLOCKS)):
            blocks = [
                (int(s), min(int(s) + BLOCK_ROWS, self._last)) for s in starts[order[first : first + BUFFER_BLOCKS]]
            ]
            n = sum(stop - start for start, stop in blocks)
            if n_done >= n:
                n_done -= n
                continue
            rows = torch.from_numpy(np.random.default_rng([seed, 1, number]).permutation(n)[n_done:])
            n_done = 0
            yield [
                torch.cat([torch.from_numpy(self._read(parts, *block)) for block in blocks]).index_select(0, rows)
                for parts in self._pieces
            ]

    def _read(self, parts: Sequence[NDArray], start: int, stop: int) -> NDArray:
        """Rows of an array of several parts."""
        found = []
        for end, part in zip(self._ends, parts, strict=True):
            before = int(end) - len(part)
            if start < end and stop > before:
                found.append(read_slice(part, max(0, start - before), stop - before))
        return found[0] if len(found) == 1 else np.concatenate(found)


class ReadAhead(Iterator[ValueT]):
    """The values of an iterator, which a thread asks for one ahead; a context manager, whose end ends the thread.

    An error of the iterator is raised where its value would have come.
    """

    def __init__(self, values: Iterator[ValueT]) -> None:
        self._queue: queue.Queue[tuple[ValueT | None, BaseException | None]] = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(values,), name="read-ahead", daemon=True)
        self._thread.start()

    def __enter__(self) -> ReadAhead[ValueT]:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def __next__(self) -> ValueT:
        value, error = self._queue.get()
        if error is not None:
            self._queue.put((None, error))  # The same for who asks again.
            raise error
        assert value is not None
        return value

    def _run(self, values: Iterator[ValueT]) -> None:
        try:
            for value in values:
                if not self._put((value, None)):
                    return
            self._put((None, StopIteration()))
        except BaseException as error:
            self._put((None, error))

    def _put(self, entry: tuple[ValueT | None, BaseException | None]) -> bool:
        """Wait for room; False where nobody asks any more."""
        while not self._closed.is_set():
            try:
                self._queue.put(entry, timeout=WAIT_S)
                return True
            except queue.Full:
                continue
        return False


def batches_in_memory(
    examples: Sequence[Tensor], steps: Sequence[tuple[int, int]], generator: torch.Generator, *, whole: bool
) -> Iterator[Sequence[Tensor]]:
    """The own examples of each step, in an order drawn anew; with ``whole`` all of them in one, as they are."""
    if whole:
        yield examples
        return
    sizes = [own for own, _ in steps]
    order = torch.randperm(len(examples[0]), generator=generator, device=generator.device)
    if sum(tensor[0].numel() for tensor in examples) <= SMALL_EXAMPLE:
        # Cheaper in one piece, and no second copy to speak of.
        yield from zip(*(tensor[order].split(sizes) for tensor in examples), strict=True)
        return
    for rows in order.split(sizes):
        yield [tensor.index_select(0, rows) for tensor in examples]
