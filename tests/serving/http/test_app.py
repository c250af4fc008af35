"""The HTTP app: right answers, clear refusals, nothing dropped when its bundle is replaced."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import threading

import numpy as np
import pytest

from serving import Retriever, bundle
from serving.http import live_bundle
from serving.http.answers import Limits
from serving.http.app import create_app
from serving.http.live_bundle import LiveBundle
from tests.helpers.asgi_client import AsgiClient
from tests.helpers.small_models import INT_IDS, STRING_IDS, SmallModel, naive_answer, small_model

LIMITS = Limits(max_body_bytes=20_000, max_users=50, max_k=30, max_items=40, max_cells=1000, timeout_s=5)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Kind of ids -> the model, and the folder it was exported to."""
    made = {}
    for kind in ("int64", "string"):
        small = small_model(users=kind, items=kind)
        folder = tmp_path_factory.mktemp(kind) / "bundle"
        small.export(folder)
        made[kind] = (small, folder)
    return made


@pytest.fixture(scope="module")
def clients(bundles):
    return {
        kind: AsgiClient(create_app(LiveBundle(Retriever, folder, "cpu", 1), LIMITS))
        for kind, (_, folder) in bundles.items()
    }


@pytest.fixture(scope="module")
def client(clients):
    return clients["int64"]


def expected(small: SmallModel, user: int | str, k: int, exclude: list) -> dict:
    ids, scores, known = naive_answer(small, user, k, exclude)
    items = [{"item_id": item, "score": score} for item, score in zip(ids, scores, strict=True)]
    return {"user_id": user, "known": known, "items": items}


@pytest.mark.parametrize(("kind", "ids"), [("int64", INT_IDS), ("string", STRING_IDS)])
def test_recommends_like_the_obvious_loop(kind, ids, bundles, clients):
    small = bundles[kind][0]
    users = [*ids, {"int64": -99, "string": "nobody"}[kind]]
    exclude = [ids[: n % 4] for n in range(len(users))]
    for k in (1, 7, 23, 24, 10**30):
        answer = clients[kind].post("/v1/recommend", {"user_ids": users, "k": k, "exclude": exclude})
        assert answer.status == 200
        assert answer.headers["content-type"] == "application/json"
        assert answer.json()["results"] == [
            expected(small, user, k, out) for user, out in zip(users, exclude, strict=True)
        ]
    plain = clients[kind].post("/v1/recommend", {"user_ids": users}).json()["results"]
    assert plain == [expected(small, user, 20, []) for user in users]


@pytest.mark.parametrize(("kind", "ids"), [("int64", INT_IDS), ("string", STRING_IDS)])
def test_scores_the_items_asked_for(kind, ids, bundles, clients):
    small = bundles[kind][0]
    unknown = {"int64": 98, "string": "nothing"}[kind]
    for user in (ids[2], unknown):
        answer = (
            clients[kind].post("/v1/score", {"user_id": user, "item_ids": [ids[3], unknown, ids[0], ids[3]]}).json()
        )
        every = {item["item_id"]: item["score"] for item in expected(small, user, 23, [])["items"]}
        assert [answer["scores"][i] for i in (0, 2, 3)] == [every[ids[3]], every[ids[0]], every[ids[3]]]
        assert answer["known_items"] == [True, False, True, True]
        assert (answer["known"], answer["user_id"]) == (user != unknown, user)
    assert clients[kind].post("/v1/score", {"user_id": ids[2], "item_ids": []}).json()["scores"] == []


def in_a_browser(body: bytes) -> dict:
    """JSON as JavaScript reads it: every number is a float64."""
    return json.loads(body, parse_int=float)


def test_ids_beyond_2_53_reach_a_browser_as_text(bundles, client):
    small = bundles["int64"][0]
    large = [i for i in INT_IDS if abs(i) > 2**53]
    assert len(large) == 3
    texts, everything = [str(user) for user in large], [[str(i) for i in INT_IDS[:3]], [], []]
    out = [INT_IDS[:3], [], []]
    body = {"user_ids": texts, "k": 23, "exclude": everything}
    answer = client.post("/v1/recommend", body | {"ids_as_text": True})
    assert answer.status == 200
    for user, result, excluded in zip(large, in_a_browser(answer.body)["results"], out, strict=True):
        whole = expected(small, user, 23, excluded)
        assert result["user_id"] == str(user)
        assert [item["item_id"] for item in result["items"]] == [str(item["item_id"]) for item in whole["items"]]
        assert [item["score"] for item in result["items"]] == [item["score"] for item in whole["items"]]
    # As numbers, which is the default, they come back rounded.
    numbers = in_a_browser(client.post("/v1/recommend", body).body)["results"]
    assert int(numbers[-1]["user_id"]) != large[-1]

    scores = client.post("/v1/score", {"user_id": texts[-1], "item_ids": texts, "ids_as_text": True}).json()
    plain = client.post("/v1/score", {"user_id": large[-1], "item_ids": large}).json()
    assert (scores["user_id"], scores["item_ids"]) == (texts[-1], texts)
    assert (plain["user_id"], plain["item_ids"]) == (large[-1], large)
    assert (scores["scores"], scores["known_items"]) == (plain["scores"], [True] * 3)


