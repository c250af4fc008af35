"""`graphhash submit`: what is checked before anything is sent."""

from __future__ import annotations

import re

import click
import pytest

from pipeline.cli.jobs import checked_command
from pipeline.cli.main import app
from pipeline.errors import ConfigError
from pipeline.runs.jobs import Driver


def test_a_command_is_checked_and_gets_the_clusters_address():
    assert checked_command(app, ["run", "--data", "s3://b/x", "--out", "/shared/run"])[:3] == [
        "run",
        "--address",
        "auto",
    ]
    given = ["run", "--data", "x", "--out", "/o", "--address", "ray://h:1"]
    assert checked_command(app, given) == given
    register = ["register", "/shared/run", "--name", "m"]
    assert checked_command(app, register) == register


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ([], ConfigError, "no command for the job"),
        (["rum"], ConfigError, "'rum' cannot run as a job"),
        (["submit", "--", "run"], ConfigError, "'submit' cannot run as a job"),
        (["run", "--data", "x"], click.UsageError, "--out"),
        (["run", "--data", "x", "--out", "/o", "--speed", "9"], click.UsageError, "--speed"),
        (["run", "--data", "x", "--out", "out"], ConfigError, "out: a job runs in a temporary copy .* s3://"),
        (["recommend", "out/bundle", "--user-id", "1"], ConfigError, "out/bundle: a job runs in a temporary copy"),
    ],
)
def test_a_command_that_would_fail_there_fails_here(words, error, message):
    with pytest.raises(error) as caught:
        checked_command(app, words)
    text = caught.value.format_message() if isinstance(caught.value, click.ClickException) else str(caught.value)
    assert re.search(message, text)


def test_submit_sends_the_checked_words_of_the_command_line_that_it_is_part_of(graphhash, monkeypatch):
    sent = []
    monkeypatch.setattr("pipeline.runs.jobs.submit", lambda command, **options: sent.append((command, options)) or 3)
    code, _, _ = graphhash("submit", "--driver-memory-gib", 2, "--", "ingest", "--data", "s3://b/x", "--out", "/o")
    assert code == 3, "the exit code of the job's program"
    ((words, options),) = sent
    assert words == ["ingest", "--address", "auto", "--data", "s3://b/x", "--out", "/o"]
    assert options["driver"] == Driver(0, 0, 2 * 2**30)
