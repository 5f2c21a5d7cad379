"""Chat messages to prompt ids, under the exact-token rule: what was sampled is never encoded again.

A model may sample ids that its own tokenizer would not give for the same text, so decoding a reply and encoding it
again in the next prompt would train on tokens nobody sampled. `build_prompt` therefore starts from the recorded ids of
the earlier call that the messages extend, and encodes only the text after that call's reply. That text is what the
chat template writes behind the reply, found by rendering the conversation with a marker in the reply's place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_jax.text.tokenizer import Tokenizer

_ROLES = ("system", "user", "assistant", "tool")
_TEXT_PARTS = ("text", "input_text", "output_text")
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """One earlier call of a rollout.

    Attributes:
        messages: the canonical messages of its prompt.
        tools: the tools offered in it, or None.
        reply: the assistant message as it was returned to the agent.
        prompt_ids: the recorded prompt.
        sampled_ids: the recorded sample, with the end-of-turn id if one was sampled.
    """

    messages: tuple[dict, ...]
    tools: Sequence[dict] | None
    reply: dict
    prompt_ids: tuple[int, ...]
    sampled_ids: tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """A prompt's ids, and the earlier call whose prompt and sampled ids they begin with (None: nothing is reused)."""

    ids: list[int]
    parent: int | None


