"""The table and the picture of a comparison."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from pipeline.maps.methods import METHODS
from pipeline.retrieval.defaults import measures_of
from pipeline.sweeps.plot import draw
from pipeline.sweeps.scheduler import Result
from pipeline.sweeps.table import Entry, summarise, write_comparison


def entry(method: str, model: str, seed: int, budget: str, recall: float | None, ratio: float = 0.2) -> Entry:
    metrics = {
        "rows": 9,
        "bytes": 90,
        "bytes_ratio": ratio,
        "recall@20": recall,
        "capped_recall@20": recall,
        "ndcg@20": recall,
        "seconds": {"train": 1.0},
    }
    return {"method": method, "model": model, "seed": seed, "budget": budget, "run": "r"}, Result(metrics=metrics)


DEVIATION = 0.1 / np.sqrt(2)


def is_grey(colour: str) -> bool:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return max(red, green, blue) - min(red, green, blue) < 32


def test_the_picture_has_a_panel_per_model_and_a_line_per_method():
    entries = [
        entry(method, model, seed, budget, 0.1 * (seed + 1), ratio)
        for method, model in (("soft", "mf"), ("graph", "mf"), ("soft", "neumf"), ("soft", "ials"))
        for budget, ratio in (("ratio 0.2", 0.2), ("ratio 0.1", 0.1))
        for seed in (0, 1)
    ] + [entry("full", "mf", 0, "", 0.3, 1.0)]
    panels = [axes for axes in draw(summarise(entries), measures_of()[0]).axes if axes.get_visible()]
    assert [panel.get_title(loc="left") for panel in panels] == ["mf", "neumf", "ials"]
    assert [len(panel.containers) for panel in panels] == [3, 1, 1]
    soft = panels[0].containers[1].lines[0]
    np.testing.assert_allclose(soft.get_xydata(), [(10, 0.15), (20, 0.15)])
    assert all(panel.get_xscale() == "log" for panel in panels)
    # The hash and the full tables are grey, and ours are not.
    assert [is_grey(container.lines[0].get_color()) for container in panels[0].containers] == [True, False, False]
    # The deviations over both seeds.
    (bars,) = panels[0].containers[1].lines[2]
    np.testing.assert_allclose(
        [segment[:, 1] for segment in bars.get_segments()], [[0.15 - DEVIATION, 0.15 + DEVIATION]] * 2
    )


def test_without_a_test_there_is_a_table_and_no_picture(tmp_path):
    (tmp_path / "compare.png").write_text("of another time")
    write_comparison(tmp_path, [entry("soft", "mf", 0, "rows 9", None)], n_runs=2, mlflow_run_id=None)
    assert not (tmp_path / "compare.png").exists()
    text = (tmp_path / "compare.md").read_text()
    assert "1 of 2 runs so far" in text
    assert "| mf | soft | rows 9 | 1 | 9 | 90 | 20.0 % | - | - | - | 1 |" in text


def test_a_comparison_says_why_a_figure_is_missing_and_what_is_wrong_with_a_method(tmp_path):
    labels, result = entry("soft", "mf", 0, "rows 9", None)
    reason = "there are no test interactions"
    metrics = {
        **result.metrics,
        "unmeasured": {"recall@20": reason, "ndcg@20": reason},
        "warnings": ["predicts a constant"],
    }
    write_comparison(tmp_path, [(labels, Result(metrics=metrics))], n_runs=1, mlflow_run_id=None)
    text = (tmp_path / "compare.md").read_text()
    assert "- recall@20, NDCG@20: - because there are no test interactions\n" in text
    assert "- warning: method soft predicts a constant\n" in text


def test_names_in_the_picture_do_not_overlap():
    entries = [entry(name, "mf", 0, "ratio 0.2", 0.2 + 0.0001 * i) for i, name in enumerate(METHODS)]
    figure = draw(summarise(entries), measures_of()[0])
    figure.canvas.draw()
    boxes = sorted((text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) == len(METHODS)
    assert all(lower.y1 <= upper.y0 + 1 for lower, upper in pairwise(boxes))
    frame = figure.bbox
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and box.y1 <= frame.y1 for box in boxes)


def test_a_comparison_says_whom_each_method_serves(tmp_path):
    labels, result = entry("soft", "mf", 0, "ratio 0.2", 0.2)
    metrics = {**result.metrics, "recall@20_tail_items": 0.0125, "coverage@20": 0.5, "training_bytes": 1234}
    written = write_comparison(tmp_path, [(labels, Result(metrics=metrics))], n_runs=1, mlflow_run_id=None)
    text = (tmp_path / "compare.md").read_text()
    assert "## Who is served" in text
    assert "| mf | soft | ratio 0.2 | - / - | - / - | 0.0125 / - | - / - | - / - | - / - | 0.5000 |" in text
    assert "| of full | training bytes | recall@20 | capped recall@20 | NDCG@20 |" in text
    assert "| 20.0 % | 1,234 | 0.2000 |" in text
    assert written["summary"][0]["recall@20_tail_items"] == 0.0125
    assert "recall@20_tail_items" in (tmp_path / "compare.csv").read_text()


def test_the_first_cut_off_is_the_main_one(tmp_path):
    labels, result = entry("soft", "mf", 0, "ratio 0.2", 0.2)
    metrics = {**result.metrics, "recall@5": 0.11, "capped_recall@5": 0.12, "ndcg@5": 0.13}
    write_comparison(tmp_path, [(labels, Result(metrics=metrics))], n_runs=1, mlflow_run_id=None, cutoffs=(5, 20))
    text = (tmp_path / "compare.md").read_text()
    assert "| recall@5 | capped recall@5 | NDCG@5 |" in text
    assert "| 0.1100 / 0.2000 | 0.1200 / 0.2000 | 0.1300 / 0.2000 |" in text
