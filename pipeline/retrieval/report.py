"""The report of a retrieval run: four pictures and one page that explains them.

    write_report(Path("out"))    # -> out/report.html, out/bytes_recall.png, out/served.png, out/cluster_sizes.png, out/training.png

It reads what the stages left in the run folder and computes nothing anew. The page embeds its pictures and its style,
so it can be mailed as one file. Its text is in `report.html.j2`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.reports.facts import RunFacts
from pipeline.reports.figures import COLOURS, FAINT, INK, draw_points, figure_of, figure_with_panels, spaced
from pipeline.reports.page import MIB
from pipeline.reports.report import Trained, draw_training, training_titles, write_page
from pipeline.retrieval.defaults import CUTOFFS, ITEM_PARTS, USER_PARTS, further_tables, measures_of
from pipeline.task import Measure, remarks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODEL_NAMES = {"mf": "matrix factorization", "neumf": "NeuMF", "lightgcn": "LightGCN"}
LOSS_NAMES = {
    "bpr": "the BPR loss",
    "softmax": "sampled softmax",
    "bsl": "the BSL loss",
    "ccl": "the cosine contrastive loss",
    "directau": "the DirectAU loss",
    "ials": "the implicit ALS loss",
}
# Keys of `bytes_of` in metrics.
PART_NAMES = {
    "tables": "embedding tables",
    "maps": "bucket maps",
    "bias": "item biases",
    "layers": "network layers",
    "graph": "the training graph",
}


SPLITS = {
    "random": "The interactions were split at random",
    "temporal": "The interactions were split by time: the latest ones are the test",
    "leave-last-out": "The latest items of every user are the test",
}


def write_report(run_dir: Path) -> list[Path]:
    """Draw the pictures and write `report.html` into the run folder. Returns the files written.

    Raises:
        RunFolderError: the run folder lacks what the stages up to `evaluate` leave there.
    """
    from pipeline.maps.descriptions import how_ids_read, use_of_communities

    facts = RunFacts.read(run_dir, _main, "capped_recall@20")
    cutoffs = _cutoffs(facts.metrics)
    served, at_cutoffs = further_tables(cutoffs)
    # Without test or validation interactions there is nothing to draw in two of them.
    pictures = {
        "bytes_recall.png": _draw_bytes_recall if facts.tested else None,
        "served.png": _draw_served if any(map(served.has_figures, facts.tested)) else None,
        "cluster_sizes.png": _draw_cluster_sizes,
        "training.png": _draw_training if facts.validated else None,
    }
    values = {
        "readings": {m["method"]: how_ids_read(m["method"], m.get("indices_per_id")) for m in facts.metrics},
        "communities_read": use_of_communities(facts.methods),
        "splits": SPLITS,
        "k": cutoffs[0],
        "measures": measures_of(cutoffs),
        "remarks": remarks(measures_of(cutoffs), facts.metrics),
        "tables": [table for table in (served, at_cutoffs) if any(map(table.has_figures, facts.tested))],
        "training_bytes": training_titles(facts.metrics),
    }
    return write_page(facts, _trained(facts), Path(__file__).with_name("report.html.j2"), pictures, values)


def _cutoffs(metrics: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """The cut-offs of the test; those of the first method, as a run tests all methods alike."""
    return tuple(metrics[0].get("k", CUTOFFS)) if metrics else CUTOFFS


def _main(metrics: Sequence[Mapping[str, Any]]) -> Measure:
    return measures_of(_cutoffs(metrics))[0]


def _trained(facts: RunFacts) -> Trained:
    train: dict[str, Any] = facts.config["train"]
    model, loss = MODEL_NAMES[train["model"]], LOSS_NAMES[train["loss"]]
    if train["model"] == "lightgcn":
        model += f" ({train['n_layers']} propagation layers)"
    if train["loss"] not in ("directau", "ials"):
        loss += f" ({train['sampler']} negatives)"
    stored = {part for entry in facts.metrics for part, n_bytes in entry["bytes_of"].items() if n_bytes}
    names = tuple(name for part, name in PART_NAMES.items() if part in stored)
    return Trained(model, loss, "capped recall@20", "interactions", names)


def _draw_training(facts: RunFacts) -> Figure:
    return draw_training(facts, "capped recall@20 on validation", from_zero=True)


def _draw_bytes_recall(facts: RunFacts) -> Figure:
    """One labelled point per method: bytes kept against test recall."""
    figure, axes = figure_of(7.2, 4.2)
    points = [(m["bytes"] / MIB, m[facts.measure], m["method"]) for m in facts.tested]
    most_bytes = max(max(x for x, _, _ in points), max(m["bytes_full"] for m in facts.metrics) / MIB)
    best = max(max(y for _, y, _ in points), 1e-9)
    # Room on the right for the last label.
    axes.set_xlim(0, most_bytes * 1.16)
    axes.set_ylim(0, best * 1.15)
    axes.axvline(most_bytes, color=FAINT, linewidth=1, linestyle=(0, (4, 4)))
    axes.annotate(
        "full tables",
        (most_bytes, 0),
        xytext=(-4, 5),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=FAINT,
    )
    full = next((y for _, y, method in points if method == "full"), None)
    if full is not None:
        axes.plot([0, most_bytes], [full, full], color=FAINT, linewidth=1, linestyle=(0, (4, 4)))
    labelled = [(x, y, f"{method}  {y:.3f}") for x, y, method in points]
    colours = [facts.colour(method) for _, _, method in points]
    draw_points(axes, labelled, colours, span=most_bytes, gap=best * 0.065)
    axes.set_xlabel("bytes of everything kept (MiB)", color=INK)
    axes.set_ylabel(f"{facts.measure_title} on the test interactions", color=INK)
    return figure


def _draw_served(facts: RunFacts) -> Figure:
    """Recall of the test items of the head, the middle and the tail, and of users by activity: a line per method."""
    figure, panels = figure_with_panels(7.8, 3.8, 2)
    high = 1e-9
    for axes, parts, title in zip(
        panels, (ITEM_PARTS, USER_PARTS), ("items by popularity", "users by activity"), strict=True
    ):
        ends: list[tuple[float, str]] = []
        for entry in facts.tested:
            values = [entry.get(f"{facts.measure}_{part}") for part in parts]
            known = [(i, value) for i, value in enumerate(values) if value is not None]
            if not known:
                continue
            x, y = zip(*known, strict=True)
            high = max(high, *y)
            axes.plot(x, y, color=facts.colour(entry["method"]), marker="o", markersize=5, linewidth=2)
            ends.append((y[-1], entry["method"]))
        axes.set_xlim(-0.25, 2.3 + (0.9 if axes is panels[-1] else 0))
        axes.set_xticks(range(3), [part.rsplit("_", 1)[0].replace("_", " ") for part in parts])
        axes.set_title(title, loc="left", fontsize=10, color=INK)
    for axes in panels:
        axes.set_ylim(0, 1.12 * high)
    heights = spaced([y for y, _ in ends], 0.075 * high, 0.0, 1.08 * high)
    for (y_end, method), height in zip(ends, heights, strict=True):
        panels[-1].plot([2.06, 2.22], [y_end, height], color=facts.colour(method), linewidth=0.7)
        panels[-1].annotate(method, (2.25, height), va="center", fontsize=9, color=facts.colour(method))
    panels[0].set_ylabel(facts.measure_title, color=INK)
    return figure


def _draw_cluster_sizes(facts: RunFacts) -> Figure:
    """Sizes of the communities from the largest to the smallest, on logarithmic axes."""
    figure, axes = figure_of(7.2, 3.6)
    for side, colour in (("users", COLOURS[0]), ("items", COLOURS[1])):
        labels = np.load(facts.path / "cluster" / f"labels_{side}.npy", allow_pickle=False)
        sizes = np.bincount(labels) if labels.size else np.zeros(0, np.int64)
        sizes = np.sort(sizes[sizes > 0])[::-1]
        axes.plot(
            np.arange(1, sizes.size + 1),
            sizes,
            color=colour,
            linewidth=2,
            marker="o" if sizes.size < 40 else None,
            markersize=3.5,
            label=f"{side}: {labels.size:,} in {sizes.size:,} communities",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("communities, largest first", color=INK)
    axes.set_ylabel("ids of the community", color=INK)
    axes.legend(frameon=False, fontsize=9.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _position: f"{value:,.0f}" if value >= 1 else "")
        axis.set_minor_formatter("")
    if axes.get_ylim()[1] < 100:
        # The decades alone would label too few ticks.
        axes.yaxis.set_minor_formatter(lambda value, _position: f"{value:.0f}" if value in (2, 5, 20, 50) else "")
    return figure
