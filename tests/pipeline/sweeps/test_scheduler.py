"""The scheduler: how many runs there are at once, in what order results come, and what becomes of a run that fails."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from pipeline.config.run_config import RunConfig
from pipeline.distributed import session as ray_session
from pipeline.errors import ConfigError
from pipeline.sweeps import scheduler
from pipeline.sweeps.scheduler import (
    LocalPool,
    RayPool,
    Result,
    RunSpec,
    execute,
    schedule,
    share_resources,
    sweep_session,
)
from pipeline.training import machine
from tests.helpers.serial_pool import SerialPool


def spec_of(name: str, folder: Path = Path("out")) -> RunSpec:
    return RunSpec(name, name, RunConfig.from_flat({"data.path": "x", "run.out": str(folder / name)}), "train")


@pytest.mark.parametrize("n_slots", [1, 2, 9])
def test_every_run_ends_once_and_no_more_run_at_once_than_there_are_slots(n_slots):
    specs = [spec_of(str(i)) for i in range(5)]
    pool = SerialPool(n_slots, lambda spec: Result(metrics={"name": spec.name}), newest_first=True)
    ended = list(schedule(specs, pool))
    assert sorted(spec.name for spec, _ in ended) == [str(i) for i in range(5)]
    assert all(result.metrics == {"name": spec.name} for spec, result in ended)
    assert pool.most_running == min(n_slots, 5)


def test_a_run_is_taken_when_a_slot_is_free_so_that_earlier_results_are_known():
    known_at: list[int] = []
    n_ended = 0

    def specs():
        for i in range(4):
            known_at.append(n_ended)
            yield spec_of(str(i))

    for _ in schedule(specs(), SerialPool(2, lambda spec: Result(metrics={}))):
        n_ended += 1
    assert known_at == [0, 0, 1, 2]


def test_an_interrupt_cancels_what_runs():
    def interrupt(spec):
        raise KeyboardInterrupt

    pool = SerialPool(3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(schedule([spec_of(str(i)) for i in range(5)], pool))
    assert [spec.name for spec in pool.cancelled] == ["1", "2"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConfigError("train.dim=0 is\n too small"), "train.dim=0 is too small"),
        (FileNotFoundError(2, "no such file", "x"), "[Errno 2] no such file: 'x'"),
        (KeyError("epochs"), "KeyError: 'epochs'"),
    ],
)
def test_an_error_is_the_reason_of_a_run_and_its_traceback_is_kept(error, reason, tmp_path, monkeypatch):
    def fail(config, **_options):
        raise error

    monkeypatch.setattr(scheduler, "run", fail)
    (tmp_path / "a").mkdir()
    assert execute(spec_of("a", tmp_path), "train") == Result(reason=reason)
    assert "Traceback" in (tmp_path / "a" / "error.txt").read_text()


def _die(spec, store):
    """What a task does whose process is killed, for its own run alone."""
    import os

    if spec.name == "dies":
        os._exit(1)
    return Result(metrics={"name": spec.name})


def test_a_task_whose_process_dies_fails_alone(ray_local, monkeypatch):
    monkeypatch.setattr(scheduler, "_execute_in_task", _die)
    ended = {spec.name: result for spec, result in schedule(map(spec_of, ("dies", "lives")), RayPool(2, 2, None))}
    assert ended["lives"] == Result(metrics={"name": "lives"})
    assert ended["dies"].reason.startswith("its process ended: ")
    assert "\n" not in ended["dies"].reason


@pytest.mark.parametrize(
    ("gpus", "machines", "n_runs", "jobs", "expected"),
    [
        (0, [2], 9, None, (1, {"num_cpus": 2})),
        (0, [16], 9, None, (4, {"num_cpus": 4})),
        (0, [16], 2, None, (2, {"num_cpus": 8})),
        (0, [16, 16], 99, None, (8, {"num_cpus": 4})),
        (0, [2], 9, 2, (2, {"num_cpus": 1})),
        (0, [2], 9, 4, (4, {"num_cpus": 1})),
        (4, [64], 9, None, (4, {"num_cpus": 1, "num_gpus": 1})),
        (4, [64], 9, 8, (4, {"num_cpus": 1, "num_gpus": 1})),
    ],
)
def test_as_many_at_once_as_the_cluster_has_room_for(gpus, machines, n_runs, jobs, expected):
    assert share_resources(n_runs, jobs, machines, gpus) == expected


@pytest.mark.parametrize(
    ("cpus", "gpus", "jobs", "address", "on_ray"),
    [(2, 0, None, None, False), (8, 0, 1, None, False), (8, 1, None, None, False), (8, 0, None, None, True),
     (2, 0, 2, None, True), (8, 2, None, None, True), (2, 0, None, "auto", True)],
)  # fmt: skip
def test_ray_starts_for_several_runs_at_once_or_on_a_cluster(cpus, gpus, jobs, address, on_ray, monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(machine, "n_cpus", lambda: cpus)
    monkeypatch.setattr(machine, "n_gpus", lambda: gpus)
    monkeypatch.setattr(ray_session, "ray_session", lambda address: nullcontext(started.append(address)))
    monkeypatch.setattr(ray_session, "check_shared", lambda folder: None)
    config = RunConfig.from_flat({"run.out": str(tmp_path), "run.address": address})
    with sweep_session(config, 9, jobs) as is_on_ray:
        assert is_on_ray == on_ray
    assert started == ([address] if on_ray else [])


def test_runs_of_this_process_come_one_after_the_other_and_a_failed_one_has_its_reason(tmp_path, monkeypatch):
    def execute(spec, until, *, store, fit_job):
        return Result(reason="no") if spec.name == "b" else Result(metrics={"name": spec.name, "by": fit_job.__name__})

    monkeypatch.setattr(scheduler, "execute", execute)
    ended = {spec.name: result for spec, result in schedule(map(spec_of, "abc"), LocalPool(None))}
    assert list(ended) == ["a", "b", "c"]
    assert ended["c"].metrics == {"name": "c", "by": "fit_here"}
    assert ended["b"].reason == "no"