def canonical_messages(messages: Sequence[Any]) -> list[dict]:
    """Brings OpenAI-style messages into the one form that is rendered, compared and stored.

    Content becomes a string (text parts joined by newlines, None becomes ""), `developer` becomes `system`, a tool
    call's arguments become JSON text in one spelling, and fields that no template reads are dropped.

    Raises:
        ValueError: something that is not text or not a message; the text names the place.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError("messages must be a list with at least one message")
    return [_canonical(message, f"messages[{n}]") for n, message in enumerate(messages)]


def build_prompt(
    tokenizer: Tokenizer, messages: Sequence[dict], tools: Sequence[dict] | None, earlier: Sequence[Call]
) -> Prompt:
    """Makes the prompt for canonical `messages`.

    If they extend an earlier call (its messages and reply are a prefix of them, with equal tools), the prompt is that
    call's recorded ids plus the new text's; the longest such call wins, the latest among equals. Any difference in the
    history means that it was rewritten: then everything is encoded afresh.

    Args:
        tokenizer: the model's.
        messages: from `canonical_messages`.
        tools: OpenAI tool objects, or None.
        earlier: the rollout's calls so far.

    Raises:
        ValueError: the chat template refuses the messages.
        InvalidConfigError: there is no chat template.
    """
    messages, tools = list(messages), list(tools or ())
    parent = _extended_call(messages, tools, earlier)
    if parent is not None:
        call = earlier[parent]
        at = len(call.messages)
        text = _text_after_reply(tokenizer, _with_whole_reply(messages, at, call.reply), tools, at)
        if text is not None:
            recorded = [*call.prompt_ids, *call.sampled_ids]
            text = _without_turn_end(tokenizer, text, call.sampled_ids)
            return Prompt(recorded + tokenizer.encode_after(recorded[-1], text), parent)
    return Prompt(tokenizer.encode(tokenizer.render(messages, tools)), None)


def build_continuation(
    tokenizer: Tokenizer, messages: Sequence[dict], tools: Sequence[dict] | None, earlier: Sequence[Call]
) -> Prompt:
    """Makes the prompt that lets the model write on after the last of canonical `messages`, the assistant's.

    Where that message is the reply of an earlier call, all that was sampled, its recorded ids are gone on from;
    otherwise it is encoded behind the prompt of the messages before it. Arguments and errors as for `build_prompt`.
    """
    *messages, final = messages
    if final["role"] != "assistant" or final.get("tool_calls") or not messages:
        raise ValueError("only a last message of the assistant without tool calls can be continued")
    tools = list(tools or ())
    for index in sorted(reversed(range(len(earlier))), key=lambda i: not _is_verbatim(final, earlier[i].reply)):
        call = earlier[index]
        if list(call.messages) == messages and list(call.tools or ()) == tools and _is_reply(final, call.reply):
            ids = without_end(tokenizer, call.sampled_ids)
            # The reply is what was sampled, behind what the call itself had gone on from.
            if not (call.reply["content"] or "").endswith(tokenizer.decode(ids, skip_special=True)):
                continue  # a stop string hid the end of it
            # Without the end that it had, it is no longer that call.
            return Prompt([*call.prompt_ids, *ids], index if len(ids) == len(call.sampled_ids) else None)
    prompt = build_prompt(tokenizer, messages, tools, earlier)
    begun = tokenizer.encode_after(prompt.ids[-1], final["content"]) if final["content"] else []
    return Prompt(prompt.ids + begun, prompt.parent)


def without_end(tokenizer: Tokenizer, sampled_ids: Sequence[int]) -> Sequence[int]:
    """Sampled ids without the end-of-sequence id, if they end with one."""
    return sampled_ids[:-1] if sampled_ids and sampled_ids[-1] in tokenizer.eos_ids else sampled_ids


def _extended_call(messages: list[dict], tools: list[dict], earlier: Sequence[Call]) -> int | None:
    """The longest that they extend, of equals one whose reply they hold to the letter, of those the latest."""
    best, best_rank = None, (1, False)
    for index, call in enumerate(earlier):
        length = len(call.messages)  # 0: a call of plain text
        if length < best_rank[0] or length >= len(messages) or list(call.tools or ()) != tools:
            continue
        reply = _with_whole_reply(messages, length, call.reply)[length]
        rank = length, _is_verbatim(reply, call.reply)
        if rank >= best_rank and _is_reply(reply, call.reply) and messages[:length] == list(call.messages):
            best, best_rank = index, rank
    return best


def _is_verbatim(message: dict, reply: dict) -> bool:
    return (message["content"] or "") == (reply["content"] or "")


def _with_whole_reply(messages: list[dict], at: int, reply: dict) -> list[dict]:
    """The messages, with the calls of `reply` in the one message `messages[at]`; the results stand behind it.

    openai-agents, where a model has Claude's or Gemini's name, sends each call in a message before its result.
    """
    ids = {call["id"] for call in reply.get("tool_calls") or ()}
    if len(ids) < 2:
        return messages

    def is_part(message: dict) -> bool:
        return not message["content"] and any(call["id"] in ids for call in message.get("tool_calls") or ())

    answered = list(takewhile(lambda message: message["role"] == "tool" or is_part(message), messages[at + 1 :]))
    parts = [messages[at], *filter(is_part, answered)]
    calls = [call for part in parts for call in part.get("tool_calls") or ()]
    results = [message for message in answered if message["role"] == "tool"]
    return [*messages[:at], messages[at] | {"tool_calls": calls}, *results, *messages[at + 1 + len(answered) :]]


def _is_reply(message: dict, reply: dict) -> bool:
    """Whether a message is a call's reply as SDKs send it back.

    Some strip the white space around the text, take the thought out of it, and spell the JSON of a call's arguments in
    their own way.
    """
    sent_thought, sent = _thought_and_text(message)
    thought, text = _thought_and_text(reply)
    if message["role"] != "assistant" or sent not in (text, text.strip(), text.rstrip(), text.lstrip()):
        return False
    sent_calls, calls = message.get("tool_calls") or (), reply.get("tool_calls") or ()
    return sent_thought == thought and len(sent_calls) == len(calls) and all(map(_is_call, sent_calls, calls))


def _thought_and_text(message: dict) -> tuple[str, str]:
    """A message's thought, "" where it has none, and what it says, without white space in between.

    LiteLLM sends the thought back as `reasoning_content`, Pydantic AI with line breaks of its own around its tags.
    """
    text = message["content"] or ""
    found = _THOUGHT.match(text)
    if found:
        return found[1].strip(), text[found.end() :].lstrip()
    thought = message.get("reasoning_content")
    return ("", text) if thought is None else (thought.strip(), text.lstrip())


def _is_call(sent: dict, made: dict) -> bool:
    """Whether `sent` is the reply's call `made`; SDKs mend arguments that were cut short, each in its own way."""
    if (sent["id"], sent["function"]["name"]) != (made["id"], made["function"]["name"]):
        return False
    arguments = _loaded(made["function"]["arguments"])
    return isinstance(arguments, str) or _loaded(sent["function"]["arguments"]) == arguments


