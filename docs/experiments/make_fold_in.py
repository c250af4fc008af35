"""Prints the table of fold-in: what `graphhash update` gives to new users and new items, beside a model that is trained anew.

    python docs/experiments/make_fold_in.py ml-100k/u.data fold-in --methods full,additive,soft train.loss=bsl cluster.ratio=0.25

A tenth of the users and a tenth of the items, drawn, are new. A fifth of the interactions, drawn, is the test. The first model is trained
on the other interactions between known ids. The second one is the first one with all other interactions folded in by `graphhash update`.
The third one is trained on both. Each is asked for 20 items for every user, without those that the user had. Recall is over a user's
items of the test: all of known users, the known ones and the new ones among them, and all of new users.
"""

from __future__ import annotations

import argparse
import shutil
import time
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
GROUPS = ("known users", "their known items", "their new items", "new users")


def read(path: str) -> NDArray[np.int64]:
    """User and item of the lines of MovieLens-100K or -1M, shape (n, 2)."""
    text = Path(path).read_text(encoding="latin-1").replace("::", "\t")
    return np.array([line.split("\t")[:2] for line in text.splitlines()], np.int64)


def write(rows: NDArray[np.int64], file: Path) -> str:
    """The interactions as a log. Returns its path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"user_id": rows[:, 0], "item_id": rows[:, 1]}), file)
    return str(file)


def train(rows: NDArray[np.int64], out: Path, method: str, overrides: list[str]) -> float:
    """A run on some interactions, a tenth of them for validation. Returns its seconds."""
    started = time.perf_counter()
    fixed = {"data.path": write(rows, out.with_suffix(".parquet")), "data.test": 0.0, "run.out": str(out)}
    run(RunConfig.load(None, overrides, **fixed, **{"run.methods": (method,), "run.mlflow": False}), until="export")
    return time.perf_counter() - started


def recall(bundle: Path, seen: NDArray[np.int64], wanted: NDArray[np.int64]) -> float:
    """Mean recall at K of the users of the wanted interactions."""
    users = np.unique(wanted[:, 0])
    had, relevant = (dict(zip(*split(rows), strict=True)) for rows in (seen, wanted))
    none = np.empty(0, np.int64)
    answers = Retriever(bundle, provider="cpu").recommend(users, K, exclude=[had.get(user, none) for user in users])
    found = zip(answers.item_ids, (relevant[user] for user in users), strict=True)
    return float(np.mean([np.isin(items, top).mean() for top, items in found]))


def split(rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[NDArray[np.int64]]]:
    """The users of interactions, ascending, and the items of each."""
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    users, first = np.unique(rows[:, 0], return_index=True)
    return users, np.split(rows[:, 1], first[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ratings", help="u.data of MovieLens-100K, or ratings.dat of MovieLens-1M")
    parser.add_argument("out", help="a new folder for the runs")
    parser.add_argument("--methods", default="full,additive,soft")
    parser.add_argument("overrides", nargs="*", help="settings of the runs, SECTION.KEY=VALUE")
    args = parser.parse_intermixed_args()
    ratings, rng, folder = read(args.ratings), np.random.default_rng(0), Path(args.out)
    is_new = [np.isin(ids, rng.choice(np.unique(ids), len(np.unique(ids)) // 10, replace=False)) for ids in ratings.T]
    is_test = rng.random(len(ratings)) < 0.2
    later = ~is_test & (is_new[0] | is_new[1])
    groups = (~is_new[0], ~is_new[0] & ~is_new[1], ~is_new[0] & is_new[1], is_new[0])
    seen = {"trained once": ratings[~is_test & ~later], "updated": ratings[~is_test], "trained anew": ratings[~is_test]}
    print(f"| method | model | {' | '.join(GROUPS)} | seconds |\n|---|---|{'---|' * 5}", flush=True)
    for method in args.methods.split(","):
        runs = {way: folder / f"{method}-{way.replace(' ', '-')}" for way in seen}
        seconds = {"trained once": train(seen["trained once"], runs["trained once"], method, args.overrides)}
        shutil.copytree(runs["trained once"], runs["updated"])
        started = time.perf_counter()
        update(runs["updated"], write(ratings[later], folder / "later.parquet"))
        seconds["updated"] = time.perf_counter() - started
        seconds["trained anew"] = train(seen["trained anew"], runs["trained anew"], method, args.overrides)
        for way, place in runs.items():
            found = [recall(place / "bundle", ratings[~is_test], ratings[is_test & group]) for group in groups]
            cells = " | ".join(f"{value:.4f}" for value in found)
            print(f"| `{method}` | {way} | {cells} | {seconds[way]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
