"""Random mutations of valid requests: no crash, no traceback, no wrong answer, no growing memory.

GRAPHHASH_FUZZ=10000 sets their number; the default suits a suite that runs often.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import random
import tracemalloc
from functools import partial

import numpy as np
import pytest

from serving import Retriever, Scorer
from serving.http.answers import Limits
from serving.http.app import create_app
from serving.http.ctr_app import create_ctr_app
from serving.http.live_bundle import LiveBundle
from serving.raw_ids import as_id_array
from tests.helpers.asgi_client import Answer, AsgiClient
from tests.helpers.small_ctr import export_small, raw_log, small_ctr
from tests.helpers.small_models import INT_IDS, STRING_IDS, small_model

N_MUTATIONS = int(os.environ.get("GRAPHHASH_FUZZ", 300))
LIMITS = Limits(max_body_bytes=30_000, max_users=50, max_k=30, max_items=40, max_cells=1000, timeout_s=30)
JUNK = [
    None, True, False, 0, -1, 1, 3, 23, 10**6, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 10**400, 0.5, -0.0, 1e300,
    float("nan"), float("inf"), "", "a", "3", "k", "\0", "é", "日本", "🙂", "\ud800", "x" * 3000, "<script>", "a\nb", "{}",
    [], {}, [[]], [[[]]], [None], [3, "a"], {"a": 1}, {"user_ids": []}, list(range(60)), ["a"] * 2000, [[1] * 50],
]  # fmt: skip


def mutated(rng: random.Random, request: tuple[str, str, object]) -> tuple[str, str, bytes, dict[str, str]]:
    """Method, path, body and headers of a valid request with one to three things changed."""
    method, path, value = request
    value, headers = copy.deepcopy(value), {}
    for _ in range(rng.randint(1, 3)):
        kind = rng.random()
        if kind < 0.7:
            value = _other_value(rng, value)
        elif kind < 0.75:
            method = rng.choice(("GET", "PUT", "DELETE", "HEAD", "OPTIONS", "POST", "PATCH", "X"))
        elif kind < 0.8:
            path = rng.choice(
                (path + "/", path + "x", "/" + path, "/v1", "", "*", "/v1/%ff", path.upper(), "/é", path + "?k=-1")
            )
        elif kind < 0.85:
            headers["content_type"] = rng.choice(
                ("", "text/plain", "application/json; charset=utf-16", "APPLICATION/JSON", "é")
            )
        elif kind < 0.9:
            headers["content_length"] = rng.choice(("-1", "0", "x", "9" * 400, "1e9", " 5", "50000000"))
    body = json.dumps(value).encode() if not isinstance(value, bytes) else value
    if rng.random() < 0.35:
        body = _other_bytes(rng, body)
    return method, path, body, headers


def _other_value(rng: random.Random, value: object) -> object:
    """Somewhere in a JSON value, a part becomes another, goes, comes twice, or moves to another name."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.25:
        return copy.deepcopy(rng.choice(JUNK))
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    action = rng.random()
    if action < 0.6:
        value[key] = _other_value(rng, value[key])
    elif action < 0.75:
        del value[key]
    elif isinstance(value, list):
        value.insert(key, copy.deepcopy(value[key] if action < 0.9 else rng.choice(JUNK)))
    else:
        value[
            rng.choice(
                ("user_ids", "k", "exclude", "user_id", "item_ids", "rows", "columns", "hour", "K", "", "__class__")
            )
        ] = value[key]
    return value


def _other_bytes(rng: random.Random, body: bytes) -> bytes:
    data = bytearray(body)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        action = rng.randrange(5)
        if action == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif action == 1:
            del data[at:]
        elif action == 2:
            data[at:at] = rng.choice(
                (b"{", b"[" * 300, b"]", b",", b'"', b"\\u0000", b"\xff", b"NaN", b"1e999", b" " * 500, b"\xef\xbb\xbf")
            )
        elif action == 3:
            del data[at : at + rng.randint(1, 5)]
        else:
            data[at:at] = data[rng.randrange(len(data) + 1) : at]
    return bytes(data)


def refused(method: str, path: str, body: bytes, answer: Answer, route: set[str]) -> bool:
    """Whether nothing was computed; the answer is then a clear one."""
    assert answer.status in {200, 307, 400, 404, 405, 413, 415}, (method, path, body[:300], answer)
    assert b"Traceback" not in answer.body
    assert b'File "' not in answer.body
    if answer.status >= 400 and method != "HEAD":
        assert len(answer.error) <= 500
    return answer.status != 200 or method != "POST" or path not in route


