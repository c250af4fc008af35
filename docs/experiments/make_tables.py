"""Writes the table of an experiment into its page, from what `graphhash compare` left.

    python docs/experiments/make_tables.py docs/experiments/frontier.md equal-rows cmp-rows

The page holds a line `<!-- FIGURES: NAME -->`. The table is written below it, and replaces the one that an earlier call wrote.
`FOLDER=NOTE` appends a note to the names of that comparison's methods. The line below the table names the commit, the machine, and the day
on which the comparison ended. `--measures` names the columns, and `--served` takes those of parts of the ids.
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
# Keys of measures in the order of columns, and whether the highest value is the best; of a ranking, at the first cut-off.
MEASURES = {"recall": True, "capped_recall": True, "ndcg": True, "log_loss": False, "auc": True}
TITLES = {"ndcg": "NDCG", "auc": "AUC", "mrr": "MRR"}
PARTS = ("head_items", "middle_items", "tail_items", "most_active_users", "middle_users", "least_active_users")
TRAINING_BYTES = {"training_bytes": "training bytes", "training_bytes_measured": "measured"}


def rows(folder: Path, note: str) -> list[dict[str, Any]]:
    """The lines of a comparison's summary, with a `title`; the model is named where there are several."""
    summary = json.loads((folder / "compare.json").read_text(encoding="utf-8"))["summary"]
    models = {line["model"] for line in summary}
    for line in summary:
        parts = [f"`{line['method']}`", f"`{line['model']}`" if len(models) > 1 else "", note]
        line["title"] = ", ".join(filter(None, parts))
    return summary


def measures_of(lines: list[dict[str, Any]]) -> list[str]:
    """Keys of the measures that the lines have, in the order of columns."""
    found = dict.fromkeys(key for line in lines for key, value in line.items() if value is not None)
    plain = [
        key for key in found if key.partition("@")[0] in MEASURES and key.partition("@")[2].isdecimal() == ("@" in key)
    ]
    cutoffs = [key.partition("@")[2] for key in plain if "@" in key]
    main = [key for key in plain if "@" not in key or key.partition("@")[2] == cutoffs[0]]
    return sorted(main, key=lambda key: list(MEASURES).index(key.partition("@")[0]))


def served(lines: list[dict[str, Any]]) -> list[str]:
    """Keys of recall for the parts of the ids, and of coverage."""
    keys = dict.fromkeys(key for line in lines for key in line if not key.endswith("_std"))
    found = [key for part in PARTS for key in keys if key.startswith("recall@") and key.endswith(f"_{part}")]
    return found + [key for key in keys if key.startswith("coverage@")][:1]


def title_of(key: str) -> str:
    """Of a column: "recall@20_tail_items" is "tail items"."""
    if (part := next((part for part in PARTS if key.endswith(f"_{part}")), None)) is not None:
        return part.replace("_", " ")
    name, at, k = key.partition("@")
    return TITLES.get(name, name.replace("_", " ")) + at + k


def table(lines: list[dict[str, Any]], keys: list[str]) -> list[str]:
    """A Markdown table: method, rows, bytes, and the measures; the best value of each is bold."""
    training = [key for key in TRAINING_BYTES if any(line.get(key) is not None for line in lines)]
    titles = ["method", "table rows", "bytes of the full table"]
    titles += [*(TRAINING_BYTES[key] for key in training), *(title_of(key) for key in keys)]
    best = {
        key: (max if MEASURES.get(key.partition("@")[0], True) else min)(values)
        for key in keys
        if (values := [line[key] for line in lines if line.get(key) is not None])
    }

    def value(line: dict[str, Any], key: str) -> str:
        if line.get(key) is None:
            return "-"
        text = f"{line[key]:.4f}"
        spread = line.get(f"{key}_std")
        return (f"**{text}**" if line[key] == best[key] else text) + (f" ({spread:.4f})" if spread is not None else "")

    made = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for line in lines:
        if line.get("bytes_ratio") is None:
            # The budget is too small for it.
            budget = 100 * float(line["budget"].removeprefix("ratio "))
            made.append(f"| {line['title']} | - | does not fit into {budget:g} % {'| - ' * (len(titles) - 3)}|")
            continue
        cells = [line["title"], f"{line['rows']:,.0f}", f"{100 * line['bytes_ratio']:.1f} %"]
        cells += ["-" if line.get(key) is None else f"{line[key]:,.0f}" for key in training]
        made.append(f"| {' | '.join(cells + [value(line, key) for key in keys])} |")
    # Two budgets may buy the same.
    return list(dict.fromkeys(made))


def caption(folders: list[Path], lines: list[dict[str, Any]], machine: str) -> str:
    """Seeds, commit, machine and day in one line."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    ).stdout.strip()
    ended = max((folder / "compare.json").stat().st_mtime for folder in folders)
    n_seeds = {line["n_seeds"] for line in lines} - {0}
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
    parser.add_argument(
        "--measures", help="keys of columns, such as recall@20,ndcg@20; without it, those of the first cut-off"
    )
    parser.add_argument("--served", action="store_true", help="recall by popularity and by activity, and coverage")
    options = parser.parse_args(arguments)
    pairs = [(Path(folder), note) for folder, _, note in (text.partition("=") for text in options.comparisons)]
    lines = [line for folder, note in pairs for line in rows(folder, note)]
    keys = options.measures.split(",") if options.measures else served(lines) if options.served else measures_of(lines)
    made = [*table(lines, keys), "", caption([folder for folder, _ in pairs], lines, options.machine)]
    write(options.page, options.name, made)


if __name__ == "__main__":
    main()
