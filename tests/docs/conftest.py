"""A working folder with the bundles and files that the pages speak of."""

from __future__ import annotations

from pathlib import Path

import pandas
import pytest

from graphhash.graph.vocabulary import Vocabulary
from tests.helpers.small_ctr import export_small, raw_log, small_ctr
from tests.helpers.small_models import SmallModel, small_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """`out/bundle` knows the users anna and ben and items named "item 0" and so on; `ctr/bundle` answers for `today.csv`."""
    folder = tmp_path_factory.mktemp("docs")
    small = small_model(users="string", items="string")
    users = ["anna", "ben", *(f"user {n}" for n in range(len(small.users) - 2))]
    items = [f"item {n}" for n in range(len(small.items))]
    named = SmallModel(small.model, small.user_map, small.item_map, Vocabulary(users), Vocabulary(items))
    for name in ("out", "ctr"):
        (folder / name).mkdir()
    named.export(folder / "out" / "bundle")
    export_small(small_ctr(multi_valued=False), folder / "ctr" / "bundle")
    # A spreadsheet has no lists, and pandas makes floats of numbers beside missing ones.
    log = {
        name: values
        for name, values in (raw_log(5) | {"device": [0, 1, None, 7, 0]}).items()
        if not any(isinstance(value, list) for value in values)
    }
    pandas.DataFrame(log).to_csv(folder / "today.csv", index=False)
    return folder
