"""Anthropic messages <-> generate's types."""

import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

import pydantic
from fastapi import Request, Response

from lightning_jax.server import wire
from lightning_jax.server.contract import ApiError, Choice, Delta, GenerateReply, GenerateRequest
from lightning_jax.server.generation import Generation
from lightning_jax.server.roles import Generators

# As in openai_chat: fields that would change the result, with the values at which they change nothing.
_UNSUPPORTED = {
    "mcp_servers": ([],),
    "container": (),
    "context_management": (),
}

_TYPES = {
    "invalid_request": "invalid_request_error",
    "authentication": "authentication_error",
    "not_found": "not_found_error",
    "too_large": "request_too_large",
    "context_length": "invalid_request_error",
    "rate_limit": "rate_limit_error",
    "server": "api_error",
}

# What LiteLLM, since 1.106, writes in place of an assistant's empty text, for Anthropic refuses that. The text is none
# that the model wrote: with it a conversation would no longer extend the call that it comes from.
_NO_TEXT = "[System: Empty message content sanitised to satisfy protocol]"

_TOOL_CHOICES = {"auto": "auto", "none": "none", "any": "required", "tool": "required"}
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessagesRequest(pydantic.BaseModel):
    """The request body as far as it is used; other fields are refused (`_UNSUPPORTED`) or mean nothing here."""

    model_config = pydantic.ConfigDict(extra="allow")

    messages: list[dict[str, Any]] = pydantic.Field(min_length=1)
    max_tokens: int = pydantic.Field(ge=1)
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    temperature: float | None = pydantic.Field(None, ge=0, le=2)
    top_p: float | None = pydantic.Field(None, ge=0, le=1)
    top_k: int | None = pydantic.Field(None, ge=-1)
    stop_sequences: list[str] | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None  # what output_config.format was called while it was a beta
    stream: bool | None = None
    return_token_ids: bool = False


class CountRequest(MessagesRequest):
    """The body of a count: a message's without what is about the reply."""

    max_tokens: int = 1


async def messages(request: Request) -> Response:
    """POST .../messages"""
    generators: Generators = request.app.state.generators
    attempt = generators.attempt(request.path_params.get("token"))
    body = wire.parse(MessagesRequest, await wire.body_of(request))
    generator = generators.choose(request.path_params, body.model)
    generation = await generator.start(_request(body), attempt)
    envelope = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant"}
    envelope["model"] = body.model or generator.policy.name
    if body.stream:
        events = _events(body, generation, generation.events(request.receive), envelope)
        return wire.EventStream([generation], events, lambda error: wire.event(error_content(error), "error"))
    return wire.json_response(_response(body, await generation.reply(request.receive), envelope))


async def count_tokens(request: Request) -> Response:
    """POST .../messages/count_tokens"""
    generators: Generators = request.app.state.generators
    attempt = generators.attempt(request.path_params.get("token"))
    body = wire.parse(CountRequest, await wire.body_of(request))
    generator = generators.choose(request.path_params, body.model)
    return wire.json_response({"input_tokens": generator.count_tokens(_request(body), attempt)})


def error_response(error: ApiError) -> Response:
    """`error` in Anthropic's shape."""
    return wire.json_response(error_content(error), error.status, error.retry_after_s)


def error_content(error: ApiError) -> dict:
    """The JSON of it."""
    details = {"details": error.details} if error.details else {}
    return {
        "type": "error",
        "error": {"type": _TYPES[error.kind], "message": error.message} | details,
        "request_id": f"req_{secrets.token_hex(12)}",
    }


# ---- request ----


