"""The report of a run on clicks: loss against bytes, calibration, where the bytes go, and how training went.

    write_ctr_report(Path("out"))    # -> out/report.html and its pictures

Reads what the stages left in the run folder and computes nothing anew; see ``pipeline.retrieval.report`` for that of retrieval.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.reports.facts import RunFacts, draw_training, write_files
from pipeline.reports.page import (
    COLOURS,
    FAINT,
    INK,
    MIB,
    duration,
    escape,
    figure_of,
    html_table,
    page,
    percent,
    picture,
    settings_section,
    size,
    spread,
)
from pipeline.runs.tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Columns of most bytes are drawn by name, and the others together.
MOST_COLUMNS = 7
MEASURES = TASKS["ctr"].measures


def write_ctr_report(run_dir: Path) -> list[Path]:
    """Draw the pictures and write `report.html` into the run folder. Returns the files written.

    Raises:
        RunFolderError: the run folder lacks what the stages up to `evaluate` leave there.
    """
    facts = RunFacts.read(run_dir, "log_loss", "auc")
    pictures = {
        "bytes_columns.png": _draw_columns,
        "bytes_loss.png": _draw_loss if facts.tested else None,
        "calibration.png": _draw_calibration if facts.tested else None,
        "training.png": (lambda of: draw_training(of, "AUC on validation", from_zero=False))
        if facts.validated
        else None,
    }
    return write_files(facts, pictures, _page)


# Pictures.


def _draw_loss(facts: RunFacts) -> Figure:
    """One labelled point per method: bytes kept against log loss."""
    figure, axes = figure_of(7.2, 4.2)
    points = [(m["bytes"] / MIB, m["log_loss"], m["method"]) for m in facts.tested]
    most, losses = max(x for x, _, _ in points), [y for _, y, _ in points]
    room = max(max(losses) - min(losses), 0.02 * max(losses), 1e-6)
    axes.set_xlim(0, most * 1.32)
    axes.set_ylim(min(losses) - 0.15 * room, max(losses) + 0.15 * room)
    axes.scatter([x for x, _, _ in points], losses, s=64, zorder=3, color=[facts.colour(m) for _, _, m in points])
    for (x, y, method), label_y in zip(points, spread(losses, room * 0.075), strict=True):
        place = {"xytext": (x + most * 0.022, label_y), "va": "center", "fontsize": 9.5, "color": facts.colour(method)}
        axes.annotate(f"{method}  {y:.4f}", (x, y), **place)
    axes.set_xlabel("bytes of the whole model (MiB)", color=INK)
    axes.set_ylabel("log loss on the test rows", color=INK)
    return figure


def _draw_calibration(facts: RunFacts) -> Figure:
    """The reliability curve of every method: share of clicks among rows of about the same prediction."""
    figure, axes = figure_of(5.6, 5.2)
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1.2, linestyle=(0, (4, 4)))
    for entry in facts.tested:
        curve = entry["curve"]
        axes.plot(
            curve["predicted"], curve["clicked"], color=facts.colour(entry["method"]), linewidth=2, marker="o", markersize=4,
            label=f"{entry['method']}, ECE {entry['ece']:.3f}",
        )  # fmt: skip
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    axes.set_xlabel("predicted probability of a click", color=INK)
    axes.set_ylabel("share of clicks", color=INK)
    return figure


def _draw_columns(facts: RunFacts) -> Figure:
    """A bar per method: bytes of the columns that take most, of all others, and of the layers."""
    of_method = [_bytes_of_columns(entry) for entry in facts.metrics]
    names = list(of_method[0])
    names = sorted(names, key=lambda name: -max(columns[name] for columns in of_method))
    shown, others = names[:MOST_COLUMNS], names[MOST_COLUMNS:]
    figure, axes = figure_of(7.2, 1.6 + 0.42 * len(facts.metrics))
    left = [0.0] * len(facts.metrics)
    parts = [(name, [columns[name] for columns in of_method]) for name in shown]
    if others:
        parts.append((f"{len(others)} other columns", [sum(columns[name] for name in others) for columns in of_method]))
    parts.append(("layers", [entry["bytes_of"]["layers"] for entry in facts.metrics]))
    palette = [*COLOURS[:MOST_COLUMNS], "#b8c0c8", "#3c4650"]
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


def _bytes_of_columns(entry: dict[str, Any]) -> dict[str, int]:
    return {name: sum(parts.values()) for name, parts in entry["bytes_of"]["columns"].items()}


# The page.


def _page(facts: RunFacts) -> str:
    sections = (
        _data_section(facts),
        _results_section(facts),
        _bytes_section(facts),
        _pairs_section(facts),
        _training_section(facts),
        _next_section(facts),
        settings_section(facts.path, facts.metrics),
    )
    return page(facts.title, facts.path, _summary(facts), sections)


def _summary(facts: RunFacts) -> str:
    """The result in one or two sentences: the first method against the full tables."""
    first = facts.metrics[0]
    text = (
        f"<b>{escape(first['method'])}</b> keeps {percent(first['bytes_ratio'])} of the bytes of the model with full tables "
        f"({size(first['bytes'])} instead of {size(first['bytes_full'])})"
    )
    if first["log_loss"] is None:
        return text + ". There were no test rows to measure it with."
    text += f" and predicts clicks with a log loss of {first['log_loss']:.4f} and an AUC of {first['auc']:.4f}"
    full = next((m for m in facts.metrics if m["method"] == "full"), None)
    if full is None or full is first:
        return text + "."
    return text + f"; full tables have {full['log_loss']:.4f} and {full['auc']:.4f}."


def _data_section(facts: RunFacts) -> str:
    ingest = facts.ingest
    rows = [
        (f"<td>{escape(part)}</td>", f"{ingest[f'n_{part}']:,}", "-" if rate is None else percent(rate))
        for part, rate in ingest["click_rate"].items()
    ]
    left = {**ingest["dropped"], **ingest["left_out"]}
    notes = [f"{len(ingest['columns'])} columns of ids and {len(ingest['dense'])} of numbers go into the model."]
    if left:
        notes.append(
            "Without: " + "; ".join(f"<code>{escape(name)}</code> ({escape(why)})" for name, why in left.items()) + "."
        )
    unknown = {name: share for name, share in ingest["unknown"].items() if share}
    if unknown:
        worst = sorted(unknown, key=lambda name: -unknown[name])[:5]
        notes.append(
            "Unknown in the test rows: "
            + ", ".join(f"<code>{escape(n)}</code> {percent(unknown[n])}" for n in worst)
            + "."
        )
    if ingest["n_cut"]:
        notes.append(f"{ingest['n_cut']:,} values of rows longer than any of train were cut.")
    return (
        f"<h2>The data</h2>\n<p>The log <code>{escape(facts.config['data']['path'])}</code>. Vocabularies, statistics and graphs are of the "
        f"training rows alone. {' '.join(notes)}</p>\n" + html_table(("part", "rows", "clicks"), rows)
    )


def _results_section(facts: RunFacts) -> str:
    rows = [
        (
            f'<td class="swatch" style="--colour: {facts.colour(m["method"])}">{escape(m["method"])}'
            + (" + id bias" if m["item_bias"] else "")
            + "</td>",
            f"{m['rows']:,}",
            f"{size(m['bytes'])} ({percent(m['bytes_ratio'])})",
            *TASKS["ctr"].of_measures(m),
            duration(m["seconds"].get("train")),
        )
        for m in facts.metrics
    ]
    header = ("method", "rows", "size (of full)", *(m.title for m in MEASURES), "training")
    train = facts.config["train"]
    text = (
        "<h2>What came out</h2>\n<p>Each method is another way of sharing the rows of the embedding tables; the model around them is the same "
        f"(<code>{escape(train['model'])}</code>, {train['dim']:,} numbers per row). Every byte is counted: tables, bucket maps, "
        "first-order weights, biases and layers.</p>\n" + html_table(header, rows)
    )
    if not facts.tested:
        return text
    return (
        text
        + '\n<p class="note">Log loss: of the predicted probabilities, in nats; lower is better. AUC: the share of pairs of a click and no '
        "click that are in order; group AUC: within the rows of a group. Calibration: mean prediction over mean label, best at 1. ECE: mean "
        "distance of the curve below from the diagonal.</p>\n"
        + picture(facts.path / "bytes_loss.png", "Bytes against log loss, one point per method")
        + '\n<p class="note">Down is better, left is smaller.</p>\n'
        + picture(facts.path / "calibration.png", "Share of clicks by predicted probability")
        + '\n<p class="note">Below the diagonal a method promises more clicks than there are.</p>'
    )


def _bytes_section(facts: RunFacts) -> str:
    first = facts.metrics[0]
    columns = first["bytes_of"]["columns"]
    order = sorted(columns, key=lambda name: -sum(columns[name].values()))
    titles = {"table": "table", "map": "map", "wide": "first order", "bias": "bias"}
    titles = {part: title for part, title in titles.items() if any(columns[name][part] for name in columns)}
    rows = [
        (
            f"<td><code>{escape(name)}</code></td>",
            f"{facts.ingest['columns'][name]:,}",
            "compressed" if name in first["compressed"] else "full",
            *(size(columns[name][part]) for part in titles),
        )
        for name in order
    ]
    return (
        f"<h2>Where the bytes go</h2>\n<p>By column, of <b>{escape(first['method'])}</b>; the layers take {size(first['bytes_of']['layers'])}. "
        "A table that two columns share is counted with the first.</p>\n"
        + html_table(("column", "ids", "", *titles.values()), rows)
        + "\n"
        + picture(facts.path / "bytes_columns.png", "Bytes by column, one bar per method")
    )


def _pairs_section(facts: RunFacts) -> str:
    pairs = facts.cluster["pairs"]
    if not pairs:
        return "<h2>What the clusters look like</h2>\n<p>No column is compressed with a partner.</p>"
    rows = [
        (
            f"<td><code>{escape(' x '.join(pair['columns']))}</code></td>",
            f"{pair['n_edges']:,}",
            f"{pair['resolution']:.4g}",
            f"{pair['modularity']:.4f}",
            f"{pair['user_rows']:,} + {pair['item_rows']:,}",
            " + ".join(f"{n:,}" for n in pair["n_without_clicks"]),
        )
        for pair in pairs
    ]
    return (
        "<h2>What the clusters look like</h2>\n<p>Two columns make a graph, whose edges are the pairs that were clicked in the training rows. Ids without a click "
        "share one row.</p>\n"
        + html_table(("columns", "pairs clicked", "resolution", "modularity", "rows", "ids without a click"), rows)
    )


def _training_section(facts: RunFacts) -> str:
    if not facts.validated:
        return "<h2>How training went</h2>\n<p>There were no validation rows, so every method was trained for all of its epochs.</p>"
    return (
        "<h2>How training went</h2>\n<p>Training stops when the validation rows are predicted no better, and keeps the best epoch: "
        f"{facts.kept_epochs()}.</p>\n" + picture(facts.path / "training.png", "Validation AUC by epoch")
    )


def _next_section(facts: RunFacts) -> str:
    out = escape(shlex.quote(str(facts.path)))
    return (
        "<h2>What to do next</h2>\n<p>Try other methods or another size in the same run folder; what does not change is not computed again:</p>\n"
        f"<pre>graphhash run --out {out} --resolution 20 --method double_soft,full</pre>"
    )
