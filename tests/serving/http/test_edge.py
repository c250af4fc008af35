"""The server at the edge of a network: who may ask, what goes over the wire, and what the description says."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import time
from html import unescape
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.bundles.serve import TlsFiles, serve_alone
from pipeline.cli import main as cli
from pipeline.errors import ServeError
from serving import Retriever
from serving.errors import InputError
from serving.http.access import LOOPBACK_HOSTS, Access, read_tokens, takes_host
from serving.http.answers import Limits
from serving.http.app import RetrievalOptions, create_app
from serving.http.connections import ConnectionLimits
from serving.http.live_bundle import LiveBundle
from serving.http.titles import read_titles
from tests.helpers.asgi_client import AsgiClient
from tests.helpers.http_server import REQUEST, on_a_thread, serve_settings
from tests.helpers.small_models import naive_answer, small_model

ROOT = Path(__file__).parents[3]
TOKEN = "a-token-of-some-length"


@pytest.fixture(scope="module")
def client(folder):
    return AsgiClient(
        create_app(
            LiveBundle(Retriever, folder, "cpu", 1), access=Access(("shop.example", "*.test", "::1"), (TOKEN, "b" * 20))
        )
    )


def test_head_is_get_without_the_body(folder):
    with on_a_thread(serve_settings(folder)) as address:
        client = http.client.HTTPConnection(*address, timeout=30)
        for path in ("/healthz", "/readyz", "/metrics", "/", "/docs"):
            client.request("GET", path)
            whole = client.getresponse()
            n_bytes = len(whole.read())
            client.request("HEAD", path)
            head = client.getresponse()
            assert (head.status, head.read(), head.getheader("content-type")) == (
                200,
                b"",
                whole.getheader("content-type"),
            )
            if path != "/metrics":  # It changes with each request.
                assert int(head.getheader("content-length")) == n_bytes
        client.request("HEAD", "/v1/score")
        assert client.getresponse().status == 405
        for path, status in (("/nothing", 404), ("/v1/recommend", 400)):
            client = http.client.HTTPConnection(*address, timeout=30)
            client.request("HEAD", path)
            assert client.getresponse().status == status


@pytest.mark.parametrize(
    ("host", "taken"),
    [
        ("shop.example", True), ("Shop.Example:8000", True), ("shop.example.", True), ("a.test", True), ("a.b.test:1", True),
        ("[::1]", True), ("[::1]:8000", True), ("test", False), ("atest", False), ("evil.example", False), ("", False),
        ("shop.example.evil.example", False), ("shop.example:80:90", False), ("[::1", False), ("[::1]evil", False),
    ],
)  # fmt: skip
def test_only_the_servers_names_are_taken(host, taken, client):
    assert takes_host(host, ("shop.example", "*.test", "::1")) is taken
    answer = client.send("GET", "/docs", host=host, authorization=f"Bearer {TOKEN}")
    assert answer.status == (200 if taken else 400)
    if not taken:
        assert answer.error == f"host is {host!r}, which is no name of this server; --allow-host adds one"
    assert client.send("GET", "/healthz", host=host).status == 200
    assert client.send("GET", "/readyz", host=host).status == 200


def test_a_token_is_needed_but_for_health(client):
    good = {"host": "shop.example", "authorization": f"Bearer {TOKEN}"}
    assert client.send("POST", "/v1/recommend", REQUEST, **good).status == 200
    assert client.send("POST", "/v1/recommend", REQUEST, **good | {"authorization": "bearer " + "b" * 20}).status == 200
    for wrong in ("", TOKEN, "Bearer", f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer é"):
        answer = client.send("POST", "/v1/recommend", REQUEST, **good | {"authorization": wrong})
        assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert answer.error == "no valid token; send the header Authorization: Bearer TOKEN"
        assert answer.n_received == 0, "the body is not read"
    for path in ("/", "/docs", "/metrics", "/openapi.json", "/nothing"):
        assert client.send("GET", path, host="shop.example").status == 401
    openapi = client.send("GET", "/openapi.json", **good).json()
    assert openapi["components"]["securitySchemes"]["bearer"] == {"type": "http", "scheme": "bearer"}
    assert openapi["paths"]["/v1/score"]["post"]["security"] == [{"bearer": []}]
    assert "security" not in openapi["paths"]["/healthz"]["get"]


def test_tokens_are_read_one_a_line(tmp_path):
    file = tmp_path / "tokens"
    file.write_text(f"# of the shop\n{TOKEN}\n\n  {'b' * 16}  \n")
    assert read_tokens(file) == (TOKEN, "b" * 16)
    assert TOKEN not in repr(Access(tokens=read_tokens(file)))
    for text, message in (("", "holds no token"), ("short", "line 1: a token has at least 16"), ("é" * 20, "ASCII")):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            read_tokens(file)
    with pytest.raises(InputError, match="No such file"):
        read_tokens(tmp_path / "none")


def test_a_body_has_to_come_as_it_is(folder):
    client = AsgiClient(create_app(LiveBundle(Retriever, folder, "cpu", 1)))
    answer = client.send("POST", "/v1/recommend", gzip.compress(REQUEST), content_encoding="gzip")
    assert (answer.status, answer.headers["accept-encoding"], answer.n_received) == (415, "identity", 0)
    assert answer.error == "content-encoding is 'gzip'; send the body as it is"
    assert client.send("POST", "/v1/recommend", REQUEST, content_encoding="identity").status == 200


def test_large_answers_are_compressed_for_who_takes_it(folder):
    client = AsgiClient(create_app(LiveBundle(Retriever, folder, "cpu", 1)))
    body = json.dumps({"user_ids": [3] * 50, "k": 20}).encode()
    plain = client.send("POST", "/v1/recommend", body)
    packed = client.send("POST", "/v1/recommend", body, accept_encoding="gzip")
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert len(packed.body) < len(plain.body) / 5
    assert gzip.decompress(packed.body) == plain.body
    small = client.send("POST", "/v1/recommend", REQUEST, accept_encoding="gzip")
    assert "content-encoding" not in small.headers


def certificate(folder: Path, *options: str) -> TlsFiles:
    tls = TlsFiles(folder / "certificate.pem", folder / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-keyout", str(tls.key), "-out", str(tls.certificate), *options]
    subprocess.run(command, check=True, capture_output=True)
    return tls


needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl: apt-get install openssl")


@needs_openssl
def test_tls_by_files(folder, tmp_path):
    tls = certificate(tmp_path, "-nodes")
    with on_a_thread(serve_settings(folder), tls=tls) as (_, port):
        context = ssl.create_default_context(cafile=tls.certificate)
        client = http.client.HTTPSConnection("localhost", port, context=context, timeout=30)
        client.request("POST", "/v1/recommend", REQUEST, {"Content-Type": "application/json"})
        items = json.load(client.getresponse())["results"][0]["items"]
        assert [item["item_id"] for item in items] == naive_answer(small_model(), 3, 4, [])[0]
        client.request("GET", "/docs")
        assert f"https://localhost:{port}/v1/recommend" in client.getresponse().read().decode()
        # The server waits at its end for connections that are open.
        client.close()


@needs_openssl
def test_an_endless_head_over_tls_is_cut_off_and_a_handshake_is_not_waited_for(folder, tmp_path):
    """TLS is closed by both sides: what came until then was read, a gigabyte in 30 seconds."""
    tls = certificate(tmp_path, "-nodes")
    limits = ConnectionLimits(header_timeout_s=0.5, linger_s=0.1)
    with on_a_thread(serve_settings(folder), limits, tls) as (_, port):
        context = ssl.create_default_context(cafile=tls.certificate)
        with socket.create_connection(("localhost", port)) as silent:
            silent.settimeout(30)
            assert silent.recv(1) == b"", "closed, without a handshake"
        with context.wrap_socket(socket.create_connection(("localhost", port)), server_hostname="localhost") as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\na: " + b"x" * 40_000)
            assert b"431 Request Header Fields Too Large" in client.recv(65536)
            with pytest.raises((ConnectionError, ssl.SSLError)):  # noqa: PT012  (which of these calls fails is not known)
                for _ in range(250):
                    client.sendall(b"x" * 100_000)
                    time.sleep(0.02)


@needs_openssl
def test_tls_files_that_cannot_be_used_are_one_line(folder, tmp_path):
    locked = certificate(tmp_path, "-passout", "pass:secret")
    with pytest.raises(ServeError, match="protected by a password"):
        serve_alone(serve_settings(folder), "127.0.0.1", 0, print, tls=locked)
    (tmp_path / "other").mkdir()
    other = certificate(tmp_path / "other", "-nodes")
    for files in (
        TlsFiles(locked.certificate, other.key),
        TlsFiles(tmp_path / "none", other.key),
        TlsFiles(other.key, other.key),
    ):
        with pytest.raises(ServeError, match="no certificate with its key"):
            serve_alone(serve_settings(folder), "127.0.0.1", 0, print, tls=files)


def test_options_that_contradict_are_told(folder):
    for options, message in (
        (["--replicas", "2"], "--replicas 2 needs Ray Serve: add --ray"),
        (["--tls-key", "key.pem"], "belong together"),
        (["--ray", "--tls-key", "k", "--tls-certificate", "c"], "Ray's proxy holds the connections"),
        (["--ray", "--max-connections", "10"], "Ray's proxy holds the connections"),
    ):
        got = CliRunner().invoke(cli.app, ["serve", str(folder), *options])
        assert got.exit_code == 2
        assert message in got.output


def test_explanations_are_there_where_asked_for(folder):
    live = LiveBundle(Retriever, folder, "cpu", 1)
    closed, opened = AsgiClient(create_app(live)), AsgiClient(create_app(live, options=RetrievalOptions(explain=True)))
    assert closed.get("/v1/explain").status == 404
    assert closed.get("/readyz").json()["explain"] is False
    assert "/v1/explain" not in closed.get("/openapi.json").json()["paths"]
    assert opened.get("/v1/explain").status == 200
    assert opened.get("/readyz").json()["explain"] is True


def test_ids_are_text_for_browsers_and_items_have_titles(folder):
    small, user = small_model(), 2**53 + 1
    best, scores, _ = naive_answer(small, user, 3, [])
    options = RetrievalOptions(titles={str(best[1]): "A <title>"})
    client = AsgiClient(create_app(LiveBundle(Retriever, folder, "cpu", 1), options=options))
    answer = client.get(f"/v1/recommend?user_id={user}&k=3").json()
    assert (answer["user_id"], answer["known"]) == (str(user), True)
    assert answer["items"] == [
        {"item_id": str(item), "score": score, "title": title}
        for item, score, title in zip(best, scores, [None, "A <title>", None], strict=True)
    ]
    for query in ("", "k=3", "user_id=a", "user_id=1.5", f"user_id={2**63}", "user_id=3&k=0", "user_id=3&other=1"):
        refused = client.get(f"/v1/recommend?{query}")
        assert refused.status == 400
        assert refused.error


def test_titles_are_read_from_a_table(tmp_path):
    file = tmp_path / "titles.csv"
    file.write_text('\ufeffyear,item_id,title\n1999,7,"Seven, the film"\n2000,8,日本\n', encoding="utf-8")
    assert read_titles(file) == {"7": "Seven, the film", "8": "日本"}
    (tmp_path / "titles.tsv").write_text("item_id\ttitle\n7\tSeven\n", encoding="utf-8")
    assert read_titles(tmp_path / "titles.tsv") == {"7": "Seven"}
    for text, message in (
        ("id,title\n", "has the columns id, title; name one 'item_id'"),
        ("", "has the columns none"),
        ("item_id,title\n7\n", "line 2: has too few cells"),
        ("item_id,title\n7,a\n7,b\n", "line 3: a second title for item '7'"),
        ('item_id,title\n7,"a\n', "no CSV file"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            read_titles(file)
    file.write_bytes(b"item_id,title\n7,\xff\n")
    with pytest.raises(InputError, match="UTF-8"):
        read_titles(file)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl: apt-get install curl")
@pytest.mark.parametrize("kind", ["int64", "string"])
def test_the_commands_of_the_description_run_as_printed(kind, tmp_path):
    small_model(users=kind, items=kind).export(tmp_path / "bundle")
    access = Access(LOOPBACK_HOSTS, (TOKEN,))
    options = RetrievalOptions(explain=True)
    with on_a_thread(serve_settings(tmp_path / "bundle", access=access, options=options)) as address:
        client = http.client.HTTPConnection(*address, timeout=30)
        client.request("GET", "/docs", headers={"Authorization": f"Bearer {TOKEN}"})
        page = client.getresponse().read().decode()
        commands = [unescape(part.partition("</pre>")[0]) for part in page.split("<pre>")[1:]]
        assert len(commands) == 4
        for command in commands:
            got = subprocess.run(
                ["bash", "-c", f"{command} --silent --show-error --fail-with-body"],
                env={**os.environ, "TOKEN": TOKEN}, capture_output=True, timeout=60, text=True,
            )  # fmt: skip
            assert got.returncode == 0, (command, got.stdout, got.stderr)
            words = shlex.split(command)
            if words[-1].endswith("/v1/score"):
                assert json.loads(got.stdout)["known_items"] == [True, True], "ids of this bundle"


def test_the_description_states_the_bundles_types_and_limits(tmp_path):
    small_model(users="string", items="int64").export(tmp_path / "bundle")
    limits = Limits(max_users=50, max_k=5, max_items=40)
    live = LiveBundle(Retriever, tmp_path / "bundle", "cpu", 1)
    client = AsgiClient(create_app(live, limits, options=RetrievalOptions(explain=True)))
    openapi = client.get("/openapi.json").json()
    paths, schemas = openapi["paths"], openapi["components"]["schemas"]
    assert paths.keys() == {"/v1/recommend", "/v1/score", "/v1/explain", "/healthz", "/readyz", "/metrics"}
    body = paths["/v1/recommend"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    int64 = {"type": "integer", "format": "int64", "minimum": -(2**63), "maximum": 2**63 - 1}
    assert body["required"] == ["user_ids"]
    assert body["properties"]["user_ids"]["items"] == {"type": "string"}
    assert body["properties"]["user_ids"]["maxItems"] == 50
    assert body["properties"]["k"]["maximum"] == 5
    asked_item = body["properties"]["exclude"]["anyOf"][0]["items"]["items"]
    assert asked_item["anyOf"][0] == int64
    assert asked_item["anyOf"][1]["type"] == "string"
    assert body["properties"]["ids_as_text"]["type"] == "boolean"
    assert (
        "ids_as_text"
        in paths["/v1/score"]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    )
    assert body["additionalProperties"] is False
    assert schemas["ScoredItem"]["properties"]["item_id"] == {"anyOf": [int64, {"type": "string"}]}
    assert schemas["UserItems"]["properties"]["user_id"] == {"type": "string"}
    assert "422" not in str(openapi)
    # All of a small catalogue may be asked for with any k.
    wide = AsgiClient(create_app(live, Limits())).get("/openapi.json").json()
    k = wide["paths"]["/v1/recommend"]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"][
        "k"
    ]
    assert "maximum" not in k


def test_the_description_needs_nothing_from_elsewhere(folder):
    client = AsgiClient(create_app(LiveBundle(Retriever, folder, "cpu", 1)))
    page = client.send("GET", "/docs", host="127.0.0.1:8000")
    assert page.status == 200
    text = page.body.decode()
    assert all(f" {path}</code>" in text for path in client.get("/openapi.json").json()["paths"])
    assert "//" not in text.replace("http://127.0.0.1:8000/", "")
    # Without a list of names, any name comes back: as text.
    hostile = client.send("GET", "/docs", host='"><script>').body.decode()
    assert "<script>" not in hostile


@pytest.mark.parametrize("external", [False, True], ids=["one file", "external data"])
def test_a_bundle_that_is_overwritten_in_place_does_not_end_the_server(external, tmp_path):
    """Run in a process of its own: before, it died of SIGBUS."""
    small_model(n_items=3000).export(tmp_path / "bundle", external_data_mib=0.0001 if external else 1024)
    code = f"""
