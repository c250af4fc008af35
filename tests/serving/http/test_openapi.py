"""Requests that schemathesis makes from the description: no 5xx, and every answer is one that the description has."""

from __future__ import annotations

import pytest

from serving import Retriever, Scorer
from serving.http.answers import Limits
from serving.http.app import RetrievalOptions, create_app
from serving.http.ctr_app import create_ctr_app
from serving.http.live_bundle import LiveBundle
from tests.helpers.small_ctr import export_small, small_ctr
from tests.helpers.small_models import small_model

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install '.[api-test]'")

LIMITS = Limits(max_body_bytes=30_000, max_users=20, max_k=30, max_items=20, max_cells=1000, timeout_s=30)
N_EXAMPLES = 25


def check_every_route(app) -> None:
    """Run schemathesis over every operation of the app's description."""
    from hypothesis import HealthCheck, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
        unsupported_method,
    )

    checks = [
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
        unsupported_method,
    ]
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert operations
    for operation in operations:

        @settings(max_examples=N_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(case=operation.as_strategy())
        def valid(case):
            case.call_and_validate(checks=checks)

        valid()


@pytest.mark.parametrize("kind", ["int64", "string"])
def test_a_retrieval_server_keeps_to_its_description(kind, tmp_path):
    small_model(users=kind, items=kind).export(tmp_path / "bundle")
    live = LiveBundle(Retriever, tmp_path / "bundle", "cpu", 1)
    check_every_route(create_app(live, LIMITS, options=RetrievalOptions(explain=True), watch_s=0))


def test_a_ctr_server_keeps_to_its_description(tmp_path):
    export_small(small_ctr("dcnv2 parallel"), tmp_path / "bundle")
    check_every_route(create_ctr_app(LiveBundle(Scorer, tmp_path / "bundle", "cpu", 1), LIMITS, watch_s=0))
