"""What must hold of every call, whichever package made it."""

import collections
import dataclasses
import functools
import json
import re

import anthropic.types
import jax
import numpy as np
import openai.types
import openai.types.chat
import openai.types.responses
import pydantic

from lightning_jax import rows
from lightning_jax.model.config import LlamaConfig
from lightning_jax.rl import packing, trajectory, update
from lightning_jax.store import CallRecord, RolloutRecord

Reply = tuple[str, list[tuple[str, dict]]]  # what an agent sees: the text and [(tool, arguments)]

_BLOCK = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


# ---- what went over the wire ----


@dataclasses.dataclass
class Exchange:
    """One request and its response."""

    path: str
    request: bytes = b""
    status: int = 0
    media_type: str = ""
    response: bytes = b""
    complete: bool = False


class Tap:
    """Keeps every exchange that a server had, by rollout token."""

    def __init__(self):
        self.exchanges: dict[str, list[Exchange]] = collections.defaultdict(list)

    def middleware(self, app):
        async def tapped(scope, receive, send):
            if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].startswith("/rollout/"):
                return await app(scope, receive, send)
            exchange = Exchange(scope["path"])
            self.exchanges[scope["path"].split("/")[2]].append(exchange)

            async def tapped_receive():
                message = await receive()
                exchange.request += message.get("body", b"")
                return message

            async def tapped_send(message):
                if message["type"] == "http.response.start":
                    exchange.status = message["status"]
                    exchange.media_type = dict(message["headers"]).get(b"content-type", b"").decode()
                exchange.response += message.get("body", b"")
                exchange.complete |= message["type"] == "http.response.body" and not message.get("more_body")
                await send(message)

            await app(scope, tapped_receive, tapped_send)

        return tapped


_TYPES = {  # by the end of the path: a reply, and an event of a stream
    "/chat/completions": (openai.types.chat.ChatCompletion, openai.types.chat.ChatCompletionChunk),
    "/responses": (openai.types.responses.Response, openai.types.responses.ResponseStreamEvent),
    "/completions": (openai.types.Completion, openai.types.Completion),
    "/messages": (anthropic.types.Message, anthropic.types.RawMessageStreamEvent),
    "/count_tokens": (anthropic.types.MessageTokensCount, None),
}


@functools.cache
def _adapter(kind: type) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(kind)


def assert_strict(exchange: Exchange) -> None:
    """The response validates, strictly, as the type that the SDK of its dialect has for it."""
    if exchange.status != 200:
        return  # SDKs have exceptions, not types, for these
    reply, event = next(types for path, types in _TYPES.items() if exchange.path.endswith(path))
    if not exchange.media_type.startswith("text/event-stream"):
        _adapter(reply).validate_json(exchange.response, strict=True)
        return
    blocks = exchange.response.decode().split("\n\n")
    for block in blocks[:-1]:
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines.get("data", "[DONE]") == "[DONE]" or lines.get("event") == "ping":
            continue
        data = lines["data"]
        if event is openai.types.Completion:  # the SDK has no type for these chunks, which tell no reason but the last
            data = data.replace('"finish_reason":null', '"finish_reason":"stop"')
        made = _adapter(event).validate_json(data, strict=True)
        assert lines.get("event") in (None, getattr(made, "type", None))


# ---- the recorded calls ----


def decoded(tokenizer, call: CallRecord) -> Reply:
    """What an agent sees of a call's sampled ids, by nothing but the vocabulary and the form of a tool call."""
    text = tokenizer.decode(call.sampled_ids, skip_special=True)
    if not call.reply.get("tool_calls"):
        cuts = [text.index(stop) for stop in call.request["stop"] if stop in text]
        return text[: min(cuts, default=None)], []
    values = [json.loads(block) for block in _BLOCK.findall(text)]
    return _BLOCK.sub("", text), [(value["name"], value["arguments"]) for value in values]


def assert_decodes(tokenizer, call: CallRecord) -> None:
    """A call's recorded reply, which is what the agent was given, is what its ids say."""
    functions = [made["function"] for made in call.reply.get("tool_calls", ())]
    if functions and call.finish_reason == "length":  # in the middle of its last call
        written = tokenizer.decode(call.sampled_ids, skip_special=True)
        assert written.startswith(call.reply["content"]) and written.endswith(functions[-1]["arguments"])
        return
    made = [(function["name"], json.loads(function["arguments"])) for function in functions]
    text, calls = decoded(tokenizer, call)
    told = call.reply["content"]
    if call.prompt_ids[-1] != tokenizer.encode("<|assistant|>")[0]:  # the prompt had the reply's beginning already
        assert told.endswith(text) and made == calls == []
    elif call.finish_reason == "cancelled":  # an agent is not shown a character or a call that has only begun
        assert text.startswith(told) and calls[: len(made)] == made
    elif made:
        assert (told.strip(), made) == (text.strip(), calls)
    else:
        assert (told, made) == (text, calls)


@dataclasses.dataclass
class Learner:
    """The model as the learner has it."""

    config: LlamaConfig
    params: dict

    def assert_agrees(self, record: RolloutRecord) -> list[trajectory.Row]:
        """The recorded log-probs are those of the learner's own forward over the stored ids; returns the rows.

        What a grammar held was not drawn from the model's distribution, says so, and is left out.
        """
        calls = [
            dataclasses.replace(call, logprobs=np.full(len(call.logprobs), np.nan)) if call.constrained else call
            for call in record.calls
        ]
        made = rows.build([dataclasses.replace(record, calls=calls)], np.array([True]))
        length = packing.block_length(max(map(len, made)), minimum=1024)
        batch = packing.pack(made, np.zeros(1), length)
        differences = []
        for i in range(len(batch.token_bt)):
            block = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch)
            logprob_bt, _ = update.policy_logprobs(
                self.params, block, config=self.config, settings=update.LearnerSettings()
            )
            difference_bt = np.abs(np.asarray(logprob_bt) - block.sampler_logprob_bt)
            differences.extend(difference_bt[block.loss_mask_bt & np.isfinite(block.sampler_logprob_bt)])
        assert len(differences) == sum(len(call.sampled_ids) for call in calls if not call.constrained)
        if differences:
            assert np.mean(differences) < 1e-4 and np.max(differences) < 1e-2
        return rows.build([record], np.array([True]))