def test_text_is_of_the_request_that_asks_for_it_not_of_those_beside_it(bundles):
    client = AsgiClient(create_app(LiveBundle(Retriever, bundles["int64"][1], "cpu", 1), LIMITS))
    bodies = [json.dumps({"user_ids": [3], "k": 2, "ids_as_text": n % 2 == 0}).encode() for n in range(8)]

    async def together():
        return await asyncio.gather(*(client.request("POST", "/v1/recommend", body) for body in bodies))

    for n, answer in enumerate(client.run(together())):
        (result,) = answer.json()["results"]
        kind = str if n % 2 == 0 else int
        assert {type(result["user_id"]), *(type(item["item_id"]) for item in result["items"])} == {kind}


def test_an_empty_batch_gets_an_empty_answer(client):
    assert client.post("/v1/recommend", {"user_ids": [], "exclude": []}).json()["results"] == []


def test_requests_at_the_same_time_share_runs_and_get_their_own_answers(bundles):
    small, folder = bundles["int64"]
    client = AsgiClient(create_app(LiveBundle(Retriever, folder, "cpu", 1), LIMITS))
    rng = np.random.default_rng(0)
    asked = []
    for n in range(60):
        users = rng.choice([*INT_IDS, 55], n % 5).tolist()
        body = {"user_ids": users, "k": int(rng.integers(1, 24))}
        if n % 3 == 0:
            body["exclude"] = [rng.choice(INT_IDS, i).tolist() for i in range(len(users))]
        asked.append(body)

    async def together():
        return await asyncio.gather(
            *(client.request("POST", "/v1/recommend", json.dumps(body).encode()) for body in asked)
        )

    for body, answer in zip(asked, client.run(together()), strict=True):
        out = body.get("exclude", [[]] * len(body["user_ids"]))
        assert answer.json()["results"] == [
            expected(small, user, body["k"], x) for user, x in zip(body["user_ids"], out, strict=True)
        ]
    text = client.get("/metrics").body.decode()
    runs = float(re.search(r"graphhash_run_users_count (\S+)", text)[1])
    assert 1 < runs < 30
    assert f"graphhash_users_total {float(sum(len(body['user_ids']) for body in asked))}" in text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "body: Invalid JSON: EOF"),
        (b"", "body: Invalid JSON: EOF"),
        (b"\xff\xfe", "body: Invalid JSON"),
        (b"[" * 10_000, "body: Invalid JSON: recursion limit"),
        (b'{"user_ids": [1' + b"0" * 5000 + b"]}", "Invalid JSON|leaves int64"),
        ([], "body: Input should be an object"),
        ({}, "user_ids: Field required"),
        ({"user_ids": 3}, "user_ids: Input should be a valid array, not 3"),
        ({"user_ids": ["03"]}, r"user_ids\[0\] is '03'; this model takes int64 ids"),
        ({"user_ids": [3, None]}, r"user_ids\[1\] is None"),
        ({"user_ids": [3.5]}, r"user_ids\[0\] is 3.5"),
        ({"user_ids": [True]}, r"user_ids\[0\] is True"),
        ({"user_ids": [2**63]}, "leaves int64"),
        ({"user_ids": [[3]]}, r"user_ids\[0\] is \[3\]"),
        ({"user_ids": [3], "k": 0}, "k is 0; give a whole number from 1"),
        ({"user_ids": [3], "k": -1}, "k is -1"),
        ({"user_ids": [3], "k": "5"}, "k: Input should be a valid integer, not '5'"),
        ({"user_ids": [3], "k": 2.0}, "k: Input should be a valid integer"),
        ({"user_ids": [3], "k": None}, "k: Input should be a valid integer"),
        ({"user_ids": [3], "exclude": [[], []]}, "exclude has 2 lists for 1 users"),
        ({"user_ids": [3], "exclude": [7]}, r"exclude\[0\] is 7; give a list"),
        ({"user_ids": [3], "exclude": [["x"]]}, r"exclude\[0\]\[0\] is 'x'"),
        ({"user_ids": [3], "exclude": [[0] * 41]}, r"exclude\[0\] has 41 ids; at most 40"),
        ({"user_ids": [3], "exlude": []}, "exlude: no such field; there are user_ids, k, exclude, ids_as_text"),
        ({"user_ids": [3], "ids_as_text": 1}, "ids_as_text: Input should be a valid boolean, not 1"),
        ({"user_ids": ["9223372036854775808"]}, "this model takes int64 ids"),
        ({"user_ids": [3] * 51}, "user_ids has 51 ids; at most 50 a request"),
        ({"user_ids": [3] * 48, "k": 23}, "48 users times 23 items each .* is over 1000"),
        ({"user_ids": ["line\nbreak\ud800"]}, "Invalid JSON|line.nbreak"),
    ],
)
def test_a_bad_request_is_told_in_one_line(body, message, client):
    answer = client.post("/v1/recommend", body)
    assert answer.status == 400
    assert re.search(message, answer.error), answer.error


