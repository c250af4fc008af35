"""Progress lines: what a command prints of the package's log records."""

from __future__ import annotations

import logging
import threading

import pytest

from pipeline.progress import SKIPPED, prefixed, progress_printed, silenced

log = logging.getLogger("pipeline.some.module")


def test_lines_are_printed_plainly_and_only_while_the_block_lasts(capsys):
    log.info("before")
    with progress_printed():
        log.info("cluster ...")
        log.debug("detail")
        logging.getLogger("graphhash.module").warning("50%% of %s", "ids")
        logging.getLogger("other").info("not ours")
    log.info("after")
    assert capsys.readouterr() == ("", "cluster ...\n50% of ids\n")


def test_loggers_are_left_as_they_were():
    ours = logging.getLogger("pipeline")
    before = (ours.level, ours.propagate, list(ours.handlers))
    with pytest.raises(KeyboardInterrupt), progress_printed():
        raise KeyboardInterrupt
    assert (ours.level, ours.propagate, ours.handlers) == before


def test_a_prefixed_job_leaves_out_its_skipped_stages(capsys):
    with progress_printed(), prefixed("seed 1"):
        log.info("ingest: unchanged, skipped", extra=SKIPPED)
        log.info("cluster: done")
    assert capsys.readouterr().err == "seed 1: cluster: done\n"


def test_a_silenced_job_silences_its_own_thread_alone(capsys):
    with progress_printed(), silenced():
        log.warning("unheard")
        other = threading.Thread(target=log.info, args=("heard",))
        other.start()
        other.join()
        with prefixed("inner"):
            log.info("heard as well")
        log.info("unheard again")
    assert capsys.readouterr().err == "heard\ninner: heard as well\n"


def test_without_configuration_progress_goes_nowhere(capsys, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])
    log.info("progress")
    assert capsys.readouterr() == ("", "")