def _request(body: MessagesRequest) -> GenerateRequest:
    wire.refuse(body, _UNSUPPORTED)
    if body.model_extra.get("thread"):
        # The SDK's tool runner asks for a conversation that the server holds, and told this goes on without.
        details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
        raise ApiError("threads are not supported by this server: send all messages", param="thread", details=details)
    choice = body.tool_choice or {"type": "auto"}
    kind = choice.get("type")
    if kind not in tuple(_TOOL_CHOICES) or (kind == "tool" and not isinstance(choice.get("name"), str)):
        raise ApiError(f"tool_choice: {choice!r} is not known", param="tool_choice")
    if _TOOL_CHOICES[kind] == "required" and not body.tools:
        raise ApiError(f"tool_choice of type {kind!r} needs tools", param="tool_choice")
    chat = [{"role": "system", "content": _text(body.system, "system")}] if body.system else []
    for position, message in enumerate(body.messages):
        chat.extend(_chat_messages(message, f"messages.{position}"))
    return GenerateRequest(
        dialect="anthropic_messages",
        messages=chat,
        tools=[_function_tool(tool, f"tools.{i}") for i, tool in enumerate(body.tools)] if body.tools else None,
        tool_choice=_TOOL_CHOICES[kind],
        tool_name=choice["name"] if kind == "tool" else None,
        parallel_tool_calls=not choice.get("disable_parallel_tool_use"),
        form=_form(body),
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        max_tokens=body.max_tokens,
        stop=wire.stop_strings(body.stop_sequences, "stop_sequences"),
        continue_final=body.messages[-1]["role"] == "assistant",  # what Anthropic calls a prefill
        stream=bool(body.stream),
    )


def _form(body: MessagesRequest) -> tuple[str, Any] | None:
    asked = (body.output_config or {}).get("format") or body.output_format
    if asked is None:
        return None
    if not isinstance(asked, dict) or asked.get("type") != "json_schema" or not isinstance(asked.get("schema"), dict):
        raise ApiError('output_config.format: must be {"type": "json_schema", "schema": {...}}', param="output_config")
    return "json_schema", asked["schema"]


