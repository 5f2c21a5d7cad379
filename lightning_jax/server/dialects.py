"""The wire dialects: where each is served, and how its errors look."""

from collections.abc import Awaitable, Callable
from typing import NamedTuple

import pydantic
from fastapi import FastAPI, Request, Response

from lightning_jax.policy import Policy
from lightning_jax.server import (
    anthropic_messages,
    openai_chat,
    openai_completions,
    openai_items,
    openai_responses,
    openai_shared,
    wire,
)
from lightning_jax.server.contract import ApiError
from lightning_jax.server.roles import Generators

# The SDKs differ in what they append to a base URL.
BASES = ("/rollout/{token}", "/rollout/{token}/model/{role}", "")
_PREFIXES = [base + version for base in BASES for version in ("/v1", "", "/v1/v1")]


class Dialect(NamedTuple):
    """One endpoint, POST of `path` under every base URL."""

    path: str
    endpoint: Callable[[Request], Awaitable[Response]]
    body: type[pydantic.BaseModel]
    error_response: Callable[[ApiError], Response]


DIALECTS = (
    Dialect("/chat/completions", openai_chat.chat_completions, openai_chat.ChatRequest, openai_shared.error_response),
    Dialect(
        "/completions",
        openai_completions.completions,
        openai_completions.CompletionRequest,
        openai_shared.error_response,
    ),
    Dialect("/responses", openai_responses.responses, openai_responses.ResponsesRequest, openai_shared.error_response),
    Dialect(
        "/messages",
        anthropic_messages.messages,
        anthropic_messages.MessagesRequest,
        anthropic_messages.error_response,
    ),
    Dialect(
        "/messages/count_tokens",
        anthropic_messages.count_tokens,
        anthropic_messages.CountRequest,
        anthropic_messages.error_response,
    ),
)


def add_to(app: FastAPI) -> None:
    """Serves every dialect, and what their SDKs ask beside it, under every base URL."""
    app.state.responses = openai_items.ResponseStore()
    # Plain routes: with FastAPI's own, the shim alone served 1,300 instead of 1,800 calls a second on two cores.
    for prefix in _PREFIXES:
        for dialect in DIALECTS:
            app.add_route(prefix + dialect.path, dialect.endpoint, methods=["POST"])
        app.add_route(prefix + "/responses/{response_id}", openai_responses.get_response, methods=["GET"])
        app.add_route(prefix + "/responses/{response_id}", openai_responses.delete_response, methods=["DELETE"])
        app.add_route(prefix + "/models", list_models, methods=["GET"])
        app.add_route(prefix + "/models/{model:path}", get_model, methods=["GET"])


def error_shape(path: str) -> Callable[[ApiError], Response] | None:
    """How errors look to whoever sent a request to this path; None where no dialect is served."""
    return next((dialect.error_response for dialect in DIALECTS if path.endswith(dialect.path)), None)


async def list_models(request: Request) -> Response:
    """The models, or the one of the URL's role, in a form that both OpenAI's and Anthropic's SDK read."""
    models = [_model(policy) for policy in _policies(request).values()]
    ends = {"first_id": models[0]["id"], "last_id": models[-1]["id"]}
    return wire.json_response({"object": "list", "data": models, "has_more": False} | ends)


async def get_model(request: Request) -> Response:
    """One of them, by name."""
    policy = _policies(request).get(request.path_params["model"])
    if policy is None:
        raise ApiError(f"there is no model {request.path_params['model']!r}", status=404, kind="not_found")
    return wire.json_response(_model(policy))


def _policies(request: Request) -> dict[str, Policy]:
    generators: Generators = request.app.state.generators
    generators.attempt(request.path_params.get("token"))
    if "role" in request.path_params:
        policy = generators.choose(request.path_params).policy
        return {policy.name: policy}
    return {policy.name: policy for policy in request.app.state.policies.values()}


def _model(policy: Policy) -> dict:
    return {
        "id": policy.name,
        "object": "model",
        "created": 0,
        "owned_by": "lightning-jax",
        "max_model_len": policy.max_seq_len,
        "type": "model",
        "display_name": policy.name,
        "created_at": "1970-01-01T00:00:00Z",
    }
