"""JSON in and out of the dialects."""

import json
from collections.abc import Sequence
from typing import Any, TypeVar

import orjson
import pydantic
from fastapi import Response

from lightning_jax.server.generate import ApiError

Model = TypeVar("Model", bound=pydantic.BaseModel)


def parse(model: type[Model], body: bytes) -> Model:
    """The request body as `model`. Raises ApiError that names the field."""
    try:
        return model.model_validate_json(body)
    except pydantic.ValidationError as error:
        field, text = first_problem(error.errors(include_url=False, include_context=False))
        raise ApiError(f"{field}: {text}" if field else text, param=field or None) from None


def first_problem(errors: Sequence[dict]) -> tuple[str, str]:
    """Where and what the first of pydantic's errors is."""
    first = errors[0]
    return ".".join(str(part) for part in first["loc"]), first["msg"]


def refuse(body: pydantic.BaseModel, neutral: dict[str, tuple]) -> None:
    """Raises ApiError if a field of `neutral` is set to something other than None or one of its neutral values."""
    given = body.model_extra | {name: getattr(body, name) for name in body.model_fields_set & neutral.keys()}
    for name in given.keys() & neutral.keys():
        value = given[name]
        if value is not None and value not in neutral[name]:
            raise ApiError(f"{name}={_short(value)} is not supported by this server", param=name)


def stop_strings(stop: Sequence[str] | None, name: str) -> tuple[str, ...]:
    """Checked stop strings."""
    if stop and "" in stop:
        raise ApiError(f"{name}: a stop string must not be empty", param=name)
    return tuple(stop or ())


def json_response(content: Any, status: int = 200, retry_after_s: int | None = None) -> Response:
    """`content` as the reply's body; NaN, which JSON does not know, becomes null."""
    headers = {"retry-after": str(retry_after_s)} if retry_after_s is not None else None
    try:
        body = orjson.dumps(content)
    except TypeError:  # an integer beyond 64 bits in a task, half of a surrogate pair in a sample
        body = json.dumps(content).encode()
    return Response(body, status, headers, media_type="application/json")


def _short(value: Any) -> str:
    text = orjson.dumps(value).decode()
    return text if len(text) <= 60 else text[:57] + "..."
