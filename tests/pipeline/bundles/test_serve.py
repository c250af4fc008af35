"""`graphhash serve` over real sockets, alone and on Ray Serve; the page in a browser."""

from __future__ import annotations

import html
import http.client
import json
import re
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from graphhash.graph.vocabulary import Vocabulary
from pipeline.bundles.serve import ServeSettings, _bound, ray_serve, serve_alone
from pipeline.cli import main as cli
from pipeline.errors import ServeError
from serving import BundleError
from serving.http.answers import Limits
from serving.http.app import RetrievalOptions
from tests.helpers.browser import CHROMIUM, PHONE_WIDTH, on_a_phone
from tests.helpers.http_server import on_a_thread, post, serve_command, serve_settings
from tests.helpers.small_models import SmallModel, naive_answer, small_model

EXPLAIN = RetrievalOptions(explain=True)


def one_user(small: SmallModel) -> list:
    ids, scores, known = naive_answer(small, 3, 4, [])
    items = [{"item_id": i, "score": s} for i, s in zip(ids, scores, strict=True)]
    return [{"user_id": 3, "known": known, "items": items}]


def test_a_body_of_50_mb_is_refused_while_it_is_sent(tmp_path):
    small_model().export(tmp_path / "bundle")
    with on_a_thread(serve_settings(tmp_path / "bundle")) as address:
        for framing in ("Content-Length: 50000000", "Transfer-Encoding: chunked"):
            with socket.create_connection(address, timeout=30) as client:
                client.sendall(
                    f"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{framing}\r\n\r\n".encode()
                )
                sent = 0
                try:
                    for _ in range(50 if "chunked" in framing else 0):
                        client.sendall(b"F4240\r\n" + b" " * 10**6 + b"\r\n")
                        sent += 1
                except OSError:
                    pass  # The server has closed: it has answered.
                answer = client.recv(4096)
            assert answer.startswith(b"HTTP/1.1 413 ")
            assert sent < 50
        client = http.client.HTTPConnection(*address)
        client.request("GET", "/healthz")
        assert client.getresponse().status == 200


def test_what_keeps_a_server_from_starting_is_one_line(tmp_path):
    small_model().export(tmp_path / "bundle")
    settings = ServeSettings(tmp_path / "bundle", Limits(), "cpu")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"cannot listen at 127.0.0.1:{port}: Address already in use; choose"):
            serve_alone(settings, "127.0.0.1", port, print)
        with pytest.raises(ServeError, match="Address already in use"), ray_serve(settings, "127.0.0.1", port):
            pass
    with pytest.raises(ServeError, match=r"cannot listen at no.such.host.invalid"):
        serve_alone(settings, "no.such.host.invalid", 0, print)
    with pytest.raises(BundleError, match="no bundle there"):
        serve_alone(ServeSettings(tmp_path / "none", Limits()), "127.0.0.1", 0, print)
    with (
        pytest.raises(BundleError, match="no bundle there"),
        ray_serve(ServeSettings(tmp_path, Limits()), "127.0.0.1", 0),
    ):
        pass
    got = CliRunner().invoke(cli.app, ["serve", str(tmp_path / "bundle"), "--replicas", "2"])
    assert got.exit_code == 2
    assert "needs Ray Serve" in got.output