def _loaded(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments  # damaged, as a model may write them


def _text_after_reply(tokenizer: Tokenizer, messages: list[dict], tools: list[dict], at: int) -> str | None:
    """What the template writes behind the reply `messages[at]`, the end of its turn included; None if unknown."""
    marker = "ReplyGoesHere"
    while any(marker in message["content"] for message in messages):
        marker += "0"
    marked = {"role": "assistant", "content": marker}

    def after_marker(earlier: list[dict]) -> str | None:
        try:
            _, found, after = tokenizer.render([*earlier, marked, *messages[at + 1 :]], tools).partition(marker)
        except ValueError:
            return None
        return after if found and marker not in after else None

    after = after_marker(messages[:at])
    if after is not None:
        return after
    # Some templates refuse a tool's message when the message before it makes no call. Then the end of the turn comes
    # from the conversation up to the marker, and the rest is what the real messages add to the real reply.
    try:
        turn_end = tokenizer.render([*messages[:at], marked], tools, add_generation_prompt=False).rpartition(marker)[2]
        ended = tokenizer.render(messages[: at + 1], tools, add_generation_prompt=False)
        whole = tokenizer.render(messages, tools)
    except ValueError:  # of earlier calls perhaps: Llama 3's templates refuse two in one reply, as models may make
        return after_marker([{k: v for k, v in message.items() if k != "tool_calls"} for message in messages[:at]])
    return turn_end + whole.removeprefix(ended) if whole.startswith(ended) else None


def _without_turn_end(tokenizer: Tokenizer, text: str, sampled_ids: Sequence[int]) -> str:
    """Drops the end of the turn from the text if the model sampled it; a truncated reply gets it as observation."""
    if sampled_ids and sampled_ids[-1] in tokenizer.eos_ids:
        turn_end = tokenizer.decode([sampled_ids[-1]])
        if text.lstrip().startswith(turn_end):
            return text.lstrip().removeprefix(turn_end)
    return text


def _canonical(message: Any, where: str) -> dict:
    if not isinstance(message, dict):
        raise ValueError(f"{where} must be an object, not {type(message).__name__}")
    role = "system" if message.get("role") == "developer" else message.get("role")
    if role not in _ROLES:
        raise ValueError(f"{where}.role is {role!r}; known are {', '.join(_ROLES)} and developer")
    between = "" if role == "assistant" else "\n"  # a reply in parts is the text that was sampled
    result = {"role": role, "content": _text(message.get("content"), f"{where}.content", between)}
    for key, roles in (("name", _ROLES), ("tool_call_id", ("tool",)), ("reasoning_content", ("assistant",))):
        value = message.get(key)
        if value is not None and role in roles:
            result[key] = _checked(value, f"{where}.{key}")
    calls = message.get("tool_calls")
    if calls:
        if role != "assistant" or not isinstance(calls, Sequence):
            raise ValueError(f"{where}.tool_calls must be a list, in an assistant message")
        result["tool_calls"] = [_canonical_call(call, f"{where}.tool_calls[{n}]") for n, call in enumerate(calls)]
    if message.get("function_call"):
        raise ValueError(f"{where}.function_call is no longer in use; send tool_calls")
    return result


def _canonical_call(call: Any, where: str) -> dict:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        raise ValueError(f'{where} must be {{"id", "type": "function", "function": {{"name", "arguments"}}}}')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _loaded(arguments)
    if not isinstance(arguments, str):
        arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    name = _checked(function.get("name"), f"{where}.function.name")
    arguments = _checked(arguments, f"{where}.function.arguments")
    call_id = _checked(call.get("id") or "", f"{where}.id")
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _text(content: Any, where: str, between: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return _checked(content, where)
    if not isinstance(content, Sequence):
        raise ValueError(f"{where} must be a string or a list of text parts, not {type(content).__name__}")
    texts = []
    for n, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in _TEXT_PARTS:
            raise ValueError(f"{where}[{n}] is of type {kind!r}; this model reads text only")
        texts.append(_checked(part.get("text"), f"{where}[{n}].text"))
    return between.join(texts)


def _checked(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a string, not {type(value).__name__}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{where} contains half of a surrogate pair, which is not a character") from error
    return value