def check_retrieval(retriever: Retriever, method: str, path: str, body: bytes, answer: Answer) -> None:
    if refused(method, path, body, answer, {"/v1/recommend", "/v1/score"}):
        return
    asked, got = json.loads(body), answer.json()

    def shown(ids: np.ndarray) -> list:
        return [str(i) for i in ids.tolist()] if asked.get("ids_as_text") else ids.tolist()

    if path == "/v1/score":
        expected = retriever.score([asked["user_id"]], [asked["item_ids"]])
        types = retriever.manifest["id_types"]
        assert [got["user_id"]] == shown(as_id_array([asked["user_id"]], types["user_id"], "user_id"))
        assert got["item_ids"] == shown(as_id_array(asked["item_ids"], types["item_id"], "item_ids"))
        assert got["scores"] == expected.scores[0].tolist()
        assert got["known_items"] == expected.known_items[0].tolist()
        return
    expected = retriever.recommend(asked["user_ids"], asked.get("k", 20), asked.get("exclude"))
    users = as_id_array(asked["user_ids"], retriever.manifest["id_types"]["user_id"], "user_ids")
    assert [result["user_id"] for result in got["results"]] == shown(users)
    assert [result["known"] for result in got["results"]] == expected.known.tolist()
    for result, ids, scores in zip(got["results"], expected.item_ids, expected.scores, strict=True):
        assert [item["item_id"] for item in result["items"]] == shown(ids)
        assert [item["score"] for item in result["items"]] == scores.tolist()


def check_clicks(scorer: Scorer, method: str, path: str, body: bytes, answer: Answer) -> None:
    if refused(method, path, body, answer, {"/v1/predict"}):
        return
    asked, got = json.loads(body), answer.json()
    columns = asked.get("columns")
    if asked.get("rows") is not None:
        names = {*scorer.columns, *(column["name"] for column in scorer.manifest["columns"])}
        columns = {
            name: [row[name] for row in asked["rows"]] for name in names if all(name in row for row in asked["rows"])
        }
    expected = scorer.details(columns)
    # Rows that run together may differ in the last bit.
    np.testing.assert_allclose(got["probabilities"], expected.probabilities, rtol=1e-5, atol=1e-7)
    n_rows = len(expected.probabilities)
    assert got["oov"] == [[name for name, known in expected.known.items() if not known[i]] for i in range(n_rows)]


def hammer(client: AsgiClient, valid: list, check) -> None:
    """Send N_MUTATIONS / 2 mutated requests, eight at a time, and `check` all answers."""
    rng = random.Random(0)
    statuses: dict[int, int] = {}
    n_rounds, n_each = 10, N_MUTATIONS // 20
    tracemalloc.start()
    try:
        memory = []
        for _ in range(n_rounds):
            requests = [mutated(rng, rng.choice(valid)) for _ in range(n_each)]

            async def some(requests=requests):
                return [
                    await asyncio.gather(*(client.request(m, p, b, **h) for m, p, b, h in requests[start : start + 8]))
                    for start in range(0, len(requests), 8)
                ]

            answers = [answer for group in client.run(some()) for answer in group]
            for (method, path, body, _), answer in zip(requests, answers, strict=True):
                check(method, path, body, answer)
                statuses[answer.status] = statuses.get(answer.status, 0) + 1
            del requests, answers, some
            memory.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert statuses[200] > 0.05 * n_rounds * n_each, statuses
    assert statuses[400] > 0.3 * n_rounds * n_each, statuses
    # What the first rounds leave are caches; after that nothing may stay behind.
    assert memory[-1] - memory[2] < 200_000, np.diff(memory)
    for method, path, value in valid:
        assert client.send(method, path, json.dumps(value).encode()).status == 200


@pytest.mark.timeout(0 if N_MUTATIONS > 5000 else 120)
@pytest.mark.parametrize(("kind", "ids"), [("int64", INT_IDS), ("string", STRING_IDS)])
def test_mutated_requests_get_a_right_answer_or_a_reason(kind, ids, tmp_path):
    small_model(users=kind, items=kind).export(tmp_path / "bundle")
    client = AsgiClient(create_app(LiveBundle(Retriever, tmp_path / "bundle", "cpu", 1), LIMITS))
    valid = [
        ("POST", "/v1/recommend", {"user_ids": ids[:3], "k": 5}),
        ("POST", "/v1/recommend", {"user_ids": ids[2:5], "k": 2, "exclude": [ids[:2], [], ids[4:5]]}),
        ("POST", "/v1/score", {"user_id": ids[1], "item_ids": ids[:6]}),
        ("POST", "/v1/recommend", {"user_ids": ids[4:7], "k": 3, "ids_as_text": True}),
        ("POST", "/v1/score", {"user_id": ids[2], "item_ids": ids[1:4], "ids_as_text": True}),
    ]
    hammer(client, valid, partial(check_retrieval, Retriever(tmp_path / "bundle", provider="cpu", threads=1)))


@pytest.mark.timeout(0 if N_MUTATIONS > 5000 else 120)
def test_mutated_rows_of_clicks_get_a_right_answer_or_a_reason(tmp_path):
    export_small(small_ctr("deepfm"), tmp_path / "bundle")
    client = AsgiClient(create_ctr_app(LiveBundle(Scorer, tmp_path / "bundle", "cpu", 1), LIMITS))
    # JSON has no NaN.
    log = {name: [None if value != value else value for value in values] for name, values in raw_log(3).items()}
    rows = [dict(zip(log, row, strict=True)) for row in zip(*log.values(), strict=True)]
    valid = [
        ("POST", "/v1/predict", {"rows": rows}),
        ("POST", "/v1/predict", {"columns": log}),
        ("POST", "/v1/predict", {"rows": rows[:1]}),
    ]
    hammer(client, valid, partial(check_clicks, Scorer(tmp_path / "bundle", provider="cpu", threads=1)))
