"""The script that writes measured tables into the pages."""

from __future__ import annotations

import json
import runpy

import pytest

from tests.docs.pages import ROOT

main = runpy.run_path(str(ROOT / "docs" / "experiments" / "make_tables.py"))["main"]


def line(method, recall, ratio, n_seeds=1, spread=None) -> dict:
    figures = {"recall@20": recall, "ndcg@20": recall / 2, "recall@20_std": spread, "ndcg@20_std": spread}
    return {"model": "mf", "method": method, "n_seeds": n_seeds, "rows": 1234.0, "bytes_ratio": ratio, **figures}


@pytest.fixture
def folders(tmp_path):
    made = {
        "cmp": [line("soft", 0.1877, 0.25), line("graph", 0.15, 0.249)],
        "cmp8": [line("full", 0.17, 0.262, 3, 0.001)],
    }
    for name, summary in made.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "compare.json").write_text(json.dumps({"summary": summary}))
    (tmp_path / "page.md").write_text("# Title\n\n<!-- FIGURES: one -->\n\nEnd.\n\n<!-- FIGURES: two -->\n")
    return tmp_path


def test_a_table_is_written_below_its_marker_and_replaced_by_the_next_one(folders):
    page, arguments = folders / "page.md", [str(folders / "page.md"), "one", str(folders / "cmp")]
    main(arguments)
    first = page.read_text()
    assert "| `soft` | 1,234 | 25.0 % | **0.1877** | **0.0939** |" in first
    assert "One seed. Commit " in first
    main([*arguments, f"{folders / 'cmp8'}=int8"])
    second = page.read_text()
    assert "| `full`, int8 | 1,234 | 26.2 % | 0.1700 (0.0010) | 0.0850 (0.0010) |" in second
    assert second.count("| method |") == 1
    assert second.endswith(" <!-- end of figures -->\n\nEnd.\n\n<!-- FIGURES: two -->\n")


def test_the_columns_are_those_of_the_first_cut_off_or_those_that_are_named(folders):
    more = {"recall@10": 0.1, "capped_recall@10": 0.2, "ndcg@10": 0.3, "recall@10_tail_items": 0.05, "coverage@10": 0.6}
    summary = [{**more, "training_bytes": 1234.0, **line("soft", 0.18, 0.25)}]
    (folders / "cmp" / "compare.json").write_text(json.dumps({"summary": summary}))
    page, arguments = folders / "page.md", [str(folders / "page.md"), "one", str(folders / "cmp")]
    main(arguments)
    assert "| training bytes | recall@10 | capped recall@10 | NDCG@10 |" in page.read_text()
    assert "| 1,234 | **0.1000** | **0.2000** | **0.3000** |" in page.read_text()
    main([*arguments, "--measures", "ndcg@20"])
    assert "| training bytes | NDCG@20 |\n" in page.read_text()
    main([*arguments, "--served"])
    assert "| tail items | coverage@10 |\n" in page.read_text()
    assert "| **0.0500** | **0.6000** |" in page.read_text()


def test_a_page_without_the_marker_is_named(folders):
    with pytest.raises(SystemExit, match="no line <!-- FIGURES: three -->"):
        main([str(folders / "page.md"), "three", str(folders / "cmp")])


def test_a_method_that_does_not_fit_says_so(folders):
    failed = {"model": "mf", "method": "graph", "budget": "ratio 0.05", "n_seeds": 0, "rows": None, "bytes_ratio": None}
    (folders / "cmp" / "compare.json").write_text(json.dumps({"summary": [line("soft", 0.18, 0.05), failed]}))
    page = folders / "page.md"
    main([str(page), "one", str(folders / "cmp")])
    assert "| `graph` | - | does not fit into 5 % | - | - |\n" in page.read_text()
    assert "One seed. Commit " in page.read_text()
