"""The HTTP app of clicks: right answers, clear refusals, requests that run together, and a new bundle while it runs."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import urllib.request

import numpy as np
import pytest

from pipeline.bundles.serve import ServeSettings, build_app
from pipeline.errors import ServeError
from serving import Scorer
from serving.http.answers import Limits
from serving.http.app import RetrievalOptions
from serving.http.ctr_app import create_ctr_app
from serving.http.live_bundle import LiveBundle
from tests.helpers.asgi_client import AsgiClient
from tests.helpers.http_server import on_a_thread, post, serve_settings
from tests.helpers.small_ctr import export_small, raw_log, small_ctr
from tests.helpers.small_models import small_model

LIMITS = Limits(max_body_bytes=40_000, max_users=50, timeout_s=5)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app") / "bundle"
    export_small(small_ctr("dcnv2 parallel"), folder)
    return folder


@pytest.fixture
def client(bundle):
    return AsgiClient(create_ctr_app(LiveBundle(Scorer, bundle, "cpu", 1), LIMITS))


def clean(log: dict[str, list]) -> dict[str, list]:
    """Without NaN, which JSON lacks."""
    return {name: [None if isinstance(v, float) and v != v else v for v in values] for name, values in log.items()}


def as_rows(log: dict[str, list]) -> list[dict]:
    return [dict(zip(log, row, strict=True)) for row in zip(*log.values(), strict=True)]


def test_rows_and_columns_get_the_scorers_answer(client, bundle):
    log = clean(raw_log(20))
    expected = Scorer(bundle, provider="cpu", threads=1).details(log)
    rows = client.post("/v1/predict", {"rows": [{**row, "click": 1} for row in as_rows(log)]})
    columns = client.post("/v1/predict", {"columns": log})
    assert rows.status == columns.status == 200
    assert rows.body == columns.body
    answer = rows.json()
    np.testing.assert_allclose(answer["probabilities"], expected.probabilities, rtol=1e-6)
    assert answer["oov"] == [[name for name, known in expected.known.items() if not known[i]] for i in range(20)]
    assert answer["bundle"] == Scorer(bundle, provider="cpu").manifest["manifest_sha256"][:12]
    for nothing in ({"rows": []}, {"columns": {name: [] for name in log}}):
        assert client.post("/v1/predict", nothing).json()["probabilities"] == []
    figures = client.get("/metrics").body.decode()
    assert "graphhash_rows_total 40.0" in figures
    assert 'graphhash_oov_values_total{column="user"}' in figures
    of_bundle = f'{{bundle="{answer["bundle"]}"}}'
    assert f"graphhash_predictions_total{of_bundle} 40.0" in figures
    total = re.search(rf"graphhash_prediction_sum_total{of_bundle} ([0-9.e+-]+)", figures).group(1)
    assert float(total) == pytest.approx(2 * expected.probabilities.sum(dtype=np.float64), rel=1e-6)
    assert 'graphhash_requests_total{route="/v1/predict",status="200"} 4.0' in figures


def test_whole_numbers_may_be_text_which_no_browser_rounds(client):
    row = as_rows(clean(raw_log(1)))[0] | {"device": 2**63 - 1, "item": 2**62, "tags": [2**62 + 1, 5]}
    texts = row | {"device": str(2**63 - 1), "item": str(2**62), "tags": [str(2**62 + 1), "5"]}
    as_text, as_numbers = (client.post("/v1/predict", {"rows": [r]}) for r in (texts, row))
    assert as_text.status == 200
    assert as_text.body == as_numbers.body
    schema = client.get("/openapi.json").json()["paths"]["/v1/predict"]["post"]["requestBody"]["content"]
    device = schema["application/json"]["schema"]["properties"]["rows"]["anyOf"][0]["items"]["properties"]["device"]
    kinds = [kind["type"] for part in device["anyOf"] for kind in part.get("anyOf", [part])]
    assert kinds == ["integer", "string", "null"]


def test_a_time_may_be_given_for_its_parts(client):
    log = clean(raw_log(2)) | {"hour_hour": [13, None]}
    expected = client.post("/v1/predict", {"columns": log}).json()["probabilities"]
    del log["hour_hour"]
    for hours in ([14102113, None], ["14102113", ""]):
        assert client.post("/v1/predict", {"rows": as_rows(log | {"hour": hours})}).json()["probabilities"] == expected


def test_options_of_retrieval_are_refused(bundle):
    with pytest.raises(ServeError, match="a CTR bundle, which has neither explanations nor titles"):
        build_app(ServeSettings(bundle, Limits(), "cpu", options=RetrievalOptions(explain=True)))


def with_value(name, value):
    row = {key: values[0] for key, values in clean(raw_log(1)).items()}
    return {"rows": [row, row | {name: value}]}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({}, "give either rows or columns"),
        ({"rows": [], "columns": {}}, "give either rows or columns"),
        ({"columns": {}}, "no column 'user'; this model reads 'user', 'device', 'item', 'hour'"),
        ({"rows": [{}]}, "no column 'user'"),
        ({"rows": {}}, "rows: Input should be a valid array"),
        ({"rows": [1]}, "rows[0]: Input should be an object, not 1"),
        ({"columns": {"user": "u1"}}, "columns.user: Input should be a valid array"),
        (
            {"columns": {"user": ["u1"]} | {k: [None] * 2 for k in raw_log(1) if k != "user"}},
            "column 'device' has 2 rows, 'user' has 1",
        ),
        ({"rows": [{}], "k": 3}, "k: no such field; there are rows, columns"),
        (
            {"rows": [*with_value("user", "u1")["rows"][:1], {"user": "u1"}]},
            "rows[1] has no 'device'; give null for a missing value",
        ),
        (with_value("user", [3]), "user[1] is [3]; this column takes string ids"),
        (with_value("item", 10.5), "item[1] is 10.5; this column takes int64 ids"),
        (with_value("item", 2**70), "leaves int64"),
        (with_value("price", "3,5"), "price[1] is '3,5'; this column takes numbers"),
        (with_value("price", 1e30), "row 1 gives no finite number"),
        (with_value("genres", {"a": 1}), "genres[1] is {'a': 1}; pass a list of ids"),
        ({"rows": with_value("user", "u1")["rows"] * 26}, "52 rows; at most 50 a request"),
        (b'{"rows": [{"user": "\\ud800"}]', "JSON"),
        (b"\xff", "JSON"),
    ],
)
def test_a_bad_request_gets_a_reason(body, reason, client):
    answer = client.post("/v1/predict", body)
    assert answer.status == 400
    assert reason in answer.error


def test_other_refusals(client):
    assert client.post("/v1/predict", b"{}" + b" " * 50_000).status == 413
    assert client.post("/v1/predict", {"rows": []}, content_type="text/plain").status == 415
    assert client.get("/v1/predict").status == 405
    assert client.post("/v1/recommend", {}).status == 404
    assert client.get("/healthz").json() == {"status": "ok"}
    ready = client.get("/readyz").json()
    assert ready["task"] == "ctr"
    assert ready["columns"]["price"] == "float64"
    assert ready["refused"] is None
    page = client.get("/").body.decode()
    assert "/v1/predict" in page
    assert "only missing" in page
    example = json.loads(re.search(r"-d &#x27;(.*?)&#x27;", page).group(1).replace("&quot;", '"'))
    assert client.post("/v1/predict", example).status == 200


def test_requests_that_run_together_get_their_own_answers(bundle, monkeypatch):
    live = LiveBundle(Scorer, bundle, "cpu", 1)
    client = AsgiClient(create_ctr_app(live, LIMITS))
    sizes = (1, 7, 3, 12)
    logs = [clean(raw_log(n, seed=n)) for n in sizes]
    alone = [live.current.predict(log) for log in logs]
    logs.insert(2, with_value("price", 1e30)["rows"])
    runs = []
    answer = live.current.answer
    monkeypatch.setattr(
        live.current, "answer", lambda feed: runs.append(len(next(iter(feed.values())))) or answer(feed)
    )

    async def ask():
        bodies = [{"rows": log} if isinstance(log, list) else {"columns": log} for log in logs]
        return await asyncio.gather(
            *(client.request("POST", "/v1/predict", json.dumps(body).encode()) for body in bodies)
        )

    first, second, bad, *others = client.run(ask())
    for got, expected in zip((first, second, *others), alone, strict=True):
        np.testing.assert_allclose(got.json()["probabilities"], expected, rtol=1e-5)
    assert bad.status == 400
    assert "row 1 gives no finite number" in bad.error
    assert max(runs) >= 7 + 2 + 3 + 12, "what came while the first ran was tried together"


def test_a_new_bundle_replaces_the_old_one_and_one_with_other_columns_does_not(bundle, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    live = LiveBundle(Scorer, folder, "cpu", 1)
    log, first = raw_log(5), live.current
    export_small(small_ctr("deepfm"), folder)
    assert live.refresh() is live.current
    assert live.current.name != first.name
    assert not np.array_equal(live.current.predict(log), first.predict(log))
    export_small(small_ctr("deepfm", multi_valued=False, dense=False), folder)
    assert live.refresh() is live.current
    assert live.refused is None, "clients send more than it reads"
    export_small(small_ctr("dlrm"), folder)
    assert live.refresh() is None
    assert "takes 'genres' (multi_valued, string" in live.refused
    small_model().export(folder)
    assert live.refresh() is None
    assert "made for the task 'retrieval', not 'ctr'" in live.refused


def test_the_command_serves_such_a_bundle(bundle):
    with on_a_thread(serve_settings(bundle)) as (host, port):
        url = f"http://{host}:{port}"
        assert len(post(f"{url}/v1/predict", {"columns": clean(raw_log(3))})["probabilities"]) == 3
        assert b"graphhash_rows_total 3.0" in urllib.request.urlopen(f"{url}/metrics").read()
