"""OpenAI chat completions <-> generate's types."""

import secrets
import time
from typing import Any

import pydantic
from fastapi import Request, Response

from lightning_jax.server import wire
from lightning_jax.server.generate import ApiError, Choice, GenerateReply, GenerateRequest, Generator
from lightning_jax.text.tokenizer import Tokenizer

# Fields that would change the result, with the values at which they change nothing.
_UNSUPPORTED = {
    "stream": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "best_of": (1,),
    "logit_bias": ({},),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "tool_choice": ("auto", "none"),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
}

_TYPES = {
    "invalid_request": ("invalid_request_error", None),
    "authentication": ("authentication_error", "invalid_api_key"),
    "context_length": ("invalid_request_error", "context_length_exceeded"),
    "rate_limit": ("rate_limit_error", "rate_limit_exceeded"),
    "server": ("server_error", None),
}


class ChatRequest(pydantic.BaseModel):
    """The request body as far as it is used; other fields are refused (`_UNSUPPORTED`) or mean nothing here."""

    model_config = pydantic.ConfigDict(extra="allow")

    messages: list[dict[str, Any]] = pydantic.Field(min_length=1)
    model: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    n: int | None = pydantic.Field(None, ge=1, le=128)
    temperature: float | None = pydantic.Field(None, ge=0, le=2)
    top_p: float | None = pydantic.Field(None, gt=0, le=1)
    top_k: int | None = pydantic.Field(None, ge=-1)
    max_tokens: int | None = pydantic.Field(None, ge=1)
    max_completion_tokens: int | None = pydantic.Field(None, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = None
    logprobs: bool | None = None
    ignore_eos: bool = False
    return_token_ids: bool = False


async def chat_completions(request: Request) -> Response:
    """POST .../chat/completions"""
    generator: Generator = request.app.state.generator
    attempt = generator.attempt(request.path_params.get("token"))
    body = wire.parse(ChatRequest, await request.body())
    wire.refuse(body, _UNSUPPORTED)
    reply = await generator.generate(_request(body), attempt, request.receive)
    return wire.json_response(_response(body, reply, generator))


def error_response(error: ApiError) -> Response:
    """`error` in OpenAI's shape."""
    kind, code = _TYPES[error.kind]
    content = {"error": {"message": error.message, "type": kind, "param": error.param, "code": code}}
    return wire.json_response(content, error.status, error.retry_after_s)


def _request(body: ChatRequest) -> GenerateRequest:
    for position, tool in enumerate(body.tools or ()):
        if tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
            raise ApiError("only tools of type 'function' are supported", param=f"tools[{position}]")
    return GenerateRequest(
        dialect="openai_chat",
        messages=body.messages,
        tools=body.tools or None,
        parse_tools=body.tool_choice != "none",
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        stop=wire.stop_strings([body.stop] if isinstance(body.stop, str) else body.stop, "stop"),
        seed=body.seed,
        n=body.n or 1,
        ignore_eos=body.ignore_eos,
    )


def _response(body: ChatRequest, reply: GenerateReply, generator: Generator) -> dict:
    completion_tokens, prompt_tokens = reply.completion_tokens, len(reply.prompt_ids)
    response = {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": body.model or generator.policy.name,
        "choices": [_choice(body, i, choice, generator.policy.tokenizer) for i, choice in enumerate(reply.choices)],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": reply.cached_tokens},
        },
    }
    if body.return_token_ids:
        response["prompt_token_ids"] = reply.prompt_ids
    return response


def _choice(body: ChatRequest, index: int, choice: Choice, tokenizer: Tokenizer) -> dict:
    message = {"role": "assistant", "content": choice.content, "refusal": None}
    if choice.tool_calls:
        message |= {"content": choice.content or None, "tool_calls": choice.tool_calls}
    logprobs = {"content": _logprobs(choice, tokenizer), "refusal": None} if body.logprobs else None
    result = {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason}
    if body.return_token_ids:
        result["token_ids"] = choice.token_ids
    return result


def _logprobs(choice: Choice, tokenizer: Tokenizer) -> list[dict]:
    entries = []
    for token_id, logprob in zip(choice.token_ids[: choice.num_text_tokens], choice.logprobs, strict=False):
        raw = tokenizer.token_bytes(token_id)
        text = raw.decode("utf-8", "replace")
        entries.append({"token": text, "logprob": logprob, "bytes": list(raw), "top_logprobs": []})
    return entries