def test_no_request_fails_and_memory_stays_bounded_while_the_bundle_is_replaced(tmp_path):
    models = {"old": small_model(), "new": small_model(item_bias=False)}
    expected = {}
    for name, small in models.items():
        manifest = small.export(tmp_path / name)
        expected[manifest["manifest_sha256"][:12]] = one_user(small)
    old, new = expected
    (tmp_path / "bundle").symlink_to("old")
    n_answers: Counter[str] = Counter()
    wrong: list[object] = []
    stop = threading.Event()

    def ask(url: str) -> None:
        while not stop.is_set():
            try:
                answer = post(f"{url}/v1/recommend", {"user_ids": [3], "k": 4})
            except OSError as error:
                wrong.append(error)
                return
            if answer["results"] != expected[answer["bundle"]]:
                wrong.append(answer)
            n_answers[answer["bundle"]] += 1

    def wait_for(bundle: str, n: int) -> None:
        deadline = time.monotonic() + 60
        while n_answers[bundle] < n and not wrong:
            assert time.monotonic() < deadline, n_answers
            time.sleep(0.01)

    with serve_command(tmp_path / "bundle", "--watch", "0.05", "--provider", "cpu") as (url, pid):
        threads = [threading.Thread(target=ask, args=(url,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            wait_for(old, 200)
            before = psutil.Process(pid).memory_info().rss
            (tmp_path / "next").symlink_to("new")
            (tmp_path / "next").replace(tmp_path / "bundle")
            wait_for(new, 500)
            grown = psutil.Process(pid).memory_info().rss - before
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert wrong == []
    assert n_answers.keys() == {old, new}
    assert grown < 100 * 2**20


def test_replicas_on_ray_answer_share_their_figures_and_take_a_new_bundle(tmp_path, ray_local):
    pytest.importorskip("ray.serve", reason="Ray Serve cannot be imported: install the project's dependencies")
    old = small_model()
    old.export(tmp_path / "bundle")
    settings = ServeSettings(tmp_path / "bundle", Limits(), "cpu", replicas=2, watch_s=0.2)
    with ray_serve(settings, "127.0.0.1", 0) as url:
        request = {"user_ids": [3], "k": 4}
        for _ in range(10):
            first = post(f"{url}/v1/recommend", request)
            assert first["results"] == one_user(old)
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(f"{url}/v1/recommend", {"user_ids": ["x"]})
        assert refused.value.code == 400
        assert json.load(refused.value)["error"].startswith("user_ids[0] is 'x'")
        figures = urllib.request.urlopen(f"{url}/metrics").read().decode()
        assert "graphhash_users_total 10.0" in figures
        assert f'graphhash_bundle{{bundle="{first["bundle"]}"}} 2.0' in figures
        new = small_model(item_bias=False)
        new.export(tmp_path / "bundle")
        deadline = time.monotonic() + 60
        seen: list[str] = []
        while seen[-10:] != [seen[-1] if seen else ""] * 10 or seen[-1] == first["bundle"]:
            answer = post(f"{url}/v1/recommend", request)
            assert answer["results"] == one_user(old if answer["bundle"] == first["bundle"] else new)
            seen.append(answer["bundle"])
            assert time.monotonic() < deadline
            time.sleep(0.05)
        page = urllib.request.urlopen(f"{url}/").read()
        assert page.startswith(b"<!doctype html>")


HOSTILE = [
    '<img src=x onerror="document.title=1">',
    "</script><script>document.title=2</script>",
    "&amp; 'x' \"y\"",
    "a\tb",
    "‮abc",
]


def hostile_model(maps: str) -> SmallModel:
    """Ids that want to be markup."""
    small = small_model(users="string", items="string", maps=maps)
    ids = Vocabulary([*HOSTILE, *(f"id {i}" for i in range(23))][:23])
    return SmallModel(small.model, small.user_map, small.item_map, Vocabulary(ids.ids[:14]), ids)


def rendered(url: str) -> str:
    """The page's markup after its script has run."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_the_page_shows_a_users_items_and_buckets_and_nothing_that_ids_say_is_run(tmp_path):
    small = hostile_model("modulo")
    small.export(tmp_path / "bundle")
    with on_a_thread(serve_settings(tmp_path / "bundle", options=EXPLAIN)) as (host, port):
        user = HOSTILE[0]
        page = rendered(f"http://{host}:{port}/?user_id={urllib.parse.quote(user)}")
        assert "<title>GraphHash: user &lt;img src=x" in page
        assert page.count("<script>") == 1
        text = html.unescape(re.sub(r"<script>.*?</script>|<style>.*?</style>|<[^>]*>", "\n", page, flags=re.DOTALL))
        ids, scores, _ = naive_answer(small, user, 10, [])
        rows = re.findall(r'<td class="id">(.*?)</td><td class="number">(.*?)</td>', page)
        assert [html.unescape(item) for item, _ in rows] == ids
        assert [float(score) for _, score in rows] == scores
        assert user in text
        assert "is in the vocabulary." in text
        assert "The user's buckets" in text
        assert "Bundle" in text
        assert "14 users with string ids" in text
        unknown = rendered(f"http://{host}:{port}/?user_id=nobody")
        assert "is out of vocabulary: the OOV row answers." in unknown
        some = rendered(f"http://{host}:{port}/")
        assert "is in the vocabulary." in some


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
@pytest.mark.parametrize("explain", [True, False])
def test_a_phone_shows_the_whole_page_and_the_address_names_the_user(explain, tmp_path):
    small = small_model(maps="modulo")
    small.export(tmp_path / "bundle")
    titles = {str(item): f"{'A very long title ' * 5}{item}" for item in small.items.ids.to_pylist()[:-1]}
    options = RetrievalOptions(explain, titles)
    best = [str(item) for item in naive_answer(small, 2**53 + 1, 3, [])[0]]
    shown = "[...document.querySelectorAll('td.id')].map(cell => cell.lastChild.textContent)"
    ask = "document.getElementById('user').value = '7'; document.getElementById('form').requestSubmit()"
    later = "new Promise(done => setTimeout(() => done([location.search, document.title]), 1000))"
    width = "document.documentElement.scrollWidth"
    settings = serve_settings(tmp_path / "bundle", options=options)
    with on_a_thread(settings) as (host, port):
        address = f"http://{host}:{port}"
        visit = on_a_phone(f"{address}/?user_id={2**53 + 1}&k=3", width, shown, ask, later, "history.back()", later)
        assert visit.console == []
        assert visit.values[0] == PHONE_WIDTH
        assert visit.values[1] == best
        assert visit.values[3] == ["?k=3&user_id=7", "GraphHash: user 7"]
        assert visit.values[5] == [f"?k=3&user_id={2**53 + 1}", f"GraphHash: user {2**53 + 1}"]
        docs = on_a_phone(f"{address}/docs", width)
        assert (docs.values, docs.console) == ([PHONE_WIDTH], [])
        # Without explanations nobody is named who was not asked for.
        nobody = on_a_phone(
            f"{address}/", "document.querySelectorAll('td').length", "document.getElementById('random').hidden"
        )
        assert (nobody.values[0] > 0, nobody.values[1]) == (explain, not explain)


def test_the_page_loads_nothing_from_elsewhere_and_its_policy_lets_only_its_own_script_run(tmp_path):
    small_model().export(tmp_path / "bundle")
    page = (Path(__file__).parents[3] / "serving" / "http" / "page.html").read_text()
    assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write|\son\w+=", page)
    with (
        on_a_thread(serve_settings(tmp_path / "bundle")) as (host, port),
        urllib.request.urlopen(f"http://{host}:{port}/") as answer,
    ):
        policy = answer.headers["content-security-policy"]
        assert answer.read().decode() == page
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_connection_does_not_wait_for_acknowledgements_between_head_and_body(host):
    if ":" in host and not _has_ipv6():
        pytest.skip("no IPv6 here")
    with _bound(host, 0) as listener, socket.create_connection(listener.getsockname()[:2]):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_ray_has_the_event_loop_whose_sockets_do_not_wait_either():
    from ray._private.async_compat import get_new_event_loop

    loop = get_new_event_loop()
    assert type(loop).__module__.startswith("uvloop")
    loop.close()
