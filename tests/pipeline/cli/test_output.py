"""What commands print of figures by name."""

from __future__ import annotations

from pipeline.cli.output import print_pairs


def test_figures_are_aligned_and_what_is_not_there_is_a_dash(capsys):
    print_pairs({"rows": 12000, "rate": 0.12345678, "newest": None, "is_whole": True, "parts": {"train": 1}})
    assert capsys.readouterr().out.splitlines() == [
        "rows      12,000",
        "rate      0.123457",
        "newest    -",
        "is_whole  True",
        "parts",
        "  train  1",
    ]
