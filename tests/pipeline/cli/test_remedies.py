"""An option that an error names as the remedy is one of the command that ends with it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from pipeline.cli.main import app
from tests.helpers.call_graph import CallGraph
from tests.helpers.small_models import small_model

ROOT = Path(__file__).resolve().parents[3]
# With {} for what a text puts in: --{}-kind is --user-kind or --item-kind.
OPTION = re.compile(r"(?<![\w-])--(?:[a-z]|\{\}-)(?:[a-z0-9-]|\{\})*")
# Another program's, or another command's, which the message writes out.
WRITTEN_OUT = re.compile(
    r"(?:ray start|ray job|graphhash \w+|pip install)[^;()`]*?(?=[;()`]|'? (?:again|first|prints)|$)"
)

# Modules of the stages after the last one of a command.
OF_MODELS = tuple(
    f"pipeline.{task}.{name}"
    for task in ("retrieval", "ctr")
    for name in ("evaluate", "export", "train", "refit", "report", "objective")
)
AFTER = {
    "ingest": (*OF_MODELS, "pipeline.training", "pipeline.tracking", "graphhash.nn", "pipeline.ctr.budget",
               "pipeline.ctr.method_spec", "pipeline.ctr.cluster", "pipeline.retrieval.cluster"),
    "cluster": (*OF_MODELS, "pipeline.training", "pipeline.tracking", "graphhash.nn"),
    "train": ("pipeline.retrieval.export", "pipeline.ctr.export"),
}  # fmt: skip


# Options that texts name which a command does not come to, and why.
NOT_REACHED = {
    "bench cluster": {"--time-column": "its splits need no times"},
    "bench train": {"--time-column": "its splits need no times", "--rows": "its budget is a resolution"},
    "bench ingest": dict.fromkeys(
        ("--time-column", "--split", "--encoding", "--{}-kind"), "it reads a log that it has made"
    ),
    "update": {"--{}-features": "the settings of a run of method lsh name its features"},
}


def commands(group: click.Group = app, before: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{before}{name} ")
        else:
            yield before + name, command


def remedies(node: ast.AST) -> set[str]:
    """The options that texts of a definition name, but for docstrings, and for words of a command line, which are nothing but an option."""
    documented = {
        id(inner.body[0].value)
        for inner in ast.walk(node)
        if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        and isinstance(inner.body[0], ast.Expr)
    }
    named = set()
    for text in texts(node):
        if id(text) not in documented:
            words = "".join(
                part.value if isinstance(part, ast.Constant) else "{}"
                for part in (text.values if isinstance(text, ast.JoinedStr) else [text])
            )
            # What begins with an option is told to whoever gave it.
            given = re.match(r"--\S*(?=[ :])", words)
            if not re.fullmatch(r"--\S*", words):
                named |= set(OPTION.findall(WRITTEN_OUT.sub("", words))) - ({given[0].rstrip(":")} if given else set())
    return named


def texts(node: ast.AST) -> Iterator[ast.Constant | ast.JoinedStr]:
    if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
        yield node
        return
    for inner in ast.iter_child_nodes(node):
        yield from texts(inner)


@pytest.fixture(scope="module")
def graph() -> CallGraph:
    return CallGraph(ROOT)


def named_by(name: str, command: click.Command, graph: CallGraph) -> dict[str, set[str]]:
    """Option -> the definitions whose texts name it, of what a command may come to."""
    callback = command.callback
    while hasattr(callback, "__wrapped__"):
        callback = callback.__wrapped__
    found: dict[str, set[str]] = {}
    for key in graph.reachable((callback.__module__, callback.__name__), AFTER.get(name, ())):
        node = graph.defined[key]
        # Those of classes are of their methods. Help texts of options are in decorators of the commands.
        if not isinstance(node, ast.ClassDef) and not key[0].startswith("pipeline.cli"):
            for option in remedies(node):
                found.setdefault(option, set()).add(".".join(key))
    return found


COMMANDS = dict(commands())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_that_an_error_names_is_one_of_the_command(name, graph):
    command = COMMANDS[name]
    taken = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    named = named_by(name, command, graph)
    forms = {option: re.compile(re.escape(option).replace(r"\{\}", "[a-z]+")) for option in named}
    missing = {option for option, form in forms.items() if not any(map(form.fullmatch, taken))}
    assert {option: named[option] for option in missing - NOT_REACHED.get(name, {}).keys()} == {}


def test_what_is_said_not_to_be_reached_is_named_all_the_same(graph):
    for name, options in NOT_REACHED.items():
        assert options.keys() <= named_by(name, COMMANDS[name], graph).keys(), "remove it from NOT_REACHED"


def test_remedies_are_found_in_texts_of_all_kinds(tmp_path):
    (tmp_path / "graphhash").mkdir()
    (tmp_path / "graphhash" / "far.py").write_text(
        'HINT = "give --far"\n\n'
        "class Far:\n"
        '    """Takes --documented."""\n\n'
        "    def fail(self, value):\n"
        "        raise ValueError(f\"--value {value}: cannot be; {HINT}, or run 'graphhash train --other' first\")\n"
    )
    (tmp_path / "graphhash" / "near.py").write_text(
        'def start(command=("--word", "x")):\n'
        "    from graphhash import far\n"
        "    far.Far().fail(1)\n\n"
        "def unused():\n"
        '    raise ValueError("give --unused")\n'
    )
    small = CallGraph(tmp_path)
    reached = small.reachable(("graphhash.near", "start"))
    assert ("graphhash.near", "unused") not in reached
    functions = [small.defined[key] for key in reached if not isinstance(small.defined[key], ast.ClassDef)]
    assert set().union(*map(remedies, functions)) == {"--far"}


@pytest.mark.parametrize("command", ["train", "register"])
def test_tracking_may_be_left_out_where_the_command_says_so(command, graphhash, tmp_path, monkeypatch):
    # Nothing listens at the port 9 (discard).
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    small_model().export(tmp_path / "bundle", metrics={"recall@20": 0.1})
    rows = [f"{user},{(user * step) % 17}" for user in range(40) for step in (1, 2, 3)]
    (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id", *rows, ""]))
    words = {
        "train": ["--data", tmp_path / "log.csv", "--out", tmp_path / "run"],
        "register": [tmp_path / "bundle", "--name", "small"],
    }
    code, _, errors = graphhash(command, *words[command])
    assert code == 1
    last = errors.strip().splitlines()[-1]
    assert "does not answer" in last
    assert last.endswith("set MLFLOW_TRACKING_URI" + (", or go without: --no-mlflow" if command == "train" else ""))
