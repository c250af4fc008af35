"""``graphhash triton`` on the command line."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.cli.command import Epilog


@click.command(
    cls=Epilog,
    epilog="""
graphhash triton out/bundle models
graphhash triton out/bundle models --name shop -k 200 --gpu
""",
)
@click.argument("bundle", metavar="BUNDLE")
@click.argument("out", metavar="DIR")
@click.option(
    "--name", default="graphhash", show_default=True, help="Of the model; the one for candidates is NAME_score."
)
@click.option(
    "-k", default=100, show_default=True, type=click.IntRange(min=1), help="Items per user, constant in the model."
)
@click.option("--gpu", is_flag=True, help="Run on the server's GPUs.  [its CPUs]")
@click.option(
    "--max-batch",
    default=256,
    show_default=True,
    type=click.IntRange(min=1),
    help="Users, or rows, of one run.",
)
def triton(bundle: str, out: str, name: str, k: int, gpu: bool, max_batch: int) -> None:
    """Write a bundle into the NVIDIA Triton model repository DIR: a model that recommends and one that scores candidates, or one that
    predicts clicks.

    All batch requests dynamically. Start the server with `tritonserver --model-repository DIR`.
    """
    from pipeline.bundles.triton import write_triton
    from pipeline.storage.uris import bundle_folder

    for folder in write_triton(bundle_folder(bundle), Path(out), name=name, k=k, gpu=gpu, max_batch_size=max_batch):
        print(f"Triton model: {folder}")
