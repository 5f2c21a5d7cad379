"""The OpenAPI document: FastAPI's own for what `Client` speaks, and the dialects, whose routes FastAPI does not see."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from lightning_jax.server import dialects, openai_shared

_REF = "#/components/schemas/{model}"
_ABOUT = (
    "Under a rollout's URL (`/rollout/TOKEN`) calls are recorded, and the URL is the credential. With `/model/ROLE` "
    "behind it one of several models is meant. At the server's root calls are not recorded, and the API key is asked "
    "for, if there is one. The path is served with no, one or two `/v1` before it."
)
_ERRORS = {
    "400": "The request cannot be served as it is; the message says why.",
    "401": "The API key is missing or wrong, or the rollout's attempt has ended.",
    "404": "There is no such model, role or response.",
    "413": "The body is too large.",
    "429": "Too many requests are waiting.",
    "500": "Sampling failed.",
    "503": "The request was cancelled because the server ends.",
}
_RESPONSES = {
    "/chat/completions": ("ChatCompletion", ("id", "object", "created", "model", "choices", "usage")),
    "/completions": ("Completion", ("id", "object", "created", "model", "choices", "usage")),
    "/responses": ("Response", ("id", "object", "created_at", "model", "status", "output", "usage")),
    "/messages": ("Message", ("id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage")),
    "/messages/count_tokens": ("TokenCount", ("input_tokens",)),
}
_FIELDS: dict[str, dict[str, Any]] = {
    "created": {"type": "integer"},
    "created_at": {"type": "integer"},
    "input_tokens": {"type": "integer"},
    "choices": {"type": "array", "items": {"type": "object"}},
    "output": {"type": "array", "items": {"type": "object"}},
    "content": {"type": "array", "items": {"type": "object"}},
    "usage": {"type": "object"},
    "stop_sequence": {"type": ["string", "null"]},
    "param": {"type": ["string", "null"]},
    "code": {"type": ["string", "null"]},
}

_EVENT = {  # each of a stream
    "type": "object",
    "required": ["data"],
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
}

# Errors of what `Client` speaks.
_CLIENT_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["type", "message", "hint"],
            "properties": {
                "type": {"type": "string"},
                "message": {"type": "string"},
                "hint": {"type": ["string", "null"]},
            },
        }
    },
}
CLIENT_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": _CLIENT_ERROR}}}
    for status, text in {
        400: "It cannot be done; the message says why.",
        401: "The API key is missing or wrong.",
        404: "There is no such dataset, job or model.",
        422: "A field or a line of the data is wrong.",
        500: "The server's disk or device failed.",
    }.items()
}


def document(app: FastAPI) -> dict[str, Any]:
    """The document of this app; made once."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, routes=app.routes)
        components = made.setdefault("components", {})
        schemas = components.setdefault("schemas", {})
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        schemas["OpenAIError"] = _error_schema({"error": _object("message", "type", "param", "code")})
        schemas["AnthropicError"] = _error_schema(
            {"type": {"const": "error"}, "error": _object("type", "message"), "request_id": {"type": "string"}}
        )
        for dialect in dialects.DIALECTS:
            _add_schemas(schemas, dialect)
            for base in dialects.BASES:
                made["paths"][f"{base}/v1{dialect.path}"] = {"post": _operation(dialect, base)}
        for base in dialects.BASES:
            made["paths"] |= _lookups(base)
        app.openapi_schema = made
    return app.openapi_schema


def _add_schemas(schemas: dict, dialect: dialects.Dialect) -> None:
    body = dialect.body.model_json_schema(ref_template=_REF)
    schemas |= body.pop("$defs", {})
    schemas[dialect.body.__name__] = body
    name, fields = _RESPONSES[dialect.path]
    schemas[name] = _object(*fields)


def _operation(dialect: dialects.Dialect, base: str) -> dict[str, Any]:
    name, _ = _RESPONSES[dialect.path]
    content = {"application/json": {"schema": _ref(name)}}
    if "stream" in dialect.body.model_fields and dialect.path != "/messages/count_tokens":
        content["text/event-stream"] = {"schema": _EVENT}
    is_openai = dialect.error_response is openai_shared.error_response
    body = {"application/json": {"schema": _ref(dialect.body.__name__)}}
    return _described(dialect.endpoint.__name__, base, _ABOUT) | {
        "requestBody": {"required": True, "content": body},
        "responses": {"200": {"description": "The reply.", "content": content}}
        | _failures("OpenAIError" if is_openai else "AnthropicError"),
    }


def _lookups(base: str) -> dict[str, Any]:
    """What is asked for by GET and DELETE."""

    def operation(name: str, *fields: str, **parameters: str) -> dict[str, Any]:
        reply = {"description": "It.", "content": {"application/json": {"schema": _object(*fields)}}}
        made = _described(name, base, _ABOUT)
        made["parameters"] += [_path_parameter(parameter, text) for parameter, text in parameters.items()]
        return made | {"responses": {"200": reply} | _failures("OpenAIError", "401", "404", "500")}

    of_response = {"response_id": "A response that was stored under this URL."}
    return {
        f"{base}/v1/responses/{{response_id}}": {
            "get": operation("get_response", "id", "object", "output", **of_response),
            "delete": operation("delete_response", "id", "object", **of_response),
        },
        f"{base}/v1/models": {"get": operation("list_models", "object")},
        f"{base}/v1/models/{{model}}": {"get": operation("get_model", "id", "object", model="A model's name.")},
    }


def _described(name: str, base: str, about: str) -> dict[str, Any]:
    where = {"": "root", dialects.BASES[0]: "rollout", dialects.BASES[1]: "role"}[base]
    texts = {"token": "The rollout's token.", "role": "A model's name, or its number from 1 on."}
    return {
        "operationId": f"{name}_{where}",
        "tags": ["model_api"],
        "description": about,
        "parameters": [_path_parameter(part, text) for part, text in texts.items() if f"{{{part}}}" in base],
        "security": [] if base else [{}, {"bearer": []}, {"x-api-key": []}],
    }


def _path_parameter(name: str, description: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "description": description, "schema": {"type": "string"}}


def _failures(schema: str, *statuses: str) -> dict[str, Any]:
    content = {"application/json": {"schema": _ref(schema)}}
    failures = {status: {"description": _ERRORS[status], "content": content} for status in statuses or _ERRORS}
    if "429" in failures:
        retry = {"description": "Seconds after which to try again.", "schema": {"type": "integer"}}
        failures["429"]["headers"] = {"Retry-After": retry}
    return failures


def _object(*fields: str) -> dict[str, Any]:
    properties = {name: _FIELDS.get(name, {"type": "string"}) for name in fields}
    return {"type": "object", "required": list(fields), "properties": properties}


def _error_schema(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REF.format(model=name)}