def test_strings_are_refused_one_by_one_too(clients):
    for body, message in (
        ({"user_ids": ["a", True]}, r"user_ids\[1\] is True; this model takes string ids"),
        (rb'{"user_ids": ["\ud800"]}', "Invalid JSON"),
    ):
        answer = clients["string"].post("/v1/recommend", body)
        assert answer.status == 400
        assert re.search(message, answer.error)
    assert clients["string"].post("/v1/score", {"user_id": [3], "item_ids": []}).status == 400
    assert clients["string"].post("/v1/score", {"user_id": "a", "item_ids": ["x"] * 41}).status == 400


def test_k_over_the_limit_is_refused_only_where_the_catalogue_has_more(bundles):
    client = AsgiClient(create_app(LiveBundle(Retriever, bundles["int64"][1], "cpu", 1), Limits(max_k=5)))
    assert client.post("/v1/recommend", {"user_ids": [3], "k": 5}).status == 200
    assert client.post("/v1/recommend", {"user_ids": [3], "k": 6}).error == "k is 6; at most 5 items a user"


def test_other_routes_methods_and_media_types_are_refused(client):
    assert (client.get("/nothing").status, client.get("/nothing").error) == (404, "no route '/nothing'; see /docs")
    assert client.get("/v1/score").status == 405
    answer = client.post("/v1/recommend", {"user_ids": [3]}, content_type="text/plain")
    assert (answer.status, answer.error) == (415, "content-type is 'text/plain'; send application/json")


def test_a_large_body_is_refused_before_it_is_read(client):
    answer = client.send("POST", "/v1/recommend", b"", content_length=str(50 * 10**6))
    assert (answer.status, answer.n_received) == (413, 0)
    assert client.send("POST", "/v1/recommend", b"", content_length="9" * 5000).status == 413
    sent = 0

    async def stream():
        nonlocal sent
        for _ in range(50_000):
            sent += 1000
            yield b" " * 1000

    answer = client.run(client.request("POST", "/v1/recommend", stream()))
    assert answer.status == 413
    assert "larger than 20000 bytes" in answer.error
    assert sent == 21_000
    assert answer.headers["connection"] == "close"


def test_a_body_that_does_not_arrive_is_not_waited_for(bundles):
    client = AsgiClient(create_app(LiveBundle(Retriever, bundles["int64"][1], "cpu", 1), Limits(timeout_s=0.05)))

    async def slow():
        yield b"{"
        await asyncio.sleep(10)

    assert client.run(client.request("POST", "/v1/recommend", slow())).status == 408


def test_what_waits_too_long_or_in_too_long_a_line_is_told_to_come_again(bundles):
    live = LiveBundle(Retriever, bundles["int64"][1], "cpu", 1)
    client = AsgiClient(create_app(live, Limits(timeout_s=0.2, max_waiting=2)))
    block, entered = threading.Event(), threading.Event()
    recommend = live.current.recommend

    def blocked(*arguments):
        entered.set()
        block.wait()
        return recommend(*arguments)

    live.current.recommend = blocked
    body = json.dumps({"user_ids": [3], "k": 2}).encode()

    async def many():
        first = asyncio.create_task(client.request("POST", "/v1/recommend", body))
        await asyncio.to_thread(entered.wait)
        return [await first, *await asyncio.gather(*(client.request("POST", "/v1/recommend", body) for _ in range(4)))]

    answers = client.run(many())
    assert [answer.status for answer in answers] == [503] * 5
    assert all(answer.headers["retry-after"] == "1" for answer in answers)
    assert (
        sorted(answer.error for answer in answers[1:])
        == ["2 requests wait already"] * 2 + ["no answer in time; ask for fewer users, or again later"] * 2
    )
    block.set()
    assert client.post("/v1/recommend", {"user_ids": [3], "k": 2}).status == 200


