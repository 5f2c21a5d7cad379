"""Anthropic messages <-> generate's types."""

import json
import secrets
from typing import Any

import pydantic
from fastapi import Request, Response

from lightning_jax.server import wire
from lightning_jax.server.generate import ApiError, Choice, GenerateReply, GenerateRequest, Generator

# As in openai_chat: fields that would change the result, with the values at which they change nothing.
_UNSUPPORTED = {
    "stream": (False,),
    "thinking": ({"type": "disabled"},),
    "mcp_servers": ([],),
    "container": (),
    "context_management": (),
    "output_format": (),
}

_TYPES = {
    "invalid_request": "invalid_request_error",
    "authentication": "authentication_error",
    "context_length": "invalid_request_error",
    "rate_limit": "rate_limit_error",
    "server": "api_error",
}

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
    top_p: float | None = pydantic.Field(None, gt=0, le=1)
    top_k: int | None = pydantic.Field(None, ge=-1)
    stop_sequences: list[str] | None = None
    return_token_ids: bool = False


async def messages(request: Request) -> Response:
    """POST .../messages"""
    generator: Generator = request.app.state.generator
    attempt = generator.attempt(request.path_params.get("token"))
    body = wire.parse(MessagesRequest, await request.body())
    wire.refuse(body, _UNSUPPORTED)
    reply = await generator.generate(_request(body), attempt, request.receive)
    return wire.json_response(_response(body, reply, generator.policy.name))


def error_response(error: ApiError) -> Response:
    """`error` in Anthropic's shape."""
    content = {
        "type": "error",
        "error": {"type": _TYPES[error.kind], "message": error.message},
        "request_id": f"req_{secrets.token_hex(12)}",
    }
    return wire.json_response(content, error.status, error.retry_after_s)


# ---- request ----


def _request(body: MessagesRequest) -> GenerateRequest:
    choice = (body.tool_choice or {}).get("type", "auto")
    if choice not in ("auto", "none"):
        raise ApiError(f"tool_choice of type {choice!r} is not supported by this server", param="tool_choice")
    if body.tools and (body.tool_choice or {}).get("disable_parallel_tool_use"):
        raise ApiError("disable_parallel_tool_use is not supported by this server", param="tool_choice")
    chat = [{"role": "system", "content": _text(body.system, "system")}] if body.system else []
    for position, message in enumerate(body.messages):
        chat.extend(_chat_messages(message, f"messages.{position}"))
    if chat[-1]["role"] == "assistant":
        raise ApiError("a last message of role 'assistant' (prefill) is not supported by this server", param="messages")
    return GenerateRequest(
        dialect="anthropic_messages",
        messages=chat,
        tools=[_function_tool(tool, f"tools.{i}") for i, tool in enumerate(body.tools)] if body.tools else None,
        parse_tools=choice != "none",
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        max_tokens=body.max_tokens,
        stop=wire.stop_strings(body.stop_sequences, "stop_sequences"),
    )


def _chat_messages(message: dict, where: str) -> list[dict]:
    """One Anthropic message as chat messages: a user's tool results become messages of role "tool"."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant"):
        raise ApiError(f"{where}.role: must be 'user' or 'assistant', not {role!r}", param=f"{where}.role")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
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
            texts.append(_field(block, "text", str, place))
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
    for i, block in enumerate(content):
        if not isinstance(block, dict) or block.get("type") != "text":
            raise ApiError(f"{where}.{i}: only blocks of type 'text' are supported here", param=f"{where}.{i}")
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
    if tool.get("description"):
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


# ---- response ----


def _response(body: MessagesRequest, reply: GenerateReply, model_name: str) -> dict:
    choice = reply.choices[0]
    response = {
        "id": f"msg_{secrets.token_hex(12)}",
        "type": "message",
        "role": "assistant",
        "model": body.model or model_name,
        "content": _blocks(choice),
        "stop_reason": "stop_sequence" if choice.stop_string else _STOP_REASONS[choice.finish_reason],
        "stop_sequence": choice.stop_string,
        "usage": {
            "input_tokens": len(reply.prompt_ids) - reply.cached_tokens,
            "cache_read_input_tokens": reply.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": len(choice.token_ids),
        },
    }
    if body.return_token_ids:
        response |= {"prompt_token_ids": reply.prompt_ids, "token_ids": choice.token_ids}
    return response


def _blocks(choice: Choice) -> list[dict]:
    blocks = [{"type": "text", "text": choice.content}] if choice.content else []
    for call in choice.tool_calls:
        function = call["function"]
        arguments = json.loads(function["arguments"])
        blocks.append({"type": "tool_use", "id": call["id"], "name": function["name"], "input": arguments})
    return blocks
