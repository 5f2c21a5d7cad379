"""Schemathesis over the OpenAPI document: whatever is sent, the answer is one that the document tells of."""

import hypothesis
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def test_every_operation(running):
    document = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    settings = hypothesis.settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    )
    failures = []
    operations = [operation.ok() for operation in document.get_all_operations()]
    for operation in operations:

        @settings
        @hypothesis.given(case=operation.as_strategy())
        def check(case):
            case.call_and_validate(checks=CHECKS, timeout=60)

        try:
            check()
        except BaseExceptionGroup as error:
            failures.append(
                f"{operation.method.upper()} {operation.path}: {error}" + "".join(map(str, error.exceptions))
            )
    assert len(operations) > 30 and not failures, "\n\n".join(failures)
