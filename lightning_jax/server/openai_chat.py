"""OpenAI chat completions <-> generate's types."""

import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pydantic
from fastapi import Request, Response

from lightning_jax.server import wire
from lightning_jax.server.contract import ApiError, Choice, Delta, GenerateReply, GenerateRequest
from lightning_jax.server.generate import Generator
from lightning_jax.server.generation import Generation
from lightning_jax.text.tokenizer import Tokenizer

# Fields that would change the result, with the values at which they change nothing.
_UNSUPPORTED = {
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

DONE = b"data: [DONE]\n\n"

_TYPES = {
    "invalid_request": ("invalid_request_error", None),
    "authentication": ("authentication_error", "invalid_api_key"),
    "not_found": ("invalid_request_error", "not_found"),
    "too_large": ("invalid_request_error", "request_too_large"),
    "context_length": ("invalid_request_error", "context_length_exceeded"),
    "rate_limit": ("rate_limit_error", "rate_limit_exceeded"),
    "server": ("server_error", None),
}


class StreamOptions(pydantic.BaseModel):
    """What else a stream tells."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


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
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    continue_final_message: bool = False
    add_generation_prompt: bool = True
    return_token_ids: bool = False


async def chat_completions(request: Request) -> Response:
    """POST .../chat/completions"""
    generator: Generator = request.app.state.generator
    attempt = generator.attempt(request.path_params.get("token"))
    body = wire.parse(ChatRequest, await wire.body_of(request))
    wire.refuse(body, _UNSUPPORTED)
    generation = generator.start(_request(body), attempt)
    model = body.model or generator.policy.name
    if body.stream:
        events = _events(body, generation, generation.events(request.receive), model, generator.policy.tokenizer)
        return wire.EventStream(generation, events, lambda error: wire.event(error_content(error)) + DONE)
    reply = await generation.reply(request.receive)
    return wire.json_response(_response(body, reply, model, generator.policy.tokenizer))


def error_response(error: ApiError) -> Response:
    """`error` in OpenAI's shape."""
    return wire.json_response(error_content(error), error.status, error.retry_after_s)


def error_content(error: ApiError) -> dict:
    """The JSON of it."""
    kind, code = _TYPES[error.kind]
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": code}}


def _request(body: ChatRequest) -> GenerateRequest:
    for position, tool in enumerate(body.tools or ()):
        if tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
            raise ApiError("only tools of type 'function' are supported", param=f"tools[{position}]")
    if body.add_generation_prompt == body.continue_final_message:
        text = "continue_final_message and add_generation_prompt: exactly one of them must be true"
        raise ApiError(text, param="continue_final_message")
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
        continue_final=body.continue_final_message,
        stream=bool(body.stream),
    )


# ---- response ----


def _response(body: ChatRequest, reply: GenerateReply, model: str, tokenizer: Tokenizer) -> dict:
    response = _envelope("chat.completion", model) | {
        "choices": [_choice(body, i, choice, tokenizer) for i, choice in enumerate(reply.choices)],
        "usage": usage(len(reply.prompt_ids), reply.completion_tokens, reply.cached_tokens),
    }
    if body.return_token_ids:
        response["prompt_token_ids"] = reply.prompt_ids
    return response


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict:
    """Token counts as chat completions and completions have them."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def _envelope(kind: str, model: str) -> dict:
    return {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


def _choice(body: ChatRequest, index: int, choice: Choice, tokenizer: Tokenizer) -> dict:
    message = {"role": "assistant", "content": choice.content, "refusal": None}
    if choice.tool_calls:
        message |= {"content": choice.content or None, "tool_calls": choice.tool_calls}
    logprobs = _logprobs(choice, tokenizer) if body.logprobs else None
    result = {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason}
    if body.return_token_ids:
        result["token_ids"] = choice.token_ids
    return result


def _logprobs(sampled: Choice | Delta, tokenizer: Tokenizer) -> dict:
    entries = []
    for token_id, logprob in zip(sampled.token_ids[: sampled.num_text_tokens], sampled.logprobs, strict=False):
        raw = tokenizer.token_bytes(token_id)
        text = raw.decode("utf-8", "replace")
        entries.append({"token": text, "logprob": logprob, "bytes": list(raw), "top_logprobs": []})
    return {"content": entries, "refusal": None}


# ---- stream ----


async def _events(
    body: ChatRequest,
    generation: Generation,
    deltas: AsyncIterator[Delta | None],
    model: str,
    tokenizer: Tokenizer,
) -> AsyncGenerator[bytes, None]:
    """The chunks of a stream: each choice's role, its deltas, its finish reason, and the usage if it is asked for."""
    options = body.stream_options or StreamOptions()
    envelope = _envelope("chat.completion.chunk", model)
    calls_begun = [0] * (body.n or 1)

    def counted() -> dict:
        return usage(len(generation.prompt_ids), generation.completion_tokens, generation.cached_tokens)

    def chunk(index: int, delta: dict, sampled: Delta | None = None, finish_reason: str | None = None) -> bytes:
        logprobs = _logprobs(sampled, tokenizer) if body.logprobs and sampled else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        if body.return_token_ids and sampled:
            choice["token_ids"] = sampled.token_ids
        content = envelope | {"choices": [choice]}
        if options.include_usage:
            content["usage"] = counted() if options.continuous_usage_stats else None
        return wire.event(content)

    for index in range(len(calls_begun)):
        if index == 0 and body.return_token_ids:
            envelope["prompt_token_ids"] = generation.prompt_ids
        yield chunk(index, {"role": "assistant", "content": ""})
        envelope.pop("prompt_token_ids", None)
    async for delta in deltas:
        if delta is None:
            yield wire.COMMENT
            continue
        parts = [{"content": delta.content}] if delta.content else []
        for call in delta.tool_calls:
            number, function = calls_begun[delta.index], call["function"]
            calls_begun[delta.index] += 1
            begun = call | {"index": number, "function": {"name": function["name"], "arguments": ""}}
            parts.append({"tool_calls": [begun]})
            parts.append({"tool_calls": [{"index": number, "function": {"arguments": function["arguments"]}}]})
        sampled = delta  # its tokens go with the first chunk
        for part in parts:
            yield chunk(delta.index, part, sampled)
            sampled = None
        if delta.choice is not None:
            yield chunk(delta.index, {}, sampled, delta.choice.finish_reason)
    if options.include_usage:
        yield wire.event(envelope | {"choices": [], "usage": counted()})
    yield DONE
