"""Ray tasks ingest, cluster and make maps of a CTR log with the bytes of one process."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.run_config import RunConfig
from pipeline.ctr import synthetic
from pipeline.ctr.cluster import cluster_ctr
from pipeline.ctr.ingest import ingest_ctr
from pipeline.ctr.method_maps import write_method_maps
from pipeline.ctr.synthetic_model import LogSettings
from pipeline.distributed.session import ray_session
from pipeline.task import TRAIN_PARTS, StageContext


def made(log: Path, run: Path) -> dict[str, bytes]:
    """The files of three stages."""
    settings = {"data.path": str(log), "data.schema": str(log / "schema.toml"), "run.methods": ("double_soft",)}
    config = RunConfig.from_flat(
        settings | {"run.task": "ctr", "run.out": str(run), "cluster.resolution": 2.0, "map.indices_per_id": 4}
    )
    context, out = StageContext(config, run), run / "methods" / "double_soft"
    for folder in (context.ingest_dir, context.cluster_dir, out):
        folder.mkdir(parents=True)
    ingest_ctr(config.data, context.ingest_dir)
    cluster_ctr(config, context.ingest_dir, context.cluster_dir)
    write_method_maps(context, "double_soft", TRAIN_PARTS, out)
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.name != "cluster.json")
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def test_ray_tasks_write_the_bytes_of_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "BLOCK", 1000)
    monkeypatch.setattr(synthetic, "BLOCKS_PER_FILE", 1)
    synthetic.synth_ctr(tmp_path / "log", LogSettings(4000, 2000, 2, 10, 0.2, 0.1, 0.3, 0))
    here = made(tmp_path / "log", tmp_path / "here")
    with ray_session(num_cpus=2):
        there = made(tmp_path / "log", tmp_path / "there")
    assert any(name.startswith("methods/double_soft/folds/") for name in here)
    assert here == there
