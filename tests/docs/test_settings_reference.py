"""The tables of the configuration page hold every setting."""

from __future__ import annotations

import importlib.util

from pipeline.config.run_config import keys
from tests.docs.pages import ROOT


def test_every_setting_is_in_a_table():
    spec = importlib.util.spec_from_file_location("settings_reference", ROOT / "docs" / "settings_reference.py")
    assert spec is not None
    assert spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    page = hook.on_page_markdown(f"text\n{hook.PLACE}\n")
    for key in keys():
        assert f"| `{key}` |" in page
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) == len(keys())
    assert all(row.count(" | ") == 3 for row in rows)
