"""OpenAI chat completions <-> generate's types."""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pydantic
from fastapi import Request, Response

from lightning_jax.server import openai_shared, wire
from lightning_jax.server.contract import ApiError, Choice, Delta, GenerateReply, GenerateRequest
from lightning_jax.server.generation import Generation
from lightning_jax.server.roles import Generators
from lightning_jax.text.tokenizer import Tokenizer

_UNSUPPORTED = openai_shared.UNSUPPORTED | {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "echo": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
}


class ChatRequest(openai_shared.SamplingBody):
    """The request body as far as it is used; other fields are refused (`_UNSUPPORTED`) or mean nothing here."""

    messages: list[dict[str, Any]] = pydantic.Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    max_completion_tokens: int | None = pydantic.Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = pydantic.Field(None, ge=0, le=20)
    continue_final_message: bool = False
    add_generation_prompt: bool = True


async def chat_completions(request: Request) -> Response:
    """POST .../chat/completions"""
    generators: Generators = request.app.state.generators
    attempt = generators.attempt(request.path_params.get("token"))
    body = wire.parse(ChatRequest, await wire.body_of(request))
    wire.refuse(body, _UNSUPPORTED)
    generator = generators.choose(request.path_params, body.model)
    generation = await generator.start(_request(body), attempt)
    model = body.model or generator.policy.name
    if body.stream:
        events = _events(body, generation, generation.events(request.receive), model, generator.policy.tokenizer)
        return wire.EventStream([generation], events, openai_shared.error_event)
    reply = await generation.reply(request.receive)
    return wire.json_response(_response(body, reply, model, generator.policy.tokenizer))


# ---- request ----


def _request(body: ChatRequest) -> GenerateRequest:
    for position, tool in enumerate(body.tools or ()):
        function = tool.get("function") if tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ApiError("only tools of type 'function', with a name, are supported", param=f"tools[{position}]")
    if body.add_generation_prompt == body.continue_final_message:
        text = "continue_final_message and add_generation_prompt: exactly one of them must be true"
        raise ApiError(text, param="continue_final_message")
    if body.top_logprobs and not body.logprobs:
        raise ApiError("top_logprobs: logprobs must be true as well", param="top_logprobs")
    tool_choice, tool_name = _tool_choice(body)
    return GenerateRequest(
        dialect="openai_chat",
        messages=body.messages,
        tools=body.tools or None,
        tool_choice=tool_choice,
        tool_name=tool_name,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        form=openai_shared.response_format(body.response_format) or openai_shared.form_of(body),
        max_tokens=body.max_completion_tokens or body.max_tokens,
        top_logprobs=body.top_logprobs or 0,
        continue_final=body.continue_final_message,
        **openai_shared.sampling_of(body),
    )


def _tool_choice(body: ChatRequest) -> tuple[str, str | None]:
    """`tool_choice` and the name of the only tool that may be called."""
    asked, name = body.tool_choice or "auto", None
    if isinstance(asked, dict):
        function = asked.get("function")
        if asked.get("type") != "function" or not isinstance(function, dict) or "name" not in function:
            text = 'tool_choice: an object must be {"type": "function", "function": {"name": ...}}'
            raise ApiError(text, param="tool_choice")
        asked, name = "required", function["name"]
    openai_shared.check_tool_choice(asked, body.tools)
    return asked, name


# ---- response ----


def _response(body: ChatRequest, reply: GenerateReply, model: str, tokenizer: Tokenizer) -> dict:
    response = openai_shared.envelope("chatcmpl", "chat.completion", model) | {
        "choices": [_choice(body, i, choice, tokenizer) for i, choice in enumerate(reply.choices)],
        "usage": openai_shared.usage(len(reply.prompt_ids), reply.completion_tokens, reply.cached_tokens),
    }
    if body.return_token_ids:
        response["prompt_token_ids"] = reply.prompt_ids
    return response


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
    return {"content": openai_shared.token_logprobs(sampled, tokenizer), "refusal": None}


# ---- stream ----


async def _events(
    body: ChatRequest,
    generation: Generation,
    deltas: AsyncIterator[Delta | None],
    model: str,
    tokenizer: Tokenizer,
) -> AsyncGenerator[bytes, None]:
    """The chunks of a stream: each choice's role, its deltas, its finish reason, and the usage if it is asked for."""
    options = body.stream_options or openai_shared.StreamOptions()
    envelope = openai_shared.envelope("chatcmpl", "chat.completion.chunk", model)
    calls_begun = [0] * (body.n or 1)

    def counted() -> dict:
        return openai_shared.usage(len(generation.prompt_ids), generation.completion_tokens, generation.cached_tokens)

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
        for piece in delta.call_pieces:
            if piece.begun is not None:
                calls_begun[delta.index] += 1
                call_id, name = piece.begun
                begun = {"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}
                parts.append({"tool_calls": [{"index": calls_begun[delta.index] - 1} | begun]})
            grown = {"index": calls_begun[delta.index] - 1, "function": {"arguments": piece.arguments}}
            parts.append({"tool_calls": [grown]})
        sampled = delta  # its tokens go with the first chunk
        for part in parts:
            yield chunk(delta.index, part, sampled)
            sampled = None
        if delta.choice is not None:
            yield chunk(delta.index, {}, sampled, delta.choice.finish_reason)
    if options.include_usage:
        yield wire.event(envelope | {"choices": [], "usage": counted()})
    yield openai_shared.DONE