from pathlib import Path
from serving import Retriever
from serving.http.live_bundle import LiveBundle
live = LiveBundle(Retriever, {str(tmp_path / "bundle")!r}, "cpu", 1)
before = live.current.recommend([3], 3000).item_ids[0].tolist()
for file in Path({str(tmp_path / "bundle")!r}).iterdir():
    with open(file, "r+b") as opened:
        opened.truncate(10)
assert live.current.recommend([3], 3000).item_ids[0].tolist() == before
assert live.refresh() is None
assert "manifest.json" in live.refused, live.refused
assert live.current.recommend([3], 3000).item_ids[0].tolist() == before
"""
    made = tmp_path / "temporary"
    made.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(made)}
    got = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert got.returncode == 0, got.stderr
    assert list(made.glob("graphhash-*")) == [], "the private copy has gone"


def test_a_bundle_that_cannot_be_copied_is_told_with_the_remedy(folder, monkeypatch, tmp_path):
    def no_room(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", no_room)
    with pytest.raises(Exception, match=r"No space left on device.*set TMPDIR to a folder with room"):
        LiveBundle(Retriever, folder, "cpu", 1)


def test_new_bundle_files_have_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        small_model().export(tmp_path / "bundle", external_data_mib=0.0001)
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "bundle").iterdir()}
    assert modes == {"model.onnx": 0o640, "model.onnx.data": 0o640, "manifest.json": 0o640}
    assert (tmp_path / "bundle").stat().st_mode & 0o777 == 0o750
