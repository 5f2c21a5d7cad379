"""OpenAI responses <-> generate's types."""

import functools
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pydantic
from fastapi import Request, Response

from lightning_jax.server import openai_shared, wire
from lightning_jax.server.contract import ApiError, Choice, Delta, GenerateRequest
from lightning_jax.server.generation import Generation
from lightning_jax.server.openai_items import Output, ResponseStore, chat_messages
from lightning_jax.server.roles import Generators
from lightning_jax.text.tokenizer import Tokenizer
from lightning_jax.text.tools import CallPiece

# Fields that would change the result, with the values at which they change nothing.
_UNSUPPORTED = {
    "background": (False,),
    "conversation": (),
    "prompt": (),
    "context_management": ([],),
    "truncation": ("disabled",),
    "modalities": (["text"],),
}

_LOGPROBS = "message.output_text.logprobs"


class ResponsesRequest(pydantic.BaseModel):
    """The request body as far as it is used; other fields are refused (`_UNSUPPORTED`) or mean nothing here."""

    model_config = pydantic.ConfigDict(extra="allow")

    input: str | list[dict[str, Any]] | None = None
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    temperature: float | None = pydantic.Field(None, ge=0, le=2)
    top_p: float | None = pydantic.Field(None, ge=0, le=1)
    top_k: int | None = pydantic.Field(None, ge=-1)
    top_logprobs: int | None = pydantic.Field(None, ge=0, le=20)
    max_output_tokens: int | None = pydantic.Field(None, ge=1)
    seed: int | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    stream: bool | None = None
    return_token_ids: bool | None = None


async def responses(request: Request) -> Response:
    """POST .../responses"""
    generators: Generators = request.app.state.generators
    token = request.path_params.get("token")
    attempt = generators.attempt(token)
    body = wire.parse(ResponsesRequest, await wire.body_of(request))
    wire.refuse(body, _UNSUPPORTED)
    generator = generators.choose(request.path_params, body.model)
    store: ResponseStore = request.app.state.responses
    messages = _messages(body, store, token)
    generation = await generator.start(_request(body, messages), attempt)

    def keep(response: dict, choice: Choice) -> None:
        if body.store is not False:
            reply = {"role": "assistant", "content": choice.content, "tool_calls": choice.tool_calls or None}
            store.put(token, response, [*messages, reply])

    writer = _Writer(body, generation, body.model or generator.policy.name, generator.policy.tokenizer, keep)
    if body.stream:
        return wire.EventStream([generation], writer.events(generation.events(request.receive)), writer.failed)
    reply = await generation.reply(request.receive)
    return wire.json_response(writer.response(reply.choices[0]))


async def get_response(request: Request) -> Response:
    """GET .../responses/ID"""
    response, _ = _kept(request)
    return wire.json_response(response)


async def delete_response(request: Request) -> Response:
    """DELETE .../responses/ID"""
    response, _ = _kept(request)
    request.app.state.responses.delete(request.path_params.get("token"), response["id"])
    return wire.json_response({"id": response["id"], "object": "response", "deleted": True})


def _kept(request: Request) -> tuple[dict, list[dict]]:
    token, response_id = request.path_params.get("token"), request.path_params["response_id"]
    request.app.state.generators.attempt(token)
    found = request.app.state.responses.get(token, response_id)
    if found is None:
        raise ApiError(f"there is no response {response_id!r}, or no longer", status=404, kind="not_found")
    return found


# ---- request ----


def _messages(body: ResponsesRequest, store: ResponseStore, scope: str | None) -> list[dict]:
    """The chat so far without the instructions, which hold for one response alone."""
    earlier: list[dict] = []
    if body.previous_response_id is not None:
        found = store.get(scope, body.previous_response_id)
        if found is None:
            text = f"previous_response_id: there is no response {body.previous_response_id!r} here, or no longer"
            raise ApiError(text, param="previous_response_id")
        earlier = found[1]
    elif not body.input:
        raise ApiError("input: must not be empty where there is no previous_response_id", param="input")
    return [*earlier, *chat_messages(body.input or [])]


