"""A job's failure as the exception that a user sees, from what the server keeps of it."""

import pytest

from agent_lightning import InvalidConfigError, TrainingError
from agent_lightning.results import job_error


def failed(error: Exception, traceback: str) -> dict:
    """A job's fields, as the server's runner writes them."""
    return {"status": "failed", "error": f"{type(error).__name__}: {error}", "traceback": traceback}


@pytest.mark.parametrize("kind", [TrainingError, InvalidConfigError])
def test_an_error_of_this_project_is_its_message_alone(kind):
    error = job_error(failed(kind("no test split: none at all", hint="upload one"), "Traceback ..."))
    assert type(error) is TrainingError
    assert str(error) == "no test split: none at all\n  hint: upload one"


def test_any_other_error_keeps_its_type_and_traceback():
    error = job_error(failed(ZeroDivisionError("division: by zero"), "Traceback ...\n  line 3"))
    assert str(error) == "ZeroDivisionError: division: by zero\nTraceback ...\n  line 3"


@pytest.mark.parametrize(
    "job, says",
    [
        ({"error": None, "traceback": None}, "the server does not say why"),
        ({"error": "TrainingError: ", "traceback": "Traceback ..."}, "the server does not say why"),
        ({"error": "__doc__: not a class"}, "__doc__: not a class"),
    ],
)
def test_errors_without_much_to_say(job, says):
    assert str(job_error(job)) == says
