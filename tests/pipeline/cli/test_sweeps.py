"""The commands `graphhash compare` and `graphhash tune`: how lists are written, what the help names, and what is refused."""

from __future__ import annotations

import click
import pytest

from pipeline.cli import main as cli
from pipeline.runs.tasks import TASKS

MODELS = [model for task in TASKS.values() for model in task.models]


@pytest.mark.parametrize(
    ("words", "seeds", "overrides"),
    [
        ("--seeds 0 1 2", (0, 1, 2), ()),
        ("--seeds 0,1,2 train.epochs=3", (0, 1, 2), ("train.epochs=3",)),
        ("train.epochs=3 --seeds 0 --seeds=1,2", (0, 1, 2), ("train.epochs=3",)),
        ("--seeds 0, 1 2 --ratios 0.5 train.epochs=3 train.dim=4", (0, 1, 2), ("train.epochs=3", "train.dim=4")),
    ],
)
def test_lists_are_written_with_commas_with_spaces_or_again(words, seeds, overrides):
    command = cli.app.commands["compare"]
    context = click.Context(command)
    command.parse_args(context, ["--data", "x", "--out", "o", *words.split()])
    assert sum(context.params["seeds"], ()) == seeds
    assert context.params["overrides"] == overrides


@pytest.mark.parametrize("words", ["--seeds 0 x", "--ratios a", "--rows 1.5"])
def test_a_list_of_what_it_does_not_take_is_refused(words):
    command = cli.app.commands["compare"]
    with pytest.raises(click.BadParameter, match="holds what is not"):
        command.parse_args(click.Context(command), ["--data", "x", "--out", "o", *words.split()])


@pytest.mark.parametrize(
    ("command", "setting", "option"),
    [
        ("compare", "train.loss=directau", "--models"),
        ("compare", "train.seed=3", "--seeds"),
        ("tune", "train.model=neumf", "--model"),
    ],
)
def test_settings_that_an_option_stands_for_are_refused(command, setting, option, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--data", "x", "--out", str(tmp_path), setting])
    assert exit_.value.code == 2
    assert (
        f"{setting}: graphhash {command} takes {setting.split('=')[0]} from {option}; give it there"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["compare", "tune"])
def test_help_names_every_model(name):
    command = cli.app.commands[name]
    text = command.get_help(click.Context(command, max_content_width=200))
    assert all(model in text for model in MODELS)
