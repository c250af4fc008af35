"""Examples that are read from disk: every row once an epoch, shuffled, in shares, and resumed to the same bits."""

import threading

import numpy as np
import pytest
import torch
from torch import nn

import pipeline.training.examples as module
from graphhash.nn.workers import Workers
from pipeline.training.examples import ReadAhead, StreamedExamples
from pipeline.training.loop import CONTINUE, STOP, Callbacks, FitSettings, Objective, fit

N_ROWS = 1000


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ROWS", 16)
    monkeypatch.setattr(module, "BUFFER_BLOCKS", 4)


@pytest.fixture
def pieces(tmp_path):
    """Row numbers, and the same rows as pairs of numbers, in two parts on disk."""
    numbers = np.arange(N_ROWS, dtype=np.int32)
    arrays = [numbers, np.column_stack([numbers, -numbers]).astype(np.float32)]
    found = []
    for i, array in enumerate(arrays):
        parts = [array[:700], array[700:]]
        for part, values in enumerate(parts):
            np.save(tmp_path / f"{i}-{part}.npy", values)
        found.append([np.load(tmp_path / f"{i}-{part}.npy", mmap_mode="r") for part in range(2)])
    return found


def epoch(examples, sizes=(96,) * 10 + (40,), seed=0, n_done=0):
    return list(examples.batches(sizes, torch.Generator().manual_seed(seed), n_done))


def test_an_epoch_has_every_row_once_and_arrays_stay_together(pieces):
    batches = epoch(StreamedExamples(pieces))
    assert [len(numbers) for numbers, _ in batches] == [96] * 10 + [40]
    numbers, pairs = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    assert sorted(numbers.tolist()) == list(range(N_ROWS))
    assert torch.equal(pairs, torch.stack([numbers, -numbers], 1).float())


def test_the_order_follows_from_the_generator_alone(pieces):
    examples = StreamedExamples(pieces)
    first, again, other = (torch.cat([b[0] for b in epoch(examples, seed=seed)]) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # Blocks are from anywhere, and rows of one block are not neighbours in the order.
    assert (first[:64] // 16).unique().numel() == 4
    assert (first[1:] - first[:-1]).abs().float().mean() > 10


@pytest.mark.parametrize("n_done", [1, 5, 10])
def test_what_is_left_of_an_epoch_is_what_the_whole_one_ends_with(pieces, n_done):
    whole, rest = epoch(StreamedExamples(pieces)), epoch(StreamedExamples(pieces), n_done=n_done)
    assert len(rest) == len(whole) - n_done
    for one, other in zip(whole[n_done:], rest, strict=True):
        assert all(map(torch.equal, one, other))


def test_shares_are_consecutive_rows_as_many_as_the_steps_take(pieces):
    examples, found = StreamedExamples(pieces), []
    for rank in range(3):
        workers = Workers(rank, 3)
        own = examples.share(workers, torch.device("cpu"))
        sizes = [n for n, _ in workers.steps(N_ROWS, 96)]
        assert sum(sizes) == len(own)
        rows = sorted(torch.cat([batch[0] for batch in epoch(own, sizes)]).tolist())
        assert rows == list(range(rows[0], rows[0] + len(own)))
        found += rows
    assert found == list(range(N_ROWS))


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))


def loss_of(model, batch, generator):
    noise = torch.rand((), generator=generator)
    return ((batch[1] @ model.weight - batch[0]).square() / 1e6).mean() * (1 + noise)


def trained(pieces, poll=lambda: CONTINUE, state=None):
    model = Line()
    settings = FitSettings(1e-2, 0.0, epochs=3, eval_every=1, patience=9, batch_size=96, seed=5)
    callbacks = Callbacks(poll=poll)
    return fit(model, StreamedExamples(pieces), settings, Objective(loss_of, "loss"), callbacks=callbacks, state=state)


def test_a_training_that_was_stopped_within_an_epoch_ends_with_the_same_bits(pieces, monkeypatch):
    monkeypatch.setattr("pipeline.training.loop.POLL_S", 0.0)
    whole = trained(pieces)
    left = iter([CONTINUE] * 16 + [STOP] + [CONTINUE] * 99)
    stopped = trained(pieces, lambda: next(left))
    assert stopped["stopped"]
    assert stopped["step"]
    resumed = trained(pieces, state=stopped)
    assert torch.equal(whole["model"]["weight"], resumed["model"]["weight"])
    assert [entry["loss"] for entry in whole["history"]] == [entry["loss"] for entry in resumed["history"]]


def test_an_error_of_reading_is_raised_where_the_batch_would_come(pieces):
    damaged = [pieces[0], [pieces[1][0], np.zeros((1, 3), np.float32)]]
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        epoch(StreamedExamples(damaged))


def test_the_thread_ends_with_the_epoch_and_where_it_is_left_early(pieces):
    before = threading.active_count()
    epoch(StreamedExamples(pieces))
    batches = StreamedExamples(pieces).batches([96] * 10, torch.Generator().manual_seed(0))
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_values_are_read_ahead_in_order():
    with ReadAhead(iter(range(5))) as values:
        assert list(values) == [0, 1, 2, 3, 4]
        assert list(values) == []
