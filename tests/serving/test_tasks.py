"""`open_bundle` chooses the class by the task in the manifest."""

from __future__ import annotations

import pytest

from serving import BundleError, Retriever, Scorer, check_bundle, open_bundle
from tests.helpers.small_ctr import export_small, raw_log, small_ctr
from tests.helpers.small_models import small_model
from tests.helpers.tampering import rewrite


def test_each_task_has_its_class_and_answers_as_if_opened_by_it(tmp_path):
    small_model().export(tmp_path / "retrieval")
    export_small(small_ctr(), tmp_path / "ctr")
    retriever, scorer = (open_bundle(tmp_path / task, "cpu", 1) for task in ("retrieval", "ctr"))
    assert isinstance(retriever, Retriever)
    assert isinstance(scorer, Scorer)
    same = Retriever(tmp_path / "retrieval", "cpu", 1).recommend([3], 5)
    assert retriever.recommend([3], 5).item_ids[0].tolist() == same.item_ids[0].tolist()
    log = raw_log(5)
    assert scorer.predict(log).tolist() == Scorer(tmp_path / "ctr", "cpu", 1).predict(log).tolist()
    assert retriever.name == check_bundle(tmp_path / "retrieval")["manifest_sha256"][:12]


def test_a_task_that_is_not_known_is_refused(tmp_path):
    small_model().export(tmp_path / "bundle")
    rewrite(tmp_path / "bundle", lambda manifest: manifest.update(task="session"))
    with pytest.raises(BundleError, match="made for the task 'session', known are retrieval, ctr; update graphhash"):
        open_bundle(tmp_path / "bundle")