def test_a_defect_is_told_without_a_traceback(bundles, caplog):
    live = LiveBundle(Retriever, bundles["int64"][1], "cpu", 1)
    client = AsgiClient(create_app(live))
    live.current.recommend = lambda *_: 1 / 0
    answer = client.post("/v1/recommend", {"user_ids": [3]})
    assert (answer.status, answer.error) == (500, "the server failed; its log says why")
    assert "ZeroDivisionError" in caplog.text
    assert 'graphhash_requests_total{route="/v1/recommend",status="500"} 1.0' in client.get("/metrics").body.decode()


def other_scores(folder, **options):
    """A bundle of the same ids with other item biases."""
    small = small_model(**options)
    small.model.item_bias.data += np.float32(1) * small.model.item_bias.data.new_tensor(range(23))
    small.export(folder)
    return small


def test_a_replaced_bundle_answers_from_the_next_look_on(tmp_path):
    old = small_model()
    old.export(tmp_path / "bundle")
    live = LiveBundle(Retriever, tmp_path / "bundle", "cpu", 1)
    client = AsgiClient(create_app(live))
    request = {"user_ids": [3], "k": 5}
    first = client.post("/v1/recommend", request).json()
    assert first["results"] == [expected(old, 3, 5, [])]
    assert live.refresh() is None
    new = other_scores(tmp_path / "bundle")
    assert client.post("/v1/recommend", request).json() == first
    before = live.current
    assert live.refresh() is live.current is not before
    second = client.post("/v1/recommend", request).json()
    assert second["results"] == [expected(new, 3, 5, [])] != first["results"]
    assert second["bundle"] == client.get("/readyz").json()["bundle"] != first["bundle"]
    # A request that began before goes on with what it began with.
    assert before.recommend([3], 5).item_ids[0].tolist() == [i["item_id"] for i in first["results"][0]["items"]]


def test_a_link_in_the_bundles_place_may_be_turned(tmp_path):
    small_model().export(tmp_path / "a")
    other_scores(tmp_path / "b")
    (tmp_path / "bundle").symlink_to("a")
    live = LiveBundle(Retriever, tmp_path / "bundle", "cpu", 1)
    (tmp_path / "next").symlink_to("b")
    (tmp_path / "next").rename(tmp_path / "bundle")
    assert live.refresh().path == tmp_path / "b"


def test_a_bundle_that_fails_its_check_is_refused_and_the_old_one_goes_on(tmp_path):
    small_model().export(tmp_path / "bundle")
    live = LiveBundle(Retriever, tmp_path / "bundle", "cpu", 1)
    client = AsgiClient(create_app(live))
    before = client.post("/v1/recommend", {"user_ids": [3]}).json()
    other_scores(tmp_path / "bundle")
    model = tmp_path / "bundle" / "model.onnx"
    whole = model.read_bytes()
    model.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert live.refresh() is None
    assert "changed (sha256" in client.get("/readyz").json()["refused"]
    assert client.post("/v1/recommend", {"user_ids": [3]}).json() == before
    assert live.refresh() is None
    # Whole again, as when copying it has come to its end.
    model.write_bytes(whole)
    assert live.refresh() is not None
    assert client.get("/readyz").json()["refused"] is None


