"""Commands that read a bundle take it from object storage by the URI that `run` and `export` print."""

from __future__ import annotations

import asyncio
import json

import pytest
from click.testing import CliRunner
from pyarrow.fs import FileSystem

from pipeline.bundles.serve import ServeSettings, build_app
from pipeline.cli import main as cli
from pipeline.storage.uris import below, upload
from serving import Retriever
from serving.http.answers import Limits
from serving.http.live_bundle import LiveBundle
from tests.helpers.asgi_client import AsgiClient
from tests.helpers.s3 import s3_bucket
from tests.helpers.small_models import SmallModel, naive_answer, small_model


@pytest.mark.parametrize(
    ("folder", "there"),
    [
        ("out", "out/bundle"),
        ("out/", "out/bundle"),
        ("/", "/bundle"),
        ("s3://b/run", "s3://b/run/bundle"),
        ("s3://b/run/?endpoint_override=127.0.0.1%3A9&scheme=http", "s3://b/run/bundle?endpoint_override=127.0.0.1%3A9&scheme=http"),
        ("file:///out", "file:///out/bundle"),
    ],
)  # fmt: skip
def test_a_query_stays_behind_the_path(folder, there):
    assert below(folder, "bundle") == there


def put(small: SmallModel, folder, uri: str) -> None:
    small.export(folder)
    filesystem, path = FileSystem.from_uri(uri)
    for file in folder.iterdir():
        upload(filesystem, f"{path}/{file.name}", file)


def test_check_recommend_triton_bench_and_serve_take_a_uri(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    small = small_model()
    with s3_bucket() as bucket:
        uri = below(bucket.uri("runs/a"), "bundle")
        put(small, tmp_path / "bundle", uri)
        commands = {
            "check": ["check", uri],
            "recommend": ["recommend", uri, "--user-id", "3", "--json", str(tmp_path / "answers.json")],
            "triton": ["triton", uri, str(tmp_path / "models"), "-k", "5"],
            "bench": ["bench", "serve", uri, "--requests", "5", "--plot", str(tmp_path / "plot.png"), "--provider", "cpu"],
        }  # fmt: skip
        for name, command in commands.items():
            got = CliRunner().invoke(cli.app, command)
            assert got.exit_code == 0, (name, got.output, got.exception)
        items = json.loads((tmp_path / "answers.json").read_text())[0]["items"]
        assert [item["item_id"] for item in items] == naive_answer(small, 3, 20, [])[0]
        assert (tmp_path / "models" / "graphhash" / "1" / "model.onnx").exists()
        app = build_app(ServeSettings(uri, Limits(), "cpu", threads=1, watch_s=0.05))
        client = AsgiClient(app)
        before = client.post("/v1/recommend", {"user_ids": [3]}).json()
        assert [i["item_id"] for i in before["results"][0]["items"]] == naive_answer(small, 3, 20, [])[0]
        _answers_from_the_newer_one(client, before, tmp_path, uri)
        for command in (["check"], ["triton"], ["bench", "serve"]):
            got = CliRunner().invoke(
                cli.app, [*command, bucket.uri("nothing"), *(["models"] if command == ["triton"] else [])]
            )
            assert "no such file or folder" in str(got.exception)


def _answers_from_the_newer_one(client: AsgiClient, before: dict, tmp_path, uri: str) -> None:
    """The server looks at the URI, too."""
    newer = small_model(item_bias=False)

    async def wait() -> dict:
        async with client.app.router.lifespan_context(client.app):
            await asyncio.to_thread(put, newer, tmp_path / "newer", uri)
            async with asyncio.timeout(60):
                while (await client.request("GET", "/readyz")).json()["bundle"] == before["bundle"]:
                    await asyncio.sleep(0.05)
            return (await client.request("POST", "/v1/recommend", b'{"user_ids": [3]}')).json()

    items = client.run(wait())["results"][0]["items"]
    assert [item["item_id"] for item in items] == naive_answer(newer, 3, 20, [])[0]


def test_storage_that_cannot_be_reached_leaves_the_bundle_in_use(tmp_path):
    small_model().export(tmp_path / "bundle")
    faults = [OSError("no network")]

    def fetch() -> None:
        if faults:
            raise faults[0]

    live = LiveBundle(Retriever, tmp_path / "bundle", "cpu", 1, fetch=fetch)
    before = live.current
    assert live.refresh() is None
    assert live.current is before
    assert live.refused == "looking for a newer bundle failed (no network)"
    faults.clear()
    assert live.refresh() is None
    assert live.refused is None