def _request(body: ResponsesRequest, messages: list[dict]) -> GenerateRequest:
    tool_choice, tool_name = _tool_choice(body)
    instructions = [{"role": "system", "content": body.instructions}] if body.instructions else []
    return GenerateRequest(
        dialect="openai_responses",
        messages=[*instructions, *messages],
        tools=[_function_tool(tool, f"tools.{i}") for i, tool in enumerate(body.tools)] if body.tools else None,
        tool_choice=tool_choice,
        tool_name=tool_name,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        form=openai_shared.response_format((body.text or {}).get("format"), "text.format"),
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        top_logprobs=body.top_logprobs or 0,
        max_tokens=body.max_output_tokens,
        seed=body.seed,
        stream=bool(body.stream),
        content_tokens=_wants_logprobs(body),
    )


def _wants_logprobs(body: ResponsesRequest) -> bool:
    return bool(body.top_logprobs) or _LOGPROBS in (body.include or ())


def _tool_choice(body: ResponsesRequest) -> tuple[str, str | None]:
    asked, name = body.tool_choice or "auto", None
    if isinstance(asked, dict):
        if asked.get("type") != "function" or not isinstance(asked.get("name"), str):
            raise ApiError('tool_choice: an object must be {"type": "function", "name": ...}', param="tool_choice")
        asked, name = "required", asked["name"]
    openai_shared.check_tool_choice(asked, body.tools)
    return asked, name


def _function_tool(tool: dict, where: str) -> dict:
    if tool.get("type") != "function" or not isinstance(tool.get("name"), str):
        text = f"{where}: only tools of type 'function', with a name, are supported, not {tool.get('type')!r}"
        raise ApiError(text, param=where)
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in names if tool.get(name) is not None}}


# ---- response ----


class _Writer:
    """A response as the wire has it, whole or as events."""

    def __init__(self, body: ResponsesRequest, generation: Generation, model: str, tokenizer: Tokenizer, keep):
        self._body, self._generation, self._keep = body, generation, keep
        self._number = -1  # of the newest event
        logprobs = None
        if _wants_logprobs(body):
            logprobs = functools.partial(openai_shared.logprobs_of, tokenizer=tokenizer)
        self._output = Output(logprobs)
        self._response = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": model,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "store": body.store is not False,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}} | (body.text or {}),
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
        }
        if body.return_token_ids:
            self._response["prompt_token_ids"] = generation.prompt_ids

    def response(self, choice: Choice) -> dict:
        """The whole response."""
        ids = (choice.token_ids, choice.logprobs, choice.num_text_tokens)
        functions = [(call["id"], call["function"]) for call in choice.tool_calls]
        calls = [CallPiece((call_id, made["name"]), made["arguments"], True) for call_id, made in functions]
        for _ in self._output.grow(Delta(0, choice.content, calls, *ids, choice, content_tokens=choice.content_tokens)):
            pass
        return self._finish(choice)

    async def events(self, deltas: AsyncIterator[Delta | None]) -> AsyncGenerator[bytes, None]:
        """The events of a stream in the order that OpenAI documents, numbered.

        With `return_token_ids` sampled ids are in the first event that came of them, or the last of all.
        """
        yield self._event({"type": "response.created", "response": self._response})
        yield self._event({"type": "response.in_progress", "response": self._response})
        async for delta in deltas:
            if delta is None:
                yield wire.COMMENT
                continue
            ids = {"token_ids": delta.token_ids} if self._body.return_token_ids else {}
            for event in self._output.grow(delta):
                yield self._event(event | ids)
                ids = {}
            if delta.choice is not None:
                response = self._finish(delta.choice)
                yield self._event({"type": f"response.{response['status']}", "response": response} | ids)

    def failed(self, error: ApiError) -> bytes:
        """The end of a stream that fails: as documented, and as the openai package raises it."""
        content = openai_shared.error_content(error)["error"]
        failure = {"code": "server_error", "message": error.message}
        response = self._response | {"status": "failed", "error": failure, "output": self._output.items}
        told = {"code": content["code"], "message": error.message, "param": error.param, "error": content}
        return self._event({"type": "response.failed", "response": response}) + self._event({"type": "error"} | told)

    def _finish(self, choice: Choice) -> dict:
        generation, sampled = self._generation, len(choice.token_ids)
        prompt = len(generation.prompt_ids)
        cut = choice.finish_reason == "length"
        self._response |= {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._output.items,
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": generation.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": sampled,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + sampled,
            },
        }
        if self._body.return_token_ids:
            self._response["token_ids"] = choice.token_ids
        self._keep(self._response, choice)
        return self._response

    def _event(self, content: dict) -> bytes:
        self._number += 1
        return wire.event(content | {"sequence_number": self._number}, content["type"])