class Clock:
    """Stands in for the module `time`."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_a_bundle_that_could_not_be_read_is_tried_again_and_said_so(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(live_bundle, "time", clock)
    small_model().export(tmp_path / "bundle")
    live = LiveBundle(Retriever, tmp_path / "bundle", "cpu", 1)
    client = AsgiClient(create_app(live))
    before = live.current
    other_scores(tmp_path / "bundle")
    attempts = []

    def no_files(path):
        attempts.append(path)
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(bundle, "file_sha256", no_files)
        for pause_s in (2, 4, 8):
            assert live.refresh() is None
            assert live.current is before
            refused = client.get("/readyz").json()["refused"]
            assert "newer than the one in use could not be loaded" in refused
            assert "Too many open files" in refused
            assert f"trying again in {pause_s} s" in refused
            n_attempts = len(attempts)
            assert live.refresh() is None
            assert len(attempts) == n_attempts, "it waits"
            clock.now += pause_s
    assert live.refresh() is live.current is not before
    assert client.get("/readyz").json()["refused"] is None
    assert live.n_failures == 0


def test_an_error_that_nobody_expects_is_tried_again_too(tmp_path, monkeypatch):
    monkeypatch.setattr(live_bundle, "FIRST_RETRY_S", 0.0)
    small_model().export(tmp_path / "bundle")
    live = LiveBundle(Retriever, tmp_path / "bundle", "cpu", 1)
    new = other_scores(tmp_path / "bundle")
    with monkeypatch.context() as patched:
        patched.setattr(Retriever, "warm_up", lambda self: [].pop())
        assert live.refresh() is None
        assert "IndexError: pop from empty list" in live.refused
    assert live.refresh().recommend([3], 5).item_ids[0].tolist() == naive_answer(new, 3, 5, [])[0]


def test_a_bundle_of_other_ids_is_refused_and_no_folder_is_no_bundle(tmp_path):
    small_model().export(tmp_path / "bundle")
    live = LiveBundle(Retriever, tmp_path / "bundle", "cpu", 1)
    before = live.current
    shutil.rmtree(tmp_path / "bundle")
    assert live.refresh() is None
    assert live.refused is None
    small_model(users="string").export(tmp_path / "bundle")
    assert live.refresh() is None
    assert "start another server for it" in live.refused
    assert live.current is before


def test_the_app_looks_for_a_new_bundle_by_itself(tmp_path, monkeypatch, caplog):
    small_model().export(tmp_path / "bundle")
    live = LiveBundle(Retriever, tmp_path / "bundle", "cpu", 1)
    client = AsgiClient(create_app(live, watch_s=0.01))
    before = live.current.name

    async def live_on():
        async with client.app.router.lifespan_context(client.app):
            await asyncio.to_thread(other_scores, tmp_path / "bundle")
            async with asyncio.timeout(30):
                while live.current.name == before:
                    await asyncio.sleep(0.01)
            # In one step: a write would show an empty file first, which is another look and another refusal.
            (tmp_path / "damaged").write_bytes(b"x")
            (tmp_path / "damaged").replace(tmp_path / "bundle" / "model.onnx")
            text = ""
            async with asyncio.timeout(30):
                while 'graphhash_reloads_total{result="refused"}' not in text:
                    await asyncio.sleep(0.01)
                    text = (await client.request("GET", "/metrics")).body.decode()
            assert live.refused is not None
            # A bundle that cannot be loaded now is counted at every attempt.
            monkeypatch.setattr(live_bundle, "FIRST_RETRY_S", 0.0)
            monkeypatch.setattr(Retriever, "warm_up", lambda self: [].pop())
            await asyncio.to_thread(small_model().export, tmp_path / "bundle")
            async with asyncio.timeout(30):
                while 'graphhash_reloads_total{result="failed"} 3.0' not in text:
                    await asyncio.sleep(0.01)
                    text = (await client.request("GET", "/metrics")).body.decode()
            return text

    text = client.run(live_on())
    assert re.search(
        "bundle .* stays: a bundle newer than the one in use could not be loaded .*IndexError", caplog.text
    )
    assert f'graphhash_bundle{{bundle="{before}"}} 0.0' in text
    assert f'graphhash_bundle{{bundle="{live.current.name}"}} 1.0' in text
    assert 'graphhash_reloads_total{result="loaded"} 1.0' in text
    assert 'graphhash_reloads_total{result="refused"} 1.0' in text


def test_health_and_figures(bundles):
    client = AsgiClient(create_app(LiveBundle(Retriever, bundles["string"][1], "cpu", 1)))
    client.post("/v1/recommend", {"user_ids": ["a", "nobody", "b?"], "k": 2})
    client.post("/v1/score", {"user_id": "a", "item_ids": ["a", "?"]})
    client.get("/a/path/of/anybody")
    assert client.get("/healthz").json() == {"status": "ok"}
    ready = client.get("/readyz").json()
    assert (ready["status"], ready["n_users"], ready["n_items"], ready["provider"]) == ("ready", 14, 23, "cpu")
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    lines = answer.body.decode().splitlines()
    for line in (
        'graphhash_requests_total{route="/v1/recommend",status="200"} 1.0',
        'graphhash_requests_total{route="other",status="404"} 1.0',
        'graphhash_request_seconds_count{route="/v1/score"} 1.0',
        "graphhash_users_total 4.0",
        "graphhash_oov_users_total 2.0",
        "graphhash_oov_items_total 1.0",
        "graphhash_run_users_sum 3.0",
        f'graphhash_bundle{{bundle="{ready["bundle"]}"}} 1.0',
    ):
        assert line in lines
    assert not any("anybody" in line for line in lines)
