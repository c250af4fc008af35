"""The table and the picture of a comparison."""

from __future__ import annotations

import numpy as np

from pipeline.runs.tasks import TASKS
from pipeline.sweeps.plot import draw
from pipeline.sweeps.scheduler import Result
from pipeline.sweeps.table import Entry, summarise, write_comparison


def entry(method: str, model: str, seed: int, budget: str, recall: float | None, ratio: float = 0.2) -> Entry:
    metrics = {
        "rows": 9,
        "bytes": 90,
        "bytes_ratio": ratio,
        "recall@20": recall,
        "ndcg@20": recall,
        "seconds": {"train": 1.0},
    }
    return {"method": method, "model": model, "seed": seed, "budget": budget, "run": "r"}, Result(metrics=metrics)


def test_the_picture_has_a_panel_per_model_and_a_line_per_method():
    entries = [
        entry(method, model, seed, budget, 0.1 * (seed + 1), ratio)
        for method, model in (("soft", "mf"), ("graph", "mf"), ("soft", "neumf"), ("soft", "ials"))
        for budget, ratio in (("ratio 0.2", 0.2), ("ratio 0.1", 0.1))
        for seed in (0, 1)
    ] + [entry("full", "mf", 0, "", 0.3, 1.0)]
    panels = [axes for axes in draw(summarise(entries), TASKS["retrieval"]).axes if axes.get_visible()]
    assert [panel.get_title(loc="left") for panel in panels] == ["mf", "neumf", "ials"]
    assert [len(panel.containers) for panel in panels] == [2, 1, 1]
    line = panels[0].containers[0].lines[0]
    np.testing.assert_allclose(line.get_xydata(), [(10, 0.15), (20, 0.15)])


def test_without_a_test_there_is_a_table_and_no_picture(tmp_path):
    (tmp_path / "compare.png").write_text("of another time")
    write_comparison(tmp_path, [entry("soft", "mf", 0, "rows 9", None)], n_runs=2, mlflow_run_id=None)
    assert not (tmp_path / "compare.png").exists()
    text = (tmp_path / "compare.md").read_text()
    assert "1 of 2 runs so far" in text
    assert "| mf | soft | rows 9 | 1 | 9 | 90 | 20.0 % | - | - | 1 |" in text