def _chat_messages(message: dict, where: str) -> list[dict]:
    """One Anthropic message as chat messages: a user's tool results become messages of role "tool"."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        text = f"{where}.role: must be 'user', 'assistant' or 'system', not {role!r}"
        raise ApiError(text, param=f"{where}.role")
    if role == "system":
        if message.get("clear_at") == "next_user_message":
            raise ApiError(f"{where}.clear_at: messages that go away are not supported", param=f"{where}.clear_at")
        text = _text(content, f"{where}.content")
        return [{"role": role, "content": text}] if text else []  # Pydantic AI sends empty ones
    if isinstance(content, str):
        return [{"role": role, "content": "" if (role, content) == ("assistant", _NO_TEXT) else content}]
    if not isinstance(content, list):
        raise ApiError(f"{where}.content: must be a string or a list of blocks", param=f"{where}.content")
    chat, texts, calls = [], [], []

    def end_text():
        if texts:
            chat.append({"role": role, "content": "".join(texts)})
            texts.clear()

    for i, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        place = f"{where}.content.{i}"
        if kind == "text":
            text = _field(block, "text", str, place)
            texts.append("" if (role, text) == ("assistant", _NO_TEXT) else text)
        elif kind == "tool_result" and role == "user":
            end_text()
            result = _text(block.get("content") or "", f"{place}.content")
            text = f"Error: {result}" if block.get("is_error") else result
            chat.append({"role": "tool", "tool_call_id": _field(block, "tool_use_id", str, place), "content": text})
        elif kind == "tool_use" and role == "assistant":
            arguments = json.dumps(_field(block, "input", dict, place), ensure_ascii=False)
            function = {"name": _field(block, "name", str, place), "arguments": arguments}
            calls.append({"id": _field(block, "id", str, place), "type": "function", "function": function})
        elif kind not in ("thinking", "redacted_thinking"):  # thoughts of earlier turns are not shown to the model
            raise ApiError(f"{place}: blocks of type {kind!r} are not supported in a message of {role}", param=place)
    if calls:
        return [{"role": role, "content": "".join(texts), "tool_calls": calls}]
    if not chat and not texts:
        texts.append("")
    end_text()
    return chat


def _text(content: str | list, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(f"{where}: must be a text or a list", param=where)
    for i, block in enumerate(content):
        if not isinstance(block, dict) or block.get("type") != "text":
            kind = block.get("type") if isinstance(block, dict) else block
            problem = f"only blocks of type 'text' are supported here, not {kind!r}"
            raise ApiError(f"{where}.{i}: {problem}", param=f"{where}.{i}")
    return "".join(_field(block, "text", str, f"{where}.{i}") for i, block in enumerate(content))


def _field(block: dict, name: str, kind: type, where: str) -> Any:
    value = block.get(name)
    if not isinstance(value, kind):
        raise ApiError(f"{where}.{name}: must be a {kind.__name__}", param=f"{where}.{name}")
    return value


def _function_tool(tool: dict, where: str) -> dict:
    if tool.get("type", "custom") != "custom":
        raise ApiError(f"{where}: tools of type {tool['type']!r} are not supported by this server", param=where)
    function = {"name": _field(tool, "name", str, where), "parameters": _field(tool, "input_schema", dict, where)}
    if tool.get("strict"):
        function["strict"] = True
    if tool.get("description"):
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


# ---- response ----


def _response(body: MessagesRequest, reply: GenerateReply, envelope: dict) -> dict:
    choice = reply.choices[0]
    response = envelope | {
        "content": _blocks(choice),
        "stop_reason": _stop_reason(choice),
        "stop_sequence": choice.stop_string,
        "usage": _usage(len(reply.prompt_ids), reply.cached_tokens, len(choice.token_ids)),
    }
    if body.return_token_ids:
        response |= {"prompt_token_ids": reply.prompt_ids, "token_ids": choice.token_ids}
    return response


def _stop_reason(choice: Choice) -> str:
    return "stop_sequence" if choice.stop_string else _STOP_REASONS[choice.finish_reason]


def _usage(prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> dict:
    return {
        "input_tokens": prompt_tokens - cached_tokens,
        "cache_read_input_tokens": cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": completion_tokens,
    }


def _blocks(choice: Choice) -> list[dict]:
    blocks = [{"type": "text", "text": choice.content}] if choice.content else []
    for call in choice.tool_calls:
        function = call["function"]
        arguments = json.loads(function["arguments"])
        blocks.append({"type": "tool_use", "id": call["id"], "name": function["name"], "input": arguments})
    return blocks


# ---- stream ----


async def _events(
    body: MessagesRequest, generation: Generation, deltas: AsyncIterator[Delta | None], envelope: dict
) -> AsyncGenerator[bytes, None]:
    """The events of a stream in the order that Anthropic documents: message_start, blocks, message_delta, message_stop.

    With `return_token_ids` the prompt's ids are in message_start, and sampled ones in the event that came of them.
    """
    num_prompt = len(generation.prompt_ids)
    blocks = _BlockEvents()

    def event(kind: str, **content) -> bytes:
        return wire.event({"type": kind, **content}, kind)

    started = envelope | {"content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(num_prompt, 0, 0)}
    if body.return_token_ids:
        started["prompt_token_ids"] = generation.prompt_ids
    yield event("message_start", message=started)
    yield event("ping")
    async for delta in deltas:
        if delta is None:
            yield event("ping")
            continue
        ids = {"token_ids": delta.token_ids} if body.return_token_ids else {}
        for kind, content in blocks.grow(delta):
            yield event(kind, **content, **(ids if kind == "content_block_delta" else {}))
            ids = {} if kind == "content_block_delta" else ids
        if delta.choice is not None:
            usage = _usage(num_prompt, generation.cached_tokens, generation.completion_tokens)
            reason = {"stop_reason": _stop_reason(delta.choice), "stop_sequence": delta.choice.stop_string}
            yield event("message_delta", delta=reason, usage=usage, **ids)
    yield event("message_stop")


class _BlockEvents:
    """The events of a message's content blocks: one block of text where text goes on, one for each tool call."""

    def __init__(self):
        self._index = -1
        self._open: str | None = None  # the type of the block that goes on

    def grow(self, delta: Delta) -> Iterator[tuple[str, dict]]:
        """(event, its content) for what is new; with the last delta, for the end of the last block."""
        if delta.content:
            if self._open != "text":
                yield from self._stop()
                yield self._start({"type": "text", "text": ""})
            yield self._grow({"type": "text_delta", "text": delta.content})
        for piece in delta.call_pieces:
            if piece.begun is not None:
                yield from self._stop()
                call_id, name = piece.begun
                yield self._start({"type": "tool_use", "id": call_id, "name": name, "input": {}})
            yield self._grow({"type": "input_json_delta", "partial_json": piece.arguments})
            if piece.complete:
                yield from self._stop()
        if delta.choice is not None:
            yield from self._stop()

    def _start(self, block: dict) -> tuple[str, dict]:
        self._index += 1
        self._open = block["type"]
        return "content_block_start", {"index": self._index, "content_block": block}

    def _grow(self, delta: dict) -> tuple[str, dict]:
        return "content_block_delta", {"index": self._index, "delta": delta}

    def _stop(self) -> Iterator[tuple[str, dict]]:
        if self._open is not None:
            self._open = None
            yield "content_block_stop", {"index": self._index}
