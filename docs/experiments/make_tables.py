"""Writes the table of an experiment into its page, from what `graphhash compare` left.

    python docs/experiments/make_tables.py docs/experiments/gowalla-random.md gowalla-random cmp-random cmp-random-int8=int8

The page holds a line `<!-- FIGURES: NAME -->`. The table is written below it, and replaces the one that an earlier call wrote.
`FOLDER=NOTE` appends a note to the names of that comparison's methods. The line below the table names the commit, the machine, and the day
on which the comparison ended.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

END = "<!-- end of figures -->"
# Key of a measure, its title, and whether the highest value is the best.
MEASURES = (
    ("recall@20", "recall@20", True),
    ("capped_recall@20", "capped recall@20", True),
    ("ndcg@20", "NDCG@20", True),
    ("log_loss", "log loss", False),
    ("auc", "AUC", True),
)


def rows(folder: Path, note: str) -> list[dict[str, Any]]:
    """The lines of a comparison's summary, with a `title`; the model is named where there are several."""
    summary = json.loads((folder / "compare.json").read_text(encoding="utf-8"))["summary"]
    models = {line["model"] for line in summary}
    for line in summary:
        parts = [f"`{line['method']}`", f"`{line['model']}`" if len(models) > 1 else "", note]
        line["title"] = ", ".join(filter(None, parts))
    return summary


def table(lines: list[dict[str, Any]]) -> list[str]:
    """A Markdown table: method, rows, bytes, and the measures that the lines have; the best value of each is bold."""
    measures = [measure for measure in MEASURES if any(line.get(measure[0]) is not None for line in lines)]
    titles = ["method", "table rows", "bytes of the full table", *(title for _, title, _ in measures)]
    best = {
        key: (max if higher else min)(line[key] for line in lines if line.get(key) is not None)
        for key, _, higher in measures
    }

    def value(line: dict[str, Any], key: str) -> str:
        if line.get(key) is None:
            return "-"
        text = f"{line[key]:.4f}"
        spread = line.get(f"{key}_std")
        return (f"**{text}**" if line[key] == best[key] else text) + (f" ({spread:.4f})" if spread is not None else "")

    made = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for line in lines:
        cells = [line["title"], f"{line['rows']:,.0f}", f"{100 * line['bytes_ratio']:.1f} %"]
        made.append(f"| {' | '.join(cells + [value(line, key) for key, _, _ in measures])} |")
    return made


def caption(folders: list[Path], lines: list[dict[str, Any]], machine: str) -> str:
    """Seeds, commit, machine and day in one line."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    ).stdout.strip()
    ended = max((folder / "compare.json").stat().st_mtime for folder in folders)
    n_seeds = {line["n_seeds"] for line in lines}
    seeds = "one seed" if n_seeds == {1} else "mean, and standard deviation over seeds in brackets"
    return f"{seeds.capitalize()}. Commit {commit}, {machine}, {datetime.fromtimestamp(ended, UTC):%Y-%m-%d}."


def write(page: Path, name: str, made: list[str]) -> None:
    """Put lines below the marker of a page.

    Raises:
        SystemExit: the page has no such marker.
    """
    text = page.read_text(encoding="utf-8")
    marker = f"<!-- FIGURES: {name} -->"
    block = re.compile(re.escape(marker) + rf"(?:\n\n(?:(?!<!--).)*?{END})?", re.DOTALL)
    if not block.search(text):
        raise SystemExit(f"{page} has no line {marker}")
    written = "\n".join([marker, "", *made]) + f" {END}"
    page.write_text(block.sub(lambda _: written, text, count=1), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the table of an experiment into its page.")
    parser.add_argument("page", type=Path)
    parser.add_argument("name", help="of the line <!-- FIGURES: NAME -->")
    parser.add_argument("comparisons", nargs="+", metavar="FOLDER[=NOTE]", help="outputs of `graphhash compare`")
    parser.add_argument("--machine", default=f"{os.cpu_count()} CPU cores, no GPU")
    options = parser.parse_args(arguments)
    pairs = [(Path(folder), note) for folder, _, note in (text.partition("=") for text in options.comparisons)]
    lines = [line for folder, note in pairs for line in rows(folder, note)]
    made = [*table(lines), "", caption([folder for folder, _ in pairs], lines, options.machine)]
    write(options.page, options.name, made)


if __name__ == "__main__":
    main()
