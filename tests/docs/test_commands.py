"""Every command that the pages show is one that the programs take."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from pathlib import Path

import click
import pytest

from pipeline.cli import main as cli
from pipeline.config.run_config import parse_override
from serving.http.api_schema import RecommendRequest, ScoreRequest
from tests.docs.pages import ROOT, blocks, commands

COMMANDS = [(block, command) for block in blocks("bash", "console") for command in commands(block)]
# Programs of others, whose options are not checked here.
OTHERS = {"docker", "openssl", "pip", "python3", "ray", "source", "tritonserver", "wrk"}
BODIES = {"/v1/recommend": RecommendRequest, "/v1/score": ScoreRequest}


def check_graphhash(words: list[str]) -> None:
    """Parse a command line as `graphhash` does, without running it."""
    command: click.Command = cli.app
    while isinstance(command, click.Group):
        assert words, "a group of commands without a command"
        assert words[0] in command.commands, f"there is no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    command.parse_args(click.Context(command), list(words))
    if "--" in words:
        check_graphhash(words[words.index("--") + 1 :])
        words = words[: words.index("--")]
    for word, before in zip(words, ["", *words], strict=False):
        if re.match(r"[a-z]+\.[a-z_]+=", word) and not before.startswith("--"):
            parse_override(word)


def check_mlflow_run(words: list[str]) -> None:
    """The entry point and the parameters are in the MLproject file."""
    project = (ROOT / words[0] / "MLproject").read_text(encoding="utf-8")
    entry = words[words.index("-e") + 1]
    body = re.search(rf"^  {entry}:\n(.*?)(?=^  \w+:|\Z)", project, re.DOTALL | re.MULTILINE)
    assert body, f"{words[0]} has no entry point {entry}"
    for flag, value in itertools.pairwise(words):
        if flag == "-P":
            name = value.split("=")[0]
            assert re.search(rf"^      {name}:", body[1], re.MULTILINE), f"{entry} has no parameter {name}"


def check_request(words: list[str]) -> None:
    """The body, if there is one, is JSON, of the shape that its path takes."""
    if "-d" not in words:
        return
    body = json.loads(words[words.index("-d") + 1])
    url = next(word for word in words if word.startswith("http"))
    path = "/" + url.split("/", 3)[3]
    if path in BODIES:
        BODIES[path].model_validate(body)


@pytest.mark.parametrize(("block", "command"), COMMANDS, ids=[f"{block}-{command[:60]}" for block, command in COMMANDS])
def test_command_takes_the_options_shown(block, command):
    program, *words = shlex.split(command, comments=True)
    program, words = Path(program).name, words[: words.index("&&") if "&&" in words else len(words)]
    if program == "graphhash":
        check_graphhash(words)
    elif "pipeline" in words:
        check_graphhash(words[words.index("pipeline") + 1 :])
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{words[0]}:", makefile, re.MULTILINE), f"the Makefile has no target {words[0]}"
    elif program == "mlflow":
        if words[0] == "run":
            check_mlflow_run(words[1:])
    elif program == "python":
        assert (ROOT / words[0]).is_file(), f"there is no {words[0]}"
    elif program in ("curl", "oha"):
        check_request(words)
    else:
        assert program in OTHERS, f"{program} is not checked; add a check, or add it to OTHERS"


def test_the_pages_show_every_command():
    shown = {shlex.split(command)[1] for _, command in COMMANDS if command.startswith("graphhash ")}
    assert set(cli.app.commands) - shown == {"demo"}  # Shown as `make demo`.


def test_a_wrong_command_is_found():
    with pytest.raises(click.NoSuchOption):
        check_graphhash(["run", "--data", "log.csv", "--out", "out", "--lookups", "4"])
    with pytest.raises(AssertionError, match="no command"):
        check_graphhash(["bench", "nothing"])
    with pytest.raises(ValueError, match="train"):
        check_graphhash(["run", "--data", "log.csv", "--out", "out", "train.epocs=4"])
