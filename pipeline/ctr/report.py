"""The report of a CTR run: loss against bytes, calibration, bytes by feature, and how training went.

    write_ctr_report(Path("out"))    # -> out/report.html, out/bytes_columns.png, out/bytes_loss.png, out/calibration.png, out/training.png

It reads what the stages left in the run folder and computes nothing anew. The page embeds its pictures and its style,
so it can be mailed as one file. Its text is in `report.html.j2`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.ctr.defaults import MEASURES
from pipeline.reports.facts import RunFacts
from pipeline.reports.figures import COLOURS, FAINT, INK, draw_points, figure_of
from pipeline.reports.page import MIB
from pipeline.reports.report import Trained, draw_training, training_titles, write_page
from pipeline.task import remarks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Features of most bytes are drawn by name, and the others together.
MOST_FEATURES = 7
# Features with the most out-of-vocabulary values that the page names.
MOST_OOV = 5
MODEL_NAMES = {"widedeep": "Wide & Deep", "deepfm": "DeepFM", "dcnv2": "DCN-V2", "dlrm": "DLRM", "finalnet": "FinalNet"}
SCORE_NAMES = {"auc": "AUC", "log_loss": "log loss"}
# Keys of a feature's `bytes_of` in metrics.
PART_TITLES = {"table": "table", "map": "map", "wide": "first order", "bias": "bias"}


def write_ctr_report(run_dir: Path) -> list[Path]:
    """Draw the pictures and write `report.html` into the run folder. Returns the files written.

    Raises:
        RunFolderError: the run folder lacks what the stages up to `evaluate` leave there.
    """
    from pipeline.maps.descriptions import how_ids_read, use_of_communities

    facts = RunFacts.read(run_dir, lambda _metrics: MEASURES[0], "auc")
    pictures = {
        "bytes_columns.png": _draw_bytes,
        "bytes_loss.png": _draw_loss if facts.tested else None,
        "calibration.png": _draw_calibration if facts.tested else None,
        "training.png": _draw_training if facts.validated else None,
    }
    values = {
        "readings": {method: how_ids_read(method) for method in facts.methods},
        "communities_read": use_of_communities(facts.methods),
        "measures": [measure.key for measure in MEASURES],
        "remarks": remarks(MEASURES, facts.metrics),
        "measure_titles": [measure.title for measure in MEASURES],
        "left_out": {**facts.ingest["dropped"], **facts.ingest["left_out"]},
        "oov": _most_oov(facts.ingest["oov_rate"], facts.ingest["oov_values"]),
        "training_bytes": training_titles(facts.metrics),
        **_bytes_table(facts.metrics[0]["bytes_of"]["columns"]),
    }
    return write_page(facts, _trained(facts), Path(__file__).with_name("report.html.j2"), pictures, values)


def _trained(facts: RunFacts) -> Trained:
    train = facts.config["train"]
    stored = "embedding tables", "bucket maps", "first-order weights", "biases", "layers"
    model = MODEL_NAMES[train["model"]]
    return Trained(model, "binary cross-entropy", SCORE_NAMES[train["score"]], "samples", stored)


def _most_oov(rates: dict[str, float], n_different: dict[str, int]) -> list[tuple[str, float, int]]:
    """The features with the largest shares of out-of-vocabulary values in the test samples: name, share, number of different ones."""
    found = [(name, rate, n_different[name]) for name, rate in rates.items() if rate]
    return sorted(found, key=lambda entry: -entry[1])[:MOST_OOV]


def _bytes_table(columns: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Features by descending bytes, with the bytes of every part that any feature has."""
    parts = [part for part in PART_TITLES if any(sizes[part] for sizes in columns.values())]
    order = sorted(columns, key=lambda name: -sum(columns[name].values()))
    return {
        "part_titles": [PART_TITLES[part] for part in parts],
        "feature_bytes": [(name, [columns[name][part] for part in parts]) for name in order],
    }


def _draw_training(facts: RunFacts) -> Figure:
    return draw_training(facts, "AUC on validation", from_zero=False)


def _draw_loss(facts: RunFacts) -> Figure:
    """One labelled point per method: bytes kept against log loss."""
    figure, axes = figure_of(7.2, 4.2)
    points = [(m["bytes"] / MIB, m["log_loss"], m["method"]) for m in facts.tested]
    most, losses = max(x for x, _, _ in points), [y for _, y, _ in points]
    room = max(max(losses) - min(losses), 0.02 * max(losses), 1e-6)
    axes.set_xlim(0, most * 1.32)
    axes.set_ylim(min(losses) - 0.15 * room, max(losses) + 0.15 * room)
    labelled = [(x, y, f"{method}  {y:.4f}") for x, y, method in points]
    draw_points(axes, labelled, [facts.colour(method) for _, _, method in points], span=most, gap=room * 0.075)
    axes.set_xlabel("bytes of the whole model (MiB)", color=INK)
    axes.set_ylabel("log loss on the test samples", color=INK)
    return figure


def _draw_calibration(facts: RunFacts) -> Figure:
    """The reliability curve of every method: share of positive labels among samples of about the same prediction."""
    figure, axes = figure_of(5.6, 5.2)
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1.2, linestyle=(0, (4, 4)))
    for entry in facts.tested:
        curve = entry["curve"]
        axes.plot(
            curve["predicted"], curve["positive"], color=facts.colour(entry["method"]), linewidth=2, marker="o", markersize=4,
            label=f"{entry['method']}, ECE {entry['ece']:.3f}",
        )  # fmt: skip
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
    axes.legend(frameon=False, fontsize=9, loc="best")
    axes.set_xlabel("predicted probability", color=INK)
    axes.set_ylabel("share of positive labels", color=INK)
    return figure


def _draw_bytes(facts: RunFacts) -> Figure:
    """A bar per method: bytes of the features that take most, of all others, and of the layers."""
    of_method = [_bytes_of_features(entry) for entry in facts.metrics]
    names = list(of_method[0])
    names = sorted(names, key=lambda name: -max(columns[name] for columns in of_method))
    shown, others = names[:MOST_FEATURES], names[MOST_FEATURES:]
    figure, axes = figure_of(7.2, 1.6 + 0.42 * len(facts.metrics))
    left = [0.0] * len(facts.metrics)
    parts = [(name, [columns[name] for columns in of_method]) for name in shown]
    if others:
        parts.append(
            (f"{len(others)} other features", [sum(columns[name] for name in others) for columns in of_method])
        )
    parts.append(("layers", [entry["bytes_of"]["layers"] for entry in facts.metrics]))
    palette = [*COLOURS[:MOST_FEATURES], "#b8c0c8", "#3c4650"]
    colours = [
        palette[i] if name in shown else palette[-2] if name != "layers" else palette[-1]
        for i, (name, _) in enumerate(parts)
    ]
    places = list(range(len(facts.metrics)))[::-1]
    for (name, values), colour in zip(parts, colours, strict=True):
        widths = [value / MIB for value in values]
        axes.barh(places, widths, left=left, height=0.62, color=colour, label=name, edgecolor="white", linewidth=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(places, [entry["method"] for entry in facts.metrics])
    axes.grid(False, axis="y")
    axes.set_xlabel("bytes (MiB)", color=INK)
    axes.legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _bytes_of_features(entry: dict[str, Any]) -> dict[str, int]:
    return {name: sum(parts.values()) for name, parts in entry["bytes_of"]["columns"].items()}
