"""Pages: number formats, escaping, and undefined names."""

from __future__ import annotations

import pytest
from jinja2 import UndefinedError

from pipeline.reports.page import duration, fixed, percent, render, size


def test_values_are_escaped_and_formatted(tmp_path):
    template = tmp_path / "t.html.j2"
    template.write_text("{{ word }} {{ n|count }} {{ x|fixed(2) }} {{ none|fixed }}")
    assert render(template, {"word": "<b>&'", "n": 12345, "x": 0.126}) == "&lt;b&gt;&amp;&#39; 12,345 0.13 -"


def test_an_undefined_name_raises(tmp_path):
    template = tmp_path / "t.html.j2"
    template.write_text("{{ nothing }}")
    with pytest.raises(UndefinedError):
        render(template, {})


def test_numbers_are_written_with_their_units():
    assert percent(0.25) == "25.0 %"
    assert [size(n) for n in (2048, 3 * 2**20, 250 * 2**20)] == ["2 KiB", "3.00 MiB", "250 MiB"]
    assert [duration(s) for s in (None, 1.24, 90.0, 270.0)] == ["-", "1.2 s", "90 s", "4.5 min"]
    assert fixed(1234.5, 1) == "1,234.5"
