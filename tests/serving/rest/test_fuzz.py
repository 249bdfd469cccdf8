"""Requests drawn from the OpenAPI description, valid and not: no answer may be a fault of ours."""

import contextlib

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from running_server import running
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


@pytest.fixture(scope="module")
def api(small):
    with running(small.models) as server:
        yield schemathesis.openapi.from_url(f"{server.rest}/openapi.json")


@pytest.mark.parametrize("examples", [4, pytest.param(100, marks=pytest.mark.long)])
@pytest.mark.parametrize("mode", GenerationMode)
def test_every_operation(api, mode, examples):
    statuses = set()
    for found in api.get_all_operations():
        ask(found.ok(), mode, examples, statuses)
    assert {400, 404} <= statuses
    assert (200 in statuses) or mode is GenerationMode.NEGATIVE


def ask(operation, mode, examples, statuses):
    """Asks an operation; nothing where it has nothing that could be wrong."""
    count = 0

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def one(case):
        nonlocal count
        count += 1
        if count % 3 and "model" in case.path_parameters:  # otherwise it is hardly ever found
            case.path_parameters["model"] = "twotower"
            if "version" in case.path_parameters:
                case.path_parameters["version"] = 1
        statuses.add(case.call_and_validate(checks=CHECKS).status_code)

    with contextlib.suppress(Unsatisfiable):
        one()
