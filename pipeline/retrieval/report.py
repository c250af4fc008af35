"""The report of a run: three pictures and one page that explains them to a colleague.

    write_report(Path("out"))    # -> out/report.html, out/bytes_recall.png, out/cluster_sizes.png, out/training.png

Reads what the stages left in the run folder and computes nothing anew. The page holds its pictures and its style in
itself, so it can be mailed as one file; every text that comes from outside is escaped.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

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

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(run_dir: Path) -> list[Path]:
    """Draw the pictures and write `report.html` into the run folder. Returns the files written.

    Raises:
        RunFolderError: the run folder lacks what the stages up to `evaluate` leave there.
    """
    facts = RunFacts.read(run_dir, "recall@20", "recall@20")
    # Without test or validation interactions there is nothing to draw in two of them.
    pictures = {
        "bytes_recall.png": _draw_bytes_recall if facts.tested else None,
        "cluster_sizes.png": _draw_cluster_sizes,
        "training.png": (lambda of: draw_training(of, "recall@20 on validation", from_zero=True))
        if facts.validated
        else None,
    }
    return write_files(facts, pictures, _page)


# Pictures.


def _draw_bytes_recall(facts: RunFacts) -> Figure:
    """One labelled point per method: bytes kept against test recall."""
    figure, axes = figure_of(7.2, 4.2)
    points = [(m["bytes"] / MIB, m["recall@20"], m["method"]) for m in facts.tested]
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
    axes.scatter(
        [x for x, _, _ in points],
        [y for _, y, _ in points],
        s=64,
        zorder=3,
        color=[facts.colour(method) for _, _, method in points],
    )
    for (x, y, method), label_y in zip(points, spread([y for _, y, _ in points], best * 0.065), strict=True):
        axes.annotate(
            f"{method}  {y:.3f}",
            (x, y),
            xytext=(x + most_bytes * 0.018, label_y),
            textcoords="data",
            va="center",
            fontsize=9.5,
            color=facts.colour(method),
        )
    axes.set_xlabel("bytes of tables, bucket maps and biases (MiB)", color=INK)
    axes.set_ylabel("recall@20 on the test interactions", color=INK)
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
            label=f"{side}: {labels.size:,} in {sizes.size:,} rows",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("communities, largest first", color=INK)
    axes.set_ylabel("ids that share the row", color=INK)
    axes.legend(frameon=False, fontsize=9.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _position: f"{value:,.0f}" if value >= 1 else "")
    return figure


# The page.


def _page(facts: RunFacts) -> str:
    sections = (
        _data_section(facts),
        _results_section(facts),
        _clusters_section(facts),
        _training_section(facts),
        _next_section(facts),
        settings_section(facts.path, facts.metrics),
    )
    return page(facts.title, facts.path, _summary(facts), sections)


def _summary(facts: RunFacts) -> str:
    """The result in one or two sentences: the first method against the full tables."""
    first = facts.metrics[0]
    text = (
        f"<b>{escape(first['method'])}</b> keeps {percent(first['bytes_ratio'])} of the bytes of the full embedding tables "
        f"({size(first['bytes'])} instead of {size(first['bytes_full'])})"
    )
    if first["recall@20"] is None:
        return text + ". There were no test interactions to measure it with."
    text += (
        f" and finds {percent(first['recall@20'])} of what the test users went on to choose, within 20 recommendations"
    )
    full = next((m for m in facts.metrics if m["method"] == "full"), None)
    if full is None or full is first:
        return text + "."
    return text + f"; the full tables find {percent(full['recall@20'])}."


def _data_section(facts: RunFacts) -> str:
    n_users, n_items = facts.ingest["n_users"], facts.ingest["n_items"]
    n_train, n_validation, n_test = (facts.ingest[f"n_{part}"] for part in ("train", "validation", "test"))
    total = n_train + n_validation + n_test
    split = {
        "given": "The test interactions are the data set's own; validation was drawn from the rest",
        "random": "The interactions were divided at random",
    }[facts.config["data"]["split"]]
    rejected = facts.ingest.get("n_rejected", 0)
    skipped = (
        f" <b>{rejected:,} bad rows were skipped</b>; they are kept in <code>ingest/rejected.parquet</code>."
        if rejected
        else ""
    )
    return (
        "<h2>The data</h2>\n"
        f"<p>The log <code>{escape(facts.config['data']['path'])}</code> holds <b>{total:,}</b> distinct interactions between "
        f"<b>{n_users:,}</b> users and <b>{n_items:,}</b> items.{skipped}</p>\n"
        f"<p>{split}: {n_train:,} to train on, {n_validation:,} to decide when to stop, and {n_test:,} that no stage saw "
        "before the test.</p>"
    )


def _results_section(facts: RunFacts) -> str:
    rows = [
        (
            f'<td class="swatch" style="--colour: {facts.colour(m["method"])}">{escape(m["method"])}'
            + (" + item bias" if m.get("item_bias") else "")
            + "</td>",
            f"{m['rows']:,}",
            size(m["bytes"]),
            percent(m["bytes_ratio"]),
            *("-" if m[name] is None else f"{m[name]:.4f}" for name in ("recall@20", "ndcg@20")),
            duration(m["seconds"].get("train")),
        )
        for m in facts.metrics
    ]
    header = ("method", "rows", "size", "of full size", "recall@20", "NDCG@20", "training")
    dim = facts.config["train"]["dim"]
    return (
        "<h2>What came out</h2>\n"
        f"<p>Each method is another way of sharing the rows of the embedding tables; the model around them is the same "
        f"(matrix factorization with {dim:,} numbers per row). Every byte is counted: tables, bucket maps and biases.</p>\n"
        + html_table(header, rows)
        + '\n<p class="note">recall@20: the share of a user\'s test items among 20 recommendations, averaged over users. '
        "NDCG@20 also rewards placing them early. A <i>row</i> is one vector of a table.</p>\n"
        + "".join(map(_rounding_note, facts.metrics))
        + (
            picture(facts.path / "bytes_recall.png", "Bytes against recall, one point per method")
            + '\n<p class="note">Up is better, left is smaller.</p>'
            if facts.tested
            else ""
        )
    )


def _clusters_section(facts: RunFacts) -> str:
    cluster = facts.cluster
    sizes = [
        (
            f"<td>{side}</td>",
            f"{cluster[f'{side[:-1]}_rows']:,}",
            *(f"{cluster['sizes'][side][key]:,.0f}" for key in ("median", "p99", "largest")),
        )
        for side in ("users", "items")
    ]
    return (
        "<h2>What the clusters look like</h2>\n"
        f"<p>Users and items that interact with each other were put into <b>{cluster['n_communities']:,}</b> communities "
        f"(modularity {cluster['modularity']:.4f} at resolution {cluster['resolution']:.4g}). "
        f"{percent(cluster['share_inside'])} of the interaction weight stays inside a community. The users of a community "
        "share a row of the user table, its items a row of the item table. "
        f"{_disconnected(cluster['n_disconnected'])}</p>\n"
        + html_table(("side", "rows", "median size", "99th percentile", "largest"), sizes)
        + "\n"
        + _levels(cluster.get("levels", {}))
        + picture(facts.path / "cluster_sizes.png", "Sizes of the communities, largest first")
    )


def _disconnected(n_communities: int) -> str:
    if n_communities == 0:
        return "Every community is connected by its own interactions."
    return (
        f"{n_communities:,} of the communities are not connected by their own interactions; "
        "<code>--cluster-method leiden</code> splits them."
    )


def _levels(levels: dict[str, Any]) -> str:
    """Table of the levels that were asked for, if any."""
    if not levels:
        return ""
    lines = [
        (
            f"<td>{name}</td>",
            f"{level['resolution']:g}",
            f"{level['modularity']:.4f}",
            f"{level['user_rows']:,}",
            f"{level['item_rows']:,}",
        )
        for name, level in levels.items()
    ]
    return html_table(("level", "resolution", "modularity", "user rows", "item rows"), lines) + "\n"


def _training_section(facts: RunFacts) -> str:
    if not facts.validated:
        return (
            "<h2>How training went</h2>\n<p>There were no validation interactions, so every method was trained for "
            "all of its epochs and the last one was kept.</p>"
        )
    return (
        "<h2>How training went</h2>\n"
        f"<p>Training stops when recall on the validation interactions no longer rises, and keeps the best epoch: "
        f"{facts.kept_epochs()}.</p>\n" + picture(facts.path / "training.png", "Validation recall by epoch")
    )


def _rounding_note(metrics: dict[str, Any]) -> str:
    """What storing the tables in fewer bits cost; nothing for float32, or where it was not measured."""
    stored, exact = metrics["recall@20"], metrics.get("recall@20_float32")
    if metrics.get("precision", "float32") == "float32" or stored is None or not exact:
        return ""
    return (
        f'<p class="note">{escape(metrics["method"])}: stored as {escape(metrics["precision"])}, {metrics["bytes"]:,} bytes; recall@20 '
        f"{stored:.4f} against {exact:.4f} in float32, a change of {100 * (stored / exact - 1):+.2f} %.</p>\n"
    )


def _next_section(facts: RunFacts) -> str:
    out = shlex.quote(str(facts.path))
    first = facts.metrics[0]["method"]
    text = "<h2>What to do next</h2>\n"
    if (facts.path / "bundle").is_dir():
        text += (
            f"<p>The folder <code>bundle/</code> holds the <b>{escape(first)}</b> model as one ONNX graph from raw user ids "
            "to raw item ids and scores. Ask it:</p>\n"
            f"<pre>graphhash recommend {escape(out)}/bundle --user-id ID -k 20 --exclude-seen</pre>\n"
        )
    return text + (
        "<p>Try another size in the same run folder; what does not change is not computed again:</p>\n"
        f"<pre>graphhash run --out {escape(out)} --ratio 0.15</pre>"
    )
