"""Requests drawn from the OpenAPI description, valid and not: no answer may be a fault of ours."""

import contextlib

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


EXAMPLES = 15  # of each operation and mode


@pytest.mark.long
def test_every_operation(server):
    api = schemathesis.openapi.from_url(f"{server.rest}/openapi.json")
    for mode in GenerationMode:
        statuses = set()
        for result in api.get_all_operations():
            request(result.ok(), mode, statuses)
        assert {400, 404} <= statuses
        assert (200 in statuses) or mode is GenerationMode.NEGATIVE


def request(operation, mode, statuses):
    """Sends requests to an operation; none where it has nothing that could be wrong."""
    count = 0

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case):
        nonlocal count
        count += 1
        if count % 3 and "model" in case.path_parameters:  # otherwise it hardly ever exists
            case.path_parameters["model"] = "twotower"
            if "version" in case.path_parameters:
                case.path_parameters["version"] = 1
        statuses.add(case.call_and_validate(checks=CHECKS).status_code)

    with contextlib.suppress(Unsatisfiable):
        send()
