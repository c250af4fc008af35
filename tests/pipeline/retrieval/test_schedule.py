"""How long a training lasts, how often it is validated and how strong its decay is, by the size of the log."""

from __future__ import annotations

import pytest

from pipeline.config.run_config import TrainConfig
from pipeline.maps.methods import METHODS
from pipeline.retrieval.budget import GraphSize
from pipeline.retrieval.presets import PRESETS
from pipeline.retrieval.schedule import EVALUATION_SHARE, evaluation_interval, interaction_cost
from pipeline.retrieval.train import fit_settings

SMALL, LARGE = GraphSize(943, 1_682, 80_000), GraphSize(30_000, 41_000, 810_000)


def settings(size: GraphSize, **train):
    return fit_settings(TrainConfig(**train), METHODS["full"], 10_000, size)


def test_a_large_log_has_the_presets_length_and_decay_and_a_small_one_fewer_epochs_and_more_decay():
    preset, large, small = PRESETS["mf", "bpr"], settings(LARGE, loss="bpr"), settings(SMALL, loss="bpr")
    assert large.epochs == preset.epochs
    assert large.weight_decay == METHODS["full"].l2_total / 10_000
    assert 100 <= small.epochs < large.epochs
    assert small.weight_decay == pytest.approx(large.weight_decay * 10**0.5)
    tiny = settings(GraphSize(20, 20, 100), loss="bpr")
    assert (tiny.epochs, tiny.weight_decay) == (100, 4 * large.weight_decay)


@pytest.mark.parametrize("loss", ["bpr", "softmax", "directau", "ials"])
@pytest.mark.parametrize("size", [SMALL, LARGE, GraphSize(6_040, 3_700, 800_000)])
def test_evaluations_take_a_tenth_of_the_time_or_are_as_few_as_the_preset_has(loss, size):
    train = TrainConfig(loss=loss)
    chosen, preset = settings(size, loss=loss), PRESETS["mf", loss]
    n_steps = -(-size.n_edges // chosen.batch_size) if chosen.batch_size else 1
    cost = interaction_cost(train, chosen.loss.negatives, chosen.batch_size, n_steps)
    scores = min(size.n_users, train.eval_users) * size.n_items
    share = scores / (chosen.eval_every * cost * size.n_edges)
    assert (
        share <= EVALUATION_SHARE or chosen.eval_every == chosen.epochs // preset.evaluations or chosen.eval_every == 1
    )
    assert chosen.epochs // chosen.eval_every >= preset.evaluations or chosen.eval_every == 1
    # A third of the epochs without a better score ends the training.
    assert chosen.patience == max(5, -(-chosen.epochs // (3 * chosen.eval_every)))


def test_what_is_set_stays_as_it_is():
    chosen = settings(SMALL, epochs=7, eval_every=3, patience=2, l2_total=0.5)
    assert (chosen.epochs, chosen.eval_every, chosen.patience, chosen.weight_decay) == (7, 3, 2, 5e-5)


def test_a_dearer_epoch_is_followed_by_an_evaluation_sooner():
    intervals = [evaluation_interval(TrainConfig(), LARGE, cost, 300, 15) for cost in (36.0, 360.0, 3600.0, 36000.0)]
    assert intervals == sorted(intervals, reverse=True)
    assert intervals[0] == 20
    assert intervals[-1] == 1
