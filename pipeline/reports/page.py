"""What pages and pictures of a report are made of: style, tables, numbers in words, and one page that holds all of it in itself."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import RunFolderError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One colour per method on every picture; told apart without red and green (after Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#5c5c5c")
INK, FAINT = "#1f2933", "#8a949e"
MIB = 2**20

CSS = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; color: #1f2933;
  background: #f4f6f8; margin: 0; }
main { max-width: 54rem; margin: 2rem auto; background: #fff; padding: 2.2rem 3rem 3rem; border-radius: 8px;
  box-shadow: 0 1px 4px rgba(31, 41, 51, .12); }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-top: 1.2rem; border-top: 1px solid #e6e9ec; }
p { margin: .6rem 0; }
.when { color: #66727f; font-size: .9rem; margin: 0 0 1.4rem; }
.lead { font-size: 1.12rem; background: #eef5fa; border-left: 4px solid #0072b2; padding: .8rem 1.1rem; margin: 1.2rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; margin: .8rem 0; }
th, td { padding: .45rem .7rem; text-align: right; border-bottom: 1px solid #e6e9ec; white-space: nowrap; }
th { font-size: .82rem; color: #66727f; font-weight: 600; border-bottom: 2px solid #cfd6dc; }
th:first-child, td:first-child { text-align: left; }
td.swatch::before { content: ""; display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .55em;
  background: var(--colour); }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0 .2rem; }
.note { color: #66727f; font-size: .92rem; }
pre { background: #1f2933; color: #f4f6f8; padding: .9rem 1.1rem; border-radius: 6px; overflow-x: auto; font-size: .88rem; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .92em; overflow-wrap: anywhere; }
details { margin: .8rem 0; } summary { cursor: pointer; color: #0072b2; }
details pre { white-space: pre; }
@media (max-width: 40rem) { main { margin: 0; padding: 1.2rem; border-radius: 0; } }
@media print { body { background: #fff; } main { box-shadow: none; margin: 0; } }
"""


def page(title: str, folder: Path, summary: str, sections: Sequence[str]) -> str:
    """The whole page; `summary` and `sections` are finished HTML."""
    when = datetime.now().astimezone().strftime("%d %B %Y, %H:%M")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="when">Written {escape(when)} in <code>{escape(folder.absolute())}</code></p>\n'
        f'<p class="lead">{summary}</p>\n' + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


def read_json(path: Path) -> Any:
    """What a stage left in a JSON file; RunFolderError where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: cannot be read ({error}); run the stages first: graphhash run") from error


def figure_of(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many inches, with one pair of axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Figure and canvas by hand: pyplot would keep state and look for a display.
    figure = Figure(figsize=(width, height), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    style(axes)
    return figure, axes


def style(axes: Axes) -> None:
    """Plain axes with a faint grid."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(True, color="#e6e9ec", linewidth=0.8)
    axes.set_axisbelow(True)


def save(figure: Figure, path: Path) -> None:
    """Write a picture whole, or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, format="png", facecolor="white")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Positions near `values`, in the same order, no two closer than `gap`."""
    spread = list(values)
    order = sorted(range(len(values)), key=lambda i: values[i])
    for lower, upper in zip(order, order[1:], strict=False):
        spread[upper] = max(spread[upper], spread[lower] + gap)
    return spread


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows whose first cell is a finished `<td>`; the others are texts."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "\n".join(f"<tr>{row[0]}{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>" for row in rows)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def picture(file: Path, words: str) -> str:
    """A picture as part of the page."""
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="{escape(words)}" src="data:image/png;base64,{data}">'


def escape(value: object) -> str:
    """A text from outside, for HTML."""
    return html.escape(str(value))


def percent(share: float) -> str:
    """0.25 -> "25.0 %"."""
    return f"{100 * share:.1f} %"


def size(n_bytes: int) -> str:
    """Bytes in KiB or MiB."""
    if n_bytes < MIB:
        return f"{n_bytes / 1024:,.0f} KiB"
    return f"{n_bytes / MIB:,.2f} MiB" if n_bytes < 100 * MIB else f"{n_bytes / MIB:,.0f} MiB"


def duration(seconds: float | None) -> str:
    """Seconds, or minutes where there are many."""
    if seconds is None:
        return "-"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def settings_section(run: Path, metrics: Sequence[Mapping[str, Any]]) -> str:
    """Times of the stages, settings and MLflow runs of a run folder."""
    text = (run / "config.toml").read_text(encoding="utf-8")
    runs = [
        f"{escape(m['method'])} <code>{escape(m['mlflow_run_id'])}</code>" for m in metrics if m.get("mlflow_run_id")
    ]
    tracked = f'<p class="note">MLflow runs: {", ".join(runs)}</p>' if runs else ""
    seconds: dict[str, float] = {}
    for entry in metrics:
        for stage, value in entry["seconds"].items():
            shared = stage in ("ingest", "cluster")
            seconds[stage] = value if shared else seconds.get(stage, 0.0) + value
    times = ", ".join(f"{escape(stage)} {duration(value)}" for stage, value in seconds.items())
    return (
        "<h2>Settings and times</h2>\n"
        f"<p>Time per stage, over all methods: {times}.</p>\n"
        f"<details><summary>All settings of this run (config.toml)</summary><pre>{escape(text)}</pre></details>\n{tracked}"
    )
