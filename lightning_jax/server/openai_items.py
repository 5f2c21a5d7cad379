"""The items of OpenAI's responses <-> chat messages, and the events that tell of items as they grow."""

import collections
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lightning_jax.server.contract import ApiError, Delta, Token
from lightning_jax.text.tools import CallPiece

_KEPT_RESPONSES = 8192


class ResponseStore:
    """Responses that later requests may go on from or ask for; the oldest are forgotten.

    A response is found under the URL it was made under alone: a rollout's attempt never sees another's.
    """

    def __init__(self, capacity: int = _KEPT_RESPONSES):
        self._capacity = capacity
        self._kept: collections.OrderedDict[tuple, tuple[dict, list[dict]]] = collections.OrderedDict()

    def put(self, scope: str | None, response: dict, messages: list[dict]) -> None:
        """Keeps a response, and the chat up to its end."""
        self._kept[scope, response["id"]] = response, messages
        if len(self._kept) > self._capacity:
            self._kept.popitem(last=False)

    def get(self, scope: str | None, response_id: str) -> tuple[dict, list[dict]] | None:
        """The response and its chat; None if there is none."""
        return self._kept.get((scope, response_id))

    def delete(self, scope: str | None, response_id: str) -> bool:
        """Whether there was one."""
        return self._kept.pop((scope, response_id), None) is not None


# ---- items to messages ----


def chat_messages(items: str | Sequence[dict]) -> list[dict]:
    """Input items as chat messages. What the assistant wrote in one turn, text and calls, is one message.

    Raises:
        ApiError: an item is none that this server knows.
    """
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    chat: list[dict] = []
    for position, item in enumerate(items):
        where = f"input.{position}"
        kind = item.get("type", "message")
        if kind == "message":
            _add_message(chat, item, where)
        elif kind == "function_call":
            function = {name: _text(item, name, where) for name in ("name", "arguments")}
            call = {"id": _text(item, "call_id", where), "type": "function", "function": function}
            if not chat or chat[-1]["role"] != "assistant":
                chat.append({"role": "assistant", "content": ""})
            chat[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            output = item.get("output")
            chat.append({"role": "tool", "tool_call_id": _text(item, "call_id", where), "content": output})
        elif kind != "reasoning":  # thoughts of earlier turns are not shown to the model
            raise ApiError(f"{where}: items of type {kind!r} are not supported by this server", param=where)
    return chat


def _add_message(chat: list[dict], item: dict, where: str) -> None:
    role, content = item.get("role"), item.get("content")
    if isinstance(content, list):
        refusals = [isinstance(part, dict) and part.get("type") == "refusal" for part in content]
        content = [
            {"type": "text", "text": part.get("refusal")} if refused else part
            for part, refused in zip(content, refusals, strict=True)
        ]
    elif not isinstance(content, str):
        raise ApiError(f"{where}.content: must be a string or a list of parts", param=f"{where}.content")
    if role == "assistant" and chat and chat[-1].get("tool_calls"):
        chat[-1]["content"] = [*_parts(chat[-1]["content"]), *_parts(content)]
    else:
        chat.append({"role": role, "content": content})


def _parts(content: str | list) -> list:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _text(item: dict, name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise ApiError(f"{where}.{name}: must be a string", param=f"{where}.{name}")
    return value


# ---- a reply to items ----


class Output:
    """The output items of a response as its reply grows: a message where there is text, a function call for each call.

    Args:
        logprobs: the log-probs of tokens as the wire has them; None if they are not asked for.

    Attributes:
        items: so far.
    """

    def __init__(self, logprobs: Callable[[Sequence[Token]], list[dict]] | None):
        self.items: list[dict] = []
        self._logprobs = logprobs
        self._in_message = self._in_call = False

    def grow(self, delta: Delta) -> Iterator[dict]:
        """The events that tell what is new; with the last delta, of the end of the last item."""
        empty = delta.choice is not None and not self.items and not delta.call_pieces
        if delta.content or delta.content_tokens or empty:
            yield from self._add_text(delta)
        for piece in delta.call_pieces:
            yield from self._end_message("completed")
            yield from self._add_call(piece)
        if delta.choice is not None:
            status = "incomplete" if delta.choice.finish_reason == "length" else "completed"
            yield from self._end_message(status)
            if self._in_call:
                yield from self._end_call(status)

    def _add_text(self, delta: Delta) -> Iterator[dict]:
        if not self._in_message:
            self._in_message = True
            item_id = f"msg_{secrets.token_hex(12)}"
            item = {"id": item_id, "type": "message", "role": "assistant", "status": "in_progress", "content": []}
            self.items.append(item)
            yield self._event("output_item.added", item=dict(item))
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item["content"] = [part]
            yield self._event("content_part.added", item_id=item_id, content_index=0, part=dict(part))
        item = self.items[-1]
        part = item["content"][0]
        logprobs = self._logprobs(delta.content_tokens) if self._logprobs else []
        part["text"] += delta.content
        part["logprobs"] = [*part["logprobs"], *logprobs]
        if delta.content:
            new = {"delta": delta.content, "logprobs": logprobs}
            yield self._event("output_text.delta", item_id=item["id"], content_index=0, **new)

    def _end_message(self, status: str) -> Iterator[dict]:
        if self._in_message:
            self._in_message = False
            item = self.items[-1]
            part, place = item["content"][0], {"item_id": item["id"], "content_index": 0}
            item["status"] = status
            yield self._event("output_text.done", **place, text=part["text"], logprobs=part["logprobs"])
            yield self._event("content_part.done", **place, part=part)
            yield self._event("output_item.done", item=item)

    def _add_call(self, piece: CallPiece) -> Iterator[dict]:
        if piece.begun is not None:
            self._in_call = True
            item = {"id": f"fc_{secrets.token_hex(12)}", "type": "function_call"}
            item |= {"call_id": piece.begun[0], "name": piece.begun[1], "arguments": "", "status": "in_progress"}
            self.items.append(item)
            yield self._event("output_item.added", item=dict(item))
        item = self.items[-1]
        item["arguments"] += piece.arguments
        yield self._event("function_call_arguments.delta", item_id=item["id"], delta=piece.arguments)
        if piece.complete:
            yield from self._end_call("completed")

    def _end_call(self, status: str) -> Iterator[dict]:
        self._in_call = False
        item = self.items[-1]
        item["status"] = status
        told = {"item_id": item["id"], "arguments": item["arguments"], "name": item["name"]}
        yield self._event("function_call_arguments.done", **told)
        yield self._event("output_item.done", item=item)

    def _event(self, kind: str, **content: Any) -> dict:
        return {"type": f"response.{kind}", "output_index": len(self.items) - 1, **content}
