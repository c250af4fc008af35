"""Requests that schemathesis makes from the description: no 5xx, and every answer is one that the description has."""

from __future__ import annotations

import pytest

from pipeline.bundles.serve import ServeSettings
from serving.http.answers import Limits
from serving.http.app import RetrievalOptions
from tests.helpers.http_server import on_a_thread
from tests.helpers.small_ctr import export_small, small_ctr
from tests.helpers.small_models import small_model

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install '.[api-test]'")

LIMITS = Limits(max_body_bytes=30_000, max_users=20, max_k=30, max_items=20, max_cells=1000, timeout_s=30)
N_EXAMPLES = 25


def check_every_route(settings: ServeSettings) -> None:
    """Run schemathesis over every operation of a server's description."""
    from hypothesis import HealthCheck, given
    from hypothesis import settings as settings_of_hypothesis
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
    with on_a_thread(settings) as (host, port):
        schema = schemathesis.openapi.from_url(f"http://{host}:{port}/openapi.json")
        operations = [operation.ok() for operation in schema.get_all_operations()]
        assert operations
        for operation in operations:

            @settings_of_hypothesis(
                max_examples=N_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
            )
            @given(case=operation.as_strategy())
            def valid(case):
                case.call_and_validate(checks=checks)

            valid()


@pytest.mark.parametrize("kind", ["int64", "string"])
def test_a_retrieval_server_keeps_to_its_description(kind, tmp_path):
    small_model(users=kind, items=kind).export(tmp_path / "bundle")
    options = RetrievalOptions(explain=True)
    check_every_route(ServeSettings(tmp_path / "bundle", LIMITS, "cpu", watch_s=0, options=options))


def test_a_ctr_server_keeps_to_its_description(tmp_path):
    export_small(small_ctr("dcnv2 parallel"), tmp_path / "bundle")
    check_every_route(ServeSettings(tmp_path / "bundle", LIMITS, "cpu", watch_s=0))
