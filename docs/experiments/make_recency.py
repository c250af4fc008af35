"""Prints the table of recency: a model that is trained once, one that `graphhash update` keeps up to date, and one that is trained anew.

    python docs/experiments/make_recency.py ml-100k/u.data recency --first 20 --last 30 --every 2

Weeks are counted from the first rating of MovieLens-100K. All models are trained on the weeks before `--first`. Before every week that is
tested, the second one gets the weeks since then by `graphhash update`, week by week, and the third is trained on all of them. Each is
asked for 20 items for the users of the week, without those that the user had before. Recall is over the items of the week.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.config.run_config import RunConfig
from pipeline.runs.run import run
from pipeline.updates.update import update
from serving.retriever import Retriever

K = 20
WEEK_S = 7 * 86_400
WAYS = {"once": "trained once", "update": "updated weekly", "again": "trained anew"}
GROUPS = ("all users", "users of the first training", "users since then", "users new in the week")


def write(rows: NDArray[np.int64], file: Path) -> str:
    """User and item of some ratings as a log. Returns its path."""
    pq.write_table(pa.table({"user_id": rows[:, 0], "item_id": rows[:, 1]}), file)
    return str(file)


def train(rows: NDArray[np.int64], out: Path, method: str) -> Path:
    """A run on some ratings, a tenth of them for validation. Returns its bundle."""
    out.mkdir(parents=True)
    settings = {"data.path": write(rows, out / "log.parquet"), "data.test": 0.0, "run.out": str(out)}
    run(RunConfig.from_flat({**settings, "run.methods": (method,), "run.mlflow": False}), until="export")
    return out / "bundle"


def recall(bundle: Path, before: NDArray[np.int64], week: NDArray[np.int64]) -> NDArray[np.float64]:
    """Recall at K of every user of a week, in ascending order of ids, shape (n_users,)."""
    users = np.unique(week[:, 0])
    seen = [before[before[:, 0] == user, 1] for user in users]
    answers = Retriever(bundle, provider="cpu").recommend(users, K, exclude=seen).item_ids
    relevant = [week[week[:, 0] == user, 1] for user in users]
    return np.array([np.isin(items, top).mean() for top, items in zip(answers, relevant, strict=True)])


def measure(ratings: NDArray[np.int64], weeks: NDArray[np.int64], args: argparse.Namespace) -> list[dict]:
    """Recall of the users of every tested week by way, and the group of each user."""
    folder = Path(args.out)
    first = ratings[weeks < args.first]
    bundles = {"update": train(first, folder / "run", args.method)}
    bundles["once"] = Path(shutil.copytree(bundles["update"], folder / "once"))
    measured, updated = [], args.first
    for number in range(args.first, args.last + 1, args.every):
        before, week = ratings[weeks < number], ratings[weeks == number]
        while updated < number:
            update(folder / "run", write(ratings[weeks == updated], folder / f"week-{updated}.parquet"))
            updated += 1
        bundles["again"] = (
            bundles["once"] if number == args.first else train(before, folder / f"again-{number}", args.method)
        )
        users = np.unique(week[:, 0])
        group = np.where(np.isin(users, first[:, 0]), 1, np.where(np.isin(users, before[:, 0]), 2, 3))
        found = {way: recall(bundle, before, week) for way, bundle in bundles.items()}
        measured.append({"week": number, "group": group, **found})
        print(line(number, len(users), found), flush=True)
    return measured


def line(title: object, n_users: int, found: dict[str, NDArray[np.float64]]) -> str:
    """A line of the table: means over users."""
    cells = [f"{found[way].mean():.4f}" if n_users else "-" for way in WAYS]
    return f"| {title} | {n_users} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ratings", help="u.data of MovieLens-100K")
    parser.add_argument("out", help="a new folder for the runs")
    parser.add_argument("--method", default="soft")
    parser.add_argument("--first", type=int, default=20, help="the week from which on is tested")
    parser.add_argument("--last", type=int, default=30)
    parser.add_argument("--every", type=int, default=2, help="test every so many weeks; updates are weekly")
    args = parser.parse_args()
    table = np.loadtxt(args.ratings, dtype=np.int64)
    ratings, times = table[:, :2], table[:, 3]
    titles = " | ".join(WAYS.values())
    print(f"| week | users | {titles} |\n| --- | --- | --- | --- | --- |")
    measured = measure(ratings, (times - times.min()) // WEEK_S, args)
    group = np.concatenate([entry["group"] for entry in measured])
    for number, title in enumerate(GROUPS):
        chosen = group == number if number else np.ones(len(group), bool)
        print(line(title, int(chosen.sum()), {way: np.concatenate([e[way] for e in measured])[chosen] for way in WAYS}))


if __name__ == "__main__":
    main()
